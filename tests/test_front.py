"""A place in front of another: saves wait for the first alone, all gets to the second, reads take what is nearest."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _between import empty_like
from _ranks import QUICK as RANKS_QUICK
from _ranks import RANKS
from _ranks import state_of as rank_state
from _retention import SMALL, Store, same, state_of, whole

import everystep
from everystep import (
    Damaged,
    DamageWarning,
    EverystepWarning,
    Repository,
    RunInUse,
    RunTakenOver,
    SaveAbandoned,
    Settings,
    UsageError,
)
from everystep.errors import StorageError
from everystep.front import Behind, FrontPast, FrontRun
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.vault import Place

QUICK: dict[str, Any] = {**SMALL, "retry_seconds": 0.001, "put_attempts": 1, "behind_seconds": 30.0}
PATIENCE = 30.0


class Network(FaultyStorage):
    """A place that can be cut off."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner, error=lambda: StorageError("no route to host", where="far"), for_ever=True)

    def cut(self) -> None:
        self.fail_at = 0

    def mend(self) -> None:
        self.fail_at = None


class Two:
    """A place in front, and one behind with a network between; `open` is a new process, of another machine if it is
    told so."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**{**QUICK, **settings})
        self.near: Any = MemoryStorage()
        self.far = MemoryStorage()
        self.network = Network(self.far)

    def open(self, near: Any = None, seam: Seam | None = None) -> Repository:
        seam = seam or Seam()
        behind = Behind("memory://far", lambda: Place(self.network, seam, self.settings))
        return Repository(Place(near if near is not None else self.near, seam, self.settings), behind)

    def run(self, **how: Any) -> FrontRun:
        run = self.open().run("a", **how)
        assert isinstance(run, FrontRun)
        run.track(rng=False)
        return run

    def alone(self, storage: Any) -> Repository:
        """One of the two, by itself."""
        return Repository(Place(storage, Seam(), self.settings))

    def live(self, storage: Any) -> list[everystep.Checkpoint]:
        repo = self.alone(storage)
        return repo["a"].checkpoints(all=True) if "a" in repo else []

    def steps(self, storage: Any) -> list[int]:
        return [c.step for c in self.live(storage)]


@contextmanager
def unsaid() -> Iterator[list[str]]:
    """What is warned of."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if issubclass(one.category, EverystepWarning)]


def save(run: everystep.Run, *steps: int) -> list[Any]:
    found = [run.save(step, state=state_of(step), metrics={"loss": 1 / step}) for step in steps]
    for saved in found:
        saved.wait(PATIENCE)
    return found


def test_what_is_saved_in_front_gets_behind() -> None:
    two = Two()
    with two.run(config={"lr": 0.1}) as run:
        for saved in save(run, 1, 2, 3):
            checkpoint = saved.wait(PATIENCE, where="remote")
            assert checkpoint.id in {c.id for c in two.alone(two.far)["a"].checkpoints()}
        run.at(2).tag("two")
        run.record(step=9, late=1.0)
    for storage in (two.near, two.far):
        past = two.alone(storage)["a"]
        assert [c.step for c in past.checkpoints()] == [1, 2, 3] and past.tagged("two").step == 2
        assert all(whole(checkpoint, checkpoint.step) for checkpoint in past.checkpoints())
        assert past.config == {"lr": 0.1} and past.series("late") == [(9, 1.0)]
        assert two.alone(storage).check().ok
        assert past.sessions()[-1]["ended"] == "closed"
    assert two.open()["a"].lag.checkpoints == 0  # type: ignore[attr-defined]


def test_a_cut_network_stops_nothing_and_is_said_once() -> None:
    two = Two()
    run = two.run()
    save(run, 1)[0].wait(PATIENCE, where="remote")
    two.network.cut()
    with unsaid() as said:
        saved = save(run, 2, 3, 4, 5)
        with pytest.raises(SaveAbandoned, match="not yet in the place behind"):
            saved[-1].wait(0.05, where="remote")
        save(run, 6, 7)
    assert sum("no route to host" in text for text in said) == 1
    lag = run.lag
    assert lag.checkpoints == 6 and lag.nbytes > 0 and two.steps(two.far) == [1]
    two.network.mend()
    with unsaid():
        saved[-1].wait(PATIENCE, where="remote")
        run.close()
    assert two.steps(two.far) == [1, 2, 3, 4, 5, 6, 7] and two.alone(two.far).check().ok


