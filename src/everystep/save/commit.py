"""Make a stored state a checkpoint: gather the ranks' parts, write the root, create the next record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
from blake3 import blake3

from everystep.errors import Conflict, Damaged, ObjectMissing, RunTakenOver, SaveAbandoned
from everystep.save.part import PartWriter, Stored
from everystep.settings import FORMAT
from everystep.vault import History, PackName, RunVault, Term
from everystep.vault.history import roll_up
from everystep.vault.lines import pack_lines, unpack_lines
from everystep.vault.manifest import Root, logical_hash, pack_halves, settle
from everystep.vault.names import pack_key, receipt_key, receipts_folder
from everystep.vault.once import put_once
from everystep.vault.record import Abandon, Commit, Cost, Where
from everystep.vault.together import together
from everystep.vault.writers import is_own

WAITED_SHARE = 0.1
"""Of what was waited for somebody else already: so late, at most, is it seen."""
PAUSE_SECONDS_MAX = 5.0
NEAR_POLL_SECONDS = 0.01
"""Where a look asks nobody but this machine: of four ranks on its disk, a save took .3 s less until all knew of it."""
HAND_OVER_BYTES_MAX = 256 << 10
HANDED_OVER_BYTES_MAX = 256 << 20


class Receipt(msgspec.Struct, frozen=True):
    """A rank's word that its part is durable."""

    nonce: str
    ordinal: int
    step: int
    rank: int
    content: str
    part: Where
    needs: list[tuple[str, int]]
    optimizer: list[tuple[str, int]]
    new: list[tuple[str, int, int]]
    raw_bytes: int
    changed: bool
    pages: bytes = b""
    """Its manifest, if the coordinator is to store it: places in it, and `part`, name no pack."""


@dataclass(frozen=True)
class Draft:
    """A save on its way: what the commit will say beside the places."""

    id: str
    step: int
    parent: str | None
    metrics: dict[str, Any]
    ordinal: int
    reason: str
    ranks: int


class Condemned(Exception):
    """A pack that the save leans on is condemned: it must be written again."""


class Missed(Exception):
    """The other ranks used this number for a step that this one took no part in."""


def check_fence(history: History, term: Term, where: str) -> None:
    """
    Raises:
        RunTakenOver: if a higher term has been opened.
    """
    if history.term > term.number:
        owner = history.owner.process if history.owner else {}
        raise RunTakenOver(
            f"process {owner.get('pid', '?')} on {owner.get('host', '?')} has taken this run over",
            where=where,
            do="end this process; what it had committed before is safe, and the other goes on from there",
        )


def check_by_hand(history: History, term: Term, vault: RunVault) -> None:
    """As `check_fence`, for whatever else a job appends: tags, notes, what it drops. Where this very process has opened
    the run again, as a notebook's cell does that runs twice, it is no other job that does so."""
    if history.owner is None or not is_own(vault.seam, history.owner):
        check_fence(history, term, vault.where)


def next_ordinal(history: History, term: Term, step: int) -> int:
    """The number of a rank's next save. Those that the others used for steps which it did not save, or that it saved
    before it was started again, are left out: else it would be behind them from then on."""
    ordinal = term.ordinal + 1
    while history.steps.get((term.nonce, ordinal), step) != step:
        ordinal += 1
    return ordinal


def deliver(vault: RunVault, term: Term, draft: Draft, rank: int, stored: Stored) -> str:
    """Puts a rank's receipt, and waits for what becomes of the save: the checkpoint's id.

    Raises:
        As `put_receipt` and `await_settled`.
    """
    while True:
        try:
            put_receipt(vault, term, draft, rank, stored)
            return await_settled(vault, term, draft, rank)
        except Missed:
            term.ordinal = next_ordinal(vault.log.history, term, draft.step)
            draft = replace(draft, ordinal=term.ordinal)


def put_receipt(vault: RunVault, term: Term, draft: Draft, rank: int, stored: Stored) -> None:
    """A rank's last word on a save. One that is there already is as good, if it says the same of the state: a process
    that was started again alone may have put it.

    Raises:
        Conflict: if another process is this rank, too.
    """
    new = [(name.writer, name.number, length) for name, length in stored.new]
    receipt = Receipt(
        term.nonce, draft.ordinal, draft.step, rank, stored.content, stored.where,
        [(name.writer, name.number) for name in sorted(stored.needs)],
        [(name.writer, name.number) for name in sorted(stored.optimizer)], new,
        stored.raw_bytes, stored.changed, stored.pages or b"",
    )  # fmt: skip
    key = receipt_key(vault.folder, term.number, draft.ordinal, rank)
    if put_once(vault.storage, key, pack_lines(receipt), vault.seam, vault.settings):
        return
    there = unpack_lines(vault.storage.get(key), Receipt, f"{vault.storage.url}/{key}")
    if (there.nonce, there.step, there.content) == (term.nonce, draft.step, stored.content):
        return
    if vault.history().steps.get((term.nonce, draft.ordinal), draft.step) != draft.step:
        raise Missed
    raise Conflict(
        f"step {draft.step}: another process has saved step {there.step} as rank {rank} of this launch",
        where=vault.where,
        do="give each process a rank of its own; one that is started again alone must come to the same state",
    )


