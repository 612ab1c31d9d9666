"""What a run keeps, drops, thins and brings back, through the door; and why, in words."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _retention import DAY, Store, same, state_of, store_of, thinned, whole
from _train import WithoutGit, new_repository, one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

import everystep
from everystep import Conflict, NotFound, RunTakenOver, UsageError, best, every, last, tagged, when, within
from everystep.errors import CheckpointRetired, EverystepWarning
from everystep.storage import MemoryStorage
from everystep.upkeep import DROP, KEEP, THIN, Kept, drops_most, plan

__all__ = ["one_thread"]

# the plan ----------------------------------------------------------------------------------------------------------


def kept(*steps: int, **of: dict[int, Any]) -> list[Kept]:
    """Checkpoints of these steps, each saved 10 seconds after the one before; `loss={step: value}` and the like."""
    loss, tags, thin = of.get("loss", {}), of.get("tags", {}), of.get("thin", {})
    return [
        Kept(str(step), step, 10.0 * n, {"loss": loss[step]} if step in loss else {}, tags.get(step, ()), step in thin)
        for n, step in enumerate(steps)
    ]


def said(found: Iterable[Any]) -> list[tuple[int, str, str]]:
    return [(one.checkpoint.step, one.action, "; ".join(one.reasons)) for one in found]


def test_without_rules_nothing_goes() -> None:
    assert said(plan(kept(1, 2), None, None)) == [(1, KEEP, "no rule drops anything"), (2, KEEP, "newest")]
    assert plan([], last(1), last(1)) == []


def test_reasons() -> None:
    rule = every(3) | best(2, "loss") | last(2)
    found = plan(kept(1, 2, 3, 4, 5, 6, loss={1: 0.5, 2: 0.3, 4: 0.2}, tags={1: ("a", "b")}), rule, None)
    assert said(found) == [
        (1, KEEP, "tag a; tag b"),
        (2, KEEP, "best loss, no. 2"),
        (3, KEEP, "every 3 steps"),
        (4, KEEP, "best loss, no. 1"),
        (5, KEEP, "last 2"),
        (6, KEEP, "newest; every 3 steps, last 2"),
    ]
    assert said(plan(kept(1, 2, 3, 4), every(3), None))[:2] == [
        (1, DROP, "no rule keeps it"),
        (2, DROP, "no rule keeps it"),
    ]


def test_keep_full_names_who_keeps_the_optimizer_state() -> None:
    thin = "no rule keeps it in full"
    assert said(plan(kept(1, 2, 3, tags={1: ("a",)}), None, last(2))) == [
        (1, THIN, f"tag a; {thin}"),
        (2, KEEP, "last 2"),
        (3, KEEP, "newest; last 2"),
    ]
    found = plan(kept(1, 2, 3, 4, loss={1: 0.1}, thin={2: True}), every(2), best(1, "loss"))
    assert said(found) == [
        (1, KEEP, "best loss, no. 1"),  # what is to be kept in full is kept
        (2, KEEP, "every 2 steps"),  # it is thin already
        (3, DROP, "no rule keeps it"),
        (4, KEEP, "newest; every 2 steps"),
    ]


def test_each_rule_names_what_it_keeps() -> None:
    ten = kept(*range(1, 11), loss={n: float(-n) for n in range(1, 10)}, tags={3: ("v1",), 4: ("w",)})
    expected: list[tuple[everystep.Rule, list[int]]] = [
        (last(3), [8, 9, 10]),
        (last(99), list(range(1, 11))),
        (every(4), [4, 8]),
        (every(seconds=30), [1, 4, 7, 10]),
        (best(2, "loss"), [8, 9]),
        (best("loss", mode="max"), [1]),
        (within(seconds=25), [8, 9, 10]),
        (tagged(), [3, 4]),
        (tagged("v*"), [3]),
        (when(lambda one: one.step % 5 == 0), [5, 10]),
        (tagged("w") | every(5), [4, 5, 10]),
    ]
    for rule, steps in expected:
        assert sorted(int(id) for id in rule.keeps(ten)) == steps
    nan = kept(1, 2, 3, loss={1: math.nan, 2: 2.0})
    assert list(best(3, "loss").keeps(nan)) == ["2"]


RULES = st.one_of(
    st.integers(1, 6).map(last),
    st.integers(1, 5).map(every),
    st.integers(1, 60).map(lambda n: every(seconds=n)),
    st.integers(1, 4).map(lambda n: best(n, "loss")),
    st.integers(1, 60).map(lambda n: within(seconds=n)),
    st.just(tagged("a*")),
    st.sets(st.integers(0, 12)).map(lambda steps: when(lambda one: one.step in steps)),
)
MAYBE = st.one_of(st.none(), RULES, st.tuples(RULES, RULES).map(lambda two: two[0] | two[1]))
KEPT = st.lists(st.integers(0, 12), max_size=12).flatmap(
    lambda steps: st.tuples(
        st.just(steps),
        st.dictionaries(st.sampled_from(steps or [0]), st.floats(0, 4), max_size=9),
        st.dictionaries(st.sampled_from(steps or [0]), st.sampled_from([("a1",), ("b",)]), max_size=3),
        st.dictionaries(st.sampled_from(steps or [0]), st.just(True), max_size=4),
    )
)


@settings(max_examples=150, deadline=None)
@given(KEPT, MAYBE, MAYBE)
def test_what_holds_for_every_plan(
    drawn: tuple[Any, ...], keep: everystep.Rule | None, keep_full: everystep.Rule | None
) -> None:
    steps, loss, tags, thin = drawn
    there = kept(*steps, loss=loss, tags=tags, thin=thin)
    there = [Kept(str(n), *vars_of(one)) for n, one in enumerate(there)]  # ids of their own: steps may be equal
    found = plan(there, keep, keep_full)
    assert [one.checkpoint for one in found] == there and all(one.reasons for one in found)
    for one in found:
        assert one.action == KEEP or one.checkpoint is not there[-1]
        assert one.action != DROP or (keep is not None and not one.checkpoint.tags)
        assert one.action != THIN or (keep_full is not None and not one.checkpoint.thin)
    rest = [one.checkpoint for one in found if one.action == KEEP]
    rest_full = {one.id for one in rest if not one.thin}
    after = [
        Kept(one.id, *vars_of(one, thin=one.thin or one.id not in rest_full))
        for one in there
        if one.id in {found.checkpoint.id for found in found if found.action != DROP}
    ]
    assert all(one.action == KEEP for one in plan(after, keep, keep_full)), "a plan leaves nothing to itself"


def vars_of(one: Kept, thin: bool | None = None) -> tuple[Any, ...]:
    return one.step, one.time, one.metrics, one.tags, one.thin if thin is None else thin


def test_most_is_more_than_half() -> None:
    assert not drops_most(plan(kept(1, 2, 3, 4), last(2), None))
    assert drops_most(plan(kept(1, 2, 3, 4, 5), last(2), None))
    assert not drops_most([])


# by hand -----------------------------------------------------------------------------------------------------------


def steps_of(past: everystep.PastRun) -> list[int]:
    return [checkpoint.step for checkpoint in past.checkpoints(all=True)]


def test_a_plan_that_is_only_looked_at_changes_nothing() -> None:
    store = store_of(6)
    before = dict(store.storage.objects)
    past = store.open()["a"]
    looked = past.forget(last(3), last(1), dry_run=True)
    assert store.storage.objects == before and steps_of(past) == [1, 2, 3, 4, 5, 6]
    assert said(past.forget(last(3), last(1))) == said(looked)
    assert steps_of(past) == [4, 5, 6] and [c.thin for c in past.checkpoints()] == [True, True, False]
    assert said(past.forget(last(1), dry_run=True)) == [
        (4, DROP, "no rule keeps it"),
        (5, DROP, "no rule keeps it"),
        (6, KEEP, "newest; last 1"),
    ]


def test_where_nothing_was_saved_nothing_is_written() -> None:
    store = Store()
    run = store.open().run("a", keep=last(1))
    assert run.forget(last(1), force=True) == [] and run.dropped == []
    assert run.prune() == everystep.Freed() and run.prune(now=True).packs == 0
    with pytest.raises(NotFound):
        run.undo()
    assert store.storage.objects == {}
    with store.open().run("b").track(rng=False) as other:
        other.save(1, state=state_of(1)).wait()
    before = set(store.storage.objects)
    assert run.forget(last(1)) == [] and run.prune().packs == 0 and set(store.storage.objects) == before


def test_more_than_half_is_asked_about() -> None:
    store = store_of(5)
    past = store.open()["a"]
    with pytest.raises(Conflict) as caught:
        past.forget(last(2))
    assert caught.value.what == "these rules drop 3 of 5 checkpoints"
    assert caught.value.where == "memory:///runs/a"
    assert caught.value.do == "look at the plan with dry_run=True, then pass force=True"
    assert steps_of(past) == [1, 2, 3, 4, 5]
    past.forget(last(2), force=True)
    assert steps_of(past) == [4, 5]
    past.forget(last(1))
    assert steps_of(past) == [5], "half is not more than half"


def test_what_is_no_rule_is_refused() -> None:
    past = store_of(2).open()["a"]
    for wrong in (3, "last", last, [last(1)]):
        with pytest.raises(UsageError, match=r"a rule of forget\(\) is .*, which is not a rule"):
            past.forget(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"keep= is 3, which is not a rule"):
        new_repository().run("a", keep=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="says when to save, not what to keep"):
        past.forget(every(epochs=1))
    with pytest.raises(UsageError, match="says what to keep, not when to save"):
        list(new_repository().run("a").track(rng=False, x=(dict, print)).steps(3, save_on=last(1)))
    assert steps_of(past) == [1, 2]


def test_a_rule_that_fails_drops_nothing() -> None:
    past = store_of(3).open()["a"]
    with pytest.raises(ZeroDivisionError):
        past.forget(when(lambda one: one.step / 0 > 1))
    assert steps_of(past) == [1, 2, 3]


def test_rules_see_what_was_added_since_somebody_looked() -> None:
    """A process that has read the run before decides about what is there now."""
    store = Store(base_ratio=0.0)
    with store.open().run("a").track(rng=False) as run:
        run.save(1, state=state_of(1)).wait()
        past, other = store.open()["a"], store.open()["a"]
        assert steps_of(past) == steps_of(other) == [1]
        for step in (2, 3, 4):
            run.save(step, state=state_of(step)).wait()
        assert said(past.forget(last(2))) == [
            (1, DROP, "no rule keeps it"),
            (2, DROP, "no rule keeps it"),
            (3, KEEP, "last 2"),
            (4, KEEP, "newest; last 2"),
        ]
        freed = other.prune(now=True)
        assert freed.packs > 0 and freed.held_bytes == store.nbytes and steps_of(other) == [3, 4]


def test_the_newest_and_what_has_a_tag_stay() -> None:
    store = store_of(4)
    past = store.open()["a"]
    past.at(2).tag("paper")
    nothing = when(lambda one: False)
    assert said(past.forget(nothing, nothing, force=True)) == [
        (1, DROP, "no rule keeps it"),
        (2, THIN, "tag paper; no rule keeps it in full"),
        (3, DROP, "no rule keeps it"),
        (4, KEEP, "newest"),
    ]
    assert same(past.tagged("paper").load(), thinned(state_of(2)))
    past.untag("paper")
    past.forget(nothing)
    assert steps_of(past) == [4]


def test_after_a_rewind_the_newest_is_where_it_went() -> None:
    store = store_of(4)
    run = store.open().run("a").track(rng=False)
    assert run.rewind(2) == 2
    run.forget(last(1), force=True, undo_seconds=0)
    assert steps_of(run) == [2] and run.latest.step == 2
    run.save(3, state=state_of(30)).wait()
    run.close()
    run.prune()
    assert steps_of(run) == [2, 3] and same(run.at(3).load(), state_of(30)) and whole(run.at(2), 2)


def test_a_thinned_checkpoint() -> None:
    store = store_of(3)
    past = store.open()["a"]
    past.forget(None, last(1), undo_seconds=0)
    past.prune()
    first = past.at(1)
    assert first.thin and same(first.load(), thinned(state_of(1)))
    assert same(first.load(only="params/w"), state_of(1)["params"]["w"])
    with pytest.raises(CheckpointRetired, match="step 1 has been thinned: its optimizer state is gone"):
        first.load(only="opt_state")
    assert all(not leaf.path.startswith("opt_state") for leaf in first.leaves())
    assert 0 < first.verify() < past.at(3).verify()
    assert past.forget(None, last(1))[0].action == KEEP
    run = store.open().run("a").track(rng=False)
    assert run.resume() == 3
    run.close()


def test_an_attachment_outlives_the_checkpoint_that_it_came_with() -> None:
    store = Store(base_ratio=0.0)
    with store.open().run("a").track(rng=False) as run:
        for step in range(1, 6):
            if step in (2, 4):
                run.attach("tokenizer", bytes([step]) * 50_000)
            run.save(step, state=state_of(step)).wait()
    past = store.open()["a"]
    past.forget(when(lambda one: one.step not in (2, 4)), undo_seconds=0)
    assert past.prune().packs > 0
    assert store.open()["a"].attachment("tokenizer") == b"\x04" * 50_000
    assert set(store.packs()) == store.read_by() and store.open().check().ok


@pytest.mark.parametrize("alike", ["equal", "the same"])
def test_what_weights_and_optimizer_have_in_common_stays_for_the_weights(alike: str) -> None:
    """Stored once, wherever it was met first, and it is not the optimizer's alone."""
    store = Store()
    noise = np.random.default_rng(2).standard_normal((4, 3, 2048)).astype(np.float32)
    twin = np.copy if alike == "equal" else np.asarray
    states = [
        {
            "opt_state": {"slow": a, "m": b},
            "params": {"a": twin(a), "b": np.concatenate([b, c]), "c": c},
            "optimizer": {"last": twin(c), "v": b * 2},
        }
        for a, b, c in noise
    ]
    with store.open().run("a").track(rng=False) as run:
        for step, state in enumerate(states):
            run.save(step, state=state).wait()
    past = store.open()["a"]
    past.forget(None, last(1), undo_seconds=0)
    assert past.prune().packs > 0
    for step, state in enumerate(states):
        assert same(past.at(step).load(), state if step == 3 else {"params": state["params"]})
    assert store.open().check().ok


