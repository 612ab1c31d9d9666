"""Collection: it never takes what is needed, beside a process that saves, at every crash, at any clock."""

from __future__ import annotations

import random
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from _retention import (
    ALONE,
    DAY,
    RAW_BYTES,
    WHOLE_PACKS,
    YEAR,
    Store,
    based,
    but,
    check,
    live,
    only,
    same,
    state_of,
    store_of,
    thinned,
)

import everystep
from everystep import NotFound, Repository, Settings, StorageError, StorageFull
from everystep.errors import CheckpointRetired, Conflict, EverystepWarning, UnknownOutcome
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.upkeep import bring_back
from everystep.vault import Place

WEEK = 7 * DAY
SHORT_CHAINS = {"chunk_bytes_max": 1 << 14, "pack_bytes_max": 1 << 14, "base_depth_max": 2}
CHANGES = ("put", "put_new", "delete")


# what leans on what is dropped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchored", [False, True], ids=["chains", "anchors"])
def test_dropping_any_base_leaves_every_other_checkpoint_whole(anchored: bool) -> None:
    keep = everystep.when(lambda kept: True) if anchored else None
    made = store_of(12, keep=keep, chunk_bytes_max=1 << 14)
    depths = list(based(made.open()["a"].checkpoints()))
    assert max(depths) == (1 if anchored else everystep.Settings().base_depth_max) and depths.count(0) < len(depths)
    for step in range(1, 12):
        store = made.copy()
        past = store.open()["a"]
        past.forget(but(step), undo_seconds=0)
        past.prune()
        check(store.open(), [other for other in range(1, 13) if other != step])
    drawn = random.Random(3)
    for _ in range(12):
        steps = {12, *drawn.sample(range(1, 12), drawn.randint(0, 10))}
        store = made.copy()
        past = store.open()["a"]
        past.forget(only(*steps), force=True, undo_seconds=0)
        past.prune()
        check(store.open(), sorted(steps))
        assert set(store.packs()) == store.read_by()


def test_a_chain_ends_where_it_must_for_what_stood_still_there_too() -> None:
    """What stands still in the save that begins another chain is referred to, as deep as it lies."""
    store = Store(base_depth_max=8)
    numbers = [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 11, 12, 13]
    with store.open().run("a").track(rng=False) as run:
        for step, number in enumerate(numbers, 1):
            run.save(step, state={"params": state_of(number)["params"], "more": np.full(2000, step)}).wait()
    past = store.open()["a"]
    assert max(based(past.checkpoints())) == 8
    assert all(same(past.at(step).load(only="params"), state_of(n)["params"]) for step, n in enumerate(numbers, 1))


def test_a_base_in_memory_that_is_not_what_was_stored() -> None:
    store = Store()
    with store.open().run("a").track(rng=False) as run:
        for step in (1, 2, 3):
            run.save(step, state=state_of(step)).wait()
            run._writer.wait()
            run._writer._bases._base.snapshot.data[::7] ^= 1
    past = store.open()["a"]
    check(store.open(), [1, 2, 3])
    assert max(based(past.checkpoints())) == 0


def test_a_base_in_memory_whose_packs_were_freed() -> None:
    """The first state is nobody's base, so it is freed; the fourth is like it, and is encoded against it."""
    store = Store(anchor_every=100, anchor_ratio=0.97)
    drawn = np.random.default_rng(1)
    noise = [drawn.standard_normal(4000).astype(np.float32) for _ in range(3)]
    states = [state_of(1)["params"]["w"], noise[1], noise[2], state_of(2)["params"]["w"], state_of(3)["params"]["w"]]
    with store.open().run("a", keep=everystep.last(1)).track(rng=False) as run:
        for step, weights in enumerate(states, 1):
            run.save(step, state={"params": {"w": weights}}).wait()
            run._writer.wait()
            past = store.open()["a"]
            assert [c.step for c in past.checkpoints(all=True)] == [step]
            assert same(past.at(step).load(), {"params": {"w": weights}})
    assert max(based(past.checkpoints())) == 1
    assert len(run._history().condemned) > 0


