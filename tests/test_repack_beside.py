"""Repack with a crash at every operation, and beside collections, other repacks and droppings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from _repack import (
    CHANGES,
    EVERY,
    STEPS,
    WIDE,
    AtRewrite,
    Between,
    check,
    events_of,
    file_of,
    made_of,
    only,
    state_of,
    store_of,
    thin_out,
    unnamed,
)
from _retention import Store, same, thinned

import everystep
from everystep import Conflict
from everystep.errors import StorageError, StorageFull, UnknownOutcome
from everystep.storage.faulty import FaultyStorage
from everystep.upkeep import collect
from everystep.upkeep.repack import Mover, _move
from everystep.vault.record import Rewrite


def verify(store: Store, rest: int) -> None:
    """Whatever a repack came to: all is there, a later prune and repack leave nothing over, and undo works."""
    check(store, STEPS, attached=6)
    past = store.open()["a"]
    assert past.prune().held_bytes == store.nbytes and not unnamed(store)
    assert past.repack().held_bytes == store.nbytes <= rest * 1.02
    assert [checkpoint.step for checkpoint in past.undo()] == [1]
    check(store, [1, *STEPS], attached=6)
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
        with pytest.raises(StorageError):
            store.open(storage=AtRewrite(store.storage, dies="before"))["a"].repack()
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
    assert number > 30
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
        """It began before, and so did not take what this one has written."""
        vault = store.open()["a"]._vault
        assert _move(vault, "another", Mover(vault), 0.5, None)[1] == 4
        assert unnamed(store)

    moved = store.open(storage=AtRewrite(store.storage, move_and_die))["a"].repack()
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

    moved = store.open(storage=AtRewrite(puts, drop))["a"].repack()
    assert moved.checkpoints == 3 and len({key.rsplit("/", 2)[1] for _, key in puts.calls}) == 1
    check(store, [5, 6], attached=6)
    store.open()["a"].prune(now=True)
    assert set(store.packs()) == store.read_by()


@pytest.mark.parametrize("stride", [5, 11, 16, 23])
def test_a_run_that_drops_and_frees_all_the_time_does_not_hold_it_up(stride: int) -> None:
    store = store_of(14, base_ratio=0.0)
    thin_out(store, range(4, 15))
    beside, dropped = store.open()["a"], list(range(4, 12))

    class Dropping(FaultyStorage):
        """Every so many reads the oldest checkpoint goes, or loses its optimizer state, as by a run's own rules."""

        def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
            if len(self.calls) % stride == stride - 1 and dropped:
                step = dropped.pop(0)
                kept = only(*range(step + 1, 15))
                beside.forget(*((kept, None) if step % 2 else (None, kept)), undo_seconds=0, force=True)
                collect(beside._vault, "a process that saves")
            return super().get(key, start, stop)

    puts = FaultyStorage(store.storage, verbs=("put",))
    moved = store.open(storage=Dropping(puts, verbs=("get",)))["a"].repack(dead=0.2)
    assert moved.checkpoints >= 3 and len(dropped) < 5
    assert len({key.rsplit("/", 2)[1] for _, key in puts.calls}) == 1, "it began once"
    assert moved.held_bytes == store.nbytes and not unnamed(store)
    check(store, [c.step for c in beside.checkpoints()], attached=14)
    store.open()["a"].repack(dead=0)
    check(store, [c.step for c in beside.checkpoints()], attached=14)


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


def test_thinning_in_between() -> None:
    """Optimizer state in a pack that is being emptied goes while it is copied: the rest is moved without it."""

    def state(step: int) -> dict[str, Any]:
        new = np.random.default_rng(step).standard_normal(8000)
        old = np.random.default_rng(100 + step // 2).standard_normal(4000)
        return {"params": {"new": new, "old": old}, "opt_state": {"new": new * 2, "old": old * 2}}

    made = Store(**WIDE, base_ratio=0.0)
    with made.open().run("a").track(rng=False) as run:
        for step in (2, 3, 4):
            run.save(step, state=state(step)).wait()
    thin_out(made, [3, 4])

    def thin(store: Store) -> None:
        past = store.open()["a"]
        past.forget(None, only(4), undo_seconds=0)
        collect(past._vault, "a process that saves")

    def verify_thin(store: Store, fired: bool) -> None:
        found = store.open()["a"].at(3)
        assert found.thin == fired and same(found.load(), thinned(state(3)) if fired else state(3))
        assert same(store.open()["a"].at(4).load(), state(4)) and store.open().check().ok
        thin(store)
        store.open()["a"].repack()
        assert set(store.packs()) == store.read_by()

    seen = at_every_operation(made, thin, verify_thin, 1)
    assert seen["moved"] > 30


def test_a_file_replaced_and_freed_in_between() -> None:
    """It came with no checkpoint of its own, so nothing else holds the pack that it is being moved from."""
    made = Store(**WIDE)
    with made.open().run("a").track(rng=False) as run:
        run.save(1, state={"number": 1}).wait()
        run.attach("small", file_of(1))
        for number in (1, 2):
            run.attach("big", np.random.default_rng(number).bytes(90_000))
            run.save(1, state={"number": 1}).wait()

    def attach(store: Store) -> None:
        with store.open().run("a").track(rng=False) as run:
            assert run.resume() == 1
            run.attach("small", file_of(2))
            run.save(2, state={"number": 2}).wait()
        collect(run._vault, "a process that saves")

    def verify_newer(store: Store, fired: bool) -> None:
        past = store.open()["a"]
        assert past.attachment("small") == file_of(2 if fired else 1)
        assert past.attachment("big") == np.random.default_rng(2).bytes(90_000)
        past.repack()
        assert set(store.packs()) == store.read_by() and store.open().check().ok

    at_every_operation(made, attach, verify_newer, 1)


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
