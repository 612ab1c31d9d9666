"""Who may write a run: take it from an owner that is gone, wait for one that may live, say so when it does."""

from __future__ import annotations

from typing import Any

import msgspec

from everystep.errors import RunInUse, SaveAbandoned
from everystep.save.commit import pause_seconds
from everystep.vault import History, RunVault, Term
from everystep.vault.record import Open
from everystep.vault.writers import is_gone, is_own


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

    Raises:
        SaveAbandoned: if it has opened none before the deadline.
        UnsafeStore: if the store does not keep several ranks apart.
    """
    begun, waited = vault.seam.monotonic(), 0.0
    while waited < vault.settings.rank_deadline_seconds:
        history = vault.history()
        vault.place.look()
        vault.place.refuse_several("several ranks would write this run")
        owner = history.owner
        # A launch id that is used again: the term of a rank 0 that has died is not the one to join.
        if owner is not None and owner.launch == launch and not history.closed and not is_gone(vault.seam, owner):
            return Term(history.term, owner.nonce, f"{vault.seam.token(16)}-{history.term}")
        vault.seam.sleep(pause_seconds(vault, waited, f"{launch} {rank}", ranks - 1))
        waited = vault.seam.monotonic() - begun
    raise SaveAbandoned(
        f"rank 0 of launch {launch!r} has not opened the run",
        where=vault.where,
        do="start rank 0, and give every rank the same launch id",
    )
