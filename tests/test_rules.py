"""When a loop saves: every so often, at each new best, whenever a function says so, and any of these together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from _train import WithoutGit, new_repository, one_thread
from torch import nn

import everystep
from everystep import Repository, Rule, UsageError, best, every, when
from everystep.rules import mode_of

__all__ = ["one_thread"]
LOSSES = [5.0, 4.0, 4.5, 3.0, math.nan, 3.5, 2.0, 2.0, 9.0, 1.0]


class Clock(WithoutGit):
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


def train(
    repo: Repository,
    values: list[Any],
    name: str = "val_loss",
    until: int | None = None,
    clock: Clock | None = None,
    **options: Any,
) -> None:
    """One step for each value, which is recorded as a metric; a step takes 10 seconds."""
    model = nn.Linear(2, 2)
    with repo.run("r").track(model=model) as run:
        for step in run.steps(len(values), **options):
            with torch.no_grad():
                model.weight.add_(step)
            if values[step - 1] is not None:
                run.record(**{name: values[step - 1]})
            if clock is not None:
                clock.seconds += 10
            if step == until:
                break


def saved(values: list[Any] | int, **options: Any) -> list[tuple[int, str]]:
    repo = new_repository(options.get("clock"))
    train(repo, values if isinstance(values, list) else [None] * values, **options)
    return [(c.step, c.reason) for c in repo["r"].checkpoints()]


def steps(values: list[Any] | int, **options: Any) -> list[int]:
    """Without the last, which is always saved."""
    return [step for step, reason in saved(values, **options) if reason != "the last step"]


def test_every_so_many_steps() -> None:
    assert saved(7, save_every=3) == [(3, "every 3 steps"), (6, "every 3 steps"), (7, "the last step")]
    assert saved(6, save_on=every(3)) == [(3, "every 3 steps"), (6, "the last step")]
    assert saved(4) == [(4, "the last step")]


def test_every_so_many_seconds() -> None:
    """Since the last save, whatever it was for."""
    assert steps(12, clock=Clock(), save_on=every(seconds=25)) == [3, 6, 9]
    assert steps(12, clock=Clock(), save_on=every(seconds=25), save_every=4) == [3, 4, 7, 8, 11]
    assert steps(5, clock=Clock(), save_on=every(seconds=0.5)) == [1, 2, 3, 4]
    assert saved(2, clock=Clock(), save_on=every(seconds=10))[0][1] == "every 10 seconds"


def test_each_new_best() -> None:
    assert saved(LOSSES, save_on=best("val_loss")) == [
        (1, "best val_loss"), (2, "best val_loss"), (4, "best val_loss"), (7, "best val_loss"), (10, "the last step"),
    ]  # fmt: skip
    assert steps([*LOSSES, 5], save_on=best("val_loss")) == [1, 2, 4, 7, 10]
    assert steps([*LOSSES, 5], save_on=best("val_loss", mode="max")) == [1, 9]
    assert steps([0.1, 0.3, 0.2, 0.4, 0], name="accuracy", save_on=best("accuracy")) == [1, 2, 4]
    assert steps([math.nan, None, 3.0, 2.0, 1.0], save_on=best("val_loss")) == [3, 4]
    assert steps([math.inf, 1.0, -math.inf, 0.0, 0], save_on=best("val_loss")) == [1, 2, 3]


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.array, float, lambda value: torch.tensor([value])])
def test_metrics_of_every_kind(kind: Any) -> None:
    assert steps([kind(value) for value in [3.0, 2.0, 2.5, 1.0, 0.0]], save_on=best("val_loss")) == [1, 2, 4]
    assert steps([None, "soon", True, False, False, 5], save_on=best("val_loss")) == [3, 4]


@pytest.mark.parametrize("cut", range(1, 10))
def test_bests_are_remembered_over_a_resume(cut: int) -> None:
    reference = saved([*LOSSES, 5], save_on=best("val_loss"))
    for options in ({"save_every": 1}, {}):
        repo = new_repository()
        train(repo, [*LOSSES, 5], until=cut, **{"save_on": best("val_loss"), **options})
        train(repo, [*LOSSES, 5], save_on=best("val_loss"))
        found = [c.step for c in repo["r"].checkpoints()]
        if not options:
            assert found == [step for step, _ in reference]
        assert {step for step, _ in reference} <= set(found)


def test_bests_of_steps_that_were_not_saved_are_remembered_too() -> None:
    repo = new_repository()
    train(repo, [3.0, 1.0, 2.0, 0.5, 9.0, 9.0], save_every=3, until=5)
    train(repo, [3.0, 1.0, 2.0, 1.5, 0.9, 0.95, 5.0], save_on=best("val_loss"))
    # 1.0 at step 2 stays the one to beat; .5 at step 4 came after what was resumed, and is another past.
    assert [c.step for c in repo["r"].checkpoints()] == [3, 5, 7]


def test_whenever_a_function_says_so() -> None:
    moments = []

    def ask(moment: everystep.Moment) -> Any:
        moments.append(moment)
        return moment.step in (2, 5)

    clock = Clock()
    assert saved([4.0, 2.0, 3.0, 1.0, 5.0, 6.0], clock=clock, save_on=best("val_loss") | when(ask))[1:] == [
        (2, "best val_loss, as your function said"), (4, "best val_loss"), (5, "as your function said"),
        (6, "the last step"),
    ]  # fmt: skip
    assert [m.step for m in moments] == [1, 2, 3, 4, 5, 6]
    assert [m.metrics["val_loss"] for m in moments] == [4.0, 2.0, 3.0, 1.0, 5.0, 6.0]
    assert [m.bests for m in moments] == [{}, *({"val_loss": n} for n in (4.0, 2.0, 2.0, 1.0, 1.0))]
    assert [m.seconds for m in moments] == [10, 10, 10, 20, 10, 10]
    assert {(m.epoch, m.epoch_ended) for m in moments} == {(None, False)}


def test_epochs() -> None:
    model = nn.Linear(2, 2)
    repo = new_repository()
    with repo.run("r").track(model=model) as run:
        for _ in run.batches([1, 2, 3], epochs=5, save_every=2, save_on=every(epochs=3) | every(7)):
            with torch.no_grad():
                model.weight.add_(1)
    assert [(c.step, c.reason) for c in repo["r"].checkpoints()] == [
        (6, "every 2 epochs"), (7, "every 7 steps"), (9, "every 3 epochs"), (12, "every 2 epochs"),
        (14, "every 7 steps"), (15, "the last step"),
    ]  # fmt: skip
    assert steps(5, save_on=every(epochs=1)) == []


def test_a_rule_of_one_s_own() -> None:
    class Powers(Rule):
        def due(self, moment: everystep.Moment) -> str | None:
            return "a power of two" if moment.step & (moment.step - 1) == 0 else None

    assert steps(9, save_on=Powers()) == [1, 2, 4, 8]
    assert steps(9, save_on=Powers() | every(3)) == [1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: every(), "positive number"),
        (lambda: every(0), "positive number"),
        (lambda: every(-1), "positive number"),
        (lambda: every(1.5), "positive number"),
        (lambda: every("5"), "positive number"),
        (lambda: every(True), "positive number"),
        (lambda: every(epochs=0), "positive number"),
        (lambda: every(5, epochs=0.5), "positive number"),
        (lambda: every(seconds=-1), "positive number"),
        (lambda: every(seconds=math.nan), "positive number"),
        (lambda: best("quality"), "Its name does not say"),
        (lambda: best("loss", mode="lowest"), "not known"),
        (lambda: when(5), "not a function"),
        (lambda: every(5) | 5, "not a rule"),
        (lambda: every(5) | every, "not a rule"),
        (lambda: steps(5, save_on="best"), "not a rule"),
        (lambda: steps(5, save_on=lambda moment: True), "not a rule"),
        (lambda: steps(5, save_on=best("x", "min") | best("x", "max")), "choose one mode"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make()
    assert caught.value.do


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("loss", "min"), ("val_loss", "min"), ("val/loss", "min"), ("Perplexity", "min"), ("train.error_rate", "min"),
        ("accuracy", "max"), ("val_acc", "max"), ("f1", "max"), ("AUC", "max"), ("top5", "max"),
    ],
)  # fmt: skip
def test_names_that_say_which_way_is_better(name: str, mode: str) -> None:
    assert mode_of(name, None) == mode
    assert mode_of(name, "max") == "max"


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, np.zeros(3), torch.zeros(2), object(), 1j, np.complex64(1j)])
def test_metrics_that_are_not_one_number_are_refused_at_once(value: Any) -> None:
    run = new_repository().run("r")
    with pytest.raises(UsageError, match="'val_loss' is not one number"):
        run.record(val_loss=value)
    with pytest.raises(UsageError, match="'val_loss' is not one number"):
        run.save(1, state={"a": 1}, metrics={"val_loss": value})
    run.close()
