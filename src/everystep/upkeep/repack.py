"""Empty packs that are mostly dead: copy what is needed of them elsewhere, say so in one record, free the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from everystep.errors import Conflict, Damaged, Error, ObjectMissing, UsageError
from everystep.upkeep.collect import check_readable, collect, sizes_of
from everystep.upkeep.moving import Emptied, Mover, Resident
from everystep.upkeep.usage import Uses, held, is_there, needs_less
from everystep.vault import Committed, History, PackName, RunVault
from everystep.vault.record import Attach, Moved, Rewrite

Progress = Callable[[int, int], None]
T = TypeVar("T")
ATTEMPTS = 3


@dataclass(frozen=True)
class Repacked:
    """What a repack did. A run takes up `freed_bytes` less and `written_bytes` more than before."""

    packs: int = 0
    """Emptied."""
    checkpoints: int = 0
    """Of which something lies elsewhere now."""
    written_bytes: int = 0
    freed_bytes: int = 0
    """With what a collection frees anyway."""
    held_bytes: int = 0
    """What the run's packs come to afterwards."""


class Overtaken(Exception):
    """Somebody freed what this has written."""


def repack(vault: RunVault, author: str, dead: float, progress: Progress | None = None) -> Repacked:
    """Empties packs of which more than the share `dead` is needed by nothing that is live or can be brought back.

    Needs no term, and is safe beside a process that is saving.

    Args:
        progress: told (bytes copied, bytes in all).

    Raises:
        UsageError: if `dead` is no share.
        Damaged: if part of the log, or a chunk that would be copied, cannot be read. Nothing is moved then.
        Conflict: if others free what is being moved, again and again.
    """
    if not 0 <= dead < 1:
        raise UsageError(f"dead={dead} is not a share", do="0.5: empty packs of which more than half is dead")
    before = collect(vault, author)  # there will be room, and what waited long enough is not moved
    written = 0
    last: Overtaken | None = None
    for _ in range(ATTEMPTS):
        mover = Mover(vault)
        try:
            packs, checkpoints = _move(vault, author, mover, dead, progress)
        except Overtaken as error:
            written, last = written + mover.written_bytes, error
            continue
        except Error:
            _leave_nothing(vault, author, mover)
            raise
        after = collect(vault, author, rewrites=True)
        freed = before.nbytes + after.nbytes
        return Repacked(packs, checkpoints, written + mover.written_bytes, freed, after.held_bytes)
    raise Conflict(
        f"packs were freed while they were emptied, {ATTEMPTS} times",
        where=vault.where,
        do="repack when no other repack or prune of this run is under way; if none is, run fsck",
    ) from last


def _leave_nothing(vault: RunVault, author: str, mover: Mover) -> None:
    """Frees what was written for nothing: where a place is full, it must not stay so."""
    if mover.written_bytes:
        try:
            collect(vault, author, rewrites=True)
        except Error:
            pass  # what went wrong before is what has to be said; a later prune() frees it


def _move(vault: RunVault, author: str, mover: Mover, dead: float, progress: Progress | None) -> tuple[int, int]:
    """(packs emptied, checkpoints moved)"""
    emptied = _plan(vault, mover, dead)
    if not emptied.packs:
        return 0, 0
    moved, attached = _write(vault, mover, emptied, _told(progress, emptied.nbytes))
    landed: list[Moved] = []

    def decide(history: History) -> list[Any] | None:
        check_readable(history, vault.where)
        landed[:] = [new for old, new in moved if _is_due(history, old, new)]
        again = [new for old, new in attached if history.attachments.get(old.name) == old]
        if {PackName(page.writer, page.number) for event in again for page in event.where} & history.condemned:
            raise Overtaken
        return [*([Rewrite(list(landed))] if landed else []), *again] or None

    vault.log.append(decide, author)
    return len(emptied.packs), len(landed)


