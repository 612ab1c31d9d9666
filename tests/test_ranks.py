"""Several ranks save one checkpoint together, through the store alone: all of it is visible, or none."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _ranks import GLOBAL, QUICK, RANKS, ROWS, WIDE, state_of, whole_of
from _train import WithoutGit, new_repository, one_thread, scramble
from torch import nn

import everystep
from everystep import (
    Conflict,
    EverystepWarning,
    Part,
    Repository,
    Run,
    RunTakenOver,
    SaveAbandoned,
    Settings,
    StorageFull,
    UsageError,
)
from everystep.adapters import numpy as numpy_adapter
from everystep.save.part import PartWriter
from everystep.schema import Box, Described
from everystep.storage import MemoryStorage
from everystep.vault import Place
from everystep.vault.names import pack_key, record_key
from everystep.vault.record import Abandon, unpack_record

__all__ = ["one_thread"]


def together(work: Callable[[int], Any], ranks: Iterable[int] = range(RANKS)) -> list[Any]:
    """What each rank's work came to, its result or its error."""
    results: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001  the test looks at it
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return [results[rank] for rank in sorted(results)]


def beside(storage: MemoryStorage, **settings: Any) -> Repository:
    """The repository as another process sees it."""
    return Repository(Place(storage, WithoutGit(), Settings(**{**QUICK, **settings})))


def runs_on(storage: MemoryStorage, launch: str = "job", **settings: Any) -> list[Run]:
    return [
        beside(storage, **settings).run("r", rank=rank, ranks=RANKS, launch=launch).track(rng=False)
        for rank in range(RANKS)
    ]


def same(loaded: Any, step: int) -> bool:
    whole = whole_of(step)
    assert loaded.keys() == whole.keys() and loaded["params"].keys() == whole["params"].keys()
    return all(loaded["params"][name].tobytes() == value.tobytes() for name, value in whole["params"].items())


# ------------------------------------------------------------------------------------------------------ together


def test_ranks_save_one_checkpoint() -> None:
    storage = MemoryStorage()
    runs = runs_on(storage)

    def work(rank: int) -> list[str]:
        return [runs[rank].save(step, state=state_of(rank, step)).wait().id for step in (1, 2, 3)]

    ids = together(work)
    assert ids[0] == ids[1] == ids[2] and len(set(ids[0])) == 3
    together(lambda rank: runs[rank].close())
    past = beside(storage)["r"]
    assert [c.step for c in past.checkpoints()] == [1, 2, 3] and past.at(2).ranks == RANKS
    for step in (1, 2, 3):
        loaded = past.at(step).load()
        assert same(loaded, step)
        assert past.at(step).load(only="params/wide").tobytes() == (WIDE + step).tobytes()
        assert past.at(step).load(only="params/only2").tolist() == [2, 2]
    leaves = {leaf.path: leaf.shape for leaf in past.at(1).leaves()}
    assert leaves["params/wide"] == WIDE.shape and leaves["params/only1"] == (2,)
    assert beside(storage).check().ok
    assert past.sessions()[0]["ended"] == "closed" and len(past.sessions()) == 1


def test_a_part_of_a_leaf_counts_its_global_shape() -> None:
    for start, shape in (((5, 0), (ROWS, 5)), ((0,), (ROWS, 5)), ((-1, 0), (ROWS, 5)), ((0, 0), (2, 5))):
        with pytest.raises(everystep.Unsupported, match="lies outside a leaf") as caught:
            new_repository().run("r").save(1, state={"w": Part(GLOBAL[:3], start, shape)})
        assert caught.value.where == "state/w"


