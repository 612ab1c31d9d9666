"""What a save leans on: the snapshot of an earlier checkpoint, kept in memory, against which chunks are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from everystep.save.snapshot import Arena, Snapshot
from everystep.seam import Pool
from everystep.settings import Settings
from everystep.vault import Spot

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Leaning:
    """Which roles may lean on a base, and how much smaller that must be; a role that is not named stands alone.

    A base must outlive what leans on it. Where everything is kept, each checkpoint leans on the one before it, in
    chains of bounded depth. Where rules drop, all lean on the newest anchor: a survivor pins one more, and not a group.
    """

    ratios: Mapping[str, float] = field(default_factory=dict)
    anchored: bool = False

    @staticmethod
    def of(settings: Settings, *, drops: bool, thins: bool) -> Leaning:
        """For a run whose rules drop checkpoints, or thin them to their weights."""
        ratio = settings.anchor_ratio if drops else settings.base_ratio
        roles = ["weights", "buffer", "other"] if drops or thins else ["weights", "buffer", "other", "optimizer"]
        return Leaning(dict.fromkeys(roles, ratio), anchored=drops)


@dataclass(frozen=True)
class Base:
    """An earlier state in memory, and where each of its chunks lies."""

    snapshot: Snapshot
    spots: list[Spot]

    def fits(self, snapshot: Snapshot) -> bool:
        """Whether chunks of equal number hold the same elements of the same leaves."""
        return self.snapshot.layout == snapshot.layout and [
            (leaf.path, leaf.shape) for leaf in self.snapshot.tree.leaves
        ] == [(leaf.path, leaf.shape) for leaf in snapshot.tree.leaves]

    def chunk(self, index: int, depth_max: int) -> tuple[Spot, Array] | None:
        """A chunk that can serve as a base, if its chain is not too long and its bytes are still what was stored."""
        spot, data = self.spots[index], self.snapshot.chunk(index)
        return (spot, data) if spot.depth < depth_max and blake3(data).digest() == spot.hash else None


class Bases:
    """Two arenas that take turns: one holds the base, the other takes the next snapshot."""

    def __init__(self, leaning: Leaning, settings: Settings, pool: Pool) -> None:
        self.leaning = leaning
        self.base: Base | None = None
        self._settings = settings
        self._arenas = [Arena(pool), Arena(pool)]
        self._leaned = 0

    @property
    def arena(self) -> Arena:
        """Where the next snapshot goes: not where the base lies."""
        held = self.base.snapshot.data if self.base is not None else None
        return self._arenas[1] if held is not None and self._arenas[0].holds(held) else self._arenas[0]

    def offer(self, snapshot: Snapshot) -> Base | None:
        """What a save may lean on; None where it must stand alone, as an anchor does."""
        if self.base is None or not self.base.fits(snapshot):
            return None
        due = self.leaning.anchored and self._leaned + 1 >= self._settings.anchor_every
        return None if due else self.base

    def take(self, snapshot: Snapshot, spots: list[Spot], offered: Base | None) -> None:
        """A checkpoint has become durable: is it what the next leans on?"""
        if not self.leaning.ratios or snapshot.layout.nbytes > self._settings.base_memory_bytes_max:
            self.base = None
        elif offered is None or not self.leaning.anchored:
            self.base, self._leaned = Base(snapshot, spots), 0
        else:
            self._leaned += 1

    def forget(self) -> None:
        """Nothing to lean on: the next save stands alone."""
        self.base = None
