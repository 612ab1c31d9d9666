"""What to keep, what to thin, what to drop: a pure plan over a run's checkpoints, with a reason for each decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

KEEP, THIN, DROP = "keep", "thin", "drop"


@dataclass(frozen=True)
class Kept:
    """A live checkpoint, as rules see it."""

    id: str
    step: int
    time: float
    metrics: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    thin: bool = False
    """Its optimizer state has been dropped already."""
    epoch: int | None = None


class KeepRule(Protocol):
    """What a plan asks a rule: which of these checkpoints (oldest first) it keeps, and why."""

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]: ...


@dataclass(frozen=True)
class Decision:
    """What becomes of one checkpoint, and why."""

    checkpoint: Kept
    action: str
    reasons: tuple[str, ...]


def plan(kept: Sequence[Kept], keep: KeepRule | None, keep_full: KeepRule | None) -> list[Decision]:
    """One decision per live checkpoint, oldest first.

    The newest is always kept in full, and a tag always holds its checkpoint. Without `keep` nothing is dropped, without
    `keep_full` nothing is thinned. What `keep_full` names is also kept.
    """
    full = _reasons(kept, keep_full)
    wanted = _reasons(kept, keep)
    return [_decide(one, wanted.get(one.id, ()), full.get(one.id, ()), keep, keep_full) for one in kept]


def _reasons(kept: Sequence[Kept], rule: KeepRule | None) -> dict[str, tuple[str, ...]]:
    """id -> why the rule, or nobody's choice, holds it."""
    found: dict[str, tuple[str, ...]] = {}
    if rule is not None:
        found = {id: (reason,) for id, reason in rule.keeps(kept).items()}
    if kept:
        newest = kept[-1].id
        found[newest] = ("newest", *found.get(newest, ()))
    return found


def _decide(
    one: Kept, wanted: tuple[str, ...], full: tuple[str, ...], keep: KeepRule | None, keep_full: KeepRule | None
) -> Decision:
    tagged = tuple(f"tag {tag}" for tag in one.tags)
    if keep is not None and not (wanted or full or tagged):
        return Decision(one, DROP, ("no rule keeps it",))
    reasons = tuple(dict.fromkeys((*wanted, *full, *tagged))) or ("no rule drops anything",)
    if keep_full is not None and not full and not one.thin:
        return Decision(one, THIN, (*reasons, "no rule keeps it in full"))
    return Decision(one, KEEP, reasons)


def drops_most(decisions: Sequence[Decision]) -> bool:
    """Whether a plan drops more than half of what is there: somebody should be asked first."""
    dropped = sum(decision.action == DROP for decision in decisions)
    return dropped > len(decisions) / 2