# back again --------------------------------------------------------------------------------------------------------


def test_undo_takes_back_what_one_call_did_and_then_what_the_one_before_did() -> None:
    store = store_of(6)
    past = store.open()["a"]
    past.forget(None, last(3))
    past.forget(last(4), last(2))
    assert steps_of(past) == [3, 4, 5, 6] and [c.thin for c in past.checkpoints()] == [True, True, False, False]
    assert [c.step for c in past.dropped] == [1, 2, 3, 4]
    assert [c.step for c in past.undo()] == [1, 2, 4]
    assert steps_of(past) == [1, 2, 3, 4, 5, 6]
    assert [c.thin for c in past.checkpoints()] == [True, True, True, False, False, False]
    past.prune()
    assert [c.step for c in past.undo()] == [1, 2, 3]
    for checkpoint in past.checkpoints():
        assert not checkpoint.thin and whole(checkpoint, checkpoint.step)
    with pytest.raises(NotFound) as caught:
        past.undo()
    assert caught.value.what == "nothing that was dropped can be brought back"
    assert caught.value.do == "look at what is kept: log"


def test_what_was_thinned_and_then_dropped_waits_for_its_time_in_full() -> None:
    """Dropping it ends neither the time nor the bytes of its optimizer state."""
    store = store_of(3, base_ratio=0.0)
    past = store.open()["a"]
    past.forget(None, last(1), undo_seconds=7 * DAY)
    store.clock.seconds += DAY
    past.forget(last(1), force=True, undo_seconds=7 * DAY)
    store.clock.seconds += 5 * DAY
    assert past.prune().packs == 0
    past.undo()
    past.undo()
    assert all(whole(c, c.step) and not c.thin for c in past.checkpoints())
    past.forget(None, last(1), undo_seconds=2 * DAY)
    past.forget(last(1), force=True, undo_seconds=7 * DAY)
    store.clock.seconds += 3 * DAY
    assert past.prune().packs > 0
    past.undo()
    assert [c.thin for c in past.checkpoints()] == [True, True, False]
    assert all(whole(c, c.step) for c in past.checkpoints())
    with pytest.raises(NotFound):
        past.undo()


