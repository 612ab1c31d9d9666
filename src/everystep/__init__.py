"""everystep: keep every checkpoint of every training run; lose none; trust what you load."""

from everystep.checkpoint import Checkpoint
from everystep.errors import (
    CheckpointRetired,
    Conflict,
    Damaged,
    DamageWarning,
    Error,
    EverystepWarning,
    ForeignRepository,
    Mismatch,
    NewerFormat,
    NotFound,
    ReadOnly,
    RunInUse,
    RunTakenOver,
    SaveAbandoned,
    StorageError,
    StorageFull,
    Unsupported,
    UsageError,
)
from everystep.past import PastRun
from everystep.repository import Repository, open
from everystep.rules import Moment, Rule, best, every, last, tagged, when, within
from everystep.run import Run
from everystep.save import Saved
from everystep.schema import LoadReport, Part
from everystep.settings import VERSION as __version__
from everystep.settings import Settings
from everystep.upkeep import Decision, Freed, Kept

__all__ = [
    "Checkpoint",
    "CheckpointRetired",
    "Conflict",
    "DamageWarning",
    "Damaged",
    "Decision",
    "Error",
    "EverystepWarning",
    "ForeignRepository",
    "Freed",
    "Kept",
    "LoadReport",
    "Mismatch",
    "Moment",
    "NewerFormat",
    "NotFound",
    "Part",
    "PastRun",
    "ReadOnly",
    "Repository",
    "Rule",
    "Run",
    "RunInUse",
    "RunTakenOver",
    "SaveAbandoned",
    "Saved",
    "Settings",
    "StorageError",
    "StorageFull",
    "Unsupported",
    "UsageError",
    "__version__",
    "best",
    "every",
    "last",
    "open",
    "tagged",
    "when",
    "within",
]
