"""What a save leans on: an earlier checkpoint, in memory or in the store, against which chunks are encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from blake3 import blake3

from everystep.errors import Error
from everystep.save.arena import Array
from everystep.save.memory import Memory
from everystep.save.snapshot import Snapshot
from everystep.schema import Layout
from everystep.settings import Settings
from everystep.vault import Spot

Read = Callable[[Spot, int], Array]
# The best of the last few saves says what the store can do: any may have met a busy disk.
RATES = 4
# Less than that says how long a request takes.
RATE_BYTES_MIN = 8 << 20
SMALL_LINK = 8
"""A link that takes less than this part of the state is a small one."""


@dataclass(frozen=True)
class Leaning:
    """Which roles may lean on a base, and how much smaller that must be; a role that is not named stands alone.

    A base must outlive what leans on it. Where everything is kept, each checkpoint leans on the one before it, in
    chains of bounded depth, and the first of a chain on the first of the chain before. Where rules drop, all lean on
    the newest anchor: a survivor pins one more, and not a group.
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
class Form:
    """How leaves lie in chunks: of two states of one form, chunks of equal number hold the same elements."""

    layout: Layout
    leaves: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(snapshot: Snapshot) -> Form:
        return Form(snapshot.layout, tuple((leaf.path, leaf.shape) for leaf in snapshot.tree.leaves))


@dataclass(frozen=True)
class Base:
    """An earlier state, and where each of its chunks lies; `data` is what reads a chunk of it."""

    form: Form
    spots: list[Spot]
    read: Read | None
    """From the store, verified; None for a snapshot that is still in memory."""
    snapshot: Snapshot | None = None

    def chunk(self, index: int, depth_max: int) -> tuple[Spot, Array] | None:
        """A chunk that can serve as a base, if its chain is not too long and its bytes are still what was stored."""
        spot = self.spots[index]
        if spot.depth >= depth_max:
            return None
        if self.snapshot is not None:
            data = self.snapshot.chunk(index)
            return (spot, data) if blake3(data).digest() == spot.hash else None
        assert self.read is not None
        try:
            return spot, self.read(spot, self.form.layout.chunks[index].nbytes)
        except Error:
            return None  # what cannot be read is no base: the chunk stands alone, and a load of the other says why


class Bases:
    """What the next save leans on."""

    def __init__(self, leaning: Leaning, settings: Settings, memory: Memory, read: Read) -> None:
        self._leaning = leaning
        self._settings, self._memory, self._read = settings, memory, read
        self._rates: deque[float] = deque(maxlen=RATES)
        self.forget()

    @property
    def leaning(self) -> Leaning:
        """Which chunks of the next save may lean. Behind a slow link a load takes as long as its bytes, which a base
        adds to: there only what saves most of a chunk is worth one."""
        if not self._is_slow:
            return self._leaning
        most = self._settings.base_ratio_slow
        return replace(self._leaning, ratios={role: min(ratio, most) for role, ratio in self._leaning.ratios.items()})

    @property
    def _is_slow(self) -> bool:
        return bool(self._rates) and max(self._rates) < self._settings.slow_bytes_per_second

    def forget(self) -> None:
        """Nothing to lean on: the next save stands alone."""
        self._base: Base | None = None
        self._first: Base | None = None
        self._since = Fraction(0)
        self._chains = Fraction(0)

    @property
    def held(self) -> Array | None:
        """The buffer in which the base lies: the next snapshot goes elsewhere."""
        snapshot = self._base.snapshot if self._base is not None else None
        return snapshot.data if snapshot is not None else None

    def offer(self, snapshot: Snapshot) -> Base | None:
        """What a save may lean on; None where it must stand alone."""
        if self._base is None or self._base.form != Form.of(snapshot):
            return None
        if self._leaning.anchored:
            return self._base if self._since + 1 < self._settings.anchor_every else None
        depth_max = self._depth_max()
        if self._chains + self._since < depth_max:
            return self._base
        return self._first if self._chains < depth_max else None

    def hear(self, nbytes: int, seconds: float) -> None:
        """How long the store took for what a save brought it."""
        if nbytes >= RATE_BYTES_MIN:
            self._rates.append(nbytes / max(seconds, 1e-9))

    def _depth_max(self) -> int:
        return min(self._settings.base_depth_max, self._settings.base_depth_slow if self._is_slow else 60)

    def _length(self, snapshot: Snapshot, spots: list[Spot], offered: Base) -> Fraction:
        """By how much a checkpoint made its chain longer: small links by less, so that more make up the longest."""
        layout, roles = snapshot.layout, self._leaning.ratios
        raw = sum(stream.nbytes for stream in layout.streams if stream.role in roles)
        linked = sum(spot.length for spot, old in zip(spots, offered.spots) if spot.base is not None and spot != old)
        small = max(self._settings.base_depth_small, 1)
        return min(Fraction(1), Fraction(self._depth_max(), small)) if linked * SMALL_LINK < raw else Fraction(1)

    def take(self, snapshot: Snapshot, spots: list[Spot], offered: Base | None) -> None:
        """A checkpoint has become durable: is it what the next leans on?"""
        leans = self._leaning.ratios and self._settings.base_depth_max
        if not leans or snapshot.in_place or not self._memory.has_room_for_base():
            self.forget()
            return
        length = Fraction(1) if offered is None or self._leaning.anchored else self._length(snapshot, spots, offered)
        starts = offered is None or (offered is self._first and offered is not self._base)
        if starts:
            self._chains = Fraction(0) if offered is None else self._chains + length
            self._first = Base(Form.of(snapshot), spots, self._read)
        self._since = Fraction(0) if starts else self._since + length
        if starts or not self._leaning.anchored:
            self._base = Base(Form.of(snapshot), spots, None, snapshot)