def test_what_was_dropped_has_no_name_and_no_tag_until_it_is_back() -> None:
    store = store_of(3)
    past = store.open()["a"]
    first = past.at(1)
    past.forget(last(2))
    for look in (lambda: past.at(1), lambda: past.find("1"), lambda: past.find(first.id)):
        with pytest.raises(NotFound):
            look()
    with pytest.raises(CheckpointRetired, match="step 1 has been dropped"):
        first.tag("again")
    assert past.best("loss", mode="max").step == 2
    past.undo()
    assert first.tag("again").tags == ["again"] and past.best("loss", mode="max") == first
    assert steps_of(past) == [1, 2, 3]


def test_undo_beside_a_process_that_saves() -> None:
    store = store_of(3)
    run = store.open().run("a", keep=last(2)).track(rng=False)
    assert run.resume() == 3
    beside = store.open()["a"]
    beside.forget(last(2))
    run.save(4, state=state_of(4)).wait()
    run._writer.wait()
    assert steps_of(beside) == [3, 4]
    beside.undo()
    assert set(steps_of(beside)) >= {3, 4}
    run.save(5, state=state_of(5)).wait()
    run.close()
    assert steps_of(beside) == [4, 5]
    assert all(whole(c, c.step) for c in beside.checkpoints())


# by the run's own rules --------------------------------------------------------------------------------------------


