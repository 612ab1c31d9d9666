"""`prune(dry_run=True)`: what it says is what `prune` then does, and it changes nothing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from _cli import call, json_of, lines_of
from _retention import ALONE, DAY, YEAR, Store, but, live, store_of

import everystep
from everystep import Freed
from everystep.vault.names import PackName, pack_key

WEEK = 7 * DAY


def foretold(store: Store, *, now: bool = False) -> Freed:
    """What it says, having changed nothing."""
    before = dict(store.storage.objects)
    found = store.open()["a"].prune(now=now, dry_run=True)
    assert store.storage.objects == before, "a dry run writes and deletes nothing"
    return found


def lost_pack(store: Store, nbytes: int) -> None:
    """Of a save that was never committed."""
    store.storage.put_new(pack_key("runs/a/", PackName(f"{'ab' * 16}-1", 7)), bytes(nbytes))


@pytest.mark.parametrize("seed", range(5))
def test_what_it_says_is_what_is_done(seed: int) -> None:
    chance = random.Random(seed)
    store = store_of(8, **(ALONE if seed % 2 else {}))
    freed = 0
    for turn in range(12):
        act = chance.choice(["forget", "thin", "undo", "later", "prune", "prune", "lost" if turn % 3 else "save"])
        past, steps = store.open()["a"], live(store.open())
        if act == "forget" and len(steps) > 2:
            past.forget(but(chance.choice(steps[:-1])), force=True)
        elif act == "thin":
            past.forget(None, but(chance.choice(steps)), force=True)
        elif act == "undo" and past.dropped:
            past.undo()
        elif act == "later":
            store.clock.seconds += chance.choice([DAY, WEEK])
        elif act == "lost":
            store.storage.objects.pop(pack_key("runs/a/", PackName(f"{'ab' * 16}-1", 7)), None)
            lost_pack(store, 100 * turn + 1)
        now = chance.random() < 0.3
        said = foretold(store, now=now)
        tried = store.copy()
        assert tried.open()["a"].prune(now=now) == said
        left = {c.id for c in tried.open()["a"].dropped}
        assert {c.id for c in past.dropped if c.id not in left} == set(said.checkpoints)
        if act == "prune":
            freed += past.prune(now=now).packs
    store.open()["a"].forget(but(live(store.open())[0]), force=True)
    assert foretold(store, now=True).nbytes > 0


def test_the_share_of_what_was_never_committed() -> None:
    store = store_of(3, **ALONE)
    lost_pack(store, 12_345)
    assert foretold(store) == Freed(1, 12_345, 0, store.nbytes - 12_345, 12_345)
    store.open()["a"].forget(but(2))
    now = foretold(store, now=True)
    assert now.left_bytes == 12_345 < now.nbytes and len(now.checkpoints) == 1
    assert foretold(store).pending_bytes == now.nbytes - 12_345
    assert store.open()["a"].prune(now=True) == now


def test_time_that_has_passed_since_the_last_record_counts() -> None:
    """A real one asks the store what time it is, with a record; a dry one takes this machine's word for it."""
    store = store_of(3, **ALONE)
    store.open()["a"].forget(but(2))
    for seconds, packs in ((WEEK - 60, False), (120.0, True)):
        store.clock.seconds += seconds
        assert (foretold(store).packs > 0) == packs
    assert store.open(skew=-YEAR)["a"].prune(dry_run=True).packs == 0, "a clock that is behind frees nothing early"


def test_in_front_of_another_place_it_is_about_the_one_in_front(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "near"), behind=str(tmp_path / "far"))
    with repo.run("a").track(rng=False) as run:
        for step in (1, 2, 3):
            run.save(step, state={"w": np.random.default_rng(step).random(500)}).wait()
    repo["a"].forget(everystep.last(1), force=True)
    said = repo["a"].prune(now=True, dry_run=True)
    assert said.packs > 0 and repo["a"].prune(now=True) == said


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Run a, of whose four steps 1 and 3 were dropped; run b."""
    repo = everystep.open(str(tmp_path / "runs"))
    for name in ("a", "b"):
        with repo.run(name).track(rng=False) as run:
            for step in (1, 2, 3, 4):
                run.save(step, state={"w": np.random.default_rng(step).random(500)}).wait()
    repo["a"].forget(everystep.when(lambda kept: kept.step not in (1, 3)))
    return tmp_path / "runs"


def test_on_the_command_line(place: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*"))
    waits = json_of(place, "prune", "--dry-run")
    said = json_of(place, "prune", "a", "--now", "--dry-run")
    lines = lines_of(place, "prune", "--now", "--dry-run")
    assert sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*")) == before
    assert waits["dry_run"] and [one["nbytes"] for one in waits["runs"]] == [0, 0]
    (one,) = said["runs"]
    assert one["pending_bytes"] == 0 < one["nbytes"] == waits["runs"][0]["pending_bytes"]
    assert [gone["step"] for gone in one["checkpoints"]] == [1, 3]
    assert lines[0].split()[:4] == ["run", "would", "be", "freed"]
    assert "… a: could not be brought back any more: 1, 3" in lines
    assert lines[-1] == "… nothing was done: without --dry-run it is"
    (done,) = json_of(place, "prune", "a", "--now")["runs"]
    assert done == one and call(place, "undo", "a").exit_code == 3
    assert "brought back" not in call(place, "prune").stdout
    shutil.rmtree(place / "runs")
    assert lines_of(place, "prune", "--dry-run") == ["no run yet"]


def test_a_damaged_run_is_refused_by_a_dry_run_too(place: Path) -> None:
    record = sorted((place / "runs" / "a" / "log").iterdir())[2]
    record.chmod(0o644)
    record.write_bytes(b"x" + record.read_bytes()[1:])
    document = json_of(place, "prune", "--dry-run", code=4)
    assert [one["run"] for one in document["runs"]] == ["b"] and document["refused"][0]["kind"] == "damaged"
