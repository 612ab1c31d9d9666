"""Old files into a run, and checkpoints into files of other programs. Nothing in a file runs, and none is changed."""

from everystep.exchange.found import (
    CONFLICT,
    DAMAGED,
    DELTA,
    SAME,
    STATE,
    UNKNOWN,
    UNPLACED,
    Found,
    Imported,
    Piece,
    Skipped,
    Survey,
    why_not,
)
from everystep.exchange.give import export
from everystep.exchange.look import survey
from everystep.exchange.take import each, read
from everystep.formats import Written

__all__ = [
    "CONFLICT",
    "DAMAGED",
    "DELTA",
    "SAME",
    "STATE",
    "UNKNOWN",
    "UNPLACED",
    "Found",
    "Imported",
    "Piece",
    "Skipped",
    "Survey",
    "Written",
    "each",
    "export",
    "read",
    "survey",
    "why_not",
]