def _told(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Counts what has been copied."""
    done = 0

    def told(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        if progress is not None:
            progress(done, total)

    return told


def _write(
    vault: RunVault, mover: Mover, emptied: Emptied, told: Callable[[int], None]
) -> tuple[list[tuple[Committed, Moved]], list[tuple[Attach, Attach]]]:
    """Writes elsewhere what checkpoints and attachments have in packs: each as it was, and as it will be."""
    copied = [_while_held(vault, mover, one, lambda one: mover.copy_chunks(emptied, one, told))
              for one in emptied.residents]  # fmt: skip
    mover.store_chunks()
    written = [_while_held(vault, mover, found[0], mover.write_manifest) for found in copied if found is not None]
    attached = []
    for event in emptied.attachments:
        try:
            attached.append((event, mover.copy_attachment(emptied, event)))
        except ObjectMissing as error:
            if vault.history().attachments[event.name] == event:
                raise _lost(error) from error
    told(emptied.nbytes)
    return [(one.commit, new) for one, new in filter(None, written)], attached


def _while_held(
    vault: RunVault, mover: Mover, one: Resident, act: Callable[[Resident], T]
) -> tuple[Resident, T] | None:
    """Does something with a checkpoint as it is by now; None where it has been freed, or moved by another.

    Raises:
        Overtaken: if what was written for it has been freed.
        Damaged: if it has lost a pack.
    """
    while True:
        try:
            return one, act(one)
        except ObjectMissing as error:
            history, id = vault.history(), one.commit.event.id
            if mover.packs & history.condemned:
                raise Overtaken from error
            if history.commits[id].event.root != one.commit.event.root or not is_there(history, id):
                return None
            if one.thin or not needs_less(history, id):
                raise _lost(error) from error
            one = replace(one, thin=True)


def _lost(error: ObjectMissing) -> Damaged:
    return Damaged("a pack that is needed is missing", where=error.where, do="run fsck")


def _is_due(history: History, old: Committed, new: Moved) -> bool:
    """Whether a checkpoint lies where it did, and may be needed.

    Raises:
        Overtaken: if it would need what is condemned.
    """
    now = history.commits[new.id]
    if now.event.root != old.event.root or not is_there(history, new.id):
        return False
    event = msgspec.structs.replace(now.event, root=new.root, packs=new.packs, optimizer=new.optimizer)
    if replace(now, event=event).needs(thin=needs_less(history, new.id)) & history.condemned:
        raise Overtaken
    return True


def _plan(vault: RunVault, mover: Mover, dead: float) -> Emptied:
    history = vault.history()
    check_readable(history, vault.where)
    uses, residents = Uses(), []
    for id, thin in held(vault, history).items():
        one = Resident(history.commits[id], thin, 0)
        found = _while_held(vault, mover, one, lambda one: vault.manifest(one.commit))
        if found is not None:
            nbytes = uses.add(found[1], one.commit.event.root, thin=found[0].thin)
            residents.append(replace(found[0], manifest_bytes=nbytes))
    attachments = list(history.attachments.values())
    for event in attachments:
        uses.add_pages(event.where)
    packs = _choose(vault, uses, residents, dead)
    live = uses.live_bytes()
    return Emptied(
        packs,
        [one for one in residents if one.commit.needs(thin=one.thin) & packs],
        [event for event in attachments if packs & {PackName(page.writer, page.number) for page in event.where}],
        uses.of_packs(packs),
        sum(live[pack] for pack in packs),
    )


def _choose(vault: RunVault, uses: Uses, residents: list[Resident], dead: float) -> frozenset[PackName]:
    """The packs to empty: of those that are mostly dead, the largest, as long as they give back more than the manifests
    come to that must be written for it."""
    sizes = sizes_of(vault)
    gains = {pack: nbytes for pack, nbytes in uses.dead_bytes(sizes).items() if nbytes > dead * sizes[pack]}
    order = sorted(gains, key=lambda pack: (-gains[pack], pack))
    users: dict[PackName, list[int]] = {pack: [] for pack in order}
    for number, one in enumerate(residents):
        for pack in one.commit.needs(thin=one.thin) & gains.keys():
            users[pack].append(number)
    total = best = chosen = 0
    paid: set[int] = set()
    for count, pack in enumerate(order, 1):
        total += gains[pack] - sum(residents[number].manifest_bytes for number in users[pack] if number not in paid)
        paid.update(users[pack])
        if total > best:
            best, chosen = total, count
    return frozenset(order[:chosen])
