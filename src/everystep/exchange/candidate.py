"""A file, or files that belong together, on its way to be found or skipped."""

from __future__ import annotations

from dataclasses import dataclass

from everystep.exchange.facts import Facts
from everystep.exchange.found import Piece, Skipped
from everystep.exchange.names import Named


@dataclass(frozen=True)
class Candidate:
    """`folder` is the name of the subfolder it is in, empty for none."""

    path: str
    folder: str
    named: Named
    facts: Facts
    nbytes: int
    pieces: tuple[Piece, ...]

    @property
    def is_delta(self) -> bool:
        return self.named.delta or self.facts.delta

    @property
    def epoch(self) -> int | None:
        return self.named.epoch if self.facts.epoch is None else self.facts.epoch

    @property
    def metrics(self) -> dict[str, float]:
        return {**self.named.metrics, **self.facts.metrics}

    def skip(self, why: str, kind: str) -> list[Skipped]:
        """All its files."""
        return [Skipped(piece.path, why, kind) for piece in self.pieces]
