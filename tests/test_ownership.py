"""Who may write a run: a dead owner is followed at once, a living one is waited for, a superseded one is told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import WithoutGit, one_thread
from torch import nn

import everystep
from everystep import Repository, Run, RunInUse, RunTakenOver, Settings
from everystep.seam import Process, Seam
from everystep.storage import MemoryStorage
from everystep.vault import Place

__all__ = ["one_thread"]
MINUTE = 60.0


class World:
    """One store, one clock, and the processes that live."""

    def __init__(self) -> None:
        self.storage = MemoryStorage()
        self.seconds = 0.0
        self.alive: set[Process] = set()
        self.meanwhile: Callable[[], None] = lambda: None
        """Runs once, half a minute into the next wait."""

    def process(self, pid: int = 1, host: str = "here", **fields: str) -> Machine:
        default = {"machine": f"id of {host}", "boot": f"boot of {host}", "started": "100"}
        machine = Machine(self, Process(host, pid=pid, **{**default, **fields}))
        self.alive.add(machine.identity)
        return machine


class Machine(WithoutGit):
    """The outside as one process of that world sees it. Sleeping moves the clock."""

    def __init__(self, world: World, identity: Process) -> None:
        super().__init__()
        self.world, self.identity = world, identity
        self.told: list[str] = []
        self.slept = 0.0

    def now(self) -> float:
        return 1_700_000_000 + self.world.seconds

    def monotonic(self) -> float:
        return self.world.seconds

    def sleep(self, seconds: float) -> None:
        self.world.seconds += seconds
        self.slept += seconds
        if self.slept > 30:
            happen, self.world.meanwhile = self.world.meanwhile, lambda: None
            happen()

    def process(self) -> Process:
        return self.identity

    def is_gone(self, other: Process) -> bool:
        return other.host == self.identity.host and other not in self.world.alive

    def tell(self, line: str) -> None:
        self.told.append(line)

    def at_exit(self, function: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def die(self) -> None:
        self.world.alive.discard(self.identity)

    @property
    def repo(self) -> Repository:
        return Repository(Place(self.world.storage, self, Settings(poll_seconds=1.0)))

    def write(self, step: int, **options: Any) -> Run:
        """A run that has just saved a step."""
        run = self.repo.run("r", **options)
        run.resume()
        save(run, step)
        return run


def save(run: Run, step: int) -> None:
    run.save(step, state={"w": np.full(5, step)}).wait()


def steps(world: World) -> list[int]:
    return [c.step for c in world.process(99, "reader").repo["r"].checkpoints()]


@pytest.fixture
def world() -> World:
    return World()


# ----------------------------------------------------------------------------------------------- who waits for whom


def test_an_owner_that_has_died_is_followed_at_once(world: World) -> None:
    first, second = world.process(1), world.process(2)
    first.write(1)
    first.die()
    run = second.repo.run("r")
    assert run.resume() == 1 and second.slept == 0 and second.told == []
    save(run, 2)
    assert steps(world) == [1, 2]


def test_an_owner_that_has_closed_is_followed_at_once(world: World) -> None:
    world.process(1).write(1).close()
    second = world.process(2)
    assert second.repo.run("r").resume() == 1 and second.slept == 0


def test_a_living_owner_that_stays_silent_is_taken_over(world: World) -> None:
    world.process(1).write(1)
    second = world.process(2)
    assert second.repo.run("r").resume() == 1
    assert 10 * MINUTE <= second.slept <= 10 * MINUTE + 2
    assert len(second.told) == 1 and "process 1 on here may still be writing 'r'" in second.told[0]
    assert "takeover=True" in second.told[0] and "600 s" in second.told[0]


def test_a_living_owner_that_writes_keeps_the_run(world: World) -> None:
    owner = world.process(1).write(1)
    second = world.process(2)
    world.meanwhile = lambda: save(owner, 2)
    with pytest.raises(RunInUse, match="process 1 on here is writing this run") as caught:
        second.repo.run("r").resume()
    assert 30 < second.slept < 40 and "takeover=True" in str(caught.value)
    save(owner, 3)
    assert steps(world) == [1, 2, 3]


@pytest.mark.parametrize("how", ["closes", "dies"])
def test_an_owner_that_ends_while_it_is_waited_for(world: World, how: str) -> None:
    machine = world.process(1)
    owner, second = machine.write(1), world.process(2)
    world.meanwhile = owner.close if how == "closes" else machine.die
    run = second.repo.run("r")
    assert run.resume() == 1 and 30 < second.slept < 40
    save(run, 2)
    assert steps(world) == [1, 2]


def test_tags_and_metrics_of_others_are_no_sign_of_the_owner(world: World) -> None:
    world.process(1).write(1)
    reader, second = world.process(3).repo["r"], world.process(2)
    world.meanwhile = lambda: reader.at(1).tag("good").record(val_loss=1.0)  # type: ignore[assignment, return-value]
    assert second.repo.run("r").resume() == 1 and second.slept >= 10 * MINUTE


def test_another_that_takes_the_run_while_it_is_waited_for(world: World) -> None:
    world.process(1).write(1)
    second, third = world.process(2), world.process(3)
    world.meanwhile = lambda: third.write(2, takeover=True)  # type: ignore[assignment, return-value]
    with pytest.raises(RunInUse, match="process 3 on here"):
        second.repo.run("r").resume()


def test_told_to_take_over_it_does_not_wait(world: World) -> None:
    world.process(1).write(1)
    second = world.process(2)
    run = second.repo.run("r", takeover=True)
    assert run.resume() == 1 and second.slept == 0 and second.told == []
    assert [s["reason"] for s in run.sessions()] == ["start", "takeover"]


def test_the_same_process_opens_again(world: World) -> None:
    """A notebook's cell that is run twice."""
    machine = world.process(1)
    first = machine.write(1)
    again = machine.repo.run("r")
    assert again.resume() == 1 and machine.slept == 0
    save(again, 2)
    with pytest.raises(RunTakenOver):
        save(first, 3)
    assert steps(world) == [1, 2]