# crashes -----------------------------------------------------------------------------------------------------------


def thin_out(past: everystep.PastRun) -> None:
    """1, 2 and 5 are gone, and the optimizer state of 3 and 4; step 7 can come back for a week."""
    past.forget(only(3, 4, 6, 7, 8), only(6, 7, 8), undo_seconds=0)
    past.forget(but(7), undo_seconds=WEEK)


def verify_thinned_out(store: Store, rest: set[str]) -> None:
    """What is left after a collection that ended somewhere, and after another that ends as it should."""
    check(store.open(), [3, 4, 6, 8])
    assert store.open().check().ok
    past = store.open()["a"]
    freed = past.prune()
    assert freed.held_bytes == store.nbytes and set(store.packs()) == rest
    assert [checkpoint.step for checkpoint in past.undo()] == [7]
    check(store.open(), [3, 4, 6, 7, 8])
    assert past.at(3).thin and past.at(4).thin and not past.at(6).thin


@pytest.mark.parametrize("ends", ["died", "goes on"])
def test_a_collection_that_crashes_at_any_operation(ends: str) -> None:
    """It dies for good there; or that operation fails, before or after it took effect."""
    made = store_of(8, **SHORT_CHAINS)
    thin_out(made.open()["a"])
    done = made.copy()
    done.open()["a"].prune()
    rest = set(done.packs())
    assert 0 < len(rest) < len(made.packs())
    number, fired = 0, True
    while fired:
        for applied in (False, True) if ends == "goes on" else (False,):
            store = made.copy()
            faulty = FaultyStorage(
                store.storage,
                number,
                lambda: UnknownOutcome("timeout", where="here"),
                for_ever=ends == "died",
                applied=applied,
                verbs=CHANGES,
            )
            past = store.open(storage=faulty)["a"]
            try:
                freed = past.prune()
                assert freed.held_bytes == store.nbytes
            except StorageError:
                assert len(faulty.calls) > number
            fired = len(faulty.calls) > number
            verify_thinned_out(store, rest)
        number += 1
    assert number > 6


@pytest.mark.parametrize("error", [StorageError, StorageFull], ids=lambda e: e.kind)
def test_a_collection_that_cannot_read(error: type[StorageError]) -> None:
    made = store_of(8, **WHOLE_PACKS)
    thin_out(made.open()["a"])
    number, failed, fired = 0, 0, True
    while fired:
        store = made.copy()
        faulty = FaultyStorage(store.storage, number, lambda: error("no", where="here"), verbs=("get", "list", "stat"))
        try:
            store.open(storage=faulty)["a"].prune()
        except error:
            failed += 1
        fired = len(faulty.calls) > number
        assert live(store.open()) == [3, 4, 6, 8] and store.open().check().ok
        number += 1
    assert failed > 20


def test_a_writer_that_dies_at_any_operation_while_its_rules_drop() -> None:
    """Another goes on under the same rules; at the end there is what they keep, whole, and nothing else."""
    rules = {"keep": everystep.last(3), "keep_full": everystep.last(2)}
    number, fired = 0, True
    while fired:
        store = Store(**WHOLE_PACKS)
        faulty = FaultyStorage(
            store.storage, number, lambda: StorageError("no", where="here"), for_ever=True, verbs=CHANGES
        )
        durable: list[int] = []
        try:
            first = store.open(storage=faulty).run("a", **rules).track(rng=False)
            for step in range(1, 7):
                first.save(step, state=state_of(step)).wait()
                durable.append(step)
                first._writer.wait()
                first._writer.notices.clear()
        except StorageError:
            pass
        fired = len(faulty.calls) > number
        if durable:
            found = live(store.open())
            assert set(durable[-3:]) <= set(found)
            check(store.open())
        second = store.open().run("a", **rules).track(rng=False)
        begun = second.resume()
        assert begun >= max(durable, default=0)
        for step in range(begun + 1, begun + 4):
            second.save(step, state=state_of(step)).wait()
        second.close()
        check(store.open(), range(begun + 1, begun + 4))
        assert set(store.packs()) == store.read_by()
        number += 1
    assert number > 35


# clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collector", [-YEAR, 0.0, YEAR])
@pytest.mark.parametrize("writer", [-YEAR, 0.0, YEAR])
def test_only_the_clock_of_the_store_counts(writer: float, collector: float) -> None:
    store = Store(**ALONE)
    run = store.open(skew=writer).run("a").track(rng=False)
    for step in (1, 2, 3, 4):
        run.save(step, state=state_of(step)).wait()
    beside = store.open(skew=collector)["a"]
    (beside if collector else run).forget(only(1, 3, 4), only(1, 4))
    store.clock.seconds += WEEK - 1
    held = beside.prune()
    assert held.packs == 0 and held.pending_bytes > RAW_BYTES / 4
    assert [checkpoint.step for checkpoint in beside.dropped] == [2, 3]
    restored = store.copy()
    restored.open(skew=collector)["a"].undo()
    assert [c.thin for c in restored.open()["a"].checkpoints()] == [False] * 4
    check(restored.open(), [1, 2, 3, 4])
    store.clock.seconds += 1
    freed = beside.prune()
    assert freed.nbytes == held.pending_bytes and freed.pending_bytes == 0 and beside.dropped == []
    with pytest.raises(NotFound, match="nothing that was dropped can be brought back"):
        beside.undo()
    check(store.open(), [1, 3, 4])
    run.close()


def test_a_clock_that_goes_back_frees_nothing_early() -> None:
    store = store_of(3, **ALONE)
    past = store.open()["a"]
    past.forget(but(2))
    store.clock.seconds -= YEAR
    assert past.prune().packs == 0 and [checkpoint.step for checkpoint in past.dropped] == [2]


def test_a_run_at_rest_forgets_too() -> None:
    """No record is written but the one that asks the store what time it is; and none where nothing waits."""
    store = store_of(3, **ALONE)
    past = store.open()["a"]
    past.forget(but(2))
    store.clock.seconds += WEEK
    assert past.prune().packs > 0
    slots = past._history().slots
    assert past.prune().packs == 0 and past._history().slots == slots


def test_what_rules_free_is_not_what_waits() -> None:
    """A run's own rules free at once what they drop, and leave what was dropped by hand for its time."""
    store = Store(**ALONE, anchor_ratio=0.0)
    run = store.open().run("a", keep=everystep.last(3)).track(rng=False)
    for step in (1, 2, 3):
        run.save(step, state=state_of(step)).wait()
    run.forget(but(2))
    for step in (4, 5, 6, 7):
        run.save(step, state=state_of(step)).wait()
    run._writer.wait()
    assert [checkpoint.step for checkpoint in run.dropped if checkpoint.step != 1] == [2]
    store.clock.seconds += WEEK
    run.save(8, state=state_of(8)).wait()
    run.close()
    assert live(store.open()) == [6, 7, 8] and 2 not in [checkpoint.step for checkpoint in run.dropped]
    assert set(store.packs()) == store.read_by()


# readers -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_freed_while_somebody_holds_it() -> None:
    store = store_of(4, **ALONE)
    past = store.open()["a"]
    gone, thin = past.at(2), past.at(3)
    assert gone.leaves() and thin.leaves()  # their manifests are read
    past.forget(but(2), only(1, 4), undo_seconds=0)
    store.open()["a"].prune()
    with pytest.raises(CheckpointRetired, match="step 2 has been dropped"):
        gone.load()
    with pytest.raises(CheckpointRetired, match="step 3 has been thinned"):
        thin.load()
    assert same(thin.load(only="params"), state_of(3)["params"])
    assert same(past.at(3).load(), thinned(state_of(3)))


