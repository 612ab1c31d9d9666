"""Many ranks, many checkpoints, many leaves, on a simulated object store: how many requests, and what they survive."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _thorough import THOROUGH

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # they are no part of the package

from benchmarks import ranks_at_scale as scale  # noqa: E402
from benchmarks.simulated import Model, SimulatedStorage, Stuck  # noqa: E402

from everystep import SaveAbandoned  # noqa: E402
from everystep.errors import Unreachable  # noqa: E402
from everystep.settings import DEFAULT  # noqa: E402
from everystep.storage.retrying import RetryingStorage  # noqa: E402

RANKS = 48
QUICK = replace(DEFAULT, rank_deadline_seconds=60.0)


# the simulation itself -----------------------------------------------------------------------------------------------


def test_time_passes_only_while_everybody_waits() -> None:
    with scale.world() as world:
        seen: list[tuple[float, str]] = []

        def one(name: str, pause: float) -> None:
            for _ in range(3):
                world.sleep(pause)
                seen.append((world.time, name))

        assert world.run([lambda: one("a", 1.0), lambda: one("b", 0.4)]) == [None, None]
        assert [(round(at, 3), name) for at, name in seen] == [
            (0.4, "b"), (0.8, "b"), (1.0, "a"), (1.2, "b"), (2.0, "a"), (3.0, "a"),
        ]  # fmt: skip


def test_what_waits_for_ever_is_told() -> None:
    with scale.world() as world:
        condition = world.condition()

        def waits() -> None:
            with condition:
                condition.wait_for(lambda: False)

        with pytest.raises(Stuck):
            world.run([waits])
        assert world.run([]) == []


def test_locks_conditions_and_pools_of_the_simulation() -> None:
    with scale.world() as world:
        lock, condition, order, ready = world.lock(), world.condition(), [], []

        def holder() -> None:
            with lock, lock:
                world.sleep(1.0)
                order.append("first")
            with condition:
                ready.append(True)
                condition.notify_all()

        def waiter() -> None:
            world.sleep(0.1)
            with lock:
                order.append("second")
            with condition:
                assert condition.wait_for(lambda: bool(ready), 5.0)
                assert not condition.wait_for(lambda: False, 2.0)
            order.append(round(world.time, 3))

        def pooled() -> None:
            pool = world.pool(2, "everystep-requests")
            done = list(pool.map(lambda pause: (world.sleep(pause), pause)[1], [3.0, 1.0, 1.0], 4))
            order.append((done, round(world.time, 3)))

        assert world.run([holder, waiter, pooled]) == [None] * 3
        assert order == ["first", "second", 3.0, ([3.0, 1.0, 1.0], 3.0)]


def test_a_store_that_is_asked_too_often_refuses() -> None:
    with scale.world() as world:
        storage = SimulatedStorage(world, Model(reads_per_second=10, slow_share=0.0))
        storage.inner.put_new("a", b"1")
        answers: list[str] = []

        def ask(store: Any) -> None:
            try:
                store.get("a")
                answers.append("there")
            except Unreachable:
                answers.append("503")

        world.run([lambda: ask(storage) for _ in range(25)])
        assert (answers.count("there"), answers.count("503")) == (10, 15) and storage.bill.refused == 15
        world.run([lambda: ask(RetryingStorage(storage, world, DEFAULT)) for _ in range(40)])
        assert answers.count("there") == 50 and answers.count("503") == 15
        assert storage.bill.busiest >= 25 and world.time > 3


# many ranks ----------------------------------------------------------------------------------------------------------


def test_many_ranks_save_one_checkpoint_in_few_requests() -> None:
    fleet = scale.Fleet(RANKS)
    second = fleet.save(2)[-1]
    assert not fleet.errors and [len(ids) for ids in fleet.ids] == [1, 1], "all ranks were told the same checkpoint"
    asked = second.requests
    assert asked["PUT"] == 2 * RANKS + (RANKS - 1) + 2, "two packs of each, receipts, rank 0's manifest, a record"
    assert asked["HEAD"] == 2 * (RANKS - 1) and asked["LIST"] <= 10
    looks = asked["GET"] - (RANKS - 1)
    assert looks <= RANKS * (2 + second.known / DEFAULT.poll_seconds * 2), "one look a pause, at the most"
    assert second.refused == 0 and second.committed < 5
    checkpoints = scale.repository(fleet.storage, DEFAULT)["run"].checkpoints()
    assert [one.step for one in checkpoints] == [1, 2] and checkpoints[-1].ranks == RANKS
    state = checkpoints[-1].load()
    for rank in (0, 7, RANKS - 1):
        assert state["model"][f"w{rank}"].tobytes() == fleet._state(rank, 1)["model"][f"w{rank}"].tobytes()


def test_the_same_seed_is_the_same_bill() -> None:
    one, other = (scale.Fleet(12).save(1) for _ in range(2))
    assert one == other


def test_a_store_that_throttles_is_waited_for() -> None:
    fleet = scale.Fleet(RANKS, model=Model(writes_per_second=40, reads_per_second=60))
    save = fleet.save(1)[0]
    assert not fleet.errors and save.refused > 50 and len(fleet.ids[0]) == 1


def test_ranks_that_wait_long_look_less_and_less() -> None:
    """Rank 0 comes five minutes late: the others do not ask every .2 s for so long."""
    fleet = scale.Fleet(RANKS, late={0: 300.0})
    save = fleet.save(1)[0]
    assert not fleet.errors
    assert save.requests["GET"] / RANKS < 250, "every .2 s it would be 3,000"
    assert 300 < save.committed < 312 and save.known - save.committed < 8


@pytest.mark.parametrize("pace, least, most", [(20.0, 5, 40), (1e9, 60, 300)])
def test_all_ranks_together_keep_the_pace(pace: float, least: int, most: int) -> None:
    """All but one have delivered at one moment, and wait for the commit: their looks are spread over time."""
    fleet = scale.Fleet(RANKS, replace(DEFAULT, polls_per_second=pace), spread=0.0, late={1: 40.0})
    fleet.save(2)
    assert not fleet.errors
    begun = 2 * scale.APART
    looks = [fleet.bills[1].by_second["read", int(begun) + second] for second in range(2, 6)]
    assert least <= max(looks) <= most


def test_a_rank_that_never_comes_is_named_to_all() -> None:
    fleet = scale.Fleet(RANKS, QUICK, late={7: None, 30: None})
    save = fleet.save(1)[0]
    assert set(fleet.errors) == set(range(RANKS)) - {7, 30}
    assert all(isinstance(one, SaveAbandoned) and one.missing == (7, 30) for one in fleet.errors.values())
    assert save.requests["LIST"] < 5 * RANKS + 80, "five of each to open the run"
    assert not scale.repository(fleet.storage, QUICK)["run"].checkpoints()


@pytest.mark.parametrize("most, saves, requests", [(256 << 10, 1, 1), (256 << 10, 2, 1), (0, 1, RANKS)])
def test_the_manifest_of_many_ranks_lies_together(
    most: int, saves: int, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's part comes with its receipt, and rank 0 stores it, with short pages that the save before has too;
    one that is too long has a pack of its own."""
    monkeypatch.setattr("everystep.save.commit.HAND_OVER_BYTES_MAX", most)
    fleet = scale.Fleet(RANKS)
    fleet.save(saves)
    assert not fleet.errors
    asked = scale.open_manifest(fleet.storage, DEFAULT)
    assert asked["requests of the manifest"] == requests + 1, "and a look at the log"
    repo = scale.repository(fleet.storage, DEFAULT)
    assert repo.check().ok and repo["run"].checkpoints()[-1].ranks == RANKS