def test_another_process_with_the_same_number(world: World) -> None:
    first = world.process(7)
    first.write(1)
    first.die()
    second = world.process(7, started="200")
    assert second.repo.run("r").resume() == 1 and second.slept == 0


@pytest.mark.parametrize(("silent", "waits"), [(11, 0), (9, 1), (4, 6), (0, 10)])
def test_an_owner_elsewhere_counts_by_what_it_wrote_last(world: World, silent: int, waits: int) -> None:
    world.process(1, "there").write(1)
    world.seconds += silent * MINUTE
    second = world.process(1, "here")
    assert second.repo.run("r").resume() == 1
    assert waits * MINUTE <= second.slept <= waits * MINUTE + 2
    assert len(second.told) == (1 if waits else 0)


def test_an_owner_elsewhere_that_writes_keeps_the_run(world: World) -> None:
    owner = world.process(1, "there").write(1)
    world.seconds += 5 * MINUTE
    second = world.process(1, "here")
    world.meanwhile = lambda: save(owner, 2)
    with pytest.raises(RunInUse, match="process 1 on there"):
        second.repo.run("r").resume()


def test_reading_takes_nothing(world: World) -> None:
    owner = world.process(1).write(1)
    before = dict(world.storage.objects)
    reader = world.process(2)
    for past in (reader.repo["r"], reader.repo.run("r")):
        assert past.latest is not None and past.latest.load()["w"].tolist() == [1] * 5
        assert past.checkpoints() and past.sessions() and past.config == {} and past.series("loss") == []
        past.latest.verify()
    assert reader.repo.check().ok
    reader.repo.run("r").close()
    assert world.storage.objects == before and reader.slept == 0
    save(owner, 2)


# ---------------------------------------------------------------------------------------------------- who is told


def test_the_first_writer_is_told_and_changes_nothing(world: World) -> None:
    first = world.process(1).write(1)
    second = world.process(2).write(2, takeover=True)
    log = sorted(key for key in world.storage.objects if "/log/" in key)
    for _ in range(2):
        first.record(loss=1.0)
        with pytest.raises(RunTakenOver, match="process 2 on here has taken this run over") as caught:
            save(first, 2)
        assert caught.value.exit_code == 10 and caught.value.do
    with pytest.raises(RunTakenOver):
        first.resume()
    with pytest.raises(RunTakenOver):
        first.close()
    assert sorted(key for key in world.storage.objects if "/log/" in key) == log
    save(second, 3)
    second.close()
    assert steps(world) == [1, 2, 3] and world.process(9).repo.check().ok
    assert [s["ended"] for s in second.sessions()] == ["taken over", "closed"]


def test_a_first_writer_that_only_closes(world: World) -> None:
    """It says so only if something is lost."""
    first, third = world.process(1).write(1), world.process(3)
    second = world.process(2).write(2, takeover=True)
    first.close()
    second.record(step=3, loss=1.0)
    third.write(3, takeover=True)
    with pytest.raises(RunTakenOver):
        second.close()
    assert steps(world) == [1, 2, 3] and world.process(9).repo["r"].series("loss") == []


def test_a_loop_ends_when_its_run_is_taken(world: World) -> None:
    model = nn.Linear(2, 2)
    run = world.process(1).repo.run("r").track(model=model)
    trained = []
    with pytest.raises(RunTakenOver):
        for step in run.steps(20, save_every=1):
            trained.append(step)
            with torch.no_grad():
                model.weight.add_(1)
            if step == 3:
                run._writer.wait()  # type: ignore[union-attr]
                other = world.process(2).repo.run("r", takeover=True).track(model=nn.Linear(2, 2))
                assert other.resume() == 2
    assert len(trained) <= 5
    with pytest.raises(RunTakenOver):
        run.close()
    assert steps(world) == [1, 2]


