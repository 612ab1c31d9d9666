"""Who may write a run: take it from an owner that is gone, wait for one that may live, say so when it does."""

from __future__ import annotations

from typing import Any

import msgspec

from everystep.errors import RunInUse, SaveAbandoned
from everystep.save.commit import pause_seconds
from everystep.vault import History, RunVault, Term
from everystep.vault.record import Open
from everystep.vault.writers import is_gone, is_own

SILENT_SECONDS = 5.0
"""A rank that waits for longer than this says so."""
_JOINED: set[tuple[str, int]] = set()
"""Nonces of the terms that ranks in this process have joined: a loop of runs opens one after the other."""


def take_run(
    vault: RunVault,
    *,
    takeover: bool,
    launch: str,
    ranks: int,
    environment: dict[str, Any],
    continues: str | None,
    reason: str,
    author: str,
) -> Term:
    """Opens a term, after the present owner is known to be gone, silent for long, or told to be overruled.

    A courtesy, not a lock: whoever opens the higher term is the writer, and the other is refused at its next save.

    Raises:
        RunInUse: if the owner lives and wrote while we waited.
    """
    if not takeover:
        _await_owner(vault)
    process: dict[str, Any] = msgspec.to_builtins(vault.seam.process())

    def event(history: History) -> Open:
        return Open(vault.seam.token(16), launch, ranks, process, environment, continues, reason)

    return vault.open_term(event, author)


def _await_owner(vault: RunVault) -> None:
    history = vault.history()
    written, said = _written(history), False
    begun = vault.seam.monotonic()
    while not _is_free(vault, history, vault.seam.monotonic() - begun):
        owner = history.owner.process if history.owner else {}
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        if _written(history) != written:
            raise RunInUse(
                f"{who} is writing this run",
                where=vault.where,
                do='end it first, use another run name, or pass takeover=True: repo.run("…", takeover=True)',
            )
        if not said:
            limit = vault.settings.takeover_seconds
            vault.seam.tell(
                f"everystep: {who} may still be writing {vault.name!r}; waiting up to {limit:g} s for it to end or "
                f"fall silent (takeover=True does not wait)"
            )
            said = True
        vault.seam.sleep(vault.settings.poll_seconds)
        history = vault.history()


def _written(history: History) -> tuple[int, int]:
    """Grows with what an owner writes; tags, notes and late metrics, which anybody may write, do not count."""
    return history.term, len(history.settled)


def _is_free(vault: RunVault, history: History, waited: float) -> bool:
    if history.owner is None or history.closed:
        return True
    if is_own(vault.seam, history.owner) or is_gone(vault.seam, history.owner):
        return True
    away = history.owner.process.get("host") != vault.seam.process().host
    silent = max(waited, vault.seam.now() - history.last_time if away else waited)
    return silent >= vault.settings.takeover_seconds


def join_run(vault: RunVault, launch: str, rank: int, ranks: int) -> Term:
    """The term that rank 0 of the same launch has opened: ranks without a process group meet through the store.

    A rank that comes when rank 0 has closed the run already, as where nothing was left to train, gets that term: it can
    resume, and a save is refused at once.

    Raises:
        SaveAbandoned: if it has opened none before the deadline.
        UnsafeStore: if the store does not keep several ranks apart.
    """
    begun, waited, said = vault.seam.monotonic(), 0.0, False
    while waited < vault.settings.rank_deadline_seconds:
        history = vault.history()
        vault.place.look()
        vault.place.refuse_several("several ranks would write this run")
        owner = history.owner
        # A launch id that is used again: the term of a rank 0 that has died is not the one to join.
        if owner is not None and owner.launch == launch and _may_join(vault, history, owner, rank, ranks):
            _JOINED.add((owner.nonce, rank))
            return Term(history.term, owner.nonce, f"{vault.seam.token(16)}-{history.term}")
        if waited >= SILENT_SECONDS and not said:
            vault.seam.tell(
                f"everystep: rank {rank} waits for rank 0 of launch {launch!r} to open run {vault.name!r}, up to "
                f"{vault.settings.rank_deadline_seconds:g} s; {_seen(vault, history)}"
            )
            said = True
        vault.seam.sleep(pause_seconds(vault, waited, f"{launch} {rank}", ranks - 1))
        waited = vault.seam.monotonic() - begun
    raise SaveAbandoned(
        f"rank 0 of launch {launch!r} has not opened the run; {_seen(vault, vault.history())}",
        where=vault.where,
        do="start rank 0, and give every rank the same launch id and number of ranks",
    )


def _may_join(vault: RunVault, history: History, owner: Open, rank: int, ranks: int) -> bool:
    """Whether the newest term, of this launch, is one to join. A launch id may be used again: then it is not that of an
    earlier start, nor the one that this rank has had before."""
    if owner.ranks != ranks:  # its checkpoints would be whole without this rank
        return False
    if not history.closed:
        return not is_gone(vault.seam, owner)
    if (owner.nonce, rank) in _JOINED:
        return False
    # Clocks of two hosts differ by less than the time from one start to the next, but maybe by more than that from an
    # end to the next start.
    here = owner.process.get("boot") == vault.seam.process().boot
    moment = (history.closed_at if here else history.opened_at)[history.term]
    if moment < vault.seam.began():
        return False
    vault.seam.tell(
        f"everystep: rank {rank} comes when rank 0 has closed run {vault.name!r} already: it can resume, and what it "
        "saves is refused"
    )
    return True


def _seen(vault: RunVault, history: History) -> str:
    """What the log says instead."""
    owner = history.owner
    if owner is None:
        return "nobody has opened it yet"
    how = "and closed it" if history.closed else "and has died" if is_gone(vault.seam, owner) else "and has it open"
    at = vault.seam.local_time(history.opened_at.get(history.term, 0.0))
    of = f", of {owner.ranks} ranks," if owner.ranks > 1 else ""
    return f"the last to open it was launch {owner.launch!r}{of} on {owner.process.get('host', '?')}, {at}, {how}"