def test_flat_boxes() -> None:
    """As sharding wrappers cut: a range of the elements in C order, across rows."""

    storage = MemoryStorage()
    flat = GLOBAL.reshape(-1)
    cuts = [0, 11, 12, 35]

    class Flat:
        def __init__(self, rank: int) -> None:
            self.start, self.stop = cuts[rank], cuts[rank + 1]

    def describe(value: Any, path: str) -> Any:
        if not isinstance(value, Flat):
            return plain(value, path)
        box = Box((value.start,), (value.stop - value.start,), flat=True)
        return Described("<f4", GLOBAL.shape, "array", flat[value.start : value.stop], None, (box,))

    plain = numpy_adapter.describe
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(numpy_adapter, "describe", describe)
        runs = runs_on(storage)
        together(lambda rank: runs[rank].save(1, state={"w": Flat(rank)}).wait())
        together(lambda rank: runs[rank].close())
    finally:
        patch.undo()
    assert beside(storage)["r"].at(1).load(only="w").tobytes() == GLOBAL.tobytes()


def test_parts_that_leave_a_hole_are_seen() -> None:
    storage = MemoryStorage()
    runs = runs_on(storage)
    together(lambda rank: runs[rank].save(1, state={"w": Part(GLOBAL[:2], (2 * rank, 0), GLOBAL.shape)}).wait())
    with pytest.raises(everystep.Damaged, match="hold 30 of 35 elements"):
        beside(storage)["r"].at(1).load()
    together(lambda rank: runs[rank].close())


# --------------------------------------------------------------------------------------------- somebody is missing


def test_a_missing_rank_is_named_on_every_rank_and_nothing_is_visible() -> None:
    storage = MemoryStorage()
    runs = runs_on(storage, rank_deadline_seconds=2.0)
    together(lambda rank: runs[rank].save(1, state=state_of(rank, 1)).wait())
    found = together(lambda rank: runs[rank].save(2, state=state_of(rank, 2)).wait(), (0, 2))
    for error in found:
        assert isinstance(error, SaveAbandoned), error
        assert error.missing == (1,) and "rank 1" in str(error)
    assert [c.step for c in beside(storage)["r"].checkpoints()] == [1]
    # The rank that was missing comes late: it is told, too, and the next save of all is whole.
    late = together(lambda rank: runs[rank].save(2, state=state_of(rank, 2)).wait(), (1,))
    assert isinstance(late[0], SaveAbandoned) and late[0].missing == (1,)
    ids = together(lambda rank: runs[rank].save(3, state=state_of(rank, 3)).wait().id)
    assert len(set(ids)) == 1
    past = beside(storage)["r"]
    assert [c.step for c in past.checkpoints()] == [1, 3]
    assert past.at(3).parent == past.at(1).id and same(past.at(3).load(), 3)
    together(lambda rank: runs[rank].close())
    assert beside(storage).check().ok


def test_a_rank_that_left_a_save_out_is_not_behind_for_ever() -> None:
    storage = MemoryStorage()
    runs = runs_on(storage, rank_deadline_seconds=2.0)
    together(lambda rank: runs[rank].save(1, state=state_of(rank, 1)).wait())
    for step in (2, 3):
        left_out = together(lambda rank, step=step: runs[rank].save(step, state=state_of(rank, step)).wait(), (0, 2))
        assert all(isinstance(error, SaveAbandoned) and error.missing == (1,) for error in left_out)
    for step in (4, 5):
        ids = together(lambda rank, step=step: runs[rank].save(step, state=state_of(rank, step)).wait().id)
        assert len(set(ids)) == 1, ids
    together(lambda rank: runs[rank].close())
    past = beside(storage)["r"]
    assert [c.step for c in past.checkpoints()] == [1, 4, 5] and same(past.at(5).load(), 5)