def test_collection_removes_the_receipts_of_saves_that_are_over() -> None:
    fleet = scale.Fleet(4)
    fleet.save(2)
    receipts = [key for key in fleet.storage.inner.objects if "/save/" in key]
    assert len(receipts) == 6
    scale.repository(fleet.storage, DEFAULT)["run"].prune()
    assert not [key for key in fleet.storage.inner.objects if "/save/" in key]


# many checkpoints, many leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [2, 250, 9_999, *([109_999] if THOROUGH else [21_999])])
def test_a_long_run_is_opened_in_few_requests(records: int) -> None:
    checkpoints = min(records - 1, 100_000)
    made = scale.long_log(checkpoints, more=records - 1 - checkpoints)
    asked = scale.open_log(made)
    assert asked["checkpoints"] == checkpoints and asked["records"] == records
    whole, rest = divmod(records, 100)
    volumes = whole // 100 + whole // 10 % 10 + whole % 10
    assert asked["requests"] <= volumes + rest + 10 < 200
    assert asked["volume bytes"] < asked["log bytes"]


def test_the_manifest_of_a_large_state_is_three_requests_and_next_to_nothing() -> None:
    found = scale.measure_leaves(20_000)
    assert found["requests of the manifest"] <= 4, "three, and one look at the log"
    for which in ("first", "further"):
        assert found[which] < 1e-4 * found["state"], f"{which}: more than .01 % of the state"
    assert found["leaves"] == 20_000


def test_the_manifest_of_a_small_state_is_one_request() -> None:
    with scale.world() as world:
        storage = SimulatedStorage(world)
        with scale.repository(storage, DEFAULT).run("run") as run:
            run.track(rng=False)
            run.save(1, state={"w": np.arange(1000), "b": np.ones(3)}).wait()
        asked = scale.open_manifest(storage, DEFAULT)
        assert asked["requests of the manifest"] == 2, "one, and one look at the log"


def test_the_tables_are_made_of_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--ranks", "2", "5", "--checkpoints", "120", "--leaves", "40", "--results", str(tmp_path)]
    scale.main(options)
    out = capsys.readouterr().out
    assert "One save by many ranks together" in out and "120" in out and "40 leaves of 4 MB" in out
    assert [path.name for path in tmp_path.iterdir()] == ["ranks-at-scale.json"]
