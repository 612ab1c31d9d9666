"""Rules that a user composes with `|`: when to save, what to keep (and which way a metric is better)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from everystep.errors import UsageError
from everystep.metrics import measure
from everystep.upkeep import Kept

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
    known = known_mode(metric)
    if known is not None:
        return known
    raise UsageError(
        f"is a higher {metric!r} better, or a lower one? Its name does not say",
        do=f'pass mode="min" or mode="max" with {metric!r}',
    )


def known_mode(metric: str) -> str | None:
    """ "min" or "max" as a metric's name says; None if it does not."""
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word]
    for word in reversed(words):
        if word in _LOWER:
            return "min"
        if word in _HIGHER:
            return "max"
    return None


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
    """When to save, what to keep. Rules are joined with `|`."""

    def due(self, moment: Moment) -> str | None:
        """Why this moment should be saved; None if it need not."""
        raise UsageError(f"{type(self).__name__.lower()}() says what to keep, not when to save", do="give it to keep=")

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        """id -> why it is kept, of live checkpoints, oldest first."""
        raise UsageError(f"{type(self).__name__.lower()}() does not say what to keep", do="give it to save_on=")

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

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        found: dict[str, str] = {}
        for rule in self.rules:
            for id, reason in rule.keeps(kept).items():
                found[id] = f"{found[id]}, {reason}" if id in found else reason
        return found

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

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        """Steps that are multiples; and of each span of time, the first."""
        if self.epochs is not None:
            raise UsageError(
                "every(epochs=…) says when to save, not what to keep", do="every(steps) or every(seconds=…)"
            )
        found = {}
        span = None
        for one in kept:
            if self.steps is not None and one.step % self.steps == 0:
                found[one.id] = f"every {self.steps} steps"
            if self.seconds is not None and one.time // self.seconds != span:
                found[one.id] = f"every {self.seconds:g} seconds"
                span = one.time // self.seconds
        return found


@dataclass
class Best(Rule):
    """At each new best of a metric; the `count` best are kept."""

    metric: str
    mode: str
    count: int = 1

    def due(self, moment: Moment) -> str | None:
        if self.metric not in moment.metrics:
            return None
        value = measure(self.metric, moment.metrics[self.metric])
        best = moment.bests.get(self.metric)
        return f"best {self.metric}" if value is not None and better(value, best, self.mode) else None

    def metrics(self) -> dict[str, str]:
        return {self.metric: self.mode}

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        sign = 1 if self.mode == "min" else -1
        values = [_order(one.metrics.get(self.metric)) for one in kept]
        ranked = sorted((sign * value, i) for i, value in enumerate(values) if value is not None)
        return {kept[i].id: f"best {self.metric}, no. {n}" for n, (_, i) in enumerate(ranked[: self.count], 1)}


@dataclass
class When(Rule):
    """Whenever the user's function says so."""

    function: Callable[[Any], Any]

    def due(self, moment: Moment) -> str | None:
        return "as your function said" if self.function(moment) else None

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        return {one.id: "as your function said" for one in kept if self.function(one)}


@dataclass
class Last(Rule):
    """The newest ones."""

    count: int

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        return {one.id: f"last {self.count}" for one in kept[-self.count :]}


@dataclass
class Within(Rule):
    """Saved within this time before the newest."""

    seconds: float

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        newest = max((one.time for one in kept), default=0.0)
        return {one.id: f"within {self.seconds:g} s" for one in kept if newest - one.time <= self.seconds}


@dataclass
class Tagged(Rule):
    """With a tag that matches a pattern."""

    pattern: str

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        found = {one.id: [tag for tag in one.tags if fnmatchcase(tag, self.pattern)] for one in kept}
        return {id: f"tagged {tags[0]}" for id, tags in found.items() if tags}


def _order(value: Any) -> float | None:
    """A metric as a number that can be ranked; None for NaN and what is no number."""
    return float(value) if isinstance(value, (int, float)) and not math.isnan(value) else None


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


def best(count: int | str, metric: str | None = None, mode: str | None = None) -> Rule:
    """Saves at each new best of a metric; keeps the best one, or the `count` best.

    `best("val_loss")`, `best(3, "val_loss")`, `best("size", mode="min")`: `mode` is "min" or "max", and needed where
    the metric's name does not tell.
    """
    if isinstance(count, str):
        return Best(count, mode_of(count, mode or metric))
    if metric is None:
        raise UsageError("best() needs a metric", do='best("val_loss") or best(3, "val_loss")')
    return Best(metric, mode_of(metric, mode), _count(count, "best"))


def last(count: int) -> Rule:
    """Keeps the newest checkpoints."""
    return Last(_count(count, "last"))


def within(*, days: float = 0, hours: float = 0, seconds: float = 0) -> Rule:
    """Keeps what was saved within this time before the newest checkpoint."""
    total = 86400 * days + 3600 * hours + seconds
    if not total > 0:
        raise UsageError("within() needs a time", do="within(days=7) or within(hours=12)")
    return Within(total)


def tagged(pattern: str = "*") -> Rule:
    """Keeps what has a tag that matches a pattern; tags hold their checkpoints anyway, but not in full."""
    return Tagged(pattern)


def _count(count: Any, name: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"{name}({count!r}): how many is a positive number", do=f"{name}(3)" if name == "last" else "")
    return count


def when(function: Callable[[Any], Any]) -> Rule:
    """Whenever `function(moment)` is true; as a rule of what to keep, what `function(kept)` is true for.

    See `Moment` and `Kept` for what it is given.
    """
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