def test_a_rank_that_is_started_again_alone() -> None:
    """Its saves are those of the others, never one that was settled before: and what it had said itself still holds."""
    storage = MemoryStorage()
    runs = runs_on(storage, rank_deadline_seconds=5.0)
    for step in (1, 2):
        together(lambda rank, step=step: runs[rank].save(step, state=state_of(rank, step)).wait())
    runs[1].save(3, state=state_of(1, 3))  # and dies before the others come to it
    while not any(key.startswith("runs/r/save/1/3/") for key in storage.objects):
        time.sleep(0.01)
    lost, runs[1] = runs[1], beside(storage, rank_deadline_seconds=5.0).run("r", rank=1, ranks=RANKS, launch="job")
    assert runs[1].track(rng=False).resume() == 2
    for step in (3, 4):
        found = together(lambda rank, step=step: runs[rank].save(step, state=state_of(rank, step)).wait())
        assert len({one.id for one in found}) == 1 and [one.step for one in found] == [step] * RANKS
    again = runs[1].save(4, state=state_of(1, 4))
    assert together(lambda rank: runs[rank].save(4, state=state_of(rank, 4)).wait().id, (0, 2)) == [found[0].id] * 2
    assert again.wait().id == found[0].id
    lost.close()
    together(lambda rank: runs[rank].close())
    past = beside(storage)["r"]
    assert [c.step for c in past.checkpoints()] == [1, 2, 3, 4]
    assert all(same(past.at(step).load(), step) for step in (1, 2, 3, 4))


def test_two_processes_that_are_one_rank() -> None:
    storage = MemoryStorage()
    runs = runs_on(storage, rank_deadline_seconds=2.0)
    twin = beside(storage, rank_deadline_seconds=2.0).run("r", rank=1, ranks=RANKS, launch="job").track(rng=False)
    runs[0].resume()
    first = runs[1].save(1, state=state_of(1, 1))
    while not any(key.startswith("runs/r/save/") for key in storage.objects):
        time.sleep(0.01)
    with pytest.raises(Conflict, match="another process has saved step 1 as rank 1 of this launch"):
        twin.save(1, state=state_of(2, 1)).wait()
    ids = together(lambda rank: runs[rank].save(1, state=state_of(rank, 1)).wait().id, (0, 2))
    assert ids == [first.wait().id] * 2 and same(beside(storage)["r"].at(1).load(), 1)
    twin.close()
    together(lambda rank: runs[rank].close())


def test_a_rank_at_another_step() -> None:
    storage = MemoryStorage()
    runs = runs_on(storage)
    found = together(lambda rank: runs[rank].save(5 if rank == 2 else 4, state=state_of(rank, 4)).wait())
    assert isinstance(found[0], Conflict) and "rank 2 saves step 5 where rank 0 saves step 4" in str(found[0])
    assert all(isinstance(error, SaveAbandoned) for error in found[1:])
    assert beside(storage)["r"].latest is None
    ids = together(lambda rank: runs[rank].save(6, state=state_of(rank, 6)).wait().id)
    assert len(set(ids)) == 1 and same(beside(storage)["r"].at(6).load(), 6)
    together(lambda rank: runs[rank].close())


def test_whatever_ends_the_save_of_rank_0_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    runs = runs_on(storage, rank_deadline_seconds=600.0)
    together(lambda rank: runs[rank].save(1, state=state_of(rank, 1)).wait())
    write = PartWriter.write

    def fail(self: PartWriter, snapshot: Any, rank: int) -> None:
        if rank == 0:
            raise MemoryError("no room")
        write(self, snapshot, rank)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "write", fail)
        found = together(lambda rank: runs[rank].save(2, state=state_of(rank, 2)).wait())
    assert "MemoryError" in str(found[0]) and all(isinstance(error, SaveAbandoned) for error in found[1:])
    assert len({one.id for one in together(lambda rank: runs[rank].save(3, state=state_of(rank, 3)).wait())}) == 1
    together(lambda rank: runs[rank].close())


class FullFor(MemoryStorage):
    """A place that is full for some writers."""

    def __init__(self) -> None:
        super().__init__()
        self.full: set[int] = set()

    def put(self, key: str, data: Iterable[Any]) -> None:
        if threading.current_thread() in self.full_threads():
            raise StorageFull("no space left", where=key)
        super().put(key, data)

    def full_threads(self) -> set[Any]:
        return {run._writer._thread for run in self.runs if run.rank in self.full and run._writer is not None}

    runs: list[Run]


