"""Copy chunks and manifests to other packs: the encoded bytes as they are, the logical halves byte for byte."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from everystep.upkeep.usage import needed_of
from everystep.vault import Committed, Manifest, PackName, PackWriter, PartView, RunVault, Spot, read_manifest
from everystep.vault.history import roll_up
from everystep.vault.manifest import NO_BASE, SPOT, Placement, pack_halves, pages, settle
from everystep.vault.names import NO_TERM
from everystep.vault.packs import Slot
from everystep.vault.record import Attach, Moved, Where

Array = np.ndarray[Any, Any]
Place = tuple[PackName, int]
BATCH_BYTES = 16 << 20
"""Plain bytes that are read and verified at a time, by each thread."""
MANIFEST_BYTES_MAX = 1 << 30


@dataclass(frozen=True)
class Resident:
    """A checkpoint that has bytes in packs that are looked at; `thin` if it needs no optimizer state any more."""

    commit: Committed
    thin: bool
    manifest_bytes: int


@dataclass(frozen=True)
class Emptied:
    """Packs to empty, who has something there, and how much that is."""

    packs: frozenset[PackName]
    residents: list[Resident]
    attachments: list[Attach]
    main: dict[Place, bool]
    """Of each place that is needed, whether that is for more than optimizer state."""
    nbytes: int


class Mover:
    """Writes packs of its own. They are of no term, and nothing until a record names them."""

    def __init__(self, vault: RunVault) -> None:
        self._vault = vault
        writer, number = f"{vault.seam.token(16)}-{NO_TERM}", itertools.count()
        # As a save does it: optimizer state apart, so that thinning frees whole files, and a pack for each manifest.
        self._optimizer, self._main, self._attachments, self._manifest = (
            PackWriter(vault.storage, vault.folder, writer, number.__next__, vault.seam, vault.settings, limit)
            for limit in (*(vault.settings.pack_bytes_max,) * 3, MANIFEST_BYTES_MAX)
        )
        self._pages = _Pages(self._manifest)
        self._slots: dict[Place, Slot] = {}
        self._routes: dict[PackName, _Route] = {}

    @property
    def written_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self._stored)

    @property
    def packs(self) -> set[PackName]:
        """What it has written."""
        return {name for name, _ in self._stored}

    @property
    def _stored(self) -> Iterator[tuple[PackName, int]]:
        for writer in (self._optimizer, self._main, self._attachments, self._manifest):
            yield from writer.stored

    def copy_chunks(self, emptied: Emptied, one: Resident, told: Callable[[int], None]) -> None:
        """Copies what a checkpoint needs of the chunks there, as far as it is not copied yet.

        Args:
            told: told the stored bytes that have been copied.

        Raises:
            Damaged: if one of them is not what was saved.
        """
        vault, workers = self._vault, self._vault.settings.workers
        with closing(vault.seam.pool(workers, "everystep-repack")) as pool:
            batches = _batches(_chunks(vault.manifest(one.commit), emptied, one, self._slots.keys()))
            for batch, stored in pool.map(lambda batch: (batch, vault.read_stored(batch)), batches, workers + 1):
                for (spot, _), piece in zip(batch, stored):
                    packs = self._main if emptied.main[spot.pack, spot.offset] else self._optimizer
                    self._slots[spot.pack, spot.offset] = packs.add([piece])
                    told(spot.length)

    def store_chunks(self) -> None:
        """From here on it is known where all that was copied lies, durably."""
        self._optimizer.flush()
        self._main.flush()
        self._routes = _routes(self._slots)

    def write_manifest(self, one: Resident) -> Moved:
        """Stores the checkpoint's manifest anew, and whole: none of its pages, either, is left where it was."""
        vault, event = self._vault, one.commit.event
        where = f"{vault.where} checkpoint {event.id}"
        manifest = vault.manifest(one.commit)
        needs = _Needs()
        parts = [self._write_part(view, at, needs, where) for view, at in zip(manifest.views, manifest.parts)]
        page = self._pages.add(_with_placement(vault.read_pages([event.root], where), parts))
        here, own = self._pages.close()
        root = settle(page, here)
        read_manifest(msgspec.structs.replace(event, root=root), vault.read_pages, where)  # before it is in force
        return Moved(event.id, root, roll_up(needs.all | own), roll_up(needs.all - needs.main - own))

    def copy_attachment(self, emptied: Emptied, event: Attach) -> Attach:
        """Stores what an attached file has there."""
        places = [self._copy_page(page, emptied, event.name) for page in event.where]
        self._attachments.flush()
        where = [page if slot is None else settle(page, slot.name) for page, slot in places]
        return msgspec.structs.replace(event, where=where)

    def _copy_page(self, page: Where, emptied: Emptied, name: str) -> tuple[Where, Slot | None]:
        if PackName(page.writer, page.number) not in emptied.packs:
            return page, None
        body = self._vault.read_pages([page], f"{self._vault.where} attachment {name}")
        return self._attachments.add_page(body, page.blake3)

    # one rank's part

    def _write_part(self, view: PartView, at: Where, needs: _Needs, where: str) -> Where:
        vault, old = self._vault, view.placement
        packs, spots, bases = self._follow(view, needs)
        tree, values, chunks, base_hashes = (
            [self._pages.carry(page, lambda page: vault.read_pages([page], where)) for page in table]
            for table in (old.tree, old.values, old.chunks, old.base_hashes)
        )
        named = [(pack.writer, pack.number) for pack in packs]
        placement = Placement(named, tree, values, chunks, self._table(spots), self._table(bases), base_hashes)
        return self._pages.add(_with_placement(vault.read_pages([at], where), placement))

    def _table(self, rows: Array) -> list[Where]:
        return [self._pages.add(bytes(page)) for page in pages(rows.tobytes(), SPOT.itemsize)]

    def _follow(self, view: PartView, needs: _Needs) -> tuple[list[PackName], Array, Array]:
        """Packs, spots and bases as they are now. What a thinned checkpoint has lost points to where it was."""
        names = [PackName(*name) for name in view.placement.packs]
        tables = view.spots.copy(), view.bases.copy()
        for number, name in enumerate(names.copy()):
            route = self._routes.get(name)
            if route is not None:
                for table, before in zip(tables, (view.spots, view.bases)):
                    route.send(table, np.flatnonzero(before["pack"] == number), len(names))
                names += route.packs
        used = np.unique(np.concatenate([table["pack"] for table in tables]))
        packs = [names[number] for number in used]
        for table in tables:
            table["pack"] = np.searchsorted(used, table["pack"])
        found = needed_of(view, thin=False)
        for table, main in zip(tables, (found.main_chunks, found.main_bases)):
            needs.main.update(packs[number] for number in np.unique(table["pack"][main]))
        needs.all.update(packs)
        return packs, *tables


