"""Drop, thin, bring back, and free: first a record that says so, then the deletes; what is needed stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everystep.errors import Conflict, Damaged, NotFound, ObjectMissing
from everystep.upkeep.receipts import free_receipts, free_unfinished
from everystep.upkeep.retention import DROP, THIN, Decision, Kept
from everystep.vault import History, PackName, RunVault
from everystep.vault.history import Dropped, roll_up
from everystep.vault.names import NO_TERM, pack_key, record_key
from everystep.vault.record import Gc, Restore, Retire, Thin
from everystep.vault.together import together

Fence = Callable[[History], None]


@dataclass(frozen=True)
class Freed:
    """What a collection gave back, and what it will once it can no longer be undone."""

    packs: int = 0
    nbytes: int = 0
    pending_bytes: int = 0
    """Held by checkpoints that were dropped or thinned and can still be brought back."""
    held_bytes: int = 0
    """What the run's packs come to afterwards."""
    left_bytes: int = 0
    """Of `nbytes`, what saves left behind that were never committed."""
    checkpoints: tuple[str, ...] = ()
    """Ids of those that were dropped or thinned and can be brought back no more."""


@dataclass(frozen=True)
class _Plan:
    """Of the packs that lie there: what may go, and what is held only because it can be undone."""

    doomed: set[PackName]
    pending: set[PackName]
    left: set[PackName]
    """Of the doomed, those of saves that were never committed."""
    gone: list[str]
    """Checkpoints that can be brought back no more once they are gone."""


def kept_of(history: History) -> list[Kept]:
    """The live checkpoints as rules see them, oldest first."""
    names: dict[str, list[str]] = {}
    for tag, id in history.tags.items():
        names.setdefault(id, []).append(tag)
    found = []
    for id in history.live:
        commit = history.commits[id]
        tags = tuple(sorted(names.get(id, ())))
        found.append(Kept(id, commit.event.step, commit.time, history.metrics_of(id), tags, id in history.thin))
    tip = history.latest
    # The newest comes last: after a rewind, that is not the last that was saved.
    return sorted(found, key=lambda one: tip is not None and one.id == tip.event.id)


def check_readable(history: History, where: str) -> None:
    """
    Raises:
        Damaged: if part of the log cannot be read: a commit, a tag or a metric in it may hold what nothing else holds.
    """
    if history.damaged:
        raise Damaged(
            "part of the log cannot be read, and what it holds is not known",
            where=where,
            do="nothing was dropped or freed; run fsck, and bring the damaged records back from a copy",
        )


def drop_events(decisions: Sequence[Decision], reason: str, undo_seconds: float) -> list[Any]:
    """A plan as events."""
    events: list[Any] = []
    for action, event in ((DROP, Retire), (THIN, Thin)):
        ids = [decision.checkpoint.id for decision in decisions if decision.action == action]
        if ids:
            events.append(event(ids, reason, undo_seconds))
    return events


def can_return(history: History, id: str) -> bool:
    """Whether a checkpoint that was dropped, or its optimizer state, is still there."""
    found = history.dropped.get(id)
    return found is not None and not history.commits[id].needs(thin=found.was_thin) & history.condemned


def bring_back(vault: RunVault, ids: Sequence[str], author: str) -> None:
    """Takes the dropping or thinning of checkpoints back.

    Raises:
        NotFound: if one was not dropped.
        Conflict: if what it needs has been freed already.
    """

    def decide(history: History) -> list[Any]:
        for id in ids:
            if id not in history.dropped:
                raise NotFound(f"checkpoint {id} was not dropped", where=vault.where, do="there is nothing to undo")
            if not can_return(history, id):
                step = history.commits[id].event.step
                raise Conflict(f"step {step} has been freed", where=vault.where, do="it is gone for good")
        return [Restore(list(ids))]

    vault.log.append(decide, author)


def collect(
    vault: RunVault,
    author: str,
    *,
    at_once: bool = False,
    room_bytes: int = 0,
    stamp: bool = True,
    rewrites: bool = False,
    dry_run: bool = False,
) -> Freed:
    """Frees packs that no live or undoable checkpoint needs, and what dead processes left behind.

    Args:
        at_once: also what could still be undone.
        room_bytes: also what could still be undone, what was dropped first before the rest, until this much is freed.
        stamp: where ages matter, write a record first: a store tells its time by what it creates.
        rewrites: also what a repack wrote and no record names. One that is under way begins again.
        dry_run: write and delete nothing. Ages then go by this machine's clock, for the store does not tell its time.

    Raises:
        Damaged: if part of the log cannot be read: it may need what nothing else needs.
    """
    if not vault.place.exists:
        return Freed()
    if stamp and not at_once and not dry_run and _waiting(vault.history()):
        vault.log.append(lambda history: [Gc([])], author)
    present = sizes_of(vault)
    rewrites = rewrites or at_once or room_bytes > 0
    how: dict[str, Any] = {"at_once": at_once, "room_bytes": room_bytes, "rewrites": rewrites}
    if dry_run:
        history = vault.history()
        plan = _plan(vault, history, present, now=vault.seam.now(), **how)
        freed = plan.doomed | (present.keys() & history.condemned)
    else:
        freed, plan = _free(vault, author, present, **how)
        free_receipts(vault, vault.log.history)
        free_unfinished(vault, vault.log.history, rewrites=rewrites)
    nbytes = _sum(present, freed)
    held = sum(present.values()) - nbytes
    return Freed(
        len(freed), nbytes, _sum(present, plan.pending), held, _sum(present, plan.left & freed), tuple(plan.gone)
    )