def test_close_waits_no_longer_than_it_is_told() -> None:
    two = Two(behind_seconds=0.05)
    run = two.run()
    save(run, 1)[0].wait(PATIENCE, where="remote")
    two.network.cut()
    save(run, 2)
    with unsaid() as said:
        run.close()
    assert any("not yet in memory://far: 1 checkpoint" in text for text in said)
    assert two.steps(two.near) == [1, 2] and two.steps(two.far) == [1]
    two.network.mend()
    with two.run() as again:
        assert again.resume() == 2
    assert two.steps(two.far) == [1, 2], "the next process goes on with what is missing"


@pytest.mark.parametrize("verb", ["put", "put_new", "get", "list"])
def test_every_operation_behind_fails_once(verb: str) -> None:
    """Whatever fails in the background is done again; behind is in the end what is in front, each once."""
    number, fired = 0, True
    while fired and number < 24:
        two = Two()
        with unsaid(), two.run() as run:
            save(run, 1)[0].wait(PATIENCE, where="remote")
            two.network.verbs, two.network.for_ever = (verb,), False
            two.network.calls.clear()
            two.network.fail_at = number
            save(run, 2, 3)[-1].wait(PATIENCE, where="remote")
            fired = len(two.network.calls) > number
        assert two.steps(two.far) == [1, 2, 3] and two.alone(two.far).check().ok
        number += 3
    assert number > 3 or verb == "list"


