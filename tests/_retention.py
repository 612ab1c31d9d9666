"""A run whose checkpoints differ a little from each other, a store whose clock moves when it is told to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from _seams import QuickSeam

from everystep import Checkpoint, Repository, Rule, Settings, when
from everystep.seam import Files
from everystep.storage import LocalStorage, MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.vault import Place

DAY = 86400.0
YEAR = 365 * DAY
SMALL: dict[str, Any] = {"chunk_bytes_max": 4096, "small_leaf_bytes": 1024, "pack_bytes_max": 8192}
"""Several chunks and several packs for a state of 50 kB."""

WHOLE_PACKS: dict[str, Any] = {"chunk_bytes_max": 1 << 16, "pack_bytes_max": 1 << 20}
ALONE: dict[str, Any] = {**WHOLE_PACKS, "base_ratio": 0.0}
"""Each checkpoint has bytes of its own; only what stood still is shared."""


class Clock:
    """What everybody's time is measured from."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return 1_700_000_000.0 + self.seconds


class Clocked(QuickSeam):
    """A process whose own clock is wrong by `skew` seconds."""

    def __init__(self, clock: Clock, *, files: Files | None = None, pid: int = 1, skew: float = 0.0) -> None:
        super().__init__(files)
        self.clock, self.skew, self._pid = clock, skew, pid

    def now(self) -> float:
        return self.clock.now() + self.slept + self.skew


class ClockedFiles(Files):
    """Real files, stamped by a clock of their own; a power cut is not what they are for, so nothing is synced."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._times: dict[str, float] = {}

    def fsync(self, fd: int) -> None:
        os.fstat(fd)

    def fsync_folder(self, path: str) -> None:
        os.stat(path)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._times[target] = self.clock.now()

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self._times[target] = self.clock.now()

    def modified(self, path: str) -> float:
        return self._times[path]


class Store:
    """A place and its clock; `open` is a new process that comes to it, with its own idea of the time."""

    def __init__(self, folder: str | None = None, **settings: Any) -> None:
        self.clock, self.settings, self.processes = Clock(), {**SMALL, **settings}, 0
        self.files = ClockedFiles(self.clock) if folder is not None else None
        seam = Clocked(self.clock, files=self.files)
        self.storage: Any = LocalStorage(folder, seam) if folder is not None else MemoryStorage(seam=seam)

    def open(self, *, skew: float = 0.0, storage: Any = None, **settings: Any) -> Repository:
        self.processes += 1
        seam = Clocked(self.clock, files=self.files, pid=self.processes, skew=skew)
        return Repository(Place(storage or self.storage, seam, Settings(**{**self.settings, **settings})))

    def copy(self) -> Store:
        """The same bytes and times elsewhere, in memory."""
        other = Store(**self.settings)
        other.clock.seconds, other.processes = self.clock.seconds, self.processes
        for key in self.storage.list(""):
            other.storage.objects[key] = bytes(self.storage.get(key))
            other.storage._times[key] = self.storage.stat(key).time
        return other

    def packs(self) -> dict[str, int]:
        """key -> bytes of every pack."""
        return {key: self.storage.stat(key).nbytes for key in self.storage.list("") if "/packs/" in key}

    @property
    def nbytes(self) -> int:
        return sum(self.packs().values())

    def read_by(self, ids: Iterable[str] | None = None) -> set[str]:
        """Packs that a new process reads to load checkpoints (all that are live, if None) and attachments."""
        traced = FaultyStorage(self.storage, verbs=("get",))
        past = self.open(storage=traced)["a"]
        for checkpoint in past.checkpoints(all=True):
            if ids is None or checkpoint.id in ids:
                checkpoint.load()
        for name in past.attachments:
            past.attachment(name)
        return {key for _, key in traced.calls if "/packs/" in key}


_DRAWN = np.random.default_rng(7)
_START = _DRAWN.standard_normal(4000).astype(np.float32)
_WAY = _DRAWN.standard_normal(4000).astype(np.float32)
_TABLE = _DRAWN.integers(0, 1 << 40, 800)


def state_of(number: int) -> dict[str, Any]:
    """Number by number a little further: weights of several chunks and types, an optimizer, a table that rarely moves,
    and one that never does."""
    rate = np.float32(1e-4 * number)
    weights = _START + rate * _WAY
    return {
        "params": {"w": weights, "half": weights[:600].astype(np.float16), "bias": weights[:7].astype(np.float64)},
        "opt_state": {"m": weights * 1e-3, "v": (weights * weights).astype(np.float64)[:1500], "count": number},
        "table": _TABLE + number // 5,
        "seen": np.arange(900) % 7 == number // 5 % 7,
        "frozen": _TABLE[:300].astype(np.uint16),
        "number": number,
    }


RAW_BYTES = sum(
    value.nbytes
    for part in state_of(0).values()
    for value in (part.values() if isinstance(part, dict) else [part])
    if isinstance(value, np.ndarray)
)


def thinned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "opt_state"}


def same(one: Any, other: Any) -> bool:
    """Bit for bit, types included."""
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        alike = isinstance(other, np.ndarray) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and one.tobytes() == other.tobytes()
    return type(one) is type(other) and bool(one == other)


def whole(checkpoint: Checkpoint, number: int) -> bool:
    """Whether a checkpoint loads as the state of that number, as far as it has not been thinned."""
    expected = state_of(number)
    return same(checkpoint.load(), thinned(expected) if checkpoint.thin else expected)


def based(checkpoints: Iterable[Checkpoint]) -> Iterator[int]:
    """How long the chain of bases behind each chunk is."""
    for checkpoint in checkpoints:
        for view in checkpoint._open().manifest.views:
            yield from (int(depth) for depth in view.spots["depth"])


def store_of(count: int, keep: Rule | None = None, **settings: Any) -> Store:
    """In memory: a closed run "a" of steps 1 … `count`; step n holds state n."""
    store = Store(**settings)
    with store.open().run("a", keep=keep).track(rng=False) as run:
        for step in range(1, count + 1):
            run.save(step, state=state_of(step), metrics={"loss": 1 / step}).wait()
    return store


def only(*steps: int) -> Rule:
    return when(lambda kept: kept.step in steps)


def but(*steps: int) -> Rule:
    return when(lambda kept: kept.step not in steps)


def live(repo: Repository) -> list[int]:
    return [checkpoint.step for checkpoint in repo["a"].checkpoints(all=True)]


def check(repo: Repository, steps: Iterable[int] | None = None) -> None:
    """All that is live is whole, and it is these steps."""
    found = repo["a"].checkpoints(all=True)
    for checkpoint in found:
        assert whole(checkpoint, checkpoint.step)
    if steps is not None:
        assert [checkpoint.step for checkpoint in found] == list(steps)
