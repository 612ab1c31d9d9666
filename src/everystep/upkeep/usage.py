"""Which bytes of which packs checkpoints need: what is left of such a pack is dead."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep.errors import Damaged
from everystep.vault import History, Manifest, PackName, PartView, RunVault
from everystep.vault.history import Dropped
from everystep.vault.manifest import DEPTH_MAX, NO_BASE
from everystep.vault.names import record_key
from everystep.vault.packs import MAGIC
from everystep.vault.record import Where

Array = np.ndarray[Any, Any]
OPTIMIZER = "optimizer"
USE = np.dtype([("pack", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("main", "?")])
MERGE_ROWS = 1 << 16


def held(vault: RunVault, history: History) -> dict[str, bool]:
    """Checkpoints that are live, or that were dropped so short a time ago that they can be brought back -> whether
    that is without their optimizer state."""
    # Copies: a save in this process may add to the fold while the store is asked.
    found = {id: id in history.thin for id in list(history.live)}
    newest, times = history.slots - 1, dict[int, float]()

    def age(slot: int) -> float:
        """By the store's own clock."""
        for each in (slot, newest):
            if each not in times:
                times[each] = vault.storage.stat(record_key(vault.folder, each)).time
        return times[newest] - times[slot]

    for id, dropped in list(history.dropped.items()):
        way: Dropped | None = dropped
        while way is not None and way.undo_seconds > 0 and age(way.slot) < way.undo_seconds:
            if history.commits[id].needs(thin=way.was_thin) & history.condemned:
                break  # freed before its time: there was no room
            found[id] = way.was_thin and found.get(id, True)
            way = way.before
    return found


def needs_less(history: History, id: str) -> bool:
    """Whether a checkpoint does without its optimizer state, as it is or would come back."""
    dropped = history.dropped.get(id)
    return id in history.thin if id in history.live or dropped is None else dropped.was_thin


def is_there(history: History, id: str) -> bool:
    """Whether a checkpoint is live, or has not been freed yet."""
    return id in history.live or not history.commits[id].needs(thin=needs_less(history, id)) & history.condemned


@dataclass(frozen=True)
class Needed:
    """Of a part, masks over its chunks and over its bases: what is needed, and what of that not for the optimizer
    state alone."""

    chunks: Array
    main_chunks: Array
    bases: Array
    main_bases: Array


def needed_of(view: PartView, *, thin: bool) -> Needed:
    """
    Raises:
        Damaged: if a chunk points to what its manifest does not list.
    """
    _check(view)
    streams = view.layout.streams
    main = np.array([streams[chunk.stream].role != OPTIMIZER for chunk in view.layout.chunks], bool)
    chunks = main if thin else np.ones(len(main), bool)
    return Needed(chunks, main, _behind(view, chunks), _behind(view, main))


def _behind(view: PartView, chunks: Array) -> Array:
    """The bases that chunks lean on, with the bases of these."""
    found = np.zeros(len(view.bases), bool)
    at = view.spots["base"][chunks]
    while len(at := np.unique(at[at != NO_BASE])):  # each link has one less behind it, so that this ends
        found[at] = True
        at = view.bases["base"][at]
    return found


def _check(view: PartView) -> None:
    for rows in (view.spots, view.bases):
        leaning = rows[rows["base"] != NO_BASE]
        wrong = (rows["pack"] >= len(view.placement.packs)).any() or (rows["depth"] > DEPTH_MAX).any()
        wrong = wrong or ((rows["base"] == NO_BASE) != (rows["depth"] == 0)).any()
        wrong = wrong or (leaning["base"] >= len(view.bases)).any()
        if wrong or (view.bases["depth"][leaning["base"]] != leaning["depth"] - 1).any():
            raise Damaged("a chunk points to a pack or base that its manifest does not list", do="run fsck")


class Uses:
    """Places in packs that are needed, each counted once."""

    def __init__(self) -> None:
        self.names: list[PackName] = []
        self._numbers: dict[PackName, int] = {}
        self._parts: list[Array] = [np.empty(0, USE)]

    def add(self, manifest: Manifest, root: Where, *, thin: bool) -> int:
        """Adds all that a checkpoint needs; the bytes of its manifest."""
        for view in manifest.views:
            found = needed_of(view, thin=thin)
            numbers = np.array([self._number(PackName(*name)) for name in view.placement.packs], np.uint32)
            self._add(view.spots, numbers, found.chunks, found.main_chunks)
            self._add(view.bases, numbers, found.bases, found.main_bases)
        places = (page for view in manifest.views for page in view.placement.pages())
        return self.add_pages([root, *manifest.parts, *places])

    def add_pages(self, pages: Sequence[Where]) -> int:
        """Adds pages; their bytes."""
        rows = [(self._number(PackName(page.writer, page.number)), page.offset, page.length, True) for page in pages]
        self._take(np.array(rows, USE))
        return sum(page.length for page in pages)

    def live_bytes(self) -> dict[PackName, int]:
        """Pack -> how much of it is needed. A pack that nothing needs is not in it."""
        table = self.table()
        sums = np.bincount(table["pack"], weights=table["length"], minlength=len(self.names))
        return {name: int(nbytes) for name, nbytes in zip(self.names, sums)}

    def dead_bytes(self, sizes: dict[PackName, int]) -> dict[PackName, int]:
        """Pack that is needed -> how much of it is not."""
        return {
            name: max(0, sizes[name] - len(MAGIC) - nbytes)
            for name, nbytes in self.live_bytes().items()
            if name in sizes
        }

    def of_packs(self, packs: Collection[PackName]) -> dict[tuple[PackName, int], bool]:
        """(pack, offset) of what is needed of some packs -> whether it is not for optimizer state alone."""
        wanted = np.array([name in packs for name in self.names], bool)
        table = self.table()
        rows = table[wanted[table["pack"]]] if len(table) else table
        return {
            (self.names[pack], offset): main
            for pack, offset, main in zip(rows["pack"].tolist(), rows["offset"].tolist(), rows["main"].tolist())
        }

    def table(self) -> Array:
        """USE per place, by pack and offset."""
        rows = np.concatenate(self._parts)
        if len(self._parts) > 1 and len(rows):
            rows = rows[np.lexsort((rows["offset"], rows["pack"]))]
            new = (np.diff(rows["pack"], prepend=~rows["pack"][:1]) != 0) | (
                np.diff(rows["offset"], prepend=~rows["offset"][:1]) != 0
            )
            starts = np.flatnonzero(new)
            found = rows[starts]
            found["length"] = np.maximum.reduceat(rows["length"], starts)
            found["main"] = np.logical_or.reduceat(rows["main"], starts)
            rows = found
        self._parts = [rows]
        return rows

    def _add(self, spots: Array, numbers: Array, needed: Array, main: Array) -> None:
        chosen = spots[needed]
        rows = np.empty(len(chosen), USE)
        rows["pack"] = numbers[chosen["pack"]]
        rows["offset"], rows["length"], rows["main"] = chosen["offset"], chosen["length"], main[needed]
        self._take(rows)

    def _take(self, rows: Array) -> None:
        self._parts.append(rows)
        # What checkpoints share is counted once before it becomes much: memory follows what is stored.
        if sum(map(len, self._parts[1:])) > max(MERGE_ROWS, len(self._parts[0])):
            self.table()

    def _number(self, name: PackName) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]
