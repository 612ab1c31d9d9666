"""Rules that a user composes with `|`: when to save (and which way a metric is better)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from everystep.errors import UsageError
from everystep.metrics import measure

_LOWER = {
    "loss", "error", "err", "perplexity", "ppl", "mse", "mae", "rmse", "mape", "nll", "wer", "cer", "fid", "bpc",
    "bpb", "kl", "entropy", "distance", "regret",
}  # fmt: skip
_HIGHER = {
    "accuracy", "acc", "f1", "auc", "auroc", "precision", "recall", "map", "bleu", "rouge", "iou", "miou", "dice",
    "r2", "score", "reward", "psnr", "ssim", "correlation", "top1", "top5", "pass", "mrr", "ndcg",
}  # fmt: skip


def mode_of(metric: str, mode: str | None) -> str:
    """ "min" or "max": as told, or as the metric's name says.

    Raises:
        UsageError: if neither does.
    """
    if mode in ("min", "max"):
        return mode
    if mode is not None:
        raise UsageError(f"mode={mode!r} is not known", do='"min" or "max"')
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word]
    for word in reversed(words):
        if word in _LOWER:
            return "min"
        if word in _HIGHER:
            return "max"
    raise UsageError(
        f"is a higher {metric!r} better, or a lower one? Its name does not say",
        do=f'pass mode="min" or mode="max" with {metric!r}',
    )


def better(value: float, than: float | None, mode: str) -> bool:
    """Whether a metric is strictly better; NaN never is."""
    if math.isnan(value):
        return False
    if than is None or math.isnan(than):
        return True
    return value < than if mode == "min" else value > than


@dataclass(frozen=True)
class Moment:
    """What a rule may look at, at the top of the loop after `step` is complete."""

    step: int
    epoch: int | None
    """Epochs completed; None outside of `batches`."""
    epoch_ended: bool
    seconds: float
    """Since the last save, or since the loop began."""
    metrics: Mapping[str, Any]
    """What was recorded at this step."""
    bests: Mapping[str, float]
    """The best value so far of each metric that a rule asks for, this step's not counted."""


class Rule:
    """When to save. Rules are joined with `|`."""

    def due(self, moment: Moment) -> str | None:
        """Why this moment should be saved; None if it need not."""
        raise NotImplementedError

    def metrics(self) -> dict[str, str]:
        """metric -> mode, of what the rule wants to know the best of."""
        return {}

    def __or__(self, other: Rule) -> Rule:
        return AnyOf([self, check_rule(other, "the right side of |")])


@dataclass
class AnyOf(Rule):
    rules: list[Rule] = field(default_factory=list)

    def due(self, moment: Moment) -> str | None:
        reasons = [reason for rule in self.rules if (reason := rule.due(moment)) is not None]
        return ", ".join(reasons) or None

    def metrics(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for rule in self.rules:
            for name, mode in rule.metrics().items():
                if found.setdefault(name, mode) != mode:
                    raise UsageError(f"rules ask for the lowest and for the highest {name!r}", do="choose one mode")
        return found


@dataclass
class Every(Rule):
    """Every n steps, epochs or seconds."""

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def due(self, moment: Moment) -> str | None:
        if self.steps is not None and moment.step % self.steps == 0:
            return f"every {self.steps} steps"
        if self.epochs is not None and moment.epoch_ended and (moment.epoch or 0) % self.epochs == 0:
            return f"every {self.epochs} epochs"
        if self.seconds is not None and moment.seconds >= self.seconds:
            return f"every {self.seconds:g} seconds"
        return None


@dataclass
class Best(Rule):
    """At each new best of a metric."""

    metric: str
    mode: str

    def due(self, moment: Moment) -> str | None:
        if self.metric not in moment.metrics:
            return None
        value = measure(self.metric, moment.metrics[self.metric])
        best = moment.bests.get(self.metric)
        return f"best {self.metric}" if value is not None and better(value, best, self.mode) else None

    def metrics(self) -> dict[str, str]:
        return {self.metric: self.mode}


@dataclass
class When(Rule):
    """Whenever the user's function says so."""

    function: Callable[[Moment], Any]

    def due(self, moment: Moment) -> str | None:
        return "as your function said" if self.function(moment) else None


def every(steps: int | None = None, *, epochs: int | None = None, seconds: float | None = None) -> Rule:
    """Every n steps, epochs or seconds, whichever is given.

    Raises:
        UsageError: if none is given, or one is not positive.
    """
    kinds = ((steps, (int,)), (epochs, (int,)), (seconds, (int, float)))
    given = [(value, kinds) for value, kinds in kinds if value is not None]
    if not given or not all(type(value) in kinds and value > 0 for value, kinds in given):
        raise UsageError(
            "every() needs a positive number of steps, epochs or seconds",
            do="every(100), every(epochs=1) or every(seconds=600)",
        )
    return Every(steps, epochs, seconds)


def best(metric: str, mode: str | None = None) -> Rule:
    """At each new best of a metric; `mode` is "min" or "max", needed where the name does not tell."""
    return Best(metric, mode_of(metric, mode))


def when(function: Callable[[Moment], Any]) -> Rule:
    """Whenever `function(moment)` is true; see `Moment` for what it is given."""
    if not callable(function):
        raise UsageError(f"when({function!r}): not a function", do="when(lambda moment: moment.step in (10, 100))")
    return When(function)


def check_rule(rule: Any, what: str) -> Rule:
    """
    Raises:
        UsageError: if it is none.
    """
    if not isinstance(rule, Rule):
        raise UsageError(
            f"{what} is {rule!r}, which is not a rule",
            do='everystep.every(…) | everystep.best("val_loss") | everystep.when(f)',
        )
    return rule


def union(save_every: int | None, save_on: Rule | None, *, epochs: bool = False) -> AnyOf:
    """The rule for `save_every=` (steps, or epochs) and `save_on=` together."""
    rules: list[Rule] = []
    if save_every is not None:
        rules.append(every(epochs=save_every) if epochs else every(save_every))
    if save_on is not None:
        rules.append(check_rule(save_on, "save_on="))
    return AnyOf(rules)
