"""Rules that a user composes with `|`: when to save (and which way a metric is better)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from everystep.errors import UsageError

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
        return AnyOf([self, other])


@dataclass
class AnyOf(Rule):
    rules: list[Rule] = field(default_factory=list)

    def due(self, moment: Moment) -> str | None:
        reasons = [reason for rule in self.rules if (reason := rule.due(moment)) is not None]
        return ", ".join(reasons) or None

    def metrics(self) -> dict[str, str]:
        return {name: mode for rule in self.rules for name, mode in rule.metrics().items()}


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
        value = number(self.metric, moment.metrics[self.metric])
        best = moment.bests.get(self.metric)
        return f"best {self.metric}" if better(float(value), best, self.mode) else None

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
    given = [value for value in (steps, epochs, seconds) if value is not None]
    if not given or any(isinstance(value, bool) or value <= 0 for value in given):
        raise UsageError("every() needs a positive number", do="every(100), every(epochs=1) or every(seconds=600)")
    return Every(steps, epochs, seconds)


def best(metric: str, mode: str | None = None) -> Rule:
    """At each new best of a metric; `mode` is "min" or "max", needed where the name does not tell."""
    return Best(metric, mode_of(metric, mode))


def when(function: Callable[[Moment], Any]) -> Rule:
    """Whenever `function(moment)` is true; see `Moment` for what it is given."""
    return When(function)


def union(save_every: int | None, save_on: Rule | None, *, epochs: bool = False) -> AnyOf:
    """The rule for `save_every=` (steps, or epochs) and `save_on=` together."""
    rules: list[Rule] = []
    if save_every is not None:
        rules.append(every(epochs=save_every) if epochs else every(save_every))
    if save_on is not None:
        if not isinstance(save_on, Rule):
            raise UsageError(
                f"save_on={save_on!r} is not a rule",
                do='everystep.every(…) | everystep.best("val_loss") | everystep.when(f)',
            )
        rules.append(save_on)
    return AnyOf(rules)


def hold(value: Any) -> Any:
    """A metric, safe from what its owner does next; a tensor is not brought to the CPU yet."""
    if callable(getattr(value, "detach", None)):
        return value.detach().clone()
    return value.copy() if callable(getattr(value, "__array__", None)) else value


def number(name: str, value: Any) -> Any:
    """A metric as a plain number (or bool, str, None).

    Raises:
        UsageError: for what is not one number.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        plain = value.item()
    except (AttributeError, ValueError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"the metric {name!r} is not one number but {type(value).__name__}", do="record a scalar: its mean, perhaps"
        ) from error
    return plain if type(plain) in (bool, int, float) else float(plain)