def test_rules_of_a_run_hold_after_every_save() -> None:
    store = Store()
    rules = {"keep": last(3) | best(1, "loss") | every(10), "keep_full": last(2)}
    with store.open().run("a", **rules).track(rng=False) as run:
        for step in range(8, 23):
            run.save(step, state=state_of(step), metrics={"loss": 0.1 if step == 12 else 1.0}).wait()
            run._writer.wait()
            expected = {
                12 if step >= 12 else 8,
                *(s for s in (10, 20) if s <= step),
                *range(max(8, step - 2), step + 1),
            }
            assert steps_of(run) == sorted(expected)
            assert [c.step for c in run.checkpoints() if not c.thin] == list(range(max(8, step - 1), step + 1))
    assert steps_of(run) == [10, 12, 20, 21, 22]
    assert all(whole(c, c.step) for c in run.checkpoints())
    assert set(store.packs()) == store.read_by()


def test_rules_that_would_empty_a_run_ask_first() -> None:
    store = store_of(9)
    run = store.open().run("a", keep=last(2)).track(rng=False)
    run.resume()
    run.save(10, state=state_of(10)).wait()
    with pytest.warns(EverystepWarning) as caught:
        run.save(11, state=state_of(11)).wait()
        run._writer.wait()
    assert str(caught[0].message) == (
        "run 'a': keep= would drop 8 of 10 checkpoints, so nothing is dropped; if that is meant, call "
        "forget(keep=…, force=True) once"
    )
    assert len(steps_of(run)) == 11
    run._writer.notices.clear()
    run.forget(keep=last(2), force=True)
    run.save(12, state=state_of(12)).wait()
    run.save(13, state=state_of(13)).wait()
    run.close()
    assert steps_of(run) == [12, 13]