KILLED = """
import os, signal, sys
import numpy as np
import everystep

repo = everystep.open(sys.argv[1], behind=sys.argv[2])
run = repo.run("a").track(rng=False)
first = run.resume() + 1
for step in range(first, first + 6):
    saved = run.save(step, state={"w": np.arange(200_000, dtype=np.float32) * step})
    saved.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_process_sends_what_a_killed_one_left(tmp_path: Path) -> None:
    places = [str(tmp_path / "near"), str(tmp_path / "far")]
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", KILLED, *places], check=False, timeout=120)
        assert done.returncode == -signal.SIGKILL
        for place in places:
            repo = everystep.open(place)
            assert not repo.exists or repo.check().ok
    repo = everystep.open(places[0], behind=places[1])
    with repo.run("a").track(rng=False) as run:
        assert run.resume() == 18
    near, far = (everystep.open(place)["a"] for place in places)
    assert [c.id for c in far.checkpoints()] == [c.id for c in near.checkpoints()] and far.latest is not None
    assert same(far.latest.load(), {"w": np.arange(200_000, dtype=np.float32) * 18})
    assert os.path.isdir(places[1]) and everystep.open(places[1]).check().ok


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_everything_saved_gets_behind(seed: int) -> None:
    """Saves, cuts, restarts that wait for nothing, collections: each checkpoint is always somewhere, and in the end
    behind, once."""
    chance = random.Random(seed)
    two, step = Two(behind_seconds=0.0), 1
    with unsaid():
        run = two.run(keep=everystep.last(2))
        ids = [save(run, 1)[0].wait().id]
        for _ in range(40):
            act = chance.choice(["save", "save", "save", "cut", "mend", "mend", "restart", "prune", "tag"])
            if act == "save":
                step += 1
                ids.append(save(run, step)[0].wait().id)
            elif act in ("cut", "mend"):
                getattr(two.network, act)()
            elif act == "restart":
                run.close()
                run = two.run(keep=everystep.last(2))
                assert run.resume() == step
            elif act == "prune":
                two.alone(two.near)["a"].prune(now=True)
            else:
                run.at(step).tag("newest", move=True)
            here = {c.id for storage in (two.near, two.far) for c in two.live(storage)}
            assert set(ids) <= here
        two.network.mend()
        run.close()
        two.settings = Settings(**QUICK)
        with two.run(keep=everystep.last(2)) as run:
            assert run.resume() == step
    assert [c.id for c in two.alone(two.far)["a"].checkpoints(all=True)] == ids
    assert two.steps(two.near) == list(range(1, step + 1))[-2:] or two.alone(two.near)["a"].tags
    assert {name: c.step for name, c in two.alone(two.far)["a"].tags.items()} == {
        name: c.step for name, c in two.open()["a"].tags.items()
    }
    assert all(whole(c, c.step) for c in two.open()["a"].checkpoints())


# retention ---------------------------------------------------------------------------------------------------------


def test_rules_drop_nothing_that_is_not_behind_yet() -> None:
    two = Two()
    run = two.run(keep=everystep.last(2), keep_full=everystep.last(1))
    save(run, 1)[0].wait(PATIENCE, where="remote")
    two.network.cut()
    with unsaid():
        save(run, 2, 3, 4, 5, 6)
    assert two.steps(two.near)[-5:] == [2, 3, 4, 5, 6], "held until they are behind"
    assert not any(c.thin for c in two.alone(two.near)["a"].checkpoints() if c.step > 1)
    two.network.mend()
    with unsaid():
        run.close()
    assert two.steps(two.near) == [5, 6] and two.steps(two.far) == [1, 2, 3, 4, 5, 6]
    assert [c.thin for c in two.alone(two.near)["a"].checkpoints()] == [True, False]
    assert not any(c.thin for c in two.alone(two.far)["a"].checkpoints())
    assert all(whole(c, c.step) for c in two.alone(two.far)["a"].checkpoints())


def test_the_place_behind_has_rules_of_its_own() -> None:
    two = Two()
    run = two.run(keep=everystep.last(2), keep_behind=everystep.every(4))
    save(run, 1)[0].wait(PATIENCE, where="remote")
    two.network.cut()
    with unsaid():
        save(run, *range(2, 11))
    two.network.calls.clear()
    two.network.mend()
    with unsaid():
        run.close()
    assert two.steps(two.far) == [4, 8, 10], "every 4th, and the newest"
    assert two.steps(two.near) == [9, 10]
    sent = {c.id for c in two.alone(two.far)["a"].checkpoints(all=True)}
    history = two.alone(two.far)["a"]._history()
    assert len(history.commits) - len(sent) <= 2, "what its rules would drop is not even sent"


def test_forget_keeps_what_is_not_behind() -> None:
    two = Two(behind_seconds=0.0)
    run = two.run()
    save(run, 1, 2)[-1].wait(PATIENCE, where="remote")
    two.network.cut()
    with unsaid():
        save(run, 3, 4)
        run.close()
    two.network.mend()
    past = two.open()["a"]
    decided = past.forget(everystep.last(1), force=False)
    assert {one.checkpoint.step: one.action for one in decided} == {1: "drop", 2: "drop", 3: "keep", 4: "keep"}
    assert "not in the place behind yet" in decided[2].reasons
    past.prune(now=True)
    assert two.steps(two.near) == [3, 4]
    past.forget(everystep.last(1), force=True)
    assert two.steps(two.near) == [4]


# the nearest copy --------------------------------------------------------------------------------------------------


def test_what_was_collected_here_is_read_from_behind() -> None:
    two = Two()
    with two.run(keep=everystep.last(2)) as run:
        save(run, *range(1, 6))
    two.alone(two.near)["a"].prune(now=True)
    past = two.open()["a"]
    assert isinstance(past, FrontPast)
    assert [c.step for c in past.checkpoints()] == [1, 2, 3, 4, 5] and two.steps(two.near) == [4, 5]
    two.network.calls.clear()
    assert whole(past.at(5), 5)
    assert not [key for _, key in two.network.calls if "/packs/" in key], "the nearest copy is here"
    assert whole(past.at(2), 2) and past.best("loss").step == 5 and past.at(2).metrics == {"loss": 0.5}
    assert [key for _, key in two.network.calls if "/packs/" in key]
    assert past.query("loss > 0.3") and {c.step for c in past.query("loss > 0.3")} == {1, 2, 3}
    assert (past.at(2).environment and past.at(2).term < 0) or past.at(2).environment == past.at(5).environment


def test_what_is_damaged_or_lost_here_is_read_from_behind() -> None:
    two = Two()
    with two.run() as run:
        save(run, 1, 2, 3)
    packs = sorted(key for key in two.near.objects if "/packs/" in key)
    for number, key in enumerate(packs):
        kept = two.near.objects[key]
        if number % 2:
            del two.near.objects[key]
        else:
            two.near.objects[key] = kept[:-9] + bytes([kept[-9] ^ 1]) + kept[-8:]
        past = two.open()["a"]
        with unsaid() as said:
            assert all(whole(c, c.step) for c in past.checkpoints())
        hurt = [c for c in two.alone(two.near)["a"].checkpoints() if not _loads(c)]
        assert bool(hurt) == any("read from the place behind" in text for text in said)
        two.near.objects[key] = kept
    assert len(packs) > 6


def _loads(checkpoint: everystep.Checkpoint) -> bool:
    try:
        return whole(checkpoint, checkpoint.step)
    except Damaged:
        return False


def test_a_resume_over_damage_refers_to_nothing_damaged() -> None:
    two = Two()
    with two.run() as run:
        save(run, 1, 2)
    newest = two.alone(two.near)["a"].latest
    assert newest is not None
    for key in {f"runs/a/packs/{p.writer}/{p.number}" for p in newest._commit.needs()}:
        body = two.near.objects[key]
        two.near.objects[key] = body[:-20] + bytes([body[-20] ^ 1]) + body[-19:]
    run = two.run()
    with pytest.warns(DamageWarning, match="read from the place behind"):
        assert run.resume() == 2
    save(run, 3)
    run.close()
    latest = two.alone(two.near)["a"].latest
    assert latest is not None and latest.step == 3 and whole(latest, 3)


def test_a_new_machine_goes_on_from_behind() -> None:
    two = Two()
    with two.run(config={"lr": 1}) as run:
        run.attach("f", b"abc")
        save(run, 1, 2, 3)
    other = MemoryStorage()
    repo = two.open(other)
    assert repo.runs() == ["a"] and repo["a"].attachment("f") == b"abc"
    with repo.run("a").track(rng=False) as run:
        assert run.resume() == 3
        save(run, 4)
    assert two.steps(other) == [3, 4], "no more than it needs"
    assert two.steps(two.far) == [1, 2, 3, 4]
    assert two.alone(other)["a"].config == {"lr": 1} and two.alone(other).check().ok
    line = repo["a"].checkpoints()
    assert [c.step for c in line] == [1, 2, 3, 4] and all(whole(c, c.step) for c in line)


def test_a_place_that_went_on_elsewhere_meanwhile() -> None:
    """Machine one has steps that never got behind; machine two went on from what had. The newer one goes on."""
    two = Two(behind_seconds=0.0)
    run = two.run()
    save(run, 1, 2)[-1].wait(PATIENCE, where="remote")
    two.network.cut()
    save(run, 3)
    with unsaid():
        run.close()
    two.network.mend()
    other = MemoryStorage()
    with unsaid(), two.open(other).run("a", takeover=True).track(rng=False) as second:
        assert second.resume() == 2
        save(second, 10)[0].wait(PATIENCE, where="remote")
    first = two.run()
    with unsaid() as said:
        assert first.resume() == 10
    assert any("newer than what is here" in text for text in said)
    save(first, 11)[0].wait(PATIENCE, where="remote")
    with unsaid():
        first.close()
    assert sorted(two.steps(two.far)) == [1, 2, 3, 10, 11] and two.alone(two.far).check().ok
    assert [c.step for c in two.alone(two.near)["a"].checkpoints()][-2:] == [10, 11]
    assert 3 in two.steps(two.near), "nothing is lost: it is a line of its own"


# two jobs ----------------------------------------------------------------------------------------------------------


def test_the_first_of_two_jobs_is_fenced() -> None:
    two = Two()
    first = two.run()
    save(first, 1)[0].wait(PATIENCE, where="remote")
    second = two.open(MemoryStorage()).run("a", takeover=True).track(rng=False)
    assert second.resume() == 1
    save(second, 2)[0].wait(PATIENCE, where="remote")
    saved = first.save(20, state=state_of(20))
    saved.wait(PATIENCE)
    with pytest.raises(RunTakenOver):
        saved.wait(PATIENCE, where="remote")
    with pytest.raises(RunTakenOver):
        first.save(21, state=state_of(21))
    with unsaid() as said:
        first.close()
    assert any("another process has taken the run" in text for text in said)
    second.close()
    assert two.steps(two.far) == [1, 2]


def test_a_job_that_writes_there_is_not_overruled() -> None:
    two = Two(takeover_seconds=0.5, poll_seconds=0.01)
    first = two.run()
    save(first, 1)[0].wait(PATIENCE, where="remote")

    class Elsewhere(Seam):
        """Another machine, as far as anybody can know, on which the first job saves while it is waited for."""

        def process(self) -> Any:
            found = super().process()
            return type(found)("elsewhere", "other", "other boot", found.pid, found.started)

        def sleep(self, seconds: float) -> None:
            if two.steps(two.far) == [1]:
                save(first, 2)[0].wait(PATIENCE, where="remote")

    second = two.open(MemoryStorage(), Elsewhere()).run("a").track(rng=False)
    with pytest.raises(RunInUse):
        second.resume()
    save(first, 3)[0].wait(PATIENCE, where="remote")
    first.close()
    second.close()


def test_several_ranks_in_front() -> None:
    two = Two(**RANKS_QUICK)

    def train(rank: int) -> None:
        run = two.open().run("a", rank=rank, ranks=RANKS, launch="x").track(rng=False)
        for step in (1, 2):
            saved = run.save(step, state=rank_state(rank, step))
            saved.wait(PATIENCE)
        if rank == 0:
            saved.wait(PATIENCE, where="remote")
        else:
            with pytest.raises(UsageError, match="no such place"):
                saved.wait(where="remote")
        run.close()

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(train, range(RANKS)))
    near, far = (two.alone(storage) for storage in (two.near, two.far))
    assert two.steps(two.far) == [1, 2] and far.check().ok
    for mine, theirs in zip(near["a"].checkpoints(), far["a"].checkpoints(), strict=True):
        assert mine.id == theirs.id and theirs.ranks == RANKS and same(mine.load(), theirs.load())


# the door ----------------------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_reached_at_the_start() -> None:
    two = Two()
    two.network.cut()
    with pytest.raises(StorageError, match="there is no checkpoint here") as caught:
        two.run().resume()
    assert caught.value.__cause__ is not None and caught.value.do.startswith(caught.value.__cause__.do or "try again")
    two.network.mend()
    with two.run() as run:
        save(run, 1)
    two.network.cut()
    with unsaid() as said:
        run = two.run()
        assert run.resume() == 1
        save(run, 2)
        assert [c.step for c in two.open()["a"].checkpoints()] == [1, 2]
    assert any("cannot be reached" in text for text in said)
    two.network.mend()
    with unsaid():
        run.close()
    assert two.steps(two.far) == [1, 2]


def test_where_there_is_nothing_behind(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "runs"))
    with repo.run("a").track(rng=False) as run:
        saved = run.save(1, state=state_of(1))
        with pytest.raises(UsageError, match="no such place"):
            saved.wait(where="remote")
    with pytest.raises(UsageError, match="no place behind"):
        repo.run("b", keep_behind=everystep.last(1))
    with pytest.raises(UsageError, match="same place"):
        everystep.open(str(tmp_path / "runs"), behind=str(tmp_path / "runs"))
    with pytest.raises(UsageError, match="keep_behind"):
        everystep.open(str(tmp_path / "runs"), behind="memory://b").run("b", keep_behind=3)  # type: ignore[arg-type]


def test_push_sends_what_a_front_has_left() -> None:
    source = Store()
    with source.open().run("a").track(rng=False) as run:
        run.save(1, state=state_of(1)).wait()
    target = empty_like(source)
    source.open().push(target.open())
    assert target.open().check().ok and whole(target.open()["a"].at(1), 1)