@dataclass
class _Needs:
    """Packs that chunks of one checkpoint lie in; `main` for more than its optimizer state."""

    main: set[PackName] = field(default_factory=set)
    all: set[PackName] = field(default_factory=set)


@dataclass
class _Pages:
    """The pages of one manifest after the other; what an earlier one holds is referred to there."""

    packs: PackWriter
    _known: dict[str, Where] = field(default_factory=dict)
    _fresh: dict[str, Where] = field(default_factory=dict)
    _used: set[PackName] = field(default_factory=set)

    def add(self, body: bytes) -> Where:
        hash = blake3(body).hexdigest()
        return self._find(hash) or self._fresh.setdefault(hash, self.packs.add_page(body, hash)[0])

    def carry(self, page: Where, read: Callable[[Where], bytes]) -> Where:
        """A page that stays as it is."""
        return self._find(page.blake3) or self.add(read(page))

    def _find(self, hash: str) -> Where | None:
        page = self._known.get(hash)
        if page is not None:
            self._used.add(PackName(page.writer, page.number))
        return page or self._fresh.get(hash)

    def close(self) -> tuple[PackName, set[PackName]]:
        """Stores the manifest: its pack, and all packs that its pages lie in."""
        self.packs.flush()
        here = self.packs.stored[-1][0]
        used = {here, *self._used}
        self._known.update({hash: settle(page, here) for hash, page in self._fresh.items()})
        self._fresh, self._used = {}, set()
        return here, used