def test_rules_of_a_run_from_its_first_save_on_never_ask() -> None:
    store = Store()
    with store.open().run("a", keep=last(1)).track(rng=False) as run:
        for step in range(1, 8):
            run.save(step, state=state_of(step)).wait()
    assert steps_of(run) == [7] and whole(run.latest, 7)


def test_a_rule_that_fails_in_the_background_is_told_and_the_save_stands() -> None:
    store = Store()
    run = store.open().run("a", keep=when(lambda one: one.step / 0 > 1)).track(rng=False)
    run.save(1, state=state_of(1)).wait()
    with pytest.warns(EverystepWarning, match="old checkpoints could not be freed: ZeroDivisionError"):
        run.close()
    assert steps_of(run) == [1]


def test_a_process_that_was_taken_over_drops_nothing() -> None:
    store = Store()
    old = store.open().run("a", keep=last(1)).track(rng=False)
    old.save(1, state=state_of(1)).wait()
    new = store.open().run("a").track(rng=False)
    new.resume()
    for step in (2, 3):
        new.save(step, state=state_of(step)).wait()
    assert old._writer._keeper.after_commit() == []
    assert steps_of(new) == [1, 2, 3]
    with pytest.raises(RunTakenOver):
        old.save(4, state=state_of(4)).wait()
    with pytest.raises(RunTakenOver):
        old.close()
    new.close()
    assert steps_of(new) == [1, 2, 3] and all(whole(c, c.step) for c in new.checkpoints())


