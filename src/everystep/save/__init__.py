"""The story of a save: snapshot -> plan -> encode -> write -> commit."""

from everystep.save.owner import take_run
from everystep.save.snapshot import Arena, Snapshot, snapshot
from everystep.save.writer import Saved, Writer

__all__ = ["Arena", "Saved", "Snapshot", "Writer", "snapshot", "take_run"]
