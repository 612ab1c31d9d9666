"""Who may write a run: take it from an owner that is gone, wait for one that may live, say so when it does."""

from __future__ import annotations

from typing import Any

import msgspec

from everystep.errors import RunInUse, SaveAbandoned
from everystep.seam import Process
from everystep.vault import History, RunVault, Term
from everystep.vault.record import Open


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
    slots, said = history.slots, False
    begun = vault.seam.monotonic()
    while not _is_free(vault, history, vault.seam.monotonic() - begun):
        owner = history.owner.process if history.owner else {}
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        if history.slots > slots:
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


def _is_free(vault: RunVault, history: History, waited: float) -> bool:
    if history.owner is None or history.closed:
        return True
    owner = _process(history.owner.process)
    here = vault.seam.process()
    if (owner.boot, owner.pid, owner.started) == (here.boot, here.pid, here.started):
        return True  # this very process opened it before: a notebook cell run again
    if vault.seam.is_gone(owner):
        return True
    silent = max(waited, vault.seam.now() - history.last_time if owner.host != here.host else waited)
    return silent >= vault.settings.takeover_seconds


def _process(fields: dict[str, Any]) -> Process:
    host, machine, boot, started = (str(fields.get(name, "")) for name in ("host", "machine", "boot", "started"))
    return Process(host, machine, boot, int(fields.get("pid", 0)), started)


def join_run(vault: RunVault, launch: str) -> Term:
    """The term that rank 0 of the same launch has opened: ranks without a process group meet through the store.

    Raises:
        SaveAbandoned: if it has opened none before the deadline.
    """
    deadline = vault.seam.monotonic() + vault.settings.rank_deadline_seconds
    while vault.seam.monotonic() < deadline:
        history = vault.history()
        if history.owner is not None and history.owner.launch == launch and not history.closed:
            return Term(history.term, history.owner.nonce, f"{vault.seam.token(16)}-{history.term}")
        vault.seam.sleep(vault.settings.poll_seconds)
    raise SaveAbandoned(
        f"rank 0 of launch {launch!r} has not opened the run",
        where=vault.where,
        do="start rank 0, and give every rank the same launch id",
    )
