"""Remove what saves leave behind beside packs: receipts that nobody waits for any more, and files never finished."""

from __future__ import annotations

from everystep.vault import History, RunVault
from everystep.vault.names import NO_TERM
from everystep.vault.together import together


def free_receipts(vault: RunVault, history: History) -> None:
    """Removes the receipts of saves that are settled, and of terms that have ended."""
    if all(term.ranks == 1 for term in history.opened.values()):
        return
    folder = f"{vault.folder}save/"
    there = [(key, key.removeprefix(folder).split("/")) for key in vault.storage.list(folder)]
    dead = [key for key, parts in there if all(map(str.isdecimal, parts)) and _is_over([*map(int, parts)], history)]
    for _ in together(vault.storage, vault.seam, vault.storage.delete, dead):
        pass


def free_unfinished(vault: RunVault, history: History, *, rewrites: bool) -> None:
    """Removes the beginnings of packs that killed processes left, where the place shows them: not of the term that may
    still write.

    Args:
        rewrites: also those of a repack. One that is under way begins its pack again.
    """
    find = getattr(vault.storage, "unfinished", None)
    if find is None:
        return
    last = history.term if history.closed else history.term - 1
    least = NO_TERM if rewrites else NO_TERM + 1
    for key in find(f"{vault.folder}packs/"):
        term = key.rsplit("/", 2)[-2].rpartition("-")[2]
        if term.isdecimal() and least <= int(term) <= last:
            vault.storage.delete(key)


def _is_over(parts: list[int], history: History) -> bool:
    if len(parts) != 3:
        return False
    term, ordinal, _ = parts
    if term != history.term or history.closed:
        return term <= history.term
    return (history.nonce, ordinal) in history.settled
