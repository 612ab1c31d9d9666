"""everystep: keep every checkpoint of every training run; lose none; trust what you load."""

from everystep.access import AccessPolicy, access_policy
from everystep.analysis import LeafChange, LeafSummary, ValueChange
from everystep.checking import check_storage
from everystep.checkpoint import Checkpoint
from everystep.codecs import KERNEL
from everystep.dataloading import ResumableLoader
from everystep.difference import Difference
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
    RehearsalFailed,
    RunInUse,
    RunTakenOver,
    SaveAbandoned,
    StorageError,
    StorageFull,
    Unreachable,
    UnsafeStore,
    Unsupported,
    UsageError,
)
from everystep.importing import Brought, ImportReport
from everystep.past import PastRun
from everystep.paths import path_to
from everystep.rehearsal.doctor import Examination, examine
from everystep.rehearsal.resumes import ResumeReport, verify_resume
from everystep.repository import Repository, open
from everystep.rules import Moment, Rule, best, every, last, tagged, when, within
from everystep.run import Run
from everystep.save import Saved
from everystep.schema import LoadReport, Part
from everystep.settings import VERSION as __version__
from everystep.settings import Settings
from everystep.storage.conformance import StorageCheck, StorageReport
from everystep.upkeep import Carried, Decision, Freed, Kept, Lag, Mirrored, Repacked, RunStats

__all__ = [
    "KERNEL",
    "AccessPolicy",
    "Brought",
    "Carried",
    "Checkpoint",
    "CheckpointRetired",
    "Conflict",
    "DamageWarning",
    "Damaged",
    "Decision",
    "Difference",
    "Error",
    "EverystepWarning",
    "Examination",
    "ForeignRepository",
    "Freed",
    "ImportReport",
    "Kept",
    "Lag",
    "LeafChange",
    "LeafSummary",
    "LoadReport",
    "Mirrored",
    "Mismatch",
    "Moment",
    "NewerFormat",
    "NotFound",
    "Part",
    "PastRun",
    "ReadOnly",
    "RehearsalFailed",
    "Repacked",
    "Repository",
    "ResumableLoader",
    "ResumeReport",
    "Rule",
    "Run",
    "RunInUse",
    "RunStats",
    "RunTakenOver",
    "SaveAbandoned",
    "Saved",
    "Settings",
    "StorageCheck",
    "StorageError",
    "StorageFull",
    "StorageReport",
    "Unreachable",
    "UnsafeStore",
    "Unsupported",
    "UsageError",
    "ValueChange",
    "__version__",
    "access_policy",
    "best",
    "check_storage",
    "every",
    "examine",
    "last",
    "open",
    "path_to",
    "tagged",
    "verify_resume",
    "when",
    "within",
]