def test_what_was_freed_does_not_come_back() -> None:
    store = store_of(3, **ALONE)
    past = store.open()["a"]
    second = past.at(2).id
    with pytest.raises(NotFound, match="was not dropped"):
        bring_back(past._vault, [second], "me")
    past.forget(but(2))
    late = store.open()["a"]
    assert [checkpoint.id for checkpoint in late.dropped] == [second]
    past.prune(now=True)
    with pytest.raises(Conflict, match="step 2 has been freed") as caught:
        bring_back(late._vault, [second], "me")
    assert caught.value.do == "it is gone for good"
    assert live(store.open()) == [1, 3]


# many at once ------------------------------------------------------------------------------------------------------


class Outside(Seam):
    """Real threads and the real clock; asks no other program."""

    def ask(self, *command: str, seconds: float = 3.0) -> str | None:
        return None


class Crowd:
    """A process that saves, and others that drop, free, bring back and read, all at the same time."""

    def __init__(self, saves: int, **rules: Any) -> None:
        self.storage, self.saves, self.rules = MemoryStorage(), saves, rules
        self.over = threading.Event()
        self.errors: list[BaseException] = []
        self.seen: dict[str, int] = {"drops": 0, "loads": 0, "retired": 0, "freed": 0, "brought back": 0}

    def open(self) -> Repository:
        return Repository(Place(self.storage, Outside(), Settings(chunk_bytes_max=1 << 14, pack_bytes_max=1 << 15)))

    def state(self, step: int) -> dict[str, Any]:
        """About 100 kB."""
        weights = np.random.default_rng(0).standard_normal(12_000).astype(np.float32) + np.float32(1e-3 * step)
        return {"params": {"w": weights}, "opt_state": {"m": weights[::-1] * 2}, "step": step}

    def whole(self, checkpoint: everystep.Checkpoint) -> bool:
        """In full or thinned: that may change while it is read."""
        state, expected = checkpoint.load(), self.state(checkpoint.step)
        return same(state, expected) or same(state, thinned(expected))

    def write(self) -> None:
        with self.open().run("a", **self.rules).track(rng=False) as run:
            for step in range(1, self.saves + 1):
                run.save(step, state=self.state(step)).wait()

    def drop(self, seed: int) -> Iterator[None]:
        drawn = random.Random(seed)
        past = self.open()["a"]
        while True:
            rest = drawn.randrange(5)
            keep = everystep.last(4) | everystep.when(lambda kept, rest=rest: kept.step % 5 != rest)
            past.forget(keep, drawn.choice([None, everystep.last(3)]), force=True, undo_seconds=drawn.choice([0, WEEK]))
            self.seen["drops"] += 1
            if drawn.random() < 0.2:
                try:
                    self.seen["brought back"] += len(past.undo())
                except (NotFound, Conflict):
                    pass
            self.seen["freed"] += past.prune(now=drawn.random() < 0.5).packs
            yield

    def read(self, seed: int) -> Iterator[None]:
        drawn = random.Random(seed)
        past = self.open()["a"]
        while True:
            found = past.checkpoints(all=True)
            try:
                assert self.whole(drawn.choice(found))
                self.seen["loads"] += 1
            except CheckpointRetired:
                self.seen["retired"] += 1
            yield

    def run(self, *others: Callable[[], Iterator[None]]) -> None:
        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  the test raises it
                self.errors.append(error)
                self.over.set()

        def repeat(steps: Iterator[None]) -> None:
            while not self.over.is_set():
                next(steps)

        def write() -> None:
            try:
                self.write()
            finally:
                self.over.set()

        with self.open().run("a").track(rng=False) as run:  # so that there is something to look at
            run.save(0, state=self.state(0)).wait()
        threads = [threading.Thread(target=guarded, args=(write,))]
        threads += [threading.Thread(target=guarded, args=(lambda work=work: repeat(work()),)) for work in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize("rules", [{}, {"keep": everystep.last(20)}], ids=["all kept", "rules"])
def test_collection_beside_a_process_that_saves(rules: dict[str, Any]) -> None:
    crowd = Crowd(120 if rules else 200, **rules)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a new line begins", EverystepWarning)
        crowd.run(lambda: crowd.drop(1), lambda: crowd.drop(2), lambda: crowd.read(3))
    seen = [[c.id for c in crowd.open()["a"].checkpoints(all=True)] for _ in range(2)]
    assert seen[0] == seen[1] and len(seen[0]) > 3
    for checkpoint in crowd.open()["a"].checkpoints(all=True):
        assert crowd.whole(checkpoint)
    assert crowd.open()["a"].latest.step == crowd.saves and crowd.open().check().ok
    assert crowd.seen["drops"] > 20 and crowd.seen["loads"] > 20 and crowd.seen["freed"] > 100, crowd.seen
    crowd.open()["a"].prune(now=True)
    store = Store(**WHOLE_PACKS)
    store.storage = crowd.storage
    assert set(store.packs()) == store.read_by()


def test_reading_the_run_that_saves() -> None:
    """What one looks at does not change while its own background thread commits, drops and frees."""
    pause = sys.getswitchinterval()
    repo = Repository(Place(MemoryStorage(), Outside(), Settings()))
    sys.setswitchinterval(1e-6)
    try:
        with repo.run("a", keep=everystep.last(150)).track(rng=False) as run:
            for step in range(1, 301):
                saved = run.save(step, state={"w": np.arange(5) + step}, metrics={"loss": 1.0})
                while step > 1 and not (saved.done and not run._writer.busy):
                    steps = [checkpoint.step for checkpoint in run.checkpoints(all=True)]
                    assert steps == list(range(steps[0], steps[-1] + 1)) and step - 2 < steps[-1] <= step
                    assert len(steps) <= 151 and len(run.checkpoints()) <= 151
                    assert run.best("loss").step <= step and len(run.dropped) <= step and run.tags == {}
                    assert run.metric_names == ["loss"] and len(run.series("loss")) <= step
    finally:
        sys.setswitchinterval(pause)
    assert live(repo) == list(range(151, 301))


# no more work and memory than there is to free ---------------------------------------------------------------------


def test_a_collection_reads_no_data_and_asks_once_for_each_pack() -> None:
    for count in (8, 32):
        store = store_of(count, **WHOLE_PACKS)
        packs = len(store.packs())
        counted = FaultyStorage(store.storage)
        past = store.open(storage=counted)["a"]
        past.forget(everystep.every(2), undo_seconds=0)
        counted.calls.clear()
        tracemalloc.start()
        try:
            freed = past.prune()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        verbs = [verb for verb, _ in counted.calls]
        assert freed.packs > 0 and verbs.count("delete") == freed.packs
        assert verbs.count("stat") <= packs + 2 and verbs.count("put_new") == 1
        assert verbs.count("list") == 2, "the packs, and what a probe may have left beside the runs"
        assert [key for verb, key in counted.calls if verb in ("get", "put") and "/packs/" in key] == []
        assert peak < 2000 * packs + 200_000, peak


def test_what_a_save_frees_costs_the_same_however_much_is_kept() -> None:
    store = Store(**WHOLE_PACKS)
    counted = FaultyStorage(store.storage)
    costs = []
    with store.open(storage=counted).run("a", keep=everystep.every(2) | everystep.last(1)).track(rng=False) as run:
        for step in range(1, 41):
            counted.calls.clear()
            run.save(step, state=state_of(step)).wait()
            run._writer.wait()
            costs.append(sorted(verb for verb, _ in counted.calls if verb != "delete"))
    assert live(store.open()) == list(range(2, 41, 2))
    assert costs[3] == costs[19] == costs[39] and "stat" not in costs[39], costs[39]
