"""What the door refuses, warns of and raises later; and what happens to a run that nobody closes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import new_repository, one_thread
from torch import nn

import everystep
from everystep import EverystepWarning, Repository, SaveAbandoned, StorageError, StorageFull, Unsupported, UsageError
from everystep.storage import MemoryStorage
from everystep.storage.faulty import FaultyStorage

__all__ = ["one_thread"]


def state_of(step: int) -> dict[str, Any]:
    return {"w": np.full(1000, step)}


# ------------------------------------------------------------------------------------------- refused at once


@pytest.mark.parametrize(
    "target",
    [
        np.zeros(3), torch.zeros(3), nn.Parameter(torch.zeros(3)), {"w": np.zeros(3)}, [torch.zeros(1)], 5, 0.1, "text",
        None, lambda: 1, (1, 2), nn.Linear, torch.optim.SGD, sys.stdout, object(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_has_no_state_that_lives_in_it_cannot_be_tracked(target: Any) -> None:
    run = new_repository().run("r")
    with pytest.raises(Unsupported, match="where: thing") as caught:
        run.track(model=nn.Linear(1, 1), thing=target)
    assert "save(state=…)" in str(caught.value)
    with pytest.raises(UsageError, match="nothing to save"):
        run.save(1)
    assert not run._tracked, "half of the call was taken"


def test_open_files_cannot_be_tracked_or_saved(tmp_path: Path) -> None:
    run = new_repository().run("r")
    with open(tmp_path / "log", "w") as file:
        with pytest.raises(Unsupported, match="where: log"):
            run.track(log=file)
        with pytest.raises(Unsupported, match="where: state/log"):
            run.save(1, state={"log": file})
    run.close()


def test_names_that_are_taken() -> None:
    run = new_repository().run("r")
    for name in ("state", "rng", "loop"):
        if name != "rng":
            with pytest.raises(UsageError, match="is taken"):
                run.track(**{name: nn.Linear(1, 1)})


def test_code_in_a_state_is_refused_by_its_path() -> None:
    repo = new_repository()
    run = repo.run("r")
    for value, path in ((lambda: 1, "state/opt/[1]/f"), ({1, 2}, "state/opt/[1]/f"), (object(), "state/opt/[1]/f")):
        with pytest.raises(Unsupported, match="could only be restored by running code") as caught:
            run.save(1, state={"opt": [np.zeros(2), {"f": value}]})
        assert caught.value.where == path and caught.value.do
    assert run.latest is None
    run.save(1, state={"opt": [np.zeros(2)]})
    run.close()
    assert repo["r"].latest is not None


@pytest.mark.parametrize("step", [-1, 1.0, "1", True, None])
def test_steps_are_counts(step: Any) -> None:
    with pytest.raises(UsageError, match="count of completed updates"):
        new_repository().run("r").save(step, state={})


def test_calls_that_make_no_sense() -> None:
    repo = new_repository()
    for options in ({"when_busy": "never"}, {"rank": 2, "ranks": 2, "launch": "a"}, {"ranks": 2}, {"rank": -1}):
        with pytest.raises(UsageError):
            repo.run("r", **options)
    with pytest.raises(UsageError, match="could skip on one rank"):
        repo.run("r", rank=0, ranks=2, launch="a", when_busy="skip")
    for name in ("", "x" * 200):
        with pytest.raises(UsageError):
            repo.run(name)
    assert not repo.exists


def test_nothing_is_written_before_the_first_save(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "runs"))
    run = repo.run("r", config={"lr": 1}).track(model=nn.Linear(1, 1))
    run.record(loss=1.0)
    run.attach("a", b"b")
    assert run.latest is None and run.checkpoints() == [] and repo.runs() == [] and not repo.exists
    run.close()
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------------------- warned of


def test_a_step_without_a_change_is_warned_of() -> None:
    repo, weights = new_repository(), np.zeros(100)
    run = repo.run("r")
    run.save(1, state={"w": weights, "count": 1})
    run.save(2, state={"w": weights, "count": 2}).wait()
    with pytest.warns(EverystepWarning, match="step 2: no byte changed since step 1"):
        run.save(3, state={"w": weights + 1, "count": 2}).wait()
    run.save(4, state={"w": weights + 2, "count": 2})
    run.save(4, state={"w": weights + 2, "count": 2})
    run.save(5, state={"w": weights + 2, "count": 2})
    with pytest.warns(EverystepWarning, match="step 5: no byte changed since step 4"):
        run.close()


def test_a_state_without_arrays_is_not() -> None:
    with new_repository().run("r") as run:
        for step in (1, 2, 3):
            run.save(step, state={"count": step})


def test_what_is_not_captured_is_said_once() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3), persistent=False)
            self.register_buffer("kept", torch.zeros(3))

    run = new_repository().run("r")
    model = nn.Sequential(nn.Linear(1, 1), Rotary())
    with pytest.warns(EverystepWarning, match=r"model\.1\.table: non-persistent buffer") as said:
        run.track(model=model)
    assert len(said) == 1 and "kept" not in str(said[0].message)
    run.track(model=model)
    run.close()


def test_lazy_modules_are_said_when_they_are_needed() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    run = new_repository().run("r").track(model=model)
    with pytest.raises(Unsupported, match="deferred parameter"):
        run.save(1)
    model(torch.zeros(1, 3))
    run.save(1)
    run.close()


def test_what_is_tracked_after_the_resume_is_said() -> None:
    repo = new_repository()
    with repo.run("r").track(a=nn.Linear(1, 1), b=nn.Linear(1, 1)) as run:
        run.save(1)
    with repo.run("r") as run:
        first, second = nn.Linear(1, 1), nn.Linear(1, 1)
        run.track(a=first)
        run.resume(strict=False)
        run.track(a=first)
        with pytest.warns(EverystepWarning, match="b: tracked after the run was resumed"):
            run.track(b=second)


# ------------------------------------------------------------------------------------------------ raised later


def failing(verb: str, at: int | None, error: Callable[[], everystep.Error]) -> tuple[Repository, FaultyStorage]:
    storage = FaultyStorage(MemoryStorage(), at, error, verbs=(verb,))
    return new_repository(storage=storage, put_attempts=1), storage


def test_an_error_in_the_background_is_raised_at_the_next_call() -> None:
    """Once; what was saved before and after it stands, and what went with the failed save goes with the next."""
    repo, storage = failing("put", None, lambda: StorageFull("the disk is full"))
    run = repo.run("r")
    run.save(1, state=state_of(1)).wait()
    storage.fail_at = len(storage.calls)
    run.config["lr"] = 0.5
    run.attach("a", b"b")
    run.record(loss=2.0)
    run.save(2, state=state_of(2))
    with pytest.raises(StorageFull, match="the disk is full"):
        run.save(3, state=state_of(3))
    checkpoint = run.save(4, state=state_of(4)).wait()
    assert [c.step for c in run.checkpoints()] == [1, 4] and checkpoint.parent == run.at(1).id
    assert run.config == {"lr": 0.5} and run.attachment("a") == b"b" and run.series("loss") == [(2, 2.0)]
    run.close()


def test_an_error_in_the_background_is_raised_at_resume_and_at_close() -> None:
    for call in ("resume", "close"):
        repo, storage = failing("put", None, lambda: StorageFull("the disk is full"))
        run = repo.run("r")
        run.save(1, state=state_of(1)).wait()
        storage.fail_at = len(storage.calls)
        run.save(2, state=state_of(2))
        with pytest.raises(StorageFull):
            getattr(run, call)()
        if call == "resume":
            assert run.resume() == 1
        run.close()
        assert repo["r"]._history().closed, "the run was not given back"
        assert [c.step for c in repo["r"].checkpoints()] == [1]


def test_an_error_that_was_waited_for_is_not_raised_again() -> None:
    repo, storage = failing("put", 0, lambda: StorageError("no"))
    run = repo.run("r")
    saved = run.save(1, state=state_of(1))
    for _ in range(2):
        with pytest.raises(StorageError, match="no"):
            saved.wait()
    assert saved.done
    storage.fail_at = None
    run.save(2, state=state_of(2))
    run.close()


def test_the_error_of_the_program_says_more() -> None:
    """Leaving a `with` block by an error: that error comes out, and the other is told."""
    told: list[str] = []
    repo, _ = failing("put", 0, lambda: StorageFull("the disk is full"))
    repo._place.seam.tell = told.append  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), repo.run("r") as run:
        run.save(1, state=state_of(1))
        _ = 1 / 0
    assert len(told) == 1 and "the disk is full" in told[0]


def test_an_unexpected_error_is_raised_too() -> None:
    class Broken(MemoryStorage):
        def put(self, key: str, data: Iterable[Any]) -> None:
            raise ZeroDivisionError("a bug")

    run = new_repository(storage=Broken()).run("r")
    with pytest.raises(everystep.Error, match="failed unexpectedly: ZeroDivisionError") as caught:
        run.save(1, state=state_of(1)).wait()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    run.close()


class Slow(MemoryStorage):
    """A place whose uploads wait until they are let through."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def put(self, key: str, data: Iterable[Any]) -> None:
        assert self.gate.wait(60)
        super().put(key, data)


