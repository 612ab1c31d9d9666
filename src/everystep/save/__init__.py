"""The story of a save: snapshot -> plan -> encode -> write -> commit."""

from everystep.save.owner import take_run
from everystep.save.snapshot import Snapshot
from everystep.save.writer import Saved, Writer

__all__ = ["Saved", "Snapshot", "Writer", "take_run"]
