"""SIGTERM and SIGINT end a loop at its next top, with a save; handlers that were there are kept, and given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import Job, Numbers, go, new_repository, one_thread
from torch import nn
from torch.utils.data import DataLoader

import everystep
from everystep import EverystepWarning

__all__ = ["one_thread"]

HEAD = """
import os, signal, sys, time
import torch
import everystep

model = torch.nn.Linear(2, 2)
run = everystep.open(sys.argv[1]).run("r").track(model=model)

def train(step):
    with torch.no_grad():
        model.weight.add_(1)
    print(step, flush=True)
    if step == 3:
        sys.stdin.readline()

"""


@contextmanager
def program(place: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """A program that waits in the middle of step 3 until it is told to go on."""
    started = subprocess.Popen(
        [sys.executable, "-c", HEAD + body, str(place)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert started.stdout is not None
        for step in ("1", "2", "3"):
            assert started.stdout.readline().strip() == step
        yield started
    finally:
        started.kill()
        started.communicate()


def finish(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = started.communicate("go on\n", timeout=120)
    return started.returncode, out, errors


LOOP = """
for step in run.steps(10, save_every=5):
    train(step)
print("stopped", run.stopped, signal.getsignal(signal.SIGTERM) == before, flush=True)
run.close()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_step_is_finished_and_saved(name: str, tmp_path: Path) -> None:
    with program(tmp_path, "before = signal.getsignal(signal.SIGTERM)\n" + LOOP) as started:
        started.send_signal(signal.Signals[name])
        code, out, errors = finish(started)
    assert (code, out.split()) == (0, ["stopped", name, "True"]), errors
    latest = everystep.open(str(tmp_path))["r"].latest
    assert latest is not None and (latest.step, latest.reason) == (3, name)


def test_a_handler_of_the_user_is_called_and_given_back(tmp_path: Path) -> None:
    body = """
called = []
def before(number, frame):
    called.append(number)
signal.signal(signal.SIGTERM, before)
"""
    with program(tmp_path, body + LOOP + "print(called)") as started:
        started.send_signal(signal.SIGTERM)
        code, out, errors = finish(started)
    assert (code, out.split()) == (0, ["stopped", "SIGTERM", "True", "[15]"]), errors


def test_a_second_interrupt_is_python_s_own(tmp_path: Path) -> None:
    body = """
try:
    for step in run.steps(10, save_every=5):
        train(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            print("once", run.stopped, flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
except KeyboardInterrupt:
    print("twice", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
run.close()
"""
    with program(tmp_path, body) as started:
        code, out, errors = finish(started)
    assert (code, out.split()) == (0, ["once", "SIGINT", "twice", "True"]), errors