@pytest.fixture
def slow() -> Iterator[Slow]:
    storage = Slow()
    yield storage
    storage.gate.set()


def test_a_busy_store_skips_if_told_to(slow: Slow) -> None:
    run = new_repository(storage=slow).run("r", when_busy="skip")
    slow.gate.clear()
    first = run.save(1, state=state_of(1))
    run.record(loss=2.0, step=2)
    skipped = run.save(2, state=state_of(2))
    assert skipped.skipped and skipped.done and skipped.wait() is None and not first.done
    slow.gate.set()
    assert first.wait().step == 1
    assert run.save(3, state=state_of(3)).wait().step == 3
    assert [c.step for c in run.checkpoints()] == [1, 3] and run.series("loss") == [(2, 2.0)]
    run.close()


def test_the_last_step_is_never_skipped(slow: Slow) -> None:
    model = nn.Linear(2, 2)
    with new_repository(storage=slow).run("r", when_busy="skip").track(model=model) as run:
        for step in run.steps(5, save_every=1):
            with torch.no_grad():
                model.weight.add_(1)
            if step == 1:
                slow.gate.clear()
            if step == 5:
                threading.Timer(0.2, slow.gate.set).start()
    steps = [c.step for c in run.checkpoints()]
    assert steps[0] == 1 and steps[-1] == 5 and len(steps) < 5


