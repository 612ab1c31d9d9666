"""Remove what saves by several ranks leave behind: receipts that nobody waits for any more."""

from __future__ import annotations

from everystep.vault import History, RunVault
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


def _is_over(parts: list[int], history: History) -> bool:
    if len(parts) != 3:
        return False
    term, ordinal, _ = parts
    if term != history.term or history.closed:
        return term <= history.term
    return (history.nonce, ordinal) in history.settled
