"""Random walks of everything that keeps, drops, brings back and frees, beside a model in plain Python.

EVERYSTEP_WALKS says how many (10), of 50 steps each.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _retention import DAY, YEAR, Store, based, state_of, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import everystep
from everystep import Conflict, NotFound, RunTakenOver
from everystep.errors import CheckpointRetired

# the model ---------------------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """A checkpoint as it was saved; `way` is how it was dropped: (which dropping, thinned before)."""

    id: str
    step: int
    number: int
    parent: str | None
    loss: float
    thin: bool = False
    way: list[Dropped] = field(default_factory=list)


@dataclass
class Dropped:
    """That a checkpoint was dropped, or thinned; `held` while nothing may free what it needs."""

    group: int
    time: float
    window: float
    retired: bool
    held: bool = True


Rules = Sequence[tuple[str, int]]
"""What is kept, in words: ("last", 2), ("every", 3), ("best", 1), ("rest", 1), ("tagged", 0), any of these."""


def rule_of(rules: Rules) -> everystep.Rule | None:
    made: list[everystep.Rule] = []
    for name, n in rules:
        if name == "rest":
            made.append(everystep.when(lambda kept, n=n: kept.step % 4 == n))
        elif name == "best":
            made.append(everystep.best(n, "loss"))
        else:
            made.append({"last": everystep.last, "every": everystep.every}[name](n) if n else everystep.tagged("b*"))
    return everystep.rules.AnyOf(made) if made else None


class Model:
    """What a run holds, by what was done to it."""

    def __init__(self) -> None:
        self.saved: dict[str, Saved] = {}
        self.live: set[str] = set()
        self.tags: dict[str, str] = {}
        self.tip: str | None = None
        self.groups = 0

    @property
    def kept(self) -> list[Saved]:
        return [one for id, one in self.saved.items() if id in self.live]

    @property
    def latest(self) -> Saved | None:
        return self.saved[self.tip] if self.tip in self.live else self.kept[-1] if self.live else None

    @property
    def line(self) -> list[str]:
        found, at = [], self.latest.id if self.latest else None
        while at is not None:
            found += [at] if at in self.live else []
            at = self.saved[at].parent
        return found[::-1]

    def names(self, rules: Rules) -> set[str]:
        order = sorted(self.kept, key=lambda one: one is self.latest)
        found: set[str] = {self.latest.id} if self.latest else set()
        for name, n in rules:
            if name == "last":
                found |= {one.id for one in order[-n:]}
            elif name == "every":
                found |= {one.id for one in order if one.step % n == 0}
            elif name == "rest":
                found |= {one.id for one in order if one.step % 4 == n}
            elif name == "best":
                ranked = sorted((one for one in order if not math.isnan(one.loss)), key=lambda one: one.loss)
                found |= {one.id for one in ranked[:n]}
            else:
                found |= {id for tag, id in self.tags.items() if tag.startswith("b")}
        return found

    def plan(self, keep: Rules, keep_full: Rules) -> tuple[set[str], set[str]]:
        """(to drop, to thin)"""
        full = self.names(keep_full)
        wanted = self.names(keep) | full | set(self.tags.values())
        dropped = self.live - wanted if keep else set()
        thinned = {id for id in self.live - dropped - full if not self.saved[id].thin} if keep_full else set()
        return dropped, thinned

    def drop(self, dropped: set[str], thinned: set[str], now: float, window: float) -> None:
        self.groups += 1
        for id in dropped | thinned:
            self.saved[id].way.append(Dropped(self.groups, now, window, id in dropped))
        for id in thinned:
            self.saved[id].thin = True
        self.live -= dropped

    def free(self, now: float, at_once: bool) -> None:
        """Whatever was dropped longer ago than its window may be gone, and what leans on its coming back with it."""
        for one in self.saved.values():
            held = not at_once
            for last in reversed(one.way):
                held = held and last.held and now - last.time < last.window
                last.held = held

    def returnable(self) -> tuple[set[str], set[str]]:
        """(what must be able to come back, what might)"""
        might = {one.id for one in self.saved.values() if one.way}
        return {id for id in might if self.saved[id].way[-1].held}, might

    def undo(self, found: set[str]) -> set[str]:
        """Of what can come back, that which was dropped last does."""
        newest = max(self.saved[id].way[-1].group for id in found)
        back = {id for id in found if self.saved[id].way[-1].group == newest}
        for id in back:
            last = self.saved[id].way.pop()
            if last.retired:
                self.live.add(id)
            else:
                self.saved[id].thin = False
        return back


# the walk ----------------------------------------------------------------------------------------------------------

RULES = st.lists(
    st.one_of(
        st.tuples(st.just("last"), st.integers(1, 6)),
        st.tuples(st.just("every"), st.integers(2, 4)),
        st.tuples(st.just("best"), st.integers(1, 3)),
        st.tuples(st.just("rest"), st.integers(0, 3)),
        st.just(("tagged", 0)),
    ),
    min_size=1,
    max_size=2,
)
NONE: st.SearchStrategy[Rules] = st.just([])
MAYBE, STANDING = st.one_of(RULES, RULES, NONE), st.one_of(NONE, NONE, RULES)
LOSSES = st.sampled_from([*map(float, range(10)), math.nan])
WINDOWS = st.sampled_from([7 * DAY, DAY, 7 * DAY, 0.0])
SKEWS = st.sampled_from([0.0, -YEAR, YEAR])
PICK = st.integers(0, 1 << 16)
ACTIONS = ["train"] * 5 + ["forget"] * 5 + ["undo"] * 2 + ["prune"] * 3
ACTIONS += ["wait", "rewind", "tag", "untag", "reopen", "repack"]
STEPS, WALKS = 50, int(os.environ.get("EVERYSTEP_WALKS", "10"))


class Walk:
    """One run, written by one process after the other, and thinned out by these and by another beside them."""

    def __init__(self, store: Store, data: st.DataObject, seen: Counter[str]) -> None:
        self.store, self.data, self.seen, self.model = store, data, seen, Model()
        self.number = 0
        self.at = 0
        """The step that the training is at."""
        self.start()
        self.save(1, 1.0)
        self.beside = self.store.open(skew=YEAR)["a"]

    def draw(self, strategy: st.SearchStrategy[Any], label: str) -> Any:
        return self.data.draw(strategy, label)

    def step(self) -> None:
        getattr(self, self.draw(st.sampled_from(ACTIONS), "do"))()
        self.check_step()

    @property
    def past(self) -> everystep.PastRun:
        """The writing process, or one beside it that has not looked for a while."""
        return self.beside if self.draw(st.booleans(), "beside") else self.run

    # what is done

    def start(self) -> None:
        self.keep, self.keep_full = self.draw(STANDING, "keep"), self.draw(STANDING, "keep_full")
        self.asked = False
        repo = self.store.open(skew=self.draw(SKEWS, "skew"))
        self.run = repo.run("a", keep=rule_of(self.keep), keep_full=rule_of(self.keep_full)).track(rng=False)

    def train(self) -> None:
        gap = self.draw(st.integers(1, 2), "gap")
        for loss in self.draw(st.lists(LOSSES, min_size=1, max_size=5), "losses"):
            self.save(gap, loss)

    def save(self, gap: int, loss: float) -> None:
        self.number, self.at = self.number + 1, self.at + gap
        parent = self.model.latest.id if self.model.latest else None
        saved = self.run.save(self.at, state=state_of(self.number), metrics={"loss": loss}).wait()
        self.run._writer.wait()
        assert saved.parent == parent and saved.id not in self.model.saved
        self.model.saved[saved.id] = Saved(saved.id, self.at, self.number, parent, loss)
        self.model.live.add(saved.id)
        self.model.tip = None
        self.apply_standing_rules()

    def apply_standing_rules(self) -> None:
        notices = [self.run._writer.notices.pop(0) for _ in list(self.run._writer.notices)]
        if not (self.keep or self.keep_full):
            assert notices == []
            return
        dropped, thinned = self.model.plan(self.keep, self.keep_full)
        if not self.asked and len(dropped) >= 4 and 2 * len(dropped) > len(self.model.live):
            assert [f"would drop {len(dropped)} of {len(self.model.live)}" in notice for notice in notices] == [True]
            return
        self.asked = True
        assert notices == []
        if dropped | thinned:
            self.model.drop(dropped, thinned, self.store.clock.seconds, 0.0)
            self.model.free(self.store.clock.seconds, at_once=False)
            assert self.store.copy().open()["a"].prune().nbytes == 0, "what the run's own rules drop is freed at once"
            self.seen["dropped by the run's rules"] += len(dropped)

    def forget(self) -> None:
        past, model = self.past, self.model
        keep, keep_full = self.draw(MAYBE, "keep"), self.draw(MAYBE, "keep_full")
        force, window = self.draw(st.booleans(), "force"), self.draw(WINDOWS, "window")
        dropped, thinned = model.plan(keep, keep_full)
        expected = {id: "drop" if id in dropped else "thin" if id in thinned else "keep" for id in model.live}
        rules = rule_of(keep), rule_of(keep_full)
        assert actions(past.forget(*rules, dry_run=True)) == expected
        if 2 * len(dropped) > len(model.live) and not force:
            with pytest.raises(Conflict, match=f"drop {len(dropped)} of {len(model.live)} checkpoints"):
                past.forget(*rules, undo_seconds=window)
            return
        assert actions(past.forget(*rules, force=force, undo_seconds=window)) == expected
        model.drop(dropped, thinned, self.store.clock.seconds, window)
        self.seen["dropped"] += len(dropped)
        self.seen["thinned"] += len(thinned)

    def undo(self) -> None:
        past = self.past
        found = {checkpoint.id for checkpoint in past.dropped}
        must, might = self.model.returnable()
        assert must <= found <= might
        if not found:
            with pytest.raises(NotFound, match="nothing that was dropped can be brought back"):
                past.undo()
            return
        expected = self.model.undo(found)
        assert {checkpoint.id for checkpoint in past.undo()} == expected
        self.check_loads(expected & self.model.live)
        self.seen["brought back"] += len(expected)

    def prune(self) -> None:
        past, at_once = self.past, self.draw(st.sampled_from([False, False, True]), "at once")
        before = self.store.packs()
        freed = past.prune(now=at_once)
        after = self.store.packs()
        self.model.free(self.store.clock.seconds, at_once)
        assert freed.nbytes == sum(before.values()) - sum(after.values())
        assert freed.packs == len(before) - len(after)
        assert freed.held_bytes == sum(after.values())
        rest = self.store.copy().open()["a"].prune(now=True)
        assert (rest.nbytes, rest.held_bytes) == (freed.pending_bytes, freed.held_bytes - freed.pending_bytes)
        assert not (at_once and rest.packs)
        assert self.model.returnable()[0] or not freed.pending_bytes, "its time is over, and it is held all the same"
        if freed.packs:
            self.check_loads(self.model.live)
        self.seen["freed"] += freed.packs
        self.seen["held"] += bool(freed.pending_bytes)

    def repack(self) -> None:
        past, dead = self.past, self.draw(st.sampled_from([0.5, 0.2, 0.0]), "dead")
        before = self.store.nbytes
        moved = past.repack(dead=dead)
        self.model.free(self.store.clock.seconds, at_once=False)
        assert moved.held_bytes == self.store.nbytes == before + moved.written_bytes - moved.freed_bytes <= before
        self.check_loads(self.model.live)
        self.seen["repacked"] += moved.packs

    def rewind(self) -> None:
        target = self.model.kept[self.draw(PICK, "which") % len(self.model.live)]
        checkpoint = next(c for c in self.run.checkpoints(all=True) if c.id == target.id)
        if target.thin:
            with pytest.raises(CheckpointRetired, match="its optimizer state has been dropped"):
                self.run.rewind(checkpoint)
            return
        self.seen["left"] += target is not self.model.latest
        assert self.run.rewind(checkpoint) == target.step
        self.model.tip, self.at = target.id, target.step

    def tag(self) -> None:
        name = self.draw(st.sampled_from(["a1", "b1", "b2"]), "tag")
        target = self.model.kept[self.draw(PICK, "which") % len(self.model.live)].id
        next(c for c in self.past.checkpoints(all=True) if c.id == target).tag(name, move=True)
        self.model.tags[name] = target

    def untag(self) -> None:
        if self.model.tags:
            name = self.draw(st.sampled_from(sorted(self.model.tags)), "tag")
            self.past.untag(name)
            del self.model.tags[name]

    def reopen(self) -> None:
        """Another process goes on; the one before has ended as it should, or never finds out."""
        old, died = self.run, self.draw(st.booleans(), "died")
        if not died:
            old.close()
        self.start()
        assert self.model.latest is not None
        self.at = self.run.resume()
        assert self.at == self.model.latest.step
        if died:
            with pytest.raises(RunTakenOver):
                old.save(self.at + 1, state=state_of(0)).wait()
            with pytest.raises(RunTakenOver):
                old.close()

    def wait(self) -> None:
        self.store.clock.seconds += self.draw(st.sampled_from([0.1, 3.0, 8.0]), "days") * DAY

    # what must be true

    def check_loads(self, ids: set[str]) -> None:
        """Bit for bit, in what a new process sees."""
        for checkpoint in self.store.open()["a"].checkpoints(all=True):
            if checkpoint.id in ids:
                assert whole(checkpoint, self.model.saved[checkpoint.id].number)
                self.seen["loaded"] += 1

    def check_step(self) -> None:
        self.seen["steps"] += 1
        model = self.model
        for past in (self.run, self.store.open()["a"]):
            found = past.checkpoints(all=True)
            assert [c.id for c in found] == [one.id for one in model.kept]
            assert {c.id for c in found if c.thin} == {one.id for one in model.kept if one.thin}
            assert [c.id for c in past.checkpoints()] == model.line
            assert past.latest is not None and model.latest is not None and past.latest.id == model.latest.id
            assert {tag: c.id for tag, c in past.tags.items()} == model.tags
        self.check_loads({model.kept[self.seen["steps"] % len(model.live)].id})

    def check_end(self) -> None:
        self.check_loads(self.model.live)
        past = self.store.open()["a"]
        depths = list(based(past.checkpoints(all=True)))
        self.seen["with a base"] += sum(depth > 0 for depth in depths)
        self.seen["alone"] += depths.count(0)
        report = self.store.open().check()
        assert report.ok and report.checkpoints == len(self.model.live)
        past.prune(now=True)
        assert set(self.store.packs()) == self.store.read_by(), "what is left is what loads read, and no more"
        self.check_loads(self.model.live)


def actions(decided: list[everystep.Decision]) -> dict[str, str]:
    return {one.checkpoint.id: one.action for one in decided}


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_random_walks(place: str, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    folders = (str(tmp_path / str(number)) for number in itertools.count())
    walks = WALKS if place == "memory" else max(1, WALKS // 3)

    @settings(max_examples=walks, deadline=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        walk = Walk(Store(next(folders) if place == "folder" else None), data, seen)
        try:
            for _ in range(STEPS):
                walk.step()
        finally:
            walk.run.close()
        walk.check_end()

    run()
    assert seen["steps"] >= STEPS * walks
    for what in ("dropped", "thinned", "brought back", "freed", "with a base", "dropped by the run's rules"):
        assert seen[what] > 0 or place == "folder", seen