def test_a_busy_store_is_waited_for(slow: Slow) -> None:
    run = new_repository(storage=slow).run("r")
    slow.gate.clear()
    weights = np.ones(1000)
    run.save(1, state={"w": weights})
    threading.Timer(0.2, slow.gate.set).start()
    weights[:] = 2
    run.save(2, state={"w": weights})
    weights[:] = 3
    run.close()
    assert [c.load(only="w")[0] for c in run.checkpoints()] == [1.0, 2.0]


def test_waiting_has_a_limit(slow: Slow) -> None:
    run = new_repository(storage=slow).run("r")
    slow.gate.clear()
    saved = run.save(1, state=state_of(1))
    with pytest.raises(SaveAbandoned, match="still under way"):
        saved.wait(timeout=0.05)
    slow.gate.set()
    assert saved.wait(timeout=60).step == 1
    run.close()


# ------------------------------------------------------------------------------------------ the end of a process


def program(body: str, place: Path) -> subprocess.CompletedProcess[str]:
    head = "import os, sys\nimport numpy as np\nimport everystep\nrun = everystep.open(sys.argv[1]).run('r')\n"
    command = [sys.executable, "-c", head + body, str(place)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_program_that_forgets_to_close(tmp_path: Path) -> None:
    body = "for step in (1, 2):\n    run.record(loss=step)\n    run.save(step, state={'w': np.full(4 << 20, step)})\n"
    done = program(body + "run.record(step=3, loss=3)\n", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    past = everystep.open(str(tmp_path))["r"]
    assert [c.step for c in past.checkpoints()] == [1, 2] and [v for _, v in past.series("loss")] == [1, 2, 3]
    assert past.sessions()[0]["ended"] == "closed"


def test_a_program_that_fails(tmp_path: Path) -> None:
    done = program("run.save(1, state={'w': np.zeros(4 << 20)})\n1 / 0\n", tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert [c.step for c in everystep.open(str(tmp_path))["r"].checkpoints()] == [1]


def test_an_error_that_nobody_was_told_comes_at_the_end(tmp_path: Path) -> None:
    body = """
import shutil
run.save(1, state={'w': np.zeros(4)}).wait()
shutil.rmtree(sys.argv[1])
open(sys.argv[1], 'w').close()
run.save(2, state={'w': np.ones(4)})
"""
    done = program(body, tmp_path / "runs")
    assert done.returncode == 0 and "everystep:" in done.stderr and "do:" in done.stderr


def test_a_forked_child_does_not_touch_the_run(tmp_path: Path) -> None:
    body = """
saved = run.save(1, state={'w': np.zeros(8 << 20)})
child = os.fork()
if child == 0:
    try:
        run.save(2, state={'w': np.ones(4)})
    except everystep.UsageError as error:
        print("refused", "forked" in str(error), flush=True)
    try:
        run.resume()
    except everystep.UsageError:
        print("refused too", flush=True)
    run.close()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
child = os.fork()
if child == 0:
    with run:
        sys.exit(7)  # a second child, which leaves by the block and by the end of the process
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
saved.wait()
run.save(3, state={'w': np.ones(4)})
run.close()
"""
    done = program(body, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused True\nrefused too\n", "")
    past = everystep.open(str(tmp_path))["r"]
    assert [c.step for c in past.checkpoints()] == [1, 3]
    assert len(past.sessions()) == 1 and past.sessions()[0]["ended"] == "closed"


def test_a_closed_run_can_be_saved_to_again() -> None:
    repo = new_repository()
    run = repo.run("r")
    run.save(1, state=state_of(1))
    run.close()
    run.close()
    run.save(2, state=state_of(2))
    run.close()
    assert [c.step for c in repo["r"].checkpoints()] == [1, 2] and len(repo["r"].sessions()) == 2
    assert repo["r"].at(2).parent == repo["r"].at(1).id


def test_a_run_that_begins_anew_is_warned_of() -> None:
    """Nothing is lost: what was there is another line."""
    repo = new_repository()
    with repo.run("r") as run:
        run.save(7, state=state_of(7))
    with repo.run("r") as run:
        with pytest.warns(EverystepWarning, match="goes up to step 7, and step 1 continues none of it"):
            run.save(1, state=state_of(1))
        run.save(2, state=state_of(2))
    assert [c.step for c in repo["r"].checkpoints()] == [1, 2]
    assert [c.step for c in repo["r"].checkpoints(all=True)] == [7, 1, 2]


def test_nothing_is_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **named: Any) -> Any:
        raise AssertionError("pickle was used")

    repo, model = new_repository(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, never)
    for _ in range(2):
        with repo.run("r", config={"a": (1, "b")}).track(model=model, optimizer=optimizer) as run:
            for _ in run.steps((run.latest.step if run.latest else 0) + 2, save_every=1):
                optimizer.zero_grad()
                model(torch.randn(4, 3)).sum().backward()
                optimizer.step()
    assert [c.step for c in repo["r"].checkpoints()] == [1, 2, 3, 4]
    assert repo["r"].latest.load().keys() == {"model", "optimizer", "rng"}


# texts that no record can hold ---------------------------------------------------------------------------------------

HALF = "half a character \ud800"


@pytest.mark.parametrize("text", [HALF, 5, None, ""], ids=["surrogate", "number", "none", "empty"])
def test_names_that_no_record_can_hold_are_refused_at_once(tmp_path: Path, text: Any) -> None:
    """A record that cannot be read again is never written: the run goes on as if nothing had been said."""
    repo = everystep.open(str(tmp_path))
    state = {"x": np.zeros(3)}
    run = repo.run("a")
    run.save(1, state=state).wait()
    past = repo["a"]
    run.record(step=2, loss=0.5)
    attempts = [
        lambda: run.save(2, state=state, metrics={text: 2}),
        lambda: run.record(**{text: 1}) if isinstance(text, str) else run.save(2, state=state, metrics={text: 1}),
        lambda: run.config.update({text: 1}),
        lambda: repo.run("b", config={text: 1}),
        lambda: run.attach(text, b""),
        lambda: run.note(text),
        lambda: past.at(1).note(text),
        lambda: past.at(1).tag(text),
        lambda: past.at(1).tag_version(text),
    ]
    slots = past._history().slots
    for attempt in attempts:
        with pytest.raises(UsageError):
            attempt()
    assert past._history().slots == slots
    run.save(2, state={"x": np.ones(3)}).wait()
    run.close()
    again = everystep.open(str(tmp_path))
    assert again.check().ok and again["a"].at(2).metrics == {"loss": 0.5}, "nothing was lost on the way"


def test_texts_with_half_characters_are_kept_where_they_are_values(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path)).run("a", config={"path": HALF}) as run:
        run.save(1, state={"x": HALF}, metrics={"note": HALF}).wait()
    past = everystep.open(str(tmp_path))["a"]
    assert past.config["path"] == past.at(1).metrics["note"] == past.at(1).load()["x"] == HALF


def test_a_folder_named_runs_is_not_a_repository_that_lost_its_head(tmp_path: Path) -> None:
    """Others write into a folder of that name, too."""
    (tmp_path / "runs" / "Nov21_host").mkdir(parents=True)
    (tmp_path / "runs" / "Nov21_host" / "events.out").write_bytes(b"x")
    with pytest.raises(everystep.ForeignRepository):
        everystep.open(str(tmp_path))
    with everystep.open(str(tmp_path / "mine")).run("a") as run:
        run.save(1, state={"x": np.zeros(3)})
    (tmp_path / "mine" / "format.json").unlink()
    with pytest.raises(everystep.Damaged, match=r"lost its format\.json"):
        everystep.open(str(tmp_path / "mine"))
