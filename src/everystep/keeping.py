"""What a run keeps: rules laid over its history, by hand, or by the writer after each save."""

from __future__ import annotations

from collections.abc import Callable

from everystep.errors import Conflict, Error, ReadOnly, RunTakenOver
from everystep.rules import Rule
from everystep.upkeep import (
    DROP,
    THIN,
    Decision,
    Freed,
    check_readable,
    collect,
    drop_events,
    drops_most,
    free_unneeded,
    kept_of,
    plan,
)
from everystep.vault import History, RunVault

ASK_FROM = 4
"""A writer's rules that would drop fewer than this at once are not asked about."""


def forget(
    vault: RunVault,
    author: str,
    keep: Rule | None,
    keep_full: Rule | None,
    *,
    dry_run: bool,
    force: bool,
    undo_seconds: float,
) -> list[Decision]:
    """Drops and thins what the rules do not keep; answers the plan, oldest checkpoint first.

    Raises:
        Conflict: if the plan drops more than half, and `force` is not given.
        Damaged: if part of the log cannot be read.
    """
    decided: list[Decision] = []

    def decide(history: History) -> list[object] | None:
        check_readable(history, vault.where)
        decided[:] = plan(kept_of(history), keep, keep_full)
        if drops_most(decided) and not (force or dry_run):
            dropped = sum(one.action == DROP for one in decided)
            raise Conflict(
                f"these rules drop {dropped} of {len(decided)} checkpoints",
                where=vault.where,
                do="look at the plan with dry_run=True, then pass force=True",
            )
        return None if dry_run else drop_events(decided, "forget", undo_seconds) or None

    if vault.place.exists:
        vault.log.append(decide, author)
    return decided


class Keeper:
    """Applies a run's standing rules in the writer's background, and frees what they drop at once.

    Args:
        fence: raises RunTakenOver if this process may not write any more.
        quota_bytes: the run's packs are kept below this, as far as what can be undone reaches.
    """

    def __init__(
        self,
        vault: RunVault,
        author: str,
        fence: Callable[[History], None],
        keep: Rule | None,
        keep_full: Rule | None,
        quota_bytes: int | None,
    ) -> None:
        self._vault, self._author, self._fence = vault, author, fence
        self._keep, self._keep_full, self._quota = keep, keep_full, quota_bytes
        self._asked = self._refused = False

    def after_commit(self) -> list[str]:
        """Drops, thins and frees; answers what somebody should know."""
        try:
            said = self._apply() if self._keep is not None or self._keep_full is not None else []
            return [*said, *self._check_quota()]
        except RunTakenOver:
            return []  # the next save says so
        except Exception as error:  # noqa: BLE001  the writer's thread must live, and somebody must hear of it
            return [f"old checkpoints could not be freed: {error if isinstance(error, Error) else repr(error)}"]

    def make_room(self, nbytes: int) -> bool:
        """Whether something could be freed: also what is only held so that it can be brought back, what was dropped
        first before the rest, until there is room for a state of as many bytes and its manifest."""
        return collect(self._vault, self._author, room_bytes=nbytes + nbytes // 8, stamp=False).packs > 0

    def _apply(self) -> list[str]:
        decided: list[Decision] = []

        def decide(history: History) -> list[object] | None:
            self._fence(history)
            check_readable(history, self._vault.where)
            decided[:] = plan(kept_of(history), self._keep, self._keep_full)
            return None if self._too_many(decided) else drop_events(decided, "the run's rules", 0.0) or None

        self._vault.log.append(decide, self._author)
        dropped = sum(one.action == DROP for one in decided)
        if self._too_many(decided):
            return [
                f"keep= would drop {dropped} of {len(decided)} checkpoints, so nothing is dropped; if that is meant, "
                "call forget(keep=…, force=True) once"
            ]
        self._asked = True
        if any(one.action in (DROP, THIN) for one in decided) and not self._refused:
            try:
                free_unneeded(self._vault, self._author)
            except ReadOnly as error:
                self._refused = True  # it would be at each save
                return [
                    f"what the run's rules drop is not freed here, for this process may not delete ({error.what}). "
                    "Have one free it that may: everystep prune RUN"
                ]
        return []

    def _too_many(self, decided: list[Decision]) -> bool:
        dropped = sum(one.action == DROP for one in decided)
        return not self._asked and dropped >= ASK_FROM and drops_most(decided)

    def _check_quota(self) -> list[str]:
        if self._quota is None or self._refused:
            return []
        freed = collect(self._vault, self._author, stamp=False)
        over = freed.held_bytes - self._quota
        if over > 0:
            freed = collect(self._vault, self._author, room_bytes=over, stamp=False)
        if freed.held_bytes <= self._quota:
            return []
        return [
            f"the run holds {freed.held_bytes / 1e9:.2f} GB, over its quota of {self._quota / 1e9:.2f} GB; "
            "give it keep= or keep_full= rules that hold less"
        ]


__all__ = ["Freed", "Keeper", "forget"]
