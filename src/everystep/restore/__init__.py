"""The story of a load: verify -> plan -> fetch -> decode -> place."""

from everystep.restore.load import KEPT, SECTIONS_OF_OURS, STATE, WORKER, Opened, open_checkpoint, read_attachment
from everystep.restore.place import place_tracked

__all__ = [
    "KEPT",
    "SECTIONS_OF_OURS",
    "STATE",
    "WORKER",
    "Opened",
    "open_checkpoint",
    "place_tracked",
    "read_attachment",
]