@pytest.mark.parametrize("rank_in_trouble", [0, 1])
def test_a_rank_whose_disk_is_full(rank_in_trouble: int) -> None:
    storage = FullFor()
    storage.runs = runs = runs_on(storage, rank_deadline_seconds=2.0, put_attempts=1)
    together(lambda rank: runs[rank].save(1, state=state_of(rank, 1)).wait())
    storage.full = {rank_in_trouble}
    found = together(lambda rank: runs[rank].save(2, state=state_of(rank, 2)).wait())
    storage.full = set()
    assert isinstance(found[rank_in_trouble], StorageFull)
    assert all(isinstance(e, SaveAbandoned) for rank, e in enumerate(found) if rank != rank_in_trouble), found
    assert [c.step for c in beside(storage)["r"].checkpoints()] == [1]
    ids = together(lambda rank: runs[rank].save(3, state=state_of(rank, 3)).wait().id)
    assert len(set(ids)) == 1 and same(beside(storage)["r"].at(3).load(), 3)
    together(lambda rank: runs[rank].close())


DYING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import everystep
from everystep.save import commit
from _ranks import QUICK, RANKS, state_of

rank = int(sys.argv[3])
run = everystep.open(sys.argv[2], settings=everystep.Settings(**{**QUICK, "rank_deadline_seconds": 4.0})).run(
    "r", rank=rank, ranks=RANKS, launch=sys.argv[4]
)
print(run.resume(), flush=True)
last = run.latest.step if run.latest else 0
run.save(last + 1, state=state_of(rank, last + 1)).wait()
if rank == 1 and sys.argv[5] == "die":
    commit.put_receipt = lambda *args: os._exit(9)  # its packs are there, its word is not
try:
    run.save(last + 2, state=state_of(rank, last + 2)).wait()
except everystep.SaveAbandoned as error:
    print("abandoned", error.missing, flush=True)
    os._exit(3)