def test_a_superseded_job_changes_nothing_by_hand_either(world: World) -> None:
    """Whoever only looks on, this process too once it has closed the run, may tag it."""
    first = world.process(1).write(1)
    one = first.at(1)
    world.process(2).write(2, takeover=True).at(2).tag("best")
    before = world.process(3).repo["r"]._history().slots
    for attempt in (
        lambda: one.tag("best", move=True),
        lambda: one.tag_version("model"),
        lambda: first.untag("best"),
        lambda: first.forget(everystep.last(1), force=True),
        lambda: one.record(late=1.0),
        lambda: first.note("mine"),
    ):
        with pytest.raises(RunTakenOver, match="has taken this run over"):
            attempt()
    assert world.process(3).repo["r"]._history().slots == before
    assert world.process(3).repo["r"].at(1).tag("seen").tags == ["seen"]
    first.close()
    assert one.tag("mine").tags == ["mine", "seen"]


def test_a_cell_that_runs_twice_is_one_job(world: World) -> None:
    cell = world.process(1)
    first = cell.write(1).at(1)
    second = cell.repo.run("r").track(rng=False)
    assert second.resume() == 1 and first.tag("mine").tags == ["mine"]


# --------------------------------------------------------------------------------------------- what is known to be gone


def test_what_this_machine_can_know() -> None:
    seam = Seam()
    here = seam.process()
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    other = dataclasses.replace
    assert not seam.is_gone(here)
    assert seam.is_gone(other(here, pid=ended.pid))
    assert seam.is_gone(other(here, started="1")), "a number that is used again"
    assert not seam.is_gone(other(here, started="")), "a process that could not read its own start"
    assert not seam.is_gone(other(here, host="there", machine="m", boot="b", pid=ended.pid))
    assert not seam.is_gone(other(here, boot=here.boot + " another namespace", pid=ended.pid)), "another container"
    if here.machine:
        assert seam.is_gone(other(here, boot="0" * 36 + here.boot[36:])), "before this machine was started"


PROGRAM = """
import os, sys, time
import numpy as np
import everystep

run = everystep.open(sys.argv[1]).run("r")
step = run.resume() + 1
run.save(step, state={"w": np.full(5, step)}).wait()
print("saved", flush=True)
if sys.argv[2] == "die":
    os._exit(9)
while True:
    time.sleep(0.05)
    step += 1
    run.save(step, state={"w": np.full(5, step)}).wait()
"""


@contextmanager
def program(place: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has saved once."""
    started = subprocess.Popen([sys.executable, "-c", PROGRAM, str(place), how], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None and started.stdout.readline() == "saved\n"
        yield started
    finally:
        started.kill()
        started.communicate()


def quick(place: Path) -> Repository:
    return everystep.open(str(place), settings=Settings(poll_seconds=0.02))


def test_a_killed_process_is_followed_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for expected in (1, 2, 3):
        with program(tmp_path, "die") as started:
            assert started.wait(60) == 9
        with quick(tmp_path).run("r") as run:
            assert run.resume() == expected
    assert capfd.readouterr().err == ""


def test_a_process_that_writes_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with program(tmp_path, "live") as started:
        with pytest.raises(RunInUse, match=f"process {started.pid} on"):
            quick(tmp_path).run("r").resume()
        assert "may still be writing 'r'" in capfd.readouterr().err
        assert started.poll() is None
    with quick(tmp_path).run("r") as run:
        assert run.resume() >= 1


RACE = """
import sys
import numpy as np
import everystep

place, number = sys.argv[1], int(sys.argv[2])
run = everystep.open(place).run("r", takeover=True)
sys.stdin.readline()
mine = 0
try:
    for turn in range(20):
        if run._writer is None:
            step = run.resume()
        step += 1
        run.save(step, state={"who": number, "w": np.full(50, number)}).wait()
        mine += 1
except everystep.RunTakenOver:
    print("taken over", mine)
else:
    run.close()
    print("finished", mine)
"""


def test_racing_processes_have_one_winner_a_term(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(5)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ended = [racer.communicate(timeout=120) for racer in racers]
    words = [out.split() for out, _ in ended]
    assert all(racer.returncode == 0 for racer in racers), ended
    past = everystep.open(str(tmp_path))["r"]
    everything = past.checkpoints(all=True)
    assert sorted(s["term"] for s in past.sessions()) == list(range(1, 6))
    assert len({s["pid"] for s in past.sessions()}) == 5
    terms = [c.term for c in everything]
    assert terms == sorted(terms), "a fenced process has written"
    assert words.count(["finished", "20"]) >= 1 and terms.count(5) == 20
    counts = [sum(c.load(only="who") == number for c in everything) for number in range(5)]
    assert counts == [int(word[-1]) for word in words], "an acknowledged save is lost, or one is there twice"
    assert everystep.open(str(tmp_path)).check().ok
