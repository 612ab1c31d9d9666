"""Repack beside saves, readers, collections and other repacks, and with a crash at every operation."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from _repack import (
    CHANGES,
    WIDE,
    Between,
    check,
    events_of,
    file_of,
    only,
    state_of,
    store_of,
    thin_out,
    unnamed,
    whole,
)
from _retention import DAY, Store, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_retention_model import Walk

import everystep
from everystep import Conflict, Repository, Settings
from everystep.errors import CheckpointRetired, StorageError, StorageFull, UnknownOutcome
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.upkeep import collect
from everystep.vault import Place
from everystep.vault.record import Rewrite

STEPS = [3, 5, 6]
EVERY = ("get", "put", "put_new", "list", "delete", "stat")


def made_of(count: int = 6) -> Store:
    """Packs that are mostly dead; step 1 can be brought back, step 3 is thin."""
    store = store_of(count)
    thin_out(store, [1, *STEPS], [1, 5, 6])
    thin_out(store, STEPS, undo_seconds=7 * DAY)
    return store


def verify(store: Store, rest: int, attached: int = 6) -> None:
    """Whatever a repack came to: all is there, a later prune and repack leave nothing over, and undo works."""
    check(store, STEPS, attached=attached)
    past = store.open()["a"]
    freed = past.prune()
    assert freed.held_bytes == store.nbytes and not unnamed(store)
    assert past.repack().held_bytes == store.nbytes <= rest * 1.02
    assert [checkpoint.step for checkpoint in past.undo()] == [1]
    check(store, [1, *STEPS], attached=attached)
    assert set(store.packs()) == store.read_by()


# crashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["died", "goes on"])
def test_a_repack_that_crashes_at_any_operation(ends: str) -> None:
    """It dies for good there; or that operation fails, before or after it took effect."""
    made = made_of()
    done = made.copy()
    assert done.open()["a"].repack().checkpoints == 4
    rest = done.nbytes
    number, fired, landed = 0, True, Counter[str]()
    while fired:
        for applied in (False, True) if ends == "goes on" else (False,):
            store = made.copy()
            faulty = FaultyStorage(
                store.storage, number, lambda: UnknownOutcome("timeout", where="here"), for_ever=ends == "died",
                applied=applied, verbs=CHANGES,
            )  # fmt: skip
            past = store.open(storage=faulty)["a"]
            try:
                moved = past.repack()
                assert moved.held_bytes == store.nbytes
                landed["done"] += 1
            except StorageError:
                landed["failed"] += 1
                assert len(faulty.calls) > number
            fired = len(faulty.calls) > number
            verify(store, rest)
        number += 1
    assert number > 10 and landed["done"] >= 1
    assert landed["failed"] > 8 if ends == "died" else landed["done"] > 10


def test_a_repack_that_cannot_read() -> None:
    made = made_of()
    number, fired, failed = 0, True, 0
    slots = made.open()["a"]._history().slots
    while fired:
        store = made.copy()
        faulty = FaultyStorage(
            store.storage, number, lambda: StorageError("no", where="here"), verbs=("get", "list", "stat")
        )
        try:
            store.open(storage=faulty)["a"].repack()
        except StorageError:
            failed += 1
            assert not unnamed(store), "what was written for nothing is freed at once"
        fired = len(faulty.calls) > number
        assert store.open().check(data=False).ok and store.open()["a"]._history().slots >= slots
        number += 3
    assert failed > 20


def test_a_full_place_does_not_stay_so() -> None:
    """What had been written when the place was full is taken back."""
    made = made_of()
    for number in range(1, 5):
        store = made.copy()
        before = store.packs()
        full = FaultyStorage(store.storage, number, lambda: StorageFull("full", where="here"), verbs=("put",))
        with pytest.raises(StorageFull):
            store.open(storage=full)["a"].repack()
        assert store.packs().keys() <= before.keys()
        check(store, STEPS, attached=6)


@pytest.mark.parametrize("who", ["prune", "prune now", "repack", "no room"])
def test_what_a_dead_repack_left_is_freed_by_whoever_means_to(who: str) -> None:
    """Not by the collection after each save: the repack may be at work."""
    store = Store(**WIDE)
    with store.open().run("a", keep=everystep.last(3)).track(rng=False) as run:
        for step in range(1, 6):
            run.save(step, state=state_of(step)).wait()
            run._writer.wait()
        dead = FaultyStorage(
            store.storage, 0, lambda: StorageError("no", where="here"), for_ever=True, verbs=("put_new",)
        )
        with pytest.raises(StorageError):
            store.open(storage=dead)["a"].repack()
        left = unnamed(store)
        assert left
        for step in (6, 7):
            run.save(step, state=state_of(step)).wait()
            run._writer.wait()
        assert unnamed(store) == left
        if who == "repack":
            store.open()["a"].repack()
        elif who == "no room":
            assert run._writer._keeper.make_room(1000)
        else:
            store.open()["a"].prune(now=who == "prune now")
        assert not unnamed(store)
    check(store, [5, 6, 7])


def test_packs_of_a_repack_are_freed_by_the_rules_of_the_run() -> None:
    store = Store(**WIDE)
    with store.open().run("a", keep=everystep.last(3)).track(rng=False) as run:
        for step in range(1, 6):
            run.save(step, state=state_of(step)).wait()
        run._writer.wait()
        assert store.open()["a"].repack().checkpoints == 3
        ours = of_no_term(store.packs())
        for step in range(6, 20):
            run.save(step, state=state_of(step)).wait()
        run._writer.wait()
        left = of_no_term(store.packs())
        assert 0 < len(left) < len(ours) and left == of_no_term(store.read_by()), "what stands still is there"


def of_no_term(keys: Iterable[str]) -> set[str]:
    return {key for key in keys if key.rsplit("/", 2)[1].endswith("-0")}


# others, between any two operations --------------------------------------------------------------------------------


def at_every_operation(
    made: Store, what: Callable[[Store], object], verify: Callable[[Store, bool], None], stride: int = 7
) -> Counter[str]:
    """Repacks copies of a store, each with something else before another operation; `verify` is told whether it was."""
    seen: Counter[str] = Counter()
    number, fired = 0, True
    while fired:
        store = made.copy()
        between = Between(store.storage, number, lambda store=store: what(store), EVERY)
        moved = store.open(storage=between)["a"].repack()
        fired = between.fired
        seen["moved" if moved.checkpoints else "not moved"] += 1
        verify(store, fired)
        number += stride
    assert number > 80
    return seen


@pytest.mark.parametrize("again", [False, True], ids=["prune", "repack"])
def test_a_collection_in_between(again: bool) -> None:
    """It takes what no record names yet; then all begins again. So does another repack, which may be the faster."""
    made = made_of()
    done = made.copy()
    done.open()["a"].repack()

    def free(store: Store) -> None:
        past = store.open()["a"]
        _ = past.repack() if again else past.prune()

    def verify_same(store: Store, fired: bool) -> None:
        assert not unnamed(store) and abs(store.nbytes - done.nbytes) < 2000
        verify(store, done.nbytes)

    seen = at_every_operation(made, free, verify_same)
    assert seen["moved"] and bool(seen["not moved"]) == again


def test_who_is_faster_and_dies_is_not_undone() -> None:
    """Another has moved the same meanwhile, and not come to free what this one wrote."""
    store = made_of()

    def move_and_die() -> None:
        dies = FaultyStorage(store.storage, 1, lambda: StorageError("no", where=""), for_ever=True, verbs=("put_new",))
        with pytest.raises(StorageError):
            store.open(storage=dies)["a"].repack()

    moved = store.open(storage=Between(store.storage, 0, move_and_die, ("put_new",)))["a"].repack()
    assert moved.checkpoints == 0 and moved.written_bytes > 0 and moved.held_bytes == store.nbytes
    assert sum(isinstance(event, Rewrite) for event in events_of(store)) == 1
    verify(store, store.nbytes)


def test_what_was_dropped_meanwhile_is_left_out_without_a_new_beginning() -> None:
    store = made_of()
    puts = FaultyStorage(store.storage, verbs=("put",))

    def drop() -> None:
        past = store.open()["a"]
        past.forget(only(5, 6), undo_seconds=0)
        collect(past._vault, "a process that saves")
        assert unnamed(store)

    moved = store.open(storage=Between(puts, 0, drop, ("put_new",)))["a"].repack()
    assert moved.checkpoints == 3 and len({key.rsplit("/", 2)[1] for _, key in puts.calls}) == 1
    check(store, [5, 6], attached=6)
    store.open()["a"].prune(now=True)
    assert set(store.packs()) == store.read_by()


def test_dropping_in_between() -> None:
    """What is dropped and freed meanwhile does not come back, and is not looked for."""

    def drop(store: Store) -> None:
        thin_out(store, [5, 6], [6])
        store.open()["a"].prune(now=True)

    def verify_dropped(store: Store, fired: bool) -> None:
        steps = [5, 6] if fired else STEPS
        check(store, steps, attached=6)
        assert store.open()["a"].at(5).thin == fired
        store.open()["a"].repack()
        store.open()["a"].prune(now=True)
        check(store, steps, attached=6)
        assert set(store.packs()) == store.read_by() and not store.open()["a"].dropped

    at_every_operation(made_of(), drop, verify_dropped)


def test_undo_in_between() -> None:
    def verify_undone(store: Store, fired: bool) -> None:
        check(store, [1, *STEPS] if fired else STEPS, attached=6)
        past = store.open()["a"]
        past.repack()
        assert fired or past.undo()
        check(store, [1, *STEPS], attached=6)
        assert set(store.packs()) == store.read_by()

    at_every_operation(made_of(), lambda store: store.open()["a"].undo(), verify_undone)


def test_a_newer_file_in_between() -> None:
    """An attachment that was moved does not take the place of a newer one of its name."""
    made = Store(**WIDE)
    with made.open().run("a").track(rng=False) as run:
        for step in (1, 2):
            run.attach("big", np.random.default_rng(step).bytes(100_000))
            run.attach(f"own{step}", file_of(step))
            run.save(step, state={"params": {"w": np.arange(3000.0) + step}}).wait()

    def attach(store: Store) -> None:
        with store.open().run("a").track(rng=False) as run:
            run.resume()
            run.attach("own1", file_of(7))
            run.save(3, state={"params": {"w": np.arange(3000.0) + 3}}).wait()

    def verify_newer(store: Store, fired: bool) -> None:
        repo = store.open()
        past = repo["a"]
        assert [past.attachment(name) for name in ("own1", "own2")] == [file_of(7 if fired else 1), file_of(2)]
        assert past.attachment("big") == np.random.default_rng(2).bytes(100_000)
        assert [c.load()["params"]["w"][0] for c in past.checkpoints()] == ([1, 2, 3] if fired else [1, 2])
        assert repo.check().ok

    at_every_operation(made, attach, verify_newer, 3)


def test_others_that_free_again_and_again() -> None:
    store = made_of()

    class Pruned(FaultyStorage):
        """Each manifest that a repack writes is taken at once."""

        def put(self, key: str, data: Any) -> None:
            super().put(key, data)
            store.open()["a"].prune()

    with pytest.raises(Conflict, match="packs were freed while they were emptied, 3 times") as caught:
        store.open(storage=Pruned(store.storage))["a"].repack()
    assert "when no other repack or prune" in caught.value.do
    assert not unnamed(store)
    check(store, STEPS, attached=6)


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
            other.prune()

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
    assert seen["moved"] > 3 and seen["read"] > 20, seen
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


def test_random_walks_with_packs_that_are_worth_it() -> None:
    """Everything that keeps, drops, brings back and frees, with repacks in between."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=4,
        derandomize=True,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        walk = Walk(Store(pack_bytes_max=1 << 16), data, seen)
        try:
            for _ in range(40):
                walk.step()
                if data.draw(st.integers(0, 3), "repack too") == 0:
                    walk.repack()
        finally:
            walk.run.close()
        walk.check_end()

    run()
    assert seen["repacked"] > 0, seen