run.close()
"""


def launch(place: Path, name: str, how: str) -> list[tuple[int, list[str], str]]:
    command = [sys.executable, "-c", DYING, str(Path(__file__).parent), str(place)]
    started = [
        subprocess.Popen([*command, str(rank), name, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    ended = [one.communicate(timeout=120) for one in started]
    return [(one.returncode, out.splitlines(), errors) for one, (out, errors) in zip(started, ended)]


def test_a_rank_that_dies_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """Three processes; one is killed behind its packs. The next launch, of the same name, goes on."""
    found = launch(tmp_path, "torchrun", "die")
    assert [code for code, _, _ in found] == [3, 9, 3], found
    assert found[0][1] == found[2][1] == ["0", "abandoned (1,)"]
    past = everystep.open(str(tmp_path))["r"]
    assert [c.step for c in past.checkpoints()] == [1] and same(past.at(1).load(), 1)
    found = launch(tmp_path, "torchrun", "live")
    assert [(code, out) for code, out, _ in found] == [(0, ["1"])] * RANKS, found
    assert [c.step for c in past.checkpoints()] == [1, 2, 3] and same(past.at(3).load(), 3)
    assert [s["ended"] for s in past.sessions()] == ["died", "closed"]
    assert everystep.open(str(tmp_path)).check().ok


# ------------------------------------------------------------------------------------------------- going on


def test_every_rank_gets_its_own_random_state_back() -> None:
    storage = MemoryStorage()
    runs = [beside(storage).run("r", rank=r, ranks=2, launch="a").track(model=nn.Linear(2, 2)) for r in range(2)]
    state = runs[0]._tracked["model"].state_dict()
    runs[1]._tracked["model"].load_state_dict(state)
    together(lambda rank: runs[rank]._open(), range(2))
    drawn = []
    saves = []
    for rank in (1, 0):  # one after the other: threads would share one generator
        scramble(rank)
        saves.append(runs[rank].save(1))
        drawn.append(float(torch.rand(())))
    assert len({saved.wait().id for saved in saves}) == 1
    together(lambda rank: runs[rank].close(), range(2))

    again = [beside(storage).run("r", rank=r, ranks=2, launch="b").track(model=nn.Linear(2, 2)) for r in range(2)]
    for rank in (0, 1):
        scramble(9)
        assert again[rank].resume() == 1
        assert again[rank].report.exact, again[rank].report
        assert float(torch.rand(())) == drawn[1 - rank]
    together(lambda rank: again[rank].close(), range(2))


class Hurt(MemoryStorage):
    """The same place, as seen from a host that reads something of one object wrong."""

    def __init__(self, other: MemoryStorage, key: str) -> None:
        super().__init__()
        self.objects, self._times, self._lock, self.key = other.objects, other._times, other._lock, key

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        found = super().get(key, start, stop)
        return memoryview(bytes(byte ^ 1 for byte in found)) if key == self.key else found


def test_no_rank_goes_back_over_damage_alone() -> None:
    storage, models = MemoryStorage(), [nn.Linear(40, 40) for _ in range(RANKS)]

    def started(launch: str, key: str = "") -> list[Run]:
        places = [Hurt(storage, key if rank == 1 else "") for rank in range(RANKS)]
        return [
            beside(place).run("r", rank=rank, ranks=RANKS, launch=launch).track(rng=False, model=models[rank])
            for rank, place in enumerate(places)
        ]

    runs = started("first")
    for step in (1, 2):
        before = set(storage.objects)
        with torch.no_grad():
            for model in models:
                model.weight.fill_(step)
                model.bias.fill_(step)
        together(lambda rank, step=step: runs[rank].save(step).wait())
    together(lambda rank: runs[rank].close())
    newest = beside(storage)["r"].at(2)._open().manifest.views[0]
    runs = started("second", pack_key("runs/r/", newest.spot(0).pack))
    assert pack_key("runs/r/", newest.spot(0).pack) not in before
    found = together(lambda rank: runs[rank].resume())
    assert (found[0], found[2]) == (2, 2) and isinstance(found[1], everystep.Damaged)
    assert "step 2 is damaged where rank 1 reads it" in str(found[1]) and "rewind" in found[1].do
    assert together(lambda rank: runs[rank].rewind(1)) == [1] * RANKS
    assert all(float(model.weight.detach().sum()) == 1600.0 for model in models)
    assert len({saved.id for saved in together(lambda rank: runs[rank].save(2).wait())}) == 1
    together(lambda rank: runs[rank].close())


def test_another_number_of_ranks() -> None:
    storage = MemoryStorage()
    models = [nn.Linear(4, 4) for _ in range(RANKS)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    runs = [run.track(model=model) for run, model in zip(runs_on(storage), models)]
    together(lambda rank: runs[rank].save(1).wait())
    together(lambda rank: runs[rank].close())
    alone = nn.Linear(4, 4)
    with beside(storage).run("r").track(rng=False, model=alone) as run:
        with pytest.warns(EverystepWarning, match="saved by 3 ranks, resumed by 1"):
            assert run.resume() == 1
        assert torch.equal(alone.weight, models[0].weight)
        assert run.report is not None and run.report.complete and not run.report.exact
        run.save(2, state={"a": 1}).wait()
    assert [(c.step, c.ranks) for c in beside(storage)["r"].checkpoints()] == [(1, 3), (2, 1)]


def test_a_superseded_launch_is_told_on_every_rank() -> None:
    storage = MemoryStorage()
    old = runs_on(storage, "first")
    together(lambda rank: old[rank].save(1, state=state_of(rank, 1)).wait())
    new = runs_on(storage, "second")
    together(lambda rank: new[rank].resume())
    found = together(lambda rank: old[rank].save(2, state=state_of(rank, 2)).wait())
    assert all(isinstance(error, RunTakenOver) for error in found), found
    closed = together(lambda rank: old[rank].close())
    assert all(isinstance(error, RunTakenOver) for error in closed)
    ids = together(lambda rank: new[rank].save(2, state=state_of(rank, 2)).wait().id)
    assert len(set(ids)) == 1 and same(beside(storage)["r"].at(2).load(), 2)
    together(lambda rank: new[rank].close())


def test_a_rank_without_its_rank_0() -> None:
    storage = MemoryStorage()
    run = runs_on(storage, rank_deadline_seconds=0.2)[1]
    with pytest.raises(SaveAbandoned, match="rank 0 of launch 'job' has not opened the run"):
        run.save(1, state=state_of(1, 1))
    assert storage.objects.keys() <= {"format.json"}


def test_a_rank_that_counts_other_ranks() -> None:
    """Rank 0 says 2, this one 3: the checkpoints of the one would be whole without what the other has."""
    storage = MemoryStorage()
    first = beside(storage, rank_deadline_seconds=0.2).run("r", rank=0, ranks=2, launch="job").track(rng=False)
    assert first.resume() == 0
    other = beside(storage, rank_deadline_seconds=0.2).run("r", rank=1, ranks=3, launch="job").track(rng=False)
    with pytest.raises(SaveAbandoned, match="launch 'job', of 2 ranks, on ") as caught:
        other.resume()
    assert "the same launch id and number of ranks" in caught.value.do
    first.close()


class Launched(WithoutGit):
    """Started by a launcher."""

    def __init__(self, **variables: str) -> None:
        super().__init__()
        self.variables = variables

    def environ(self, name: str) -> str | None:
        return self.variables.get(name)


def test_launchers_say_which_start_it_is() -> None:
    for variables, expected in (
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}, "none-2"),
        ({"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}, "77.0-1"),
        ({"SLURM_JOB_ID": "77"}, "77.0-0"),
    ):
        assert new_repository(Launched(**variables)).run("r", rank=1, ranks=2)._launch == expected
    with pytest.raises(UsageError, match="need a launch id"):
        new_repository(Launched()).run("r", rank=1, ranks=2)


def test_the_process_group_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is made only after the run was named."""
    early = new_repository().run("r", launch="a")
    assert (early.rank, early.ranks) == (0, 1)
    monkeypatch.setattr("everystep.adapters.world", lambda: (1, 2))
    late = new_repository().run("r", launch="a")
    assert (late.rank, late.ranks) == (1, 2)
    early._vault.settings = Settings(rank_deadline_seconds=0.1, poll_seconds=0.01)
    with pytest.raises(SaveAbandoned, match="rank 0"):
        early.resume()
    assert (early.rank, early.ranks) == (1, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_anchor_that_was_freed_is_done_without(ranks: int) -> None:
    """The rules drop the anchor while nothing kept leans on it; what would lean on it next is written anew, by all."""
    repo = new_repository(chunk_bytes_max=65536, small_leaf_bytes=0, rank_deadline_seconds=20, poll_seconds=0.01)
    chance = np.random.default_rng(0)
    anchor = chance.normal(size=3000).astype(np.float32)
    others = [chance.normal(size=3000).astype(np.float32) for _ in range(3)]
    near = [anchor + np.float32(1e-6) * chance.normal(size=3000).astype(np.float32) for _ in range(3)]
    states = [anchor, *others, *near]

    def work(rank: int) -> list[str]:
        run = repo.run("r", keep=everystep.last(2), rank=rank, ranks=ranks, launch="x").track(rng=False)
        with run:
            return [
                run.save(step, state={"model": {f"w{rank}": state + rank}}).wait().id
                for step, state in enumerate(states, 1)
            ]

    first, *rest = together(work, range(ranks))
    assert all(ids == first for ids in rest)
    kept = repo["r"].checkpoints()
    assert [c.step for c in kept] == [6, 7]
    for checkpoint in kept:
        for rank in range(ranks):
            held = checkpoint.load()["model"][f"w{rank}"]
            assert held.tobytes() == (states[checkpoint.step - 1] + rank).tobytes()
    events = [event for _, event in _events(repo, "r")]
    assert ranks == 1 or any(isinstance(event, Abandon) and event.again for event in events), "the case did not occur"
    assert repo.check().ok


def _events(repo: Repository, name: str) -> list[tuple[int, Any]]:
    """(slot, event) of everything in a run's log."""
    vault = repo[name]._vault
    found = []
    for slot in range(vault.history().slots):
        key = record_key(vault.folder, slot)
        found += [(slot, event) for event in unpack_record(vault.storage.get(key), slot, key).events]
    return found
