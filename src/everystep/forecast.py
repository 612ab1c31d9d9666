"""What a planned run will save and keep, by its own rules, as far as that can be known before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from everystep.loop import Loop
from everystep.rules import AnyOf, Every, Rule, every
from everystep.schema import Layout, Leaf
from everystep.seam import Seam
from everystep.upkeep import DROP, KEEP, Kept, plan
from everystep.vault import RunVault

SAVES_MAX = 200_000
"""A plan of more saves is counted, and not laid out."""
_BY_ALL = " (what all {} ranks save, as far as it is known)"


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


class Outlook:
    """What a run says, once, of the space that its plan may take: before its first save what is known then, and of
    several ranks, as soon as the first checkpoint says it, what all of them store."""

    def __init__(self, keeping: Sequence[Rule | None], quota: int | None) -> None:
        self._keeping, self._quota = keeping, quota
        self._done = self._begun = False

    def say(
        self, vault: RunVault, loop: Loop | None, layout: Layout, leaves: Sequence[Leaf], rank: int, ranks: int
    ) -> str | None:
        """Before a save. None if it surely fits, or was said before.

        Args:
            loop: that saves; None where it is done by hand, and one save is all that is known of.
            layout: of what this rank saves; not encoded yet, so this is the most that it takes.
        """
        latest = vault.log.history.latest
        self._done = self._done or rank > 0 or (latest is not None and not self._begun)
        if self._done:
            return None
        self._begun = True
        cost = latest.event.cost if latest is not None else None
        free = free_bytes(vault.storage.url, vault.seam)
        free = free + cost.stored_bytes if free is not None and cost is not None else free
        room = min((limit for limit in (free, self._quota) if limit is not None), default=None)
        said = None
        if room is not None:
            whole, lasting = _bytes_of(layout, leaves, ranks)
            if cost is not None:
                whole, lasting = cost.raw_bytes, round(cost.raw_bytes * lasting / whole) if whole else cost.raw_bytes
            said = self._judge(loop, whole, lasting, room)
        self._done = said is not None or room is None or cost is not None or ranks == 1
        return f"{said}{_BY_ALL.format(ranks) if ranks > 1 else ''}" if said is not None else None

    def _judge(self, loop: Loop | None, whole: int, lasting: int, room: int) -> str | None:
        """
        Args:
            whole: bytes of a checkpoint, with its optimizer state.
            lasting: without it.
        """
        total, epoch = loop.extent() if loop is not None else (None, None)
        planned = foresee(loop.rule if loop is not None else AnyOf([]), total, epoch, None, *self._keeping)
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


def _bytes_of(layout: Layout, leaves: Sequence[Leaf], ranks: int) -> tuple[int, int]:
    """(in all, without optimizer state) of a checkpoint as one rank can know it: its own, and of each leaf that is cut
    over ranks all of it. What others hold beside that is not seen, so it may be more and is never less."""
    whole = lasting = 0
    cut = set[int]()
    for region in layout.regions:
        leaf = leaves[region.leaf]
        if region.leaf in cut:
            continue
        nbytes = region.nbytes
        if leaf.boxes and ranks > 1:
            cut.add(region.leaf)
            nbytes = leaf.nbytes
        whole += nbytes
        lasting += nbytes if layout.streams[region.stream].role != "optimizer" else 0
    return whole, lasting


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
