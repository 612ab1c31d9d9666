"""A run of which most is dead: each step has bytes of its own, beside what stands still and what bases hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from _retention import DAY, Store, same, thinned

import everystep
from everystep import Checkpoint, PastRun, StorageError
from everystep.storage.faulty import FaultyStorage
from everystep.vault import PackName
from everystep.vault.names import pack_key, record_key
from everystep.vault.record import unpack_record

WIDE: dict[str, Any] = {"chunk_bytes_max": 1 << 14, "pack_bytes_max": 1 << 17, "base_depth_max": 8}
CHANGES = ("put", "put_new", "delete")
EVERY = (*CHANGES, "get", "list", "stat")
STEPS = [3, 5, 6]
_FROZEN = np.random.default_rng(1).standard_normal(6000)
_SLOW = np.random.default_rng(2).standard_normal(4000).astype(np.float32)
_WAY = np.random.default_rng(3).standard_normal(4000).astype(np.float32)


def state_of(step: int) -> dict[str, Any]:
    """120 kB that are new with each step, 56 kB that never change, and 16 kB that change so little that they are stored
    as deltas."""
    drawn = np.random.default_rng((7, step))
    new, slow = drawn.standard_normal(20_000).astype(np.float32), _SLOW + np.float32(1e-5 * step) * _WAY
    return {
        "params": {"new": new, "slow": slow},
        "frozen": _FROZEN,
        "opt_state": {"m": drawn.standard_normal(10_000).astype(np.float32), "still": _FROZEN[:1000] * 2},
        "number": step,
    }


def store_of(count: int, **settings: Any) -> Store:
    """A closed run "a" of steps 1 … `count`, with a file that is attached anew at each."""
    store = Store(**{**WIDE, **settings})
    with store.open().run("a").track(rng=False) as run:
        for step in range(1, count + 1):
            run.attach("notes.txt", file_of(step))
            run.save(step, state=state_of(step)).wait()
    return store


def file_of(step: int) -> bytes:
    return np.random.default_rng((9, step)).bytes(30_000)


def only(*steps: int) -> everystep.Rule:
    return everystep.when(lambda kept: kept.step in steps)


def thin_out(
    store: Store, keep: Sequence[int], full: Sequence[int] | None = None, undo_seconds: float = 0.0
) -> PastRun:
    """Drops and thins, and frees what can be freed as it lies."""
    past = store.open()["a"]
    past.forget(only(*keep), only(*full) if full is not None else None, force=True, undo_seconds=undo_seconds)
    past.prune()
    return past


def whole(checkpoint: Checkpoint, thin: bool | None = None) -> bool:
    """Whether it loads bit for bit."""
    expected = state_of(checkpoint.step)
    return same(checkpoint.load(), thinned(expected) if (checkpoint.thin if thin is None else thin) else expected)


def check(store: Store, steps: Iterable[int], attached: int | None = None) -> None:
    """What a new process sees: these steps, all of them whole, and nothing that fsck would say."""
    repo = store.open()
    found = repo["a"].checkpoints(all=True)
    assert [checkpoint.step for checkpoint in found] == sorted(steps)
    assert all(whole(checkpoint) for checkpoint in found)
    if attached is not None:
        assert repo["a"].attachment("notes.txt") == file_of(attached)
    assert repo.check().ok


def made_of() -> Store:
    """STEPS in packs that are mostly dead; step 1 can be brought back, step 3 is thin."""
    store = store_of(6)
    thin_out(store, [1, *STEPS], [1, 5, 6])
    thin_out(store, STEPS, undo_seconds=7 * DAY)
    return store


def unnamed(store: Store) -> set[str]:
    """Packs of a repack that no record names."""
    history = store.open()["a"]._history()
    ever = {pack_key("runs/a/", pack) for pack in history.ever}
    return {key for key in store.packs() if key.rsplit("/", 2)[1].endswith("-0")} - ever


def packs_of(past: PastRun, *, optimizer: bool = False) -> set[PackName]:
    """What the live checkpoints need; or their optimizer state alone."""
    history = past._history()
    found: set[PackName] = set()
    for id in history.live:
        commit = history.commits[id]
        found |= commit.needs() - commit.needs(thin=True) if optimizer else commit.needs()
    return found


def events_of(store: Store, since: int = 0) -> list[Any]:
    """Of the records from a slot on."""
    slots = range(since, store.open()["a"]._history().slots)
    return [e for slot in slots for e in unpack_record(store.storage.get(record_key("runs/a/", slot)), slot, "").events]


class AtRewrite(FaultyStorage):
    """Does something right before the record of a repack is created; or dies there, or right behind it."""

    def __init__(self, inner: Any, what: Callable[[], None] | None = None, *, dies: str = "") -> None:
        super().__init__(inner, error=lambda: StorageError("no", where="here"), for_ever=True, verbs=CHANGES)
        self._what, self._dies = what, dies

    def put_new(self, key: str, data: bytes) -> None:
        if b'"type":"rewrite"' not in bytes(data):
            return super().put_new(key, data)
        what, self._what = self._what, None
        if what is not None:
            what()
        if self._dies == "before":
            self.fail_at = len(self.calls)
        super().put_new(key, data)
        if self._dies == "behind":
            self.fail_at = len(self.calls)


class Between(FaultyStorage):
    """Does something once, right before operation number `at`."""

    def __init__(self, inner: Any, at: int, what: Callable[[], None], verbs: tuple[str, ...] = CHANGES) -> None:
        super().__init__(inner, verbs=verbs)
        self._at, self._what, self.fired = at, what, False

    def _call(self, verb: str, key: str, run: Callable[[], Any]) -> Any:
        if verb in self.verbs and len(self.calls) == self._at and not self.fired:
            self.fired = True
            self._what()
        return super()._call(verb, key, run)