def test_rules_of_a_run_drop_only_where_the_whole_log_can_be_read() -> None:
    store = store_of(4)
    [record] = [key for key in store.storage.objects if key.endswith("log/" + "2".zfill(20))]
    store.storage.objects[record] = b"x" + store.storage.objects[record][1:]
    past = store.open()["a"]
    before = dict(store.storage.objects)
    for act in (lambda: past.forget(last(1), force=True), past.prune, lambda: past.prune(now=True)):
        with pytest.raises(everystep.Damaged, match="part of the log cannot be read") as caught:
            act()
        assert "nothing was dropped or freed" in caught.value.do
    assert store.storage.objects == before


# how much a run takes up -------------------------------------------------------------------------------------------


class Highest(MemoryStorage):
    """Remembers the most that all packs ever came to."""

    most = 0

    def put(self, key: str, data: Iterable[Any]) -> None:
        super().put(key, data)
        self.most = max(self.most, sum(len(body) for key, body in self.objects.items() if "/packs/" in key))


def gpt(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A small GPT in training: every second step."""
    spec = importlib.util.spec_from_file_location("gpt", Path(__file__).parents[1] / "examples" / "gpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpt", module)
    spec.loader.exec_module(module)
    module.CONTEXT, module.WIDTH, module.LAYERS = 32, 64, 2
    torch.manual_seed(0)
    model, text = module.GPT(), module.Sources(1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        tokens = torch.stack([text[index] for index in torch.randint(1000, (8,)).tolist()])
        optimizer.zero_grad()
        module.loss_of(model, tokens).backward()
        optimizer.step()
        if step % 2 == 0:
            yield model, optimizer


def test_the_last_three_of_a_gpt_take_at_most_four_and_a_half_states(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Highest()
    run = None
    for number, (model, optimizer) in enumerate(gpt(48, monkeypatch), 1):
        if run is None:
            run = new_repository(WithoutGit(), storage).run("gpt", keep=last(3)).track(model=model, optimizer=optimizer)
        run.save(2 * number).wait()
    assert run is not None
    run.close()
    assert steps_of(run) == [44, 46, 48]
    raw = run.latest.cost["raw_bytes"]
    parameters = sum(tensor.numel() * 4 for tensor in model.parameters())
    assert raw > 3 * parameters
    assert 3 < storage.most / raw <= 4.5
