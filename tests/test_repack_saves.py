"""Repack beside a process that saves, and beside readers; and random walks of everything that moves or frees."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from _repack import (
    EVERY,
    STEPS,
    WIDE,
    Between,
    check,
    file_of,
    made_of,
    only,
    state_of,
    thin_out,
    whole,
)
from _retention import DAY, Store, same

import everystep
from everystep import Conflict, Repository, Settings
from everystep.errors import CheckpointRetired
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.upkeep import collect
from everystep.vault import Place

# a process that saves ----------------------------------------------------------------------------------------------


def test_a_save_in_between() -> None:
    """The writer refers to what is being moved, and has rules of its own; at any operation, before or after."""
    number, fired = 0, True
    seen: Counter[str] = Counter()
    while fired:
        store = Store(**WIDE)
        with store.open().run("a", keep=everystep.last(4)).track(rng=False) as run:
            for step in range(1, 8):
                run.save(step, state=state_of(step)).wait()
                run._writer.wait()

            def save(run: everystep.Run = run) -> None:
                run.save(8, state=state_of(8)).wait()
                run._writer.wait()

            between = Between(store.storage, number, save, EVERY)
            moved = store.open(storage=between)["a"].repack()
            seen["moved" if moved.checkpoints else "not moved"] += 1
            fired = between.fired
            check(store, [5, 6, 7, 8] if fired else [4, 5, 6, 7])
            run.save(9, state=state_of(9)).wait()
            run.save(10, state=state_of(10)).wait()
        check(store, [7, 8, 9, 10] if fired else [6, 7, 9, 10])
        store.open()["a"].repack()
        check(store, [7, 8, 9, 10] if fired else [6, 7, 9, 10])
        assert set(store.packs()) == store.read_by()
        number += 7
    assert seen["moved"] > 10, seen


def test_a_save_after_it_stores_what_stood_still_only_once() -> None:
    """Its references were to packs that are gone; it is written again with those that its parent has now."""
    store = Store(**WIDE, base_ratio=0.0)
    with store.open().run("a").track(rng=False) as run:
        for step in range(1, 6):
            run.save(step, state=state_of(step)).wait()
        usual = run.at(5).cost["stored_bytes"]
        assert usual < run.at(1).cost["stored_bytes"] - 40_000
        beside = thin_out(store, [5])
        assert beside.repack().checkpoints == 1
        run.save(6, state=state_of(6)).wait()
        assert abs(run.at(6).cost["stored_bytes"] - usual) < 6000
        run.save(7, state=state_of(7)).wait()
        assert abs(run.at(7).cost["stored_bytes"] - usual) < 6000
    check(store, [5, 6, 7])


@pytest.mark.parametrize("times", [1, 2])
def test_what_a_save_finds_anew_may_be_freed_once_more(times: int) -> None:
    """Between its second attempt and the record, too, somebody may repack: then it leans on nothing."""
    store = Store(**{**WIDE, "pack_bytes_max": 1 << 18}, base_ratio=0.0)

    def state(step: int) -> dict[str, Any]:
        early = np.random.default_rng(min(step, 5) // 5).standard_normal(5000)
        return {"params": state_of(step)["params"], "frozen": state_of(1)["frozen"], "early": early}

    with store.open().run("a").track(rng=False) as first:
        for step in range(1, 6):
            first.save(step, state=state(step)).wait()
    left, moved = [[4, 5], [5]][:times], []

    class Disturbed(FaultyStorage):
        """Before a commit is created, another process drops a checkpoint and empties its packs."""

        def put_new(self, key: str, data: bytes) -> None:
            if b'"type":"commit"' in bytes(data) and left:
                moved.append(thin_out(store, left.pop(0)).repack(dead=0).checkpoints)
            super().put_new(key, data)

    traced = Disturbed(store.storage, verbs=("put",))
    with store.open(storage=traced).run("a").track(rng=False) as run:
        assert run.resume() == 5
        run.save(6, state=state(6)).wait()
        assert run.at(6).parent == run.at(5).id
    attempts = sum(1 for verb, _ in traced.calls)
    assert moved == [2, 1][:times] and attempts >= 2 * (times + 1)
    found = store.open()["a"].checkpoints()
    assert [c.step for c in found] == ([4, 5, 6] if times == 1 else [5, 6])
    assert all(same(c.load(), state(c.step)) for c in found) and store.open().check().ok


class Real(Seam):
    """Real threads and clock; asks no other program."""

    def ask(self, *command: str, seconds: float = 3.0) -> str | None:
        return None


def test_beside_threads_that_save_drop_and_read() -> None:
    storage, over = MemoryStorage(), threading.Event()
    errors: list[BaseException] = []
    seen: Counter[str] = Counter()

    def opened() -> Repository:
        return Repository(Place(storage, Real(), Settings(**WIDE)))

    def guarded(work: Callable[[], Any]) -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as error:  # noqa: BLE001  the test raises it
            errors.append(error)
            over.set()

    with opened().run("a").track(rng=False) as run:
        run.save(1, state=state_of(1)).wait()
        own, other, reading = run, opened()["a"], opened()["a"]
        steps = itertools.cycle(range(5))

        def drop() -> None:
            rest = next(steps)
            keep = everystep.last(4) | everystep.when(lambda kept: kept.step % 5 == rest)
            other.forget(keep, force=True, undo_seconds=0.0)
            _ = collect(other._vault, "another") if rest else other.prune()

        def repack() -> None:
            try:
                seen["moved"] += opened()["a"].repack().checkpoints
            except Conflict:
                seen["given up"] += 1

        def read() -> None:
            for checkpoint in reading.checkpoints(all=True):
                try:
                    assert whole(checkpoint)
                    seen["read"] += 1
                except CheckpointRetired:
                    seen["retired"] += 1

        def repack_here() -> None:
            """In the very process that saves."""
            try:
                over.wait(0.1)
                own.repack()
            except Conflict:
                seen["given up"] += 1

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (drop, repack, read, repack_here)]
        for thread in threads:
            thread.start()
        try:
            for step in range(2, 60):
                run.save(step, state=state_of(step)).wait()
        finally:
            over.set()
            for thread in threads:
                thread.join(100)
                assert not thread.is_alive()
    if errors:
        raise errors[0]
    assert seen["moved"] > 0 and seen["read"] > 20, seen
    assert opened().check().ok
    assert all(whole(checkpoint) for checkpoint in opened()["a"].checkpoints(all=True))


# readers -----------------------------------------------------------------------------------------------------------


def test_who_has_a_checkpoint_open_goes_on() -> None:
    store = made_of()
    past = store.open()["a"]
    before = {c.step: c for c in past.checkpoints()}
    opened = {c.step: c for c in past.checkpoints() if c.leaves()}
    one = opened[6]._open().of_rank(0)
    notes = past._history().attachments["notes.txt"]
    beside = store.open()["a"]
    assert beside.repack(dead=0).checkpoints == 4
    for held in (before, opened):
        for step in STEPS:
            assert whole(held[step], thin=step == 3)
            assert held[step].verify() > 0 and same(held[step].load(only="frozen"), state_of(step)["frozen"])
    assert one is not None and same(one.build("state"), state_of(6))
    assert opened[5].diff(opened[6], only="frozen").same
    assert everystep.restore.read_attachment(past._vault, notes) == file_of(6)


def test_a_read_that_a_repack_overtakes_anywhere() -> None:
    made = made_of()
    number, fired = 0, True
    while fired:
        store = made.copy()
        between = Between(store.storage, number, lambda store=store: move(store), ("get",))
        repo = store.open(storage=between)
        assert whole(repo["a"].at(6)) and whole(repo["a"].at(3))
        assert repo["a"].attachment("notes.txt") == file_of(6)
        assert repo.check().ok
        assert repo["a"].stats().checkpoints == 3
        fired = between.fired
        number += 2
    assert number > 30


def move(store: Store) -> None:
    assert store.open()["a"].repack(dead=0).checkpoints == 4


def test_a_reader_of_what_was_moved_twice_and_then_dropped() -> None:
    store = made_of()
    held = [store.open()["a"].at(5) for _ in range(2)]
    assert held[0].leaves()
    assert store.open()["a"].repack().checkpoints
    thin_out(store, [5, 6])
    store.open()["a"].prune(now=True)
    store.open()["a"].repack(dead=0)
    assert all(whole(checkpoint) for checkpoint in held)
    thin_out(store, [5, 6], [6])
    with pytest.raises(CheckpointRetired, match="step 5 has been thinned"):
        held[0].load()
    thin_out(store, [6])
    for checkpoint in held:
        with pytest.raises(CheckpointRetired, match="step 5 has been dropped"):
            checkpoint.load()


# random walks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_random_walks(seed: int) -> None:
    """Saves, drops, thins, undoes, frees and repacks as they come: what is live is whole, what can come back too."""
    drawn = random.Random(seed)
    store, seen = Store(**WIDE, base_ratio=drawn.choice([0.0, 0.97])), Counter[str]()
    run = store.open().run("a").track(rng=False)
    run.save(1, state=state_of(1)).wait()
    beside, step = store.open()["a"], 1
    for _ in range(80):
        past = drawn.choice([run, beside])
        kept = {step, *(c.step for c in past.checkpoints() if drawn.random() < 0.7)}
        what = drawn.choice(
            ["save", "save", "drop", "drop", "thin", "undo", "prune", "repack", "repack", "wait", "again"]
        )
        seen[what] += 1
        if what == "save":
            step += 1
            run.save(step, state=state_of(step)).wait()
        elif what in ("drop", "thin"):
            rules = (only(*kept), None) if what == "drop" else (None, only(*kept))
            past.forget(*rules, force=True, undo_seconds=drawn.choice([0.0, 7 * DAY]))
        elif what == "undo" and past.dropped:
            assert all(whole(checkpoint) for checkpoint in past.undo())
        elif what == "prune":
            past.prune(now=drawn.random() < 0.3)
        elif what == "repack":
            before, dead = store.nbytes, drawn.choice([0.0, 0.3, 0.6])
            moved = past.repack(dead=dead)
            assert store.nbytes == moved.held_bytes == before + moved.written_bytes - moved.freed_bytes <= before
            seen["moved"] += moved.checkpoints
            while past.repack(dead=dead).checkpoints:  # what it moved may have left other packs mostly dead
                assert store.nbytes < before
                before = store.nbytes
        elif what == "wait":
            store.clock.seconds += 4 * DAY
        elif what == "again":
            run.close()
            run = store.open().run("a").track(rng=False)
            assert run.resume() == step
        assert all(whole(checkpoint) for checkpoint in past.checkpoints(all=True))
    run.close()
    check(store, [checkpoint.step for checkpoint in run.checkpoints(all=True)])
    store.open()["a"].prune(now=True)
    assert set(store.packs()) == store.read_by() and seen["moved"] > 0, seen
    check(store, [checkpoint.step for checkpoint in run.checkpoints(all=True)])