def free_unneeded(vault: RunVault, author: str) -> None:
    """Frees what nothing needs, right after something was dropped; asks for no sizes, as packs are many."""
    _free(vault, author, dict.fromkeys(packs_of(vault), 0))


def _free(vault: RunVault, author: str, present: Mapping[PackName, int], **how: Any) -> tuple[set[PackName], _Plan]:
    """What was freed of the packs that are there, with their sizes, and the plan that it followed."""
    plan = _Plan(set(), set(), set(), [])

    def decide(history: History) -> list[Any] | None:
        nonlocal plan
        plan = _plan(vault, history, present, **how)
        doomed = plan.doomed - history.condemned
        return [Gc(roll_up(doomed))] if doomed else None

    history = vault.log.append(decide, author)
    dead = present.keys() & history.condemned
    keys = [pack_key(vault.folder, pack) for pack in sorted(dead)]
    for _ in together(vault.storage, vault.seam, vault.storage.delete, keys):
        pass
    return dead, plan


def _plan(
    vault: RunVault,
    history: History,
    present: Mapping[PackName, int],
    *,
    at_once: bool = False,
    room_bytes: int = 0,
    rewrites: bool = False,
    now: float | None = None,
) -> _Plan:
    """
    Args:
        now: where no record says what time it is at the store.
    """
    check_readable(history, vault.where)
    needed = _needed(history)
    undoable = [] if at_once else _undoable(vault, history, now)
    unneeded = {pack for pack in present if pack not in needed and _is_dead(pack, history, rewrites)}
    while undoable and _sum(present, unneeded.difference(*undoable)) < room_bytes:
        undoable.pop(0)
    pending = set[PackName]().union(*undoable) - needed
    doomed = unneeded - pending
    gone = [
        id
        for id, found in history.dropped.items()
        if can_return(history, id) and history.commits[id].needs(thin=found.was_thin) & doomed
    ]
    return _Plan(doomed, pending, doomed - history.ever, gone)


def _sum(sizes: Mapping[PackName, int], packs: Iterable[PackName]) -> int:
    return sum(sizes.get(pack, 0) for pack in packs)


def packs_of(vault: RunVault) -> set[PackName]:
    """Every pack that lies there."""
    found = set()
    for key in vault.storage.list(f"{vault.folder}packs/"):
        _, writer, number = key.rsplit("/", 2)
        if number.isdigit():
            found.add(PackName(writer, int(number)))
    return found


def _needed(history: History) -> set[PackName]:
    needed = {PackName(page.writer, page.number) for held in history.attachments.values() for page in held.where}
    for id in history.live:
        needed |= history.commits[id].needs(thin=id in history.thin)
    return needed


def _waiting(history: History) -> list[str]:
    """Checkpoints that can be brought back, and were dropped or thinned so that they can."""
    return [id for id, found in history.dropped.items() if found.undo_seconds > 0 and can_return(history, id)]


def _undoable(vault: RunVault, history: History, now: float | None) -> list[set[PackName]]:
    """What checkpoints need that were dropped or thinned so short a time ago that they can be brought back: one set for
    each record that dropped some, the oldest first."""
    found: dict[int, set[PackName]] = {}
    times: dict[int, float] = {}

    def written(slot: int) -> float:
        if slot not in times:
            times[slot] = _written(vault, slot)
        return times[slot]

    def at() -> float:
        return max(written(history.slots - 1), now or 0.0)

    for id in _waiting(history):
        way: Dropped | None = history.dropped[id]
        while way is not None and at() - written(way.slot) < way.undo_seconds:
            needs = history.commits[id].needs(thin=way.was_thin)
            if needs & history.condemned:
                break  # freed before its time
            found.setdefault(way.slot, set()).update(needs)
            way = way.before
    return [found[slot] for slot in sorted(found)]


def _written(vault: RunVault, slot: int) -> float:
    """When the store, by its own clock, created a record."""
    return float(vault.storage.stat(record_key(vault.folder, slot)).time)


def _is_dead(pack: PackName, history: History, rewrites: bool) -> bool:
    """Of a checkpoint that is gone, or of a save that will never be committed: not of one that is under way."""
    term = pack.writer.rpartition("-")[2]
    if not term.isdigit():
        return False
    if int(term) == NO_TERM:
        return rewrites or pack in history.ever
    return int(term) < history.term or history.closed or pack in history.ever


def sizes_of(vault: RunVault) -> dict[PackName, int]:
    """Every pack that lies there, and its bytes."""
    packs = sorted(packs_of(vault))
    return dict(zip(packs, together(vault.storage, vault.seam, lambda pack: size_of(vault, pack), packs)))


def size_of(vault: RunVault, pack: PackName) -> int:
    """Bytes of a pack; 0 if it is gone."""
    try:
        return int(vault.storage.stat(pack_key(vault.folder, pack)).nbytes)
    except ObjectMissing:
        return 0  # somebody else was collecting, too
