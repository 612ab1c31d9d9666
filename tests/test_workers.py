"""What each worker records of itself: kept by rank with the next checkpoint, shown, and in nobody's way."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _cli import json_of, lines_of
from _train import new_repository, one_thread
from independent_reader import Run as IndependentRun

import everystep
from everystep import Checkpoint, EverystepWarning, Part, Repository, UsageError, formats
from everystep.cli.workers import WORKERS_SHOWN, spread_lines, spreads, worker_lines

__all__ = ["one_thread"]

WORKER = """
import sys
import numpy as np
import everystep

folder, rank = sys.argv[1], int(sys.argv[2])
repo = everystep.open(folder, settings=everystep.Settings(poll_seconds=0.01))
run = repo.run("r", rank=rank, ranks=2, launch="one").track(rng=False)
for step in (1, 2):
    run.record(worker=True, loss=rank + 0.5 * step, step_time=0.25, examples=64 * step)
    run.save(step, state={"w": np.arange(4.0) + step}, metrics={"val_loss": 1 / step}).wait()
run.close()
"""


def save(repo: Repository, step: int, state: Any = None, **numbers: Any) -> Checkpoint:
    with repo.run("r") as run:
        run.record(worker=True, **numbers)
        found = run.save(step, state={"w": np.arange(4.0)} if state is None else state).wait()
        assert isinstance(found, Checkpoint)
        return found


def train(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param += 1


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints that two processes saved together."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    started = [subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(rank)]) for rank in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    return folder


def test_each_process_says_its_own(by_two: Path) -> None:
    for checkpoint in everystep.open(str(by_two))["r"].checkpoints():
        step = checkpoint.step
        assert checkpoint.workers == [
            {
                "rank": rank, "host": socket.gethostname(),
                "loss": rank + 0.5 * step, "step_time": 0.25, "examples": 64 * step,
            }
            for rank in range(2)
        ]  # fmt: skip
        assert checkpoint.metrics == {"val_loss": 1 / step}, "what one worker says is no metric of the step"


def test_show_lists_the_workers(by_two: Path) -> None:
    document = json_of(by_two, "show", "r@2")
    assert document["workers"] == everystep.open(str(by_two))["r"].at(2).workers
    lines = lines_of(by_two, "show", "r@2")
    at = lines.index("workers")
    assert lines[at + 1].split() == ["rank", "host", "loss", "step_time", "examples"]
    assert [line.split() for line in lines[at + 2 : at + 4]] == [
        [str(rank), socket.gethostname(), f"{rank + 1:.4f}", "0.2500", "128"] for rank in range(2)
    ]
    with everystep.open(str(by_two)).run("other") as run:
        run.save(1, state={"w": np.ones(2)})
    assert "workers" not in lines_of(by_two, "show", "other@1") and json_of(by_two, "show", "other@1")["workers"] == []


def test_a_narrow_terminal_is_told_what_found_no_room(by_two: Path) -> None:
    worker = {"rank": 0, "host": "h", "loss": 1.0, "a_metric_with_a_long_name": 2.0, "another_metric": 3}
    head, _, note = (line.plain for line in worker_lines([worker], 40))
    assert head.split() == ["rank", "host", "loss"]
    assert note == "  no room for a_metric_with_a_long_name, another_metric"


def test_show_says_how_far_workers_are_apart(by_two: Path) -> None:
    spread = json_of(by_two, "show", "r@2")["spreads"]
    assert spread["loss"] == {
        "workers": 2, "least": 1.0, "least_rank": 0, "median": 1.5, "most": 2.0, "most_rank": 1,
    }  # fmt: skip
    lines = lines_of(by_two, "show", "r@2")
    at = lines.index("over workers")
    assert lines[at + 1].split() == ["metric", "least", "rank", "median", "most", "rank", "workers"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[at + 2 : at + 5]}
    assert rows["loss"] == ["1.0000", "0", "1.5000", "2.0000", "1", "2"]
    assert rows["step_time"] == ["0.2500"] * 3 + ["2"], "whose it is says nothing where all are alike"
    assert rows["examples"] == ["128", "128", "128", "2"]


def test_the_straggler_of_many_is_named_and_the_others_are_not_listed() -> None:
    workers: list[dict[str, Any]] = [
        {"rank": rank, "host": f"h{rank}", "step_time": 9.5 if rank == 700 else 0.25 + rank / 10_000}
        for rank in range(1024)
    ]
    workers[3] |= {"step_time": math.nan, "phase": "idle", "ok": True}
    workers[5] |= {"lonely": 1.0}
    found = spreads(workers)
    assert found.keys() == {"step_time"}, "texts, truths and what one alone has are not spread"
    time = found["step_time"]
    assert (time["workers"], time["least_rank"], time["most"], time["most_rank"]) == (1023, 0, 9.5, 700)
    assert time["median"] == pytest.approx(0.3012, abs=1e-3)
    (line,) = (line.plain for line in worker_lines(workers, 80))
    assert line == "  1024 ranks said something of themselves; --json lists each"
    assert len(list(worker_lines(workers[:WORKERS_SHOWN], None))) == WORKERS_SHOWN + 1
    assert [line.plain.split() for line in spread_lines(found, 80)][1] == [
        "step_time", "0.2500", "0", "0.3012", "9.5000", "700", "1023",
    ]  # fmt: skip
    assert spreads(workers[:1]) == {} and list(spread_lines({}, 80)) == []
    alike = [{"rank": rank, "host": "h", "n": (1, 2)[rank > 1]} for rank in range(4)]
    assert (spreads(alike)["n"]["least_rank"], spreads(alike)["n"]["most_rank"]) == (0, 2)


def test_it_is_in_nobodys_way(by_two: Path, tmp_path: Path) -> None:
    first, second = everystep.open(str(by_two))["r"].checkpoints()
    assert second.load().keys() == {"w"} and [leaf.path for leaf in second.leaves()] == ["w"]
    change = first.diff(second)
    assert change.values == [] and [leaf.path for leaf in change.changed] == ["w"]
    second.export(str(tmp_path / "out.npz"))
    assert formats.read(str(tmp_path / "out.npz")).state.keys() == {"w"}
    for commit in IndependentRun(by_two, "r").live:
        state, arrays = IndependentRun(by_two, "r").load(commit)
        assert state["worker"]["metrics"]["step_time"] == 0.25 and set(arrays) == {"state/w"}


def test_beside_tracked_objects_it_is_in_nobodys_way() -> None:
    repo = new_repository()
    model = torch.nn.Linear(2, 2)
    with repo.run("r").track(model=model) as run:
        for step in run.steps(4, save_every=2):
            train(model)
            run.record(worker=True, examples=step)
    two, four = repo["r"].checkpoints()
    assert [worker["examples"] for checkpoint in (two, four) for worker in checkpoint.workers] == [2, 4]
    assert four.load().keys() == {"model", "rng"}
    assert [value.path for value in two.diff(four).values] == ["loop/step"]
    with repo.run("r").track(model=model) as run:
        assert run.resume() == 4 and run.report is not None and run.report.complete


def test_it_stays_with_a_thinned_checkpoint() -> None:
    repo = new_repository()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with repo.run("r").track(model=model, optimizer=optimizer) as run:
        for step in run.steps(2, save_every=1):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            run.record(worker=True, loss=float(step))
    repo["r"].forget(keep_full=everystep.last(1), force=True)
    repo["r"].prune(now=True)
    first = repo["r"].at(1)
    assert first.thin and [worker["loss"] for worker in first.workers] == [1.0]


def test_checkpoints_without_it_answer_nothing() -> None:
    repo = new_repository()
    with repo.run("r") as run:
        assert run.save(1, state={"worker": {"host": "mine"}, "w": np.ones(2)}).wait().workers == []
        assert run.save(2, state={"worker": 7}).wait().load(only="worker") == 7, "a state's own name is its own"


def test_ranks_that_say_nothing_are_not_listed() -> None:
    import threading

    from _train import WithoutGit

    from everystep.storage import MemoryStorage
    from everystep.vault import Place

    storage = MemoryStorage()

    def work(rank: int) -> None:
        repo = Repository(Place(storage, WithoutGit(), everystep.Settings(poll_seconds=0.01)))
        with repo.run("r", rank=rank, ranks=3, launch="one") as run:
            if rank == 1:
                run.record(worker=True, loss=0.5)
            run.save(1, state={"w": Part(np.full(2, rank), (2 * rank,), (6,))}).wait()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    checkpoint = new_repository(storage=storage)["r"].latest
    assert checkpoint is not None and [(one["rank"], one["loss"]) for one in checkpoint.workers] == [(1, 0.5)]
    assert checkpoint.load()["w"].tolist() == [0, 0, 1, 1, 2, 2]


# -------------------------------------------------------------------------------------------------------- values


def test_values_come_back_as_they_were() -> None:
    given = {"nan": math.nan, "big": 2**70, "text": "idle", "none": None, "flag": True, "tiny": 5e-324}
    (worker,) = save(new_repository(), 1, **given).workers
    assert math.isnan(worker.pop("nan")) and worker == {
        "rank": 0, "host": socket.gethostname(), **{name: given[name] for name in given if name != "nan"}
    }  # fmt: skip


def test_tensors_are_held_as_they_are_now() -> None:
    loss, array = torch.ones((), requires_grad=True), np.ones(1, np.float32)
    repo = new_repository()
    with repo.run("r") as run:
        run.record(worker=True, loss=loss, scale=array)
        with torch.no_grad():
            loss += 5
        array += 5
        (worker,) = run.save(1, state=[np.ones(1)]).wait().workers
    assert (worker["loss"], worker["scale"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ({"loss": np.ones(2)}, "not one number"),
        ({"rank": 3}, "'rank' is said of every worker already"),
        ({"host": "me"}, "'host' is said of every worker already"),
        ({"text": "x" * 5000}, "'text' is a long text"),
        ({"step": 3, "loss": 1.0}, "belong to the next checkpoint"),
    ],
)
def test_what_is_refused(numbers: dict[str, Any], what: str) -> None:
    with new_repository().run("r") as run, pytest.raises(UsageError, match=what):
        run.record(worker=True, **numbers)


def test_its_names_cannot_be_tracked() -> None:
    with new_repository().run("r") as run, pytest.raises(UsageError, match="'worker' is taken"):
        run.track(worker=torch.nn.Linear(1, 1))


# ------------------------------------------------------------------------------------------------- which checkpoint


def test_a_step_that_is_saved_twice_is_one_checkpoint() -> None:
    """By hand, and then by the loop: what is said in between waits for the step after it."""
    repo = new_repository()
    model = torch.nn.Linear(1, 1)
    with repo.run("r").track(model=model) as run:
        for step in run.steps(3, save_every=1):
            train(model)
            run.record(worker=True, loss=float(step))
            if step == 2:
                run.save(2).wait()
                run.record(worker=True, loss=20.0, late=1)
    found = repo["r"].checkpoints()
    assert [checkpoint.step for checkpoint in found] == [1, 2, 3]
    assert [checkpoint.workers[0]["loss"] for checkpoint in found] == [1.0, 2.0, 3.0]
    assert found[2].workers[0]["late"] == 1 and "late" not in found[1].workers[0]


def test_after_a_rewind_a_step_says_what_is_new() -> None:
    repo = new_repository()
    model = torch.nn.Linear(1, 1)
    with repo.run("r").track(model=model) as run:
        for step in (1, 2):
            train(model)
            run.record(worker=True, loss=float(step))
            run.save(step).wait()
        run.rewind(1)
        train(model)
        run.record(worker=True, loss=7.0)
        assert run.save(2).wait().workers[0]["loss"] == 7.0


def test_what_no_save_took_along_is_told() -> None:
    run = new_repository().run("r")
    run.save(1, state=[np.ones(1)]).wait()
    run.record(worker=True, loss=1.0)
    with pytest.warns(EverystepWarning, match="metric 'loss' of this worker"):
        run.close()