def pause_seconds(vault: RunVault, waited: float, who: str, waiting: int = 1) -> float:
    """How long to wait before the next look at the store, for something that others do.

    Args:
        waited: so long already.
        who: tells apart those that wait for the same: they are not to look all at once.
        waiting: how many those are.
    """
    settings = vault.settings
    grown = min(waited * WAITED_SHARE, PAUSE_SECONDS_MAX)
    chance = int.from_bytes(blake3(f"{who} {waited!r}".encode()).digest(4), "little") / 2**32
    least = settings.poll_seconds if vault.storage.fan_out > 1 else min(settings.poll_seconds, NEAR_POLL_SECONDS)
    return max(least, grown, waiting / settings.polls_per_second) * (0.5 + chance)


def gather(vault: RunVault, term: Term, draft: Draft) -> list[Receipt]:
    """The receipts of all other ranks, their new packs present and whole.

    Raises:
        SaveAbandoned: naming the ranks that did not deliver before the deadline.
    """

    def whole(rank: int) -> Receipt | None:
        receipt = _receipt(vault, term, draft, rank)
        for writer, number, length in receipt.new if receipt is not None else ():
            _check_pack(vault, PackName(writer, number), length, rank)
        return receipt

    found: dict[int, Receipt] = {}
    begun = vault.seam.monotonic()
    while True:
        new = [rank for rank in _delivered(vault, term, draft) if rank not in found]
        for receipt in together(vault.storage, vault.seam, whole, new):
            if receipt is not None:
                found[receipt.rank] = receipt
        if len(found) == draft.ranks - 1:
            return [found[rank] for rank in sorted(found)]
        waited = vault.seam.monotonic() - begun
        if waited > vault.settings.rank_deadline_seconds:
            raise _late(vault, draft, set(range(1, draft.ranks)) - set(found))
        vault.seam.sleep(pause_seconds(vault, waited, term.writer))


