"""What a look at old files gives: which are checkpoints and of which step, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everystep.errors import Error

STATE, DELTA = "state", "delta"
UNKNOWN, DAMAGED, SAME, CONFLICT, UNPLACED = "unknown", "damaged", "same", "conflict", "unplaced"
"""Kinds of `Skipped`: no checkpoint; bytes that nobody wrote so; the content of another file; another content for a
step that is taken; no step, or a part of a state whose other parts are missing."""


@dataclass(frozen=True)
class Piece:
    """One file of a checkpoint. Its name is the entry of the state that it becomes; empty: the state itself."""

    name: str
    path: str
    shard: int = 0


@dataclass(frozen=True)
class Found:
    """A checkpoint in old files.

    `how` says where the step comes from. A delta names in `base` the file whose state it is added to; where that is
    empty, `missing` says what was looked for.
    """

    path: str
    step: int
    epoch: int | None
    metrics: dict[str, float]
    how: str
    nbytes: int
    role: str = STATE
    pieces: tuple[Piece, ...] = ()
    base: str = ""
    missing: str = ""


def why_not(error: Error) -> str:
    """What is wrong with a file; where a package is missing, also how it is installed."""
    return f"{error.what}: {error.do}" if "pip install" in (error.do or "") else error.what


@dataclass(frozen=True)
class Skipped:
    """A file that is not taken, and why."""

    path: str
    why: str
    kind: str = UNKNOWN


@dataclass(frozen=True)
class Survey:
    """`found` is sorted by step, and no step is there twice."""

    found: list[Found]
    skipped: list[Skipped]
    steps_from: str

    @property
    def nbytes(self) -> int:
        """Bytes of all files that were found."""
        return sum(found.nbytes for found in self.found)


@dataclass(frozen=True)
class Imported:
    """A state to save, with what did not come along (`not_understood`), what has another form now (`notes`), and text
    that belongs to the run (`attachments`: a model's configuration)."""

    state: Any
    metrics: dict[str, float]
    not_understood: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    path: str = ""
    attachments: dict[str, bytes] = field(default_factory=dict)