@dataclass
class _Route:
    """Where to the needed chunks of one pack have gone."""

    offsets: Array
    """Of the chunks, in order."""
    packs: list[PackName]
    numbers: Array
    """For each of them, which of `packs` it lies in now."""
    new_offsets: Array

    def send(self, table: Array, rows: Array, first: int) -> None:
        """Rewrites rows of a table of spots; `first` is the number of the first of `packs` there."""
        at = np.minimum(np.searchsorted(self.offsets, table["offset"][rows]), len(self.offsets) - 1)
        known = self.offsets[at] == table["offset"][rows]
        rows, at = rows[known], at[known]
        table["pack"][rows] = first + self.numbers[at]
        table["offset"][rows] = self.new_offsets[at]


def _routes(slots: dict[Place, Slot]) -> dict[PackName, _Route]:
    by_pack: dict[PackName, list[tuple[int, PackName, int]]] = {}
    for (pack, offset), slot in slots.items():
        by_pack.setdefault(pack, []).append((offset, slot.name, slot.offset))
    found = {}
    for pack, rows in by_pack.items():
        offsets, names, new = zip(*sorted(rows))
        packs = sorted(set(names))
        number = {name: index for index, name in enumerate(packs)}
        numbers = np.array([number[name] for name in names], np.uint32)
        found[pack] = _Route(np.array(offsets, np.uint64), packs, numbers, np.array(new, np.uint64))
    return found


def _chunks(
    manifest: Manifest, emptied: Emptied, one: Resident, copied: Collection[Place]
) -> Iterator[tuple[Spot, int]]:
    """What a checkpoint needs of the emptied packs, each chunk and base once, with its plain length."""
    seen: set[Place] = set()
    for view in manifest.views:
        for index in _touching(view, emptied.packs, thin=one.thin):
            nbytes = view.layout.chunks[index].nbytes
            for spot in view.spot(index).links():
                place = spot.pack, spot.offset
                if spot.pack in emptied.packs and place not in seen and place not in copied:
                    seen.add(place)
                    yield spot, nbytes


def _touching(view: PartView, packs: frozenset[PackName], *, thin: bool) -> list[int]:
    """The needed chunks of a part of which a link lies in one of the packs."""
    needed = needed_of(view, thin=thin).chunks
    inside = np.array([PackName(*name) in packs for name in view.placement.packs], bool)
    bases = inside[view.bases["pack"]]
    for depth in range(1, int(view.bases["depth"].max(initial=0)) + 1):
        level = np.flatnonzero(view.bases["depth"] == depth)
        bases[level] |= bases[view.bases["base"][level]]
    chunks = inside[view.spots["pack"]]
    leaning = np.flatnonzero(view.spots["base"] != NO_BASE)
    chunks[leaning] |= bases[view.spots["base"][leaning]]
    return [int(index) for index in np.flatnonzero(chunks & needed)]


def _batches(chunks: Iterable[tuple[Spot, int]]) -> Iterator[list[tuple[Spot, int]]]:
    batch: list[tuple[Spot, int]] = []
    total = 0
    for chunk in chunks:
        if batch and total + chunk[1] > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(chunk)
        total += chunk[1]
    if batch:
        yield batch


def _with_placement(document: bytes, placement: Any) -> bytes:
    """A document of two halves with another second one."""
    return pack_halves(msgspec.Raw(document.partition(b"\n")[0]), placement)
