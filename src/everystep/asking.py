"""Queries and rankings: the catalog answers, the log is the truth, and every answer is checked against it."""

from __future__ import annotations

from collections.abc import Callable

from everystep.catalog import Absorbed, Catalog, Entry, Lost, parse
from everystep.vault import History, RunVault


def ask(vault: RunVault, history: History, text: str) -> list[str]:
    """Ids of live checkpoints that meet a condition, by step.

    Raises:
        UsageError: for a text that is no condition, or names a metric that no checkpoint has.
    """
    condition = parse(text)
    return _answer(vault, history, lambda catalog: catalog.query(vault.name, condition))


def rank(vault: RunVault, history: History, metric: str, mode: str, limit: int) -> list[str]:
    """Ids of live checkpoints with the best values of a metric, best first."""
    return _answer(vault, history, lambda catalog: catalog.rank(vault.name, metric, mode, limit))


def _answer(vault: RunVault, history: History, use: Callable[[Catalog], list[str]]) -> list[str]:
    """What the user's catalog says; where it cannot be used, what one made for this answer says."""
    path = _path(vault)
    try:
        if path is not None:
            return _answer_from(path, vault, history, use)
    except Lost:
        pass  # whatever is wrong with that file, another can be made
    return _answer_from(":memory:", vault, history, use)


def _answer_from(path: str, vault: RunVault, history: History, use: Callable[[Catalog], list[str]]) -> list[str]:
    catalog = Catalog(path, vault.seam)
    try:
        _bring_up(catalog, vault.name, history)
        found = use(catalog)
        if not _agrees(catalog, vault.name, history, found):
            _bring_up(catalog, vault.name, history, anew=True)
            found = use(catalog)
        return found
    finally:
        catalog.close()


def _path(vault: RunVault) -> str | None:
    """The file of this repository's catalog in the user's cache folder; None where nothing may be kept."""
    folder = None if vault.storage.url.startswith("memory://") else vault.seam.cache_folder()
    return f"{folder}/{vault.place.identity()}.sqlite" if folder is not None and vault.place.exists else None


def _bring_up(catalog: Catalog, run: str, history: History, *, anew: bool = False) -> None:
    """Takes in what the log has gained since."""
    seen = None if anew else catalog.recall(run)
    if seen is not None and (seen.slots, seen.head) == (history.slots, history.head):
        return
    since = seen.slots if seen is not None and seen.slots < history.slots else 0
    touched = [id for id, slot in history.touched.items() if slot >= since]
    changed = (entry_of(history, id) for id in touched if id in history.live)
    tags = {name: id for name, id in history.tags.items() if id in history.live}
    gone = [id for id in touched if id not in history.live]
    catalog.absorb(run, Absorbed(history.slots, history.head), changed, gone, tags, anew=since == 0)


def _agrees(catalog: Catalog, run: str, history: History, ids: list[str]) -> bool:
    """Whether the catalog knows as many checkpoints as the log, and of each one in the answer the same as the log."""
    if catalog.count(run) != len(history.live) or any(id not in history.live for id in ids):
        return False
    return catalog.holds(run, [entry_of(history, id) for id in ids])


def entry_of(history: History, id: str) -> Entry:
    """What the log says of a checkpoint, in the catalog's words."""
    commit = history.commits[id]
    event = commit.event
    return Entry(
        id, commit.slot, event.step, commit.time, event.parent, commit.term, event.reason, id in history.thin,
        event.cost.raw_bytes, event.cost.stored_bytes, event.cost.stall_seconds, history.metrics_of(id),
    )  # fmt: skip
