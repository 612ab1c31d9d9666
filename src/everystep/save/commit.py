"""Make a stored state a checkpoint: gather the ranks' parts, write the root, create the next record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from everystep.errors import (
    AlreadyExists,
    Conflict,
    Damaged,
    ObjectMissing,
    RunTakenOver,
    SaveAbandoned,
    UnknownOutcome,
)
from everystep.save.part import PartWriter, Stored
from everystep.settings import FORMAT
from everystep.vault import History, PackName, RunVault, Term
from everystep.vault.history import roll_up
from everystep.vault.lines import pack_lines, unpack_lines
from everystep.vault.manifest import Root, logical_hash, pack_halves, settle
from everystep.vault.names import pack_key, receipt_key
from everystep.vault.record import Abandon, Commit, Cost, Where


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


def put_receipt(vault: RunVault, term: Term, draft: Draft, rank: int, stored: Stored) -> None:
    """A rank's last word on a save. A receipt that is there already is this very one: names are never reused."""
    new = [(name.writer, name.number, length) for name, length in stored.new]
    receipt = Receipt(
        term.nonce, draft.ordinal, draft.step, rank, stored.content, stored.where,
        [(name.writer, name.number) for name in sorted(stored.needs)],
        [(name.writer, name.number) for name in sorted(stored.optimizer)], new,
        stored.raw_bytes, stored.changed,
    )  # fmt: skip
    key = receipt_key(vault.folder, term.number, rank, draft.ordinal)
    for attempt in range(vault.settings.put_attempts):
        try:
            vault.storage.put_new(key, pack_lines(receipt))
            return
        except AlreadyExists:
            return
        except UnknownOutcome:
            if attempt + 1 == vault.settings.put_attempts:
                raise


def gather(vault: RunVault, term: Term, draft: Draft) -> list[Receipt]:
    """The receipts of all other ranks, their new packs present and whole.

    Raises:
        SaveAbandoned: naming the ranks that did not deliver before the deadline.
    """
    found: dict[int, Receipt] = {}
    deadline = vault.seam.monotonic() + vault.settings.rank_deadline_seconds
    while len(found) < draft.ranks - 1:
        for rank in range(1, draft.ranks):
            if rank not in found and (receipt := _receipt(vault, term, draft, rank)) is not None:
                found[rank] = receipt
        if len(found) < draft.ranks - 1:
            if vault.seam.monotonic() > deadline:
                raise _late(vault, draft, set(range(1, draft.ranks)) - set(found))
            vault.seam.sleep(vault.settings.poll_seconds)
    for receipt in found.values():
        for writer, number, length in receipt.new:
            _check_pack(vault, PackName(writer, number), length, receipt.rank)
    return [found[rank] for rank in sorted(found)]


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
    key = receipt_key(vault.folder, term.number, rank, draft.ordinal)
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


def close_root(draft: Draft, own: PartWriter, others: list[Receipt]) -> tuple[Stored, Where, str]:
    """Adds the root to the coordinator's manifest pack and stores it: (own part, the root's place, logical hash)."""
    parts = [(0, own.content), *((receipt.rank, receipt.content) for receipt in others)]
    root = Root(FORMAT, draft.id, draft.step, draft.parent, draft.metrics, parts)
    document = pack_halves(root, [own.where, *(receipt.part for receipt in others)])
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


def await_settled(vault: RunVault, term: Term, draft: Draft) -> str:
    """What became of a save that another rank commits: the checkpoint's id.

    Raises:
        SaveAbandoned, RunTakenOver: accordingly.
        Condemned: if it must be written again.
    """
    deadline = vault.seam.monotonic() + 2 * vault.settings.rank_deadline_seconds
    key = (term.nonce, draft.ordinal)
    while vault.seam.monotonic() < deadline:
        history = vault.history()
        if key in history.settled:
            id = history.settled[key]
            if id is not None:
                return id
            if key in history.again:
                raise Condemned
            missing = history.missing_ranks.get(key, [])
            why = f"rank {_list(set(missing))} did not deliver" if missing else "rank 0 says why"
            error = SaveAbandoned(
                f"step {draft.step} was abandoned: {why}",
                where=vault.where,
                do="look at those ranks; the previous checkpoint is whole",
            )
            error.missing = tuple(missing)
            raise error
        check_fence(history, term, vault.where)
        vault.seam.sleep(vault.settings.poll_seconds)
    raise SaveAbandoned(
        f"step {draft.step}: rank 0 neither committed nor abandoned it in time", where=vault.where, do="look at rank 0"
    )
