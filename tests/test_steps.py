"""A run of steps that was interrupted and resumed is the run that never was: bit for bit, wherever it was cut."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import LEAVES, Done, Job, WithoutGit, go, new_repository, one_thread, scramble
from torch import nn

import everystep
from everystep import EverystepWarning, Mismatch, Repository, Run, UsageError
from everystep.schema import LoadReport
from everystep.seam import Seam

__all__ = ["one_thread"]
TOTAL = 12


def open_run(repo: Repository, job: Job, **options: Any) -> Run:
    return repo.run("r", **options).track(**job.tracked)


@cache
def whole(total: int = TOTAL) -> Done:
    """The training as it is without everystep."""
    job = Job()
    for step in range(1, total + 1):
        job.train(step)
    return job.done()


def check(first: Job, resumed: Job, from_step: int, total: int = TOTAL) -> None:
    """Both parts together are the whole run."""
    end = resumed.done()
    assert end.seen == whole(total).seen[from_step:]
    assert first.seen == whole(total).seen[: len(first.seen)]
    assert end.picture == whole(total).picture


def test_the_loop_and_its_saves_change_nothing() -> None:
    for save_every in (None, 1, 5):
        job = Job()
        with open_run(new_repository(), job) as run:
            loop = run.steps(TOTAL, save_every=save_every)
            assert len(loop) == TOTAL
            go(run, job, loop)
        assert job.done() == whole()


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("save_every", [1, 3, 5])
@pytest.mark.parametrize("cut", range(1, TOTAL + 1))
def test_cut_anywhere_and_resumed(cut: int, save_every: int, how: str) -> None:
    repo, first = new_repository(), Job()
    with open_run(repo, first) as run:
        go(run, first, run.steps(TOTAL, save_every=save_every), cut, LEAVES[how])
    # A step whose loop goes on is saved when due; one that is left in the middle is not.
    saved = cut if how == "stop" else (cut - 1) // save_every * save_every
    resumed = Job(seed=77 if saved else 1)
    with open_run(repo, resumed) as run:
        loop = run.steps(TOTAL, save_every=save_every)
        assert loop.step == saved
        if saved:
            assert run.report is not None and run.report.exact, run.report
        go(run, resumed, loop)
        assert run.stopped is None
    check(first, resumed, saved)
    assert repo["r"].latest.step == TOTAL


def test_cut_after_each_step_in_turn() -> None:
    repo, parts = new_repository(), []
    for cut in range(1, TOTAL + 1):
        job = Job(seed=100 + cut if parts else 1)
        with open_run(repo, job) as run:
            go(run, job, run.steps(TOTAL), cut, LEAVES["stop"])
        parts.append(job)
    end = job.picture()
    assert list(itertools.chain.from_iterable(job.seen for job in parts)) == whole().seen
    assert end == whole().picture
    steps = [checkpoint.step for checkpoint in repo["r"].checkpoints()]
    assert steps == list(range(1, TOTAL + 1))


def test_the_state_is_restored_when_steps_is_called() -> None:
    """Not when the first step is asked for: what the program looks at, or draws, in between is the restored one."""
    repo, first = new_repository(), Job()
    with open_run(repo, first) as run:
        go(run, first, run.steps(TOTAL, save_every=4), 5)
    resumed = Job(seed=5)
    with open_run(repo, resumed) as run:
        loop = run.steps(TOTAL)
        middle = Job()
        for step in range(1, 5):
            middle.train(step)
        expected = middle.picture()
        scramble(3)
        run.resume()
        assert resumed.picture() == expected
        go(run, resumed, loop)
    check(first, resumed, 4)


def test_one_object_loops_again() -> None:
    """The save of the last step may still be under way when the next loop begins: it is what the loop goes on from."""
    job = Job()
    with open_run(new_repository(), job) as run:
        for total in (3, 4, 9, TOTAL):
            go(run, job, run.steps(total))
            assert run.step is None
    assert job.done() == whole()


def test_a_loop_in_pieces() -> None:
    job = Job()
    with open_run(new_repository(), job) as run:
        loop = run.steps(TOTAL, save_every=2)
        for _ in range(5):
            go(run, job, itertools.islice(loop, 3))
        assert list(loop) == []
    assert job.seen == whole().seen


def test_total_reached_and_grown() -> None:
    repo, first = new_repository(), Job()
    with open_run(repo, first) as run:
        go(run, first, run.steps(5))
    again = Job(seed=9)
    with open_run(repo, again) as run:
        assert len(run.steps(5)) == 0
        assert list(run.steps(5)) == list(run.steps(3)) == []
    assert len(repo["r"].checkpoints()) == 1
    grown = Job(seed=10)
    with open_run(repo, grown) as run:
        go(run, grown, run.steps(TOTAL))
    check(first, grown, 5)


def test_a_loop_without_an_end() -> None:
    repo, job = new_repository(), Job()
    with open_run(repo, job) as run:
        loop = run.steps(save_every=5)
        with pytest.raises(TypeError, match="no length"):
            len(loop)
        go(run, job, loop, TOTAL, LEAVES["stop"])
    assert job.done() == whole()
    assert [c.step for c in repo["r"].checkpoints()] == [5, 10, 12]


def test_what_the_loop_says_of_itself() -> None:
    job = Job()
    with open_run(new_repository(), job) as run:
        assert run.step is None
        for step in run.steps(4, save_every=3):
            job.train(step)
            assert run.step == step
            if step == 3:
                run.stop("enough")
        assert (run.step, run.stopped) == (None, "enough")
        for step in run.steps(4):
            job.train(step)
        assert run.stopped is None
    assert [c.reason for c in run.checkpoints()] == ["enough", "the last step"]


def test_loops_that_make_no_sense() -> None:
    run = new_repository().run("r")
    for total in (-1, 1.5, "5", True):
        with pytest.raises(UsageError, match="the total is a count"):
            run.steps(total)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs to know what"):
        run.steps(5, save_every=1)
    for save_every in (0, -1, 2.5, "3", True):
        with pytest.raises(UsageError, match="positive number"):
            run.track(model=nn.Linear(1, 1)).steps(5, save_every=save_every)  # type: ignore[arg-type]


def test_an_explicit_state_in_a_loop() -> None:
    """Arrays that the program rebinds (JAX, NumPy): saved by hand inside the loop, loaded by hand after it resumed."""
    repo = new_repository()

    def train(until: int) -> np.ndarray[Any, Any]:
        with repo.run("r") as run:
            loop = run.steps(8)
            weights = run.latest.load(only="w") if loop.step else np.zeros(4)
            for step in loop:
                weights = weights * 0.5 + np.random.rand(4)
                if step % 2 == 0:
                    run.save(step, state={"w": weights})
                if step == until:
                    break
        return weights

    scramble(1)
    reference = np.zeros(4)
    for _ in range(8):
        reference = reference * 0.5 + np.random.rand(4)
    scramble(1)
    train(until=5)
    scramble(2)
    assert train(until=99).tobytes() == reference.tobytes()


# ------------------------------------------------------------------------------------------ is it exact, and why not


def resume_and_report(repo: Repository, job: Job, **options: Any) -> LoadReport:
    with pytest.warns(EverystepWarning, match="not exact") as said, open_run(repo, job) as run:
        run.resume(**options)
        assert run.report is not None
    assert all(reason in str(said[0].message) for reason in run.report.inexact)
    return run.report


def saved_once(seam: Seam | None = None) -> Repository:
    repo, job = new_repository(seam), Job()
    with open_run(repo, job) as run:
        go(run, job, run.steps(2))
    return repo


def test_another_number_of_threads_is_said() -> None:
    threads = torch.get_num_threads()
    repo = saved_once()
    try:
        torch.set_num_threads(threads + 1)
        report = resume_and_report(repo, Job())
    finally:
        torch.set_num_threads(threads)
    assert report.inexact == [f"torch: was {threads}, is {threads + 1}"]
    assert report.complete and not report.exact


class Surroundings(WithoutGit):
    """Another environment."""

    def __init__(self) -> None:
        super().__init__()
        self.variables: dict[str, str] = {}

    def environ(self, name: str) -> str | None:
        return self.variables.get(name)


def test_other_surroundings_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seam = Surroundings()
    repo = saved_once(seam)
    seam.variables = {"OMP_NUM_THREADS": "3"}
    assert resume_and_report(repo, Job()).inexact == ["OMP_NUM_THREADS: was not set, is 3"]
    seam.variables = {}
    monkeypatch.setattr(torch, "__version__", "1.13.0")
    assert "is 1.13.0" in resume_and_report(repo, Job()).inexact[0]


def test_random_states_that_are_not_kept_are_said() -> None:
    repo, job = new_repository(), Job()
    with open_run(repo, job) as run:
        run.track(rng=False).save(1).wait()
    before = Job(seed=4)
    state = torch.get_rng_state()
    with open_run(repo, before) as run:
        assert run.resume() == 1
        assert run.report is not None and run.report.inexact == ["random states are not tracked (rng=False)"]
    assert torch.equal(torch.get_rng_state(), state)


def test_rng_false_is_not_forgotten_by_the_next_track() -> None:
    job, repo = Job(), new_repository()
    run = repo.run("r").track(rng=False, model=job.model)
    run.track(average=job.average)
    checkpoint = run.save(1).wait()
    assert {leaf.path.split("/")[0] for leaf in checkpoint.leaves()} == {"model", "average"}
    run.close()


# ----------------------------------------------------------------------------------------------- in another process

SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from _train import Job
import everystep

job = Job(seed=int(sys.argv[3]))
run = everystep.open(sys.argv[2]).run("r").track(**job.tracked)
saved = None
for step in run.steps(12):
    job.train(step)
    if step == int(sys.argv[4]):
        saved.wait()
        os._exit(9)
    if step % 2 == 0:
        saved = run.save(step)
run.close()
assert run.report.exact, run.report
print(job.done().digest)
"""


def in_a_process(place: Path, seed: int, die_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(place), str(seed), str(die_at)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_killed_processes_go_on_as_one(tmp_path: Path) -> None:
    for seed, die_at in ((1, 5), (50, 8)):
        died = in_a_process(tmp_path, seed, die_at)
        assert died.returncode == 9, died.stderr
    last = in_a_process(tmp_path, 60, die_at=0)
    assert last.returncode == 0, last.stderr
    assert last.stdout.strip() == whole().digest
    past = everystep.open(str(tmp_path))["r"]
    assert [c.step for c in past.checkpoints()] == [2, 4, 6, 8, 10, 12]
    assert [s["continues"] for s in past.sessions()] == [None, past.at(4).id, past.at(6).id]


def test_a_mismatch_leaves_the_run_as_it_is() -> None:
    repo = saved_once()
    other = Job(seed=2)
    other.model = nn.Linear(2, 2)
    before = other.picture()
    with repo.run("r").track(model=other.model) as run:
        with pytest.raises(Mismatch, match="nothing was changed"):
            run.steps(5)
        assert other.picture() == before
        loop = run.steps(5, strict=False)
        assert loop.step == 2
        assert run.report is not None and run.report.missing
