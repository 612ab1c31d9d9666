"""A full disk, a quota: what can still be brought back gives way, what was dropped first before the rest."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from _retention import (
    ALONE,
    RAW_BYTES,
    Clocked,
    ClockedFiles,
    Store,
    but,
    check,
    live,
    only,
    state_of,
)  # fmt: skip

import everystep
from everystep import StorageFull
from everystep.errors import EverystepWarning
from everystep.storage import LocalStorage, MemoryStorage


class Limited(MemoryStorage):
    """Takes no more than `room` bytes."""

    room = float("inf")

    def put(self, key: str, data: Iterable[Any]) -> None:
        body = b"".join(data)
        self._check(len(body))
        super().put(key, [body])

    def put_new(self, key: str, data: bytes) -> None:
        self._check(len(data))
        super().put_new(key, data)

    def _check(self, nbytes: int) -> None:
        if sum(map(len, self.objects.values())) + nbytes > self.room:
            raise StorageFull("no space left", where=self.url)

    def leave(self, nbytes: int) -> None:
        self.room = sum(map(len, self.objects.values())) + nbytes


def limited() -> Store:
    store = Store(**ALONE)
    store.storage = Limited()
    store.storage._now = store.clock.now
    return store


def test_a_full_disk_ends_the_time_of_undo_of_what_was_dropped_first() -> None:
    store = limited()
    run = store.open().run("a").track(rng=False)
    for step in range(1, 10):
        run.save(step, state=state_of(step)).wait()
    for steps in ((2, 3), (4, 7), (8,)):
        run.forget(but(*steps))
        store.clock.seconds += 1
    store.storage.leave(8000)
    run.save(11, state=state_of(11)).wait()
    assert [checkpoint.step for checkpoint in run.dropped] == [4, 7, 8]
    check(store.open(), [1, 5, 6, 9, 11])
    store.storage.leave(8000)
    run.save(12, state=state_of(12)).wait()
    assert [checkpoint.step for checkpoint in run.dropped] == [8]
    run.undo()
    check(store.open(), [1, 5, 6, 8, 9, 11, 12])
    store.storage.leave(8000)
    with pytest.raises(StorageFull):
        run.save(13, state=state_of(13)).wait()
    check(store.open(), [1, 5, 6, 8, 9, 11, 12])
    store.storage.room = float("inf")
    run.save(13, state=state_of(13)).wait()
    run.close()
    check(store.open(), [1, 5, 6, 8, 9, 11, 12, 13])
    assert store.open().check().ok


def test_a_full_disk_on_the_record_itself() -> None:
    """Even the record that frees needs room: where there is none at all, the save fails and harms nothing."""
    store = limited()
    run = store.open().run("a").track(rng=False)
    for step in (1, 2, 3, 4):
        run.save(step, state=state_of(step)).wait()
    run.forget(only(1, 4))
    store.storage.leave(0)
    with pytest.raises(StorageFull):
        run.save(6, state=state_of(6)).wait()
    check(store.open(), [1, 4])
    assert [checkpoint.step for checkpoint in run.dropped] == [2, 3]
    store.storage.leave(2000)
    run.save(6, state=state_of(6)).wait()
    run.close()
    check(store.open(), [1, 4, 6])


def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    class Full(ClockedFiles):
        room = float("inf")

        def write(self, fd: int, data: memoryview) -> int:
            used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
            if used + len(data) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(fd, data)

    store = Store(str(tmp_path / "runs"), **ALONE)
    files = store.files = Full(store.clock)
    run = store.open(storage=LocalStorage(str(tmp_path / "runs"), Clocked(store.clock, files=files))).run("a")
    run.track(rng=False)
    for step in (1, 2, 3, 4):
        run.save(step, state=state_of(step)).wait()
    run.forget(only(1, 4))
    files.room = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) + 3000
    run.save(6, state=state_of(6)).wait()
    run.close()
    check(store.open(), [1, 4, 6])
    assert run.dropped == [] and list(tmp_path.rglob(".tmp-*")) == []


def quota_run(store: Store, quota_bytes: int, **options: Any) -> everystep.Run:
    return store.open().run("a", quota_bytes=quota_bytes, **options).track(rng=False)


def test_a_quota_that_is_kept_says_nothing() -> None:
    store = Store(**ALONE)
    with quota_run(store, 4 * RAW_BYTES, keep=everystep.last(3)) as run:
        for step in range(1, 9):
            run.save(step, state=state_of(step)).wait()
    assert live(store.open()) == [6, 7, 8] and store.nbytes < 4 * RAW_BYTES


def test_a_quota_ends_the_time_of_undo_of_what_was_dropped_first() -> None:
    store = Store(**ALONE)
    quota = 4 * RAW_BYTES
    run = quota_run(store, quota)
    for step in (1, 2, 3, 4):
        run.save(step, state=state_of(step)).wait()
    for step in (2, 3):
        run.forget(but(step))
    held = []
    for step in (6, 7, 8):
        run.save(step, state=state_of(step)).wait()
        run._writer.wait()
        held.append([checkpoint.step for checkpoint in run.dropped])
        assert store.nbytes <= quota
    assert held == [[2, 3], [3], []]
    check(store.open(), [1, 4, 6, 7, 8])
    run.close()


def test_the_warning_of_a_quota() -> None:
    store = Store()
    run = quota_run(store, 1000)
    with pytest.warns(EverystepWarning, match="there is room for 0.00 MB"):  # what it foresees
        run.save(1, state=state_of(1)).wait()
    with pytest.warns(EverystepWarning) as caught:
        run.close()
    [text] = [str(one.message) for one in caught]
    assert text == (
        f"run 'a': the run holds {store.nbytes / 1e9:.2f} GB, over its quota of 0.00 GB; "
        "give it keep= or keep_full= rules that hold less"
    )
    check(store.open(), [1])
