"""Which step each candidate is of: from contents before names, and all of them on one scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from everystep.exchange.candidate import Candidate
from everystep.exchange.found import UNPLACED, Skipped
from everystep.exchange.names import NUMBER


@dataclass(frozen=True)
class Placed:
    """`beside` are metrics that the scale leaves over: the epoch, or the step within it."""

    candidate: Candidate
    step: int
    how: str
    beside: dict[str, float]


_Step = tuple[int, str]


def place(candidates: Sequence[Candidate]) -> tuple[list[Placed], list[Skipped]]:
    """Candidates with their steps, sorted; what has none is skipped."""
    candidates = _without_constants(candidates)
    steps = {at: step for at, candidate in enumerate(candidates) if (step := _step(candidate)) is not None}
    if all(how == NUMBER and candidates[at].facts.epoch in (None, step) for at, (step, how) in steps.items()):
        steps = {at: one for at, one in steps.items() if candidates[at].facts.epoch is None}
    by_name = _by_name(candidates)
    if _within_epochs(candidates, steps) and len(by_name) == len(steps) and not _within_epochs(candidates, by_name):
        steps = by_name
    epochs = {at: epoch for at, c in enumerate(candidates) if (epoch := c.epoch) is not None}
    rest = [at for at in epochs if at not in steps]
    skipped: list[Skipped] = []
    if _within_epochs(candidates, steps):
        placed = _by_epochs(candidates, steps, epochs)
    elif rest and steps and not all(how == NUMBER for _, how in steps.values()):
        placed, skipped = _beside_steps(candidates, steps, epochs, rest)
    else:
        placed = [_of_step(candidates[at], *step) for at, step in steps.items()]
        placed += [Placed(candidates[at], epochs[at], _epoch_how(candidates[at]), {}) for at in rest]
    unknown = [c for at, c in enumerate(candidates) if at not in steps and at not in epochs]
    more, left = _unknown(unknown, alone=len(candidates) == 1)
    if more and any(one.step == 0 and one.candidate.is_delta for one in placed):
        # What the first epoch, number 0, changed leads from the initial weights to the state after one epoch.
        placed = [replace(one, step=one.step + 1, how=f"{one.how} + 1") for one in placed]
    return sorted([*placed, *more], key=lambda one: (one.step, one.candidate.path)), [*skipped, *left]


def sentence(hows: list[str]) -> str:
    """Where the steps of all files come from."""
    counts = Counter(hows).most_common()
    return ", ".join(f"{how} ({count} file{'s' if count > 1 else ''})" for how, count in counts) or "no file has a step"


def _without_constants(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without what the contents of all files say alike where their names differ: how long training was to be."""
    both = [c for c in candidates if c.facts.epoch is not None and c.named.epoch is not None]
    if len({c.facts.epoch for c in both}) == 1 < len({c.named.epoch for c in both}):
        candidates = [replace(c, facts=replace(c.facts, epoch=None)) if c in both else c for c in candidates]
    both = [c for c in candidates if c.facts.step is not None and c.named.step is not None]
    if len({c.facts.step for c in both}) == 1 < len({c.named.step for c in both}):
        candidates = [replace(c, facts=replace(c.facts, step=None)) if c in both else c for c in candidates]
    return list(candidates)


def _step(candidate: Candidate) -> _Step | None:
    if candidate.facts.step is not None:
        return candidate.facts.step, f"content: {candidate.facts.step_key}"
    return (candidate.named.step, candidate.named.how) if candidate.named.step is not None else None


def _by_name(candidates: Sequence[Candidate]) -> dict[int, _Step]:
    return {at: (c.named.step, c.named.how) for at, c in enumerate(candidates) if c.named.step is not None}


def _epoch_how(candidate: Candidate) -> str:
    return "name: epoch" if candidate.facts.epoch is None else "content: epoch"


def _of_step(candidate: Candidate, step: int, how: str) -> Placed:
    return Placed(candidate, step, how, {} if candidate.epoch is None else {"epoch": float(candidate.epoch)})


def _within_epochs(candidates: Sequence[Candidate], steps: dict[int, _Step]) -> bool:
    """Whether these steps begin anew with each epoch: a later epoch has no later step."""
    if not steps or any(candidates[at].facts.total for at in steps):
        return False
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    for at, (step, _) in steps.items():
        epoch = candidates[at].epoch
        if epoch is None:
            return False
        first[epoch] = min(step, first.get(epoch, step))
        last[epoch] = max(step, last.get(epoch, step))
    order = sorted(first)
    return any(first[later] <= last[earlier] for earlier, later in pairwise(order))


def _by_epochs(candidates: Sequence[Candidate], steps: dict[int, _Step], epochs: dict[int, int]) -> list[Placed]:
    """By epoch, then by the step within it; an epoch is the step where each has one file, else the place in the row."""
    pairs = {at: (epoch, at not in steps, steps[at][0] if at in steps else 0) for at, epoch in epochs.items()}
    order = sorted(set(pairs.values()))
    single = len({epoch for epoch, *_ in order}) == len(order)
    placed = []
    for at, pair in pairs.items():
        beside = {"step_in_epoch": float(steps[at][0])} if at in steps else {}
        if single:
            placed.append(Placed(candidates[at], pair[0], _epoch_how(candidates[at]), beside))
        else:
            how = "order of epochs, and of steps in them"
            placed.append(Placed(candidates[at], order.index(pair) + 1, how, {**beside, "epoch": float(pair[0])}))
    return placed


def _beside_steps(
    candidates: Sequence[Candidate], steps: dict[int, _Step], epochs: dict[int, int], rest: list[int]
) -> tuple[list[Placed], list[Skipped]]:
    """Files that know their epoch alone, among others that count steps."""
    placed = [_of_step(candidates[at], *step) for at, step in steps.items()]
    known = {epochs[at]: step for at, (step, _) in sorted(steps.items()) if at in epochs}
    line = _line(known)
    skipped: list[Skipped] = []
    for at in rest:
        epoch = epochs[at]
        if epoch in known:
            placed.append(_of_step(candidates[at], known[epoch], f"epoch {epoch}, whose step another file has"))
        elif line is not None:
            how = f"epoch {epoch}, at {line[0]} steps an epoch as in the other files"
            placed.append(_of_step(candidates[at], line[0] * epoch + line[1], how))
        else:
            why = f"only its epoch ({epoch}) is known, and other files count steps: put it into a folder of its own"
            skipped += candidates[at].skip(why, UNPLACED)
    return placed, skipped


def _line(known: dict[int, int]) -> tuple[int, int] | None:
    """(a, b) with step = a·epoch + b for all that is known; b is 0, or a where epochs count from 0."""
    for first in (0, 1):
        rates = {Fraction(step, epoch + first) for epoch, step in known.items() if epoch + first}
        if len(rates) == 1 and all(step == 0 for epoch, step in known.items() if not epoch + first):
            rate = rates.pop()
            if rate.denominator == 1 and rate > 0:
                return int(rate), int(rate) * first
    return None


def _unknown(candidates: list[Candidate], alone: bool) -> tuple[list[Placed], list[Skipped]]:
    placed: list[Placed] = []
    skipped: list[Skipped] = []
    for candidate in candidates:
        if candidate.named.initial:
            placed.append(Placed(candidate, 0, "name: initial", {}))
        elif alone:
            placed.append(Placed(candidate, 0, "nothing says a step", {}))
        else:
            why = "neither its name nor what is in it says a step or an epoch: rename it to …_step_N or …_epoch_N"
            skipped += candidate.skip(why, UNPLACED)
    return placed, skipped
