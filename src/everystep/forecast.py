"""What a planned run will save and keep, by its own rules, as far as that can be known before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from everystep.loop import Loop
from everystep.rules import AnyOf, Every, Rule, every
from everystep.schema import Layout
from everystep.seam import Seam
from everystep.upkeep import DROP, KEEP, Kept, plan
from everystep.vault import RunVault

SAVES_MAX = 200_000
"""A plan of more saves is counted, and not laid out."""


class Planned(msgspec.Struct, frozen=True):
    """None where it cannot be known."""

    total: int | None = None
    """Steps of the whole run."""
    every: float | None = None
    """Steps between two saves, on average."""
    saves: int | None = None
    kept: int | None = None
    """Checkpoints that are there at the end."""
    full: int | None = None
    """Those of them with their optimizer state."""
    drops: bool = False
    """Whether rules drop or thin anything."""
    unforeseen: list[str] = []
    """What a rule does that depends on how the training goes."""


def foresee(
    rule: Rule,
    total: int | None,
    epoch_steps: int | None,
    step_seconds: float | None,
    keep: Rule | None,
    keep_full: Rule | None,
) -> Planned:
    """
    Args:
        rule: when to save.
        total: steps of the whole run.
    """
    unforeseen: list[str] = []
    spans = [span for one in _flat(rule) if (span := _span(one, epoch_steps, step_seconds, unforeseen)) is not None]
    drops = keep is not None or keep_full is not None
    if total is None:
        return Planned(every=min(spans, default=None), drops=drops, unforeseen=unforeseen)
    if any(total // span > SAVES_MAX for span in spans):
        saves = max(total // span for span in spans)
        none = None if drops else saves
        return Planned(total, total / saves, saves, none, none, drops, unforeseen)
    steps = sorted({total, *(step for span in spans for step in range(span, total + 1, span))})
    kept: int | None = None
    full: int | None = None
    try:
        kept, full = _kept(steps, step_seconds or 0.0, keep, keep_full)
    except Exception as error:  # noqa: BLE001  a user's own function may ask for what only a real checkpoint has
        unforeseen.append(f"keep= ({error!r})")
    return Planned(total, total / len(steps), len(steps), kept, full, drops, unforeseen)


def by_hand(steps: Sequence[int], given: int | None) -> Rule:
    """The rule that saves by hand follow: as told, or as seen."""
    gaps = sorted(later - earlier for earlier, later in pairwise(steps) if later > earlier)
    span = given or (gaps[len(gaps) // 2] if gaps else None)
    return every(span) if span else AnyOf([])


def free_bytes(place: str, seam: Seam) -> int | None:
    """Bytes that may be written at a place, as its next folder that exists says; None for what is no folder."""
    if "://" in place:
        return None
    folder = place
    while not seam.files.is_folder(folder) and folder not in ("", "/"):
        folder = folder.rpartition("/")[0] or "/"
    try:
        return seam.files.free(folder)
    except OSError:
        return None


def outlook(
    vault: RunVault, loop: Loop | None, keeping: Sequence[Rule | None], layout: Layout, quota: int | None
) -> str | None:
    """Before the first save of a run: what to say if what is planned may not find room. None if it surely does.

    Args:
        loop: that saves; None where it is done by hand, and one save is all that is known of.
        keeping: the rules of keep and keep_full.
        layout: of the state; not encoded yet, so this is the most that it takes.
    """
    limits = (free_bytes(vault.storage.url, vault.seam), quota)
    room = min((limit for limit in limits if limit is not None), default=None)
    if room is None or vault.log.history.latest is not None:
        return None
    total, epoch = loop.extent() if loop is not None else (None, None)
    planned = foresee(loop.rule if loop is not None else AnyOf([]), total, epoch, None, *keeping)
    whole = sum(stream.nbytes for stream in layout.streams)
    lasting = sum(stream.nbytes for stream in layout.streams if stream.role != "optimizer")
    kept = planned.kept if planned.kept is not None else planned.saves or 1
    full = min(kept, planned.full if planned.full is not None else kept)
    most = (full + 1) * whole + (kept - full) * lasting  # one more is there while it is written
    if most <= room:
        return None
    what = f"{kept} checkpoints of {_size(whole)} take" if kept > 1 else f"a checkpoint of {_size(whole)} takes"
    return (
        f"{what} up to {_size(most)}, and there is room for {_size(room)}: deltas make it less, by how much is "
        "what `everystep doctor` measures; keep= and keep_full= hold less"
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _flat(rule: Rule) -> Iterable[Rule]:
    if isinstance(rule, AnyOf):
        for one in rule.rules:
            yield from _flat(one)
    else:
        yield rule


def _span(rule: Rule, epoch_steps: int | None, step_seconds: float | None, unforeseen: list[str]) -> int | None:
    """Steps between the saves of one rule."""
    if isinstance(rule, Every):
        if rule.steps is not None:
            return rule.steps
        if rule.epochs is not None and epoch_steps:
            return rule.epochs * epoch_steps
        if rule.seconds is not None and step_seconds:
            return max(1, math.ceil(rule.seconds / step_seconds))
    unforeseen.append(type(rule).__name__.lower())
    return None


def _kept(steps: Sequence[int], step_seconds: float, keep: Rule | None, keep_full: Rule | None) -> tuple[int, int]:
    """How many stay, and how many of them in full. The best of a metric are taken to be the oldest, so that they are
    not the ones that another rule keeps as well: the most that there can be."""
    modes = {name: mode for rule in (keep, keep_full) if rule is not None for name, mode in rule.metrics().items()}
    kept = [
        Kept(str(step), step, step * step_seconds, {n: float(step if m == "min" else -step) for n, m in modes.items()})
        for step in steps
    ]
    decided = plan(kept, keep, keep_full)
    return sum(one.action != DROP for one in decided), sum(one.action == KEEP for one in decided)
