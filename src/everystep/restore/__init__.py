"""The story of a load: verify -> plan -> fetch -> decode -> place."""

from everystep.restore.load import SECTIONS_OF_OURS, STATE, Opened, open_checkpoint, read_attachment
from everystep.restore.place import place_tracked

__all__ = ["SECTIONS_OF_OURS", "STATE", "Opened", "open_checkpoint", "place_tracked", "read_attachment"]