def test_a_second_termination_ends_the_process(tmp_path: Path) -> None:
    body = """
for step in run.steps(10, save_every=5):
    train(step)
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        print("once", run.stopped, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""
    with program(tmp_path, body) as started:
        code, out, errors = finish(started)
    assert (code, out.split()) == (-signal.SIGTERM, ["once", "SIGTERM"]), errors


# ------------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def handlers() -> Iterator[tuple[Any, Any]]:
    """Those that were there, which must be there afterwards."""
    before = tuple(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))
    yield before
    assert tuple(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)) == before


def now() -> tuple[Any, Any]:
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


def test_handlers_are_back_however_the_loop_is_left(handlers: tuple[Any, Any]) -> None:
    job = Job()
    run = new_repository().run("r").track(**job.tracked)
    for how in ("end", "break", "error", "stop", "next", "abandoned"):
        loop = run.steps((run.latest.step if run.latest else 0) + 3)
        assert now() == handlers, "before the loop has begun"
        if how == "next":
            next(loop)
            assert now() != handlers
            run.steps(100)
            assert now() == handlers, "the next loop has taken over"
            continue
        if how == "abandoned":
            next(loop)
            break
        try:
            for step in loop:
                assert all(handler not in handlers for handler in now())
                job.train(step)
                if how == "break":
                    break
                if how == "error":
                    raise ZeroDivisionError
                if how == "stop":
                    run.stop()
        except ZeroDivisionError:
            pass
        assert now() == handlers, how
        run._writer.wait()  # type: ignore[union-attr]
    run.close()
    assert now() == handlers


def test_batches_end_with_a_signal_too(handlers: tuple[Any, Any]) -> None:
    repo, job = new_repository(), Job()
    data = DataLoader(Numbers(), batch_size=4)
    with repo.run("r").track(**job.tracked) as run:
        for batch in run.batches(data, epochs=3):
            assert run.step is not None
            job.train(run.step, batch)
            if run.step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
                assert run.stopped == "SIGTERM"
        assert run.stopped == "SIGTERM"
    assert repo["r"].latest.step == 8 and len(job.seen) == 8  # type: ignore[union-attr]


def test_what_is_ignored_stays_ignored(handlers: tuple[Any, Any]) -> None:
    """As in a background job, which a Ctrl-C at the terminal is not meant for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with new_repository().run("r").track(model=nn.Linear(1, 1)) as run:
            for _ in run.steps(2):
                assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                os.kill(os.getpid(), signal.SIGINT)
            assert run.stopped is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loop_in_another_thread(handlers: tuple[Any, Any]) -> None:
    job, errors = Job(), []

    def work() -> None:
        try:
            with new_repository().run("r").track(**job.tracked) as run:
                for step in run.steps(5, save_every=2):
                    assert now() == handlers
                    job.train(step)
                    if step == 3:
                        run.stop()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and errors == [] and len(job.seen) == 3


def test_a_forked_child_ends_as_children_do(handlers: tuple[Any, Any]) -> None:
    """A loader's worker that is told to end must not take that for the trainer's loop."""
    with new_repository().run("r").track(model=nn.Linear(1, 1)) as run:
        for _ in run.steps(2):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(write, b"x")
                while True:
                    signal.pause()
            os.read(read, 1)
            os.kill(child, signal.SIGTERM)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
            os.close(read), os.close(write)
            assert run.stopped is None


def test_no_run_is_kept_alive_by_its_handler(handlers: tuple[Any, Any]) -> None:
    import gc
    import weakref

    job = Job()
    run = new_repository().run("r").track(model=job.model)
    go(run, Job(), run.steps(2))
    run.close()
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None
    assert torch.is_tensor(job.model[0].weight)


EXPLICIT = """
state = np.zeros(3)
with everystep.open(sys.argv[1]).run("x") as explicit:
    for step in explicit.steps(10):
        train(step)
        state = state + 1
        if step % 2 == 0:
            explicit.save(step, state={"w": state})
    if explicit.stopped and "save" in sys.argv:
        explicit.save(step, state={"w": state})
print("done", flush=True)
"""


@pytest.mark.parametrize("saves", [True, False])
def test_a_state_that_is_given_at_each_save_is_saved_behind_the_loop_or_missed_aloud(
    saves: bool, tmp_path: Path
) -> None:
    body = EXPLICIT if not saves else "sys.argv.append('save')\n" + EXPLICIT
    with program(tmp_path, "import numpy as np\n" + body) as started:
        started.send_signal(signal.SIGTERM)
        code, out, errors = finish(started)
    assert code == 0 and out.split() == ["done"], errors
    kept = everystep.open(str(tmp_path))["x"].latest
    assert kept is not None and kept.step == (3 if saves else 2)
    assert kept.load()["w"].tolist() == [kept.step] * 3
    said = (
        "SIGTERM ended the loop after step 3, which is not saved: a loop saves what is tracked, and nothing is; what is"
    )
    assert (said + " saved is step 2" in errors) == (not saves) and errors.count("if run.stopped: run.save") == (
        not saves
    )


def test_what_a_stop_costs_is_said_once_by_the_next_loop_or_at_the_end() -> None:
    run = new_repository().run("r")
    for _ in run.steps(5):
        run.stop()
    with pytest.warns(
        EverystepWarning, match="stop ended the loop after step 1, which is not saved.*nothing was saved in"
    ):
        loop = run.steps(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in loop:
            if step == 2:
                run.save(step, state={"a": np.ones(1)})
                run.stop()
        for _ in run.steps(4):
            pass
        run.close()