def _delivered(vault: RunVault, term: Term, draft: Draft) -> list[int]:
    """The ranks whose receipts of this save are there: one listing, however many ranks there are."""
    keys = vault.storage.list(receipts_folder(vault.folder, term.number, draft.ordinal), deep=False)
    names = (key.rpartition("/")[2] for key in keys)
    ranks = (int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    return [rank for rank in ranks if 1 <= rank < draft.ranks]


def _late(vault: RunVault, draft: Draft, missing: set[int]) -> SaveAbandoned:
    error = SaveAbandoned(
        f"step {draft.step}: no receipt from rank {_list(missing)} of {draft.ranks} "
        f"within {vault.settings.rank_deadline_seconds:g} s",
        where=vault.where,
        do="look at those ranks; the previous checkpoint is whole, and training can go on from it",
    )
    error.missing = tuple(sorted(missing))
    return error


def _list(ranks: set[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))


def _receipt(vault: RunVault, term: Term, draft: Draft, rank: int) -> Receipt | None:
    key = receipt_key(vault.folder, term.number, draft.ordinal, rank)
    try:
        receipt = unpack_lines(vault.storage.get(key), Receipt, f"{vault.storage.url}/{key}")
    except ObjectMissing:
        return None
    if (receipt.nonce, receipt.ordinal, receipt.rank) != (term.nonce, draft.ordinal, rank):
        raise Damaged("a receipt of another save", where=f"{vault.storage.url}/{key}", do="run fsck")
    if receipt.step != draft.step:
        raise Conflict(
            f"rank {rank} saves step {receipt.step} where rank 0 saves step {draft.step}",
            where=vault.where,
            do="call save at the same steps on every rank",
        )
    return receipt


def _check_pack(vault: RunVault, pack: PackName, length: int, rank: int) -> None:
    key = pack_key(vault.folder, pack)
    if vault.storage.stat(key).nbytes != length:
        raise Damaged(f"a pack of rank {rank} has another length", where=f"{vault.storage.url}/{key}", do="save again")


def hand_over_bytes(ranks: int) -> int:
    """Up to how many bytes of a manifest a rank hands to the coordinator, so that one request reads those of many."""
    return min(HAND_OVER_BYTES_MAX, HANDED_OVER_BYTES_MAX // ranks)


def close_root(draft: Draft, own: PartWriter, others: list[Receipt], where: str) -> tuple[Stored, Where, str]:
    """Adds the root, and the manifests of others that have not stored theirs, to the coordinator's manifest pack, and
    stores it: (own part, the root's place, logical hash).

    Raises:
        Damaged: if what another rank handed over is not whole.
    """
    parts = [(0, own.content), *((receipt.rank, receipt.content) for receipt in others)]
    root = Root(FORMAT, draft.id, draft.step, draft.parent, draft.metrics, parts)
    places = [own.adopt(each.content, each.part, each.pages, f"{where} rank {each.rank}") for each in others]
    document = pack_halves(root, [own.where, *places])
    page = own.page(document)
    stored = own.close()
    return stored, settle(page, stored.new[-1][0]), logical_hash(document)


def commit_event(
    draft: Draft, term: Term, stored: Stored, others: list[Receipt], root: Where, logical: str, cost: Cost
) -> Commit:
    needs = set(stored.needs) | {PackName(root.writer, root.number)}
    needs.update(PackName(*name) for receipt in others for name in receipt.needs)
    optimizer = _shared_by_none(stored, others) - {PackName(root.writer, root.number)}
    return Commit(
        draft.id, draft.step, draft.parent, root, logical, draft.metrics, roll_up(needs), term.nonce, draft.ordinal,
        cost, draft.ranks, draft.reason, roll_up(optimizer),
    )  # fmt: skip


def _shared_by_none(stored: Stored, others: list[Receipt]) -> set[PackName]:
    """Packs that only the optimizer state of all ranks leans on."""
    pairs = [(stored.needs, stored.optimizer)]
    pairs += [({PackName(*n) for n in r.needs}, {PackName(*n) for n in r.optimizer}) for r in others]
    rest = {name for needs, optimizer in pairs for name in needs - optimizer}
    return {name for _, optimizer in pairs for name in optimizer} - rest


def decide_commit(history: History, term: Term, commit: Commit, extra: list[Any], where: str) -> list[Any] | None:
    """One decision about one head: refuse, nothing to do, or these events."""
    check_fence(history, term, where)
    if (commit.nonce, commit.ordinal) in history.settled:
        return None
    needs = {PackName(r.writer, n) for r in commit.packs for n in range(r.first, r.last + 1)}
    if needs & history.condemned:
        raise Condemned
    return [*extra, commit]


def abandon(vault: RunVault, term: Term, draft: Draft, missing: list[int], author: str, *, again: bool = False) -> None:
    """Says in the log that a save was given up, so that every rank stops waiting for it; `again`: writes it anew."""

    def decide(history: History) -> list[Any] | None:
        check_fence(history, term, vault.where)
        if (term.nonce, draft.ordinal) in history.settled:
            return None
        return [Abandon(term.nonce, draft.ordinal, draft.step, missing, again=again)]

    vault.log.append(decide, author)


def await_settled(vault: RunVault, term: Term, draft: Draft, rank: int) -> str:
    """What became of a save that another rank commits: the checkpoint's id.

    Raises:
        SaveAbandoned, RunTakenOver: accordingly.
        Condemned: if it must be written again.
        Missed: if its number was used without this rank.
    """
    key = (term.nonce, draft.ordinal)
    begun, waited = vault.seam.monotonic(), 0.0
    while waited < 2 * vault.settings.rank_deadline_seconds:
        history = vault.history()
        if key in history.settled:
            id, missing = history.settled[key], history.missing_ranks.get(key, [])
            if history.steps[key] != draft.step and (id is not None or rank in missing):
                raise Missed
            if id is not None:
                return id
            if key in history.again:
                raise Condemned
            why = f"rank {_list(set(missing))} did not deliver" if missing else "rank 0 says why"
            error = SaveAbandoned(
                f"step {draft.step} was abandoned: {why}",
                where=vault.where,
                do="look at those ranks; the previous checkpoint is whole",
            )
            error.missing = tuple(missing)
            raise error
        check_fence(history, term, vault.where)
        if history.closed and history.nonce == term.nonce:
            error = SaveAbandoned(
                f"step {draft.step}: rank 0 has closed the run without saving it",
                where=vault.where,
                do="save at the same steps on every rank; look at what rank 0 said; the checkpoints before are whole",
            )
            error.missing = (0,)
            raise error
        vault.seam.sleep(pause_seconds(vault, waited, term.writer, draft.ranks - 1))
        waited = vault.seam.monotonic() - begun
    raise SaveAbandoned(
        f"step {draft.step}: rank 0 neither committed nor abandoned it in time", where=vault.where, do="look at rank 0"
    )
