"""Store a checkpoint of one run in another: chunks as they are, each verified, the manifest's logical halves too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import numpy as np
from blake3 import blake3

from everystep.errors import Damaged, ObjectMissing
from everystep.seam import Pool
from everystep.upkeep.usage import Needed, needed_of
from everystep.vault import (
    CODEC_NAMES,
    Committed,
    Manifest,
    PackName,
    PackWriter,
    PartView,
    RunVault,
    Spot,
    Term,
    Uploads,
    read_manifest,
)
from everystep.vault.history import roll_up
from everystep.vault.manifest import HASH_BYTES, NO_BASE, SPOT, Placement, pack_halves, pages, settle
from everystep.vault.packs import Slot
from everystep.vault.pages import Pages
from everystep.vault.record import Attach, Commit, Where

K = TypeVar("K")
V = TypeVar("V")
BATCH_BYTES = 16 << 20
"""Plain bytes that are read and verified at a time, by each thread."""
MANIFEST_BYTES_MAX = 1 << 30
RAW = next(code for code, name in CODEC_NAMES.items() if name == "raw")
READERS_MAX = 8
Stored = dict[tuple[PackName, int, int], memoryview]
SPANS = 9
"""What the target holds is remembered of as many checkpoints: an anchor and all that lean on it."""


@dataclass(frozen=True)
class Sent:
    """A checkpoint that is stored, and not committed yet."""

    event: Commit
    lost: PackName | None
    """Stands for where the chunks lie that a thinned checkpoint has lost; there is no such pack."""
    nbytes: int
    """Newly stored for it."""
    chunks: dict[bytes, Spot]
    pages: dict[str, Where]
    """Where all that it needs lies, by hash."""


@dataclass
class There:
    """Where the target has chunks and pages, by hash: of the last few checkpoints, whatever the run's length."""

    chunks: dict[bytes, Spot] = field(default_factory=dict)
    pages: dict[str, Where] = field(default_factory=dict)
    checkpoints: dict[str, None] = field(default_factory=dict)
    """Ids of those whose manifests were learned."""

    def find(self, spot: Spot, depth_max: int) -> Spot | None:
        """Equal bytes, unless so much lies behind them that chains would grow from push to push."""
        found = self.chunks.get(spot.hash)
        return found if found is not None and found.depth <= max(spot.depth, depth_max) else None

    def learn(self, id: str, manifest: Manifest, *, thin: bool) -> None:
        spots = [view.spot(index) for view in manifest.views for index in view.there(thin=thin)]
        tables = [(view.placement.tree, view.placement.values, view.placement.chunks) for view in manifest.views]
        self.add(id, {link.hash: link for spot in spots for link in spot.links()},
                 {page.blake3: page for lists in tables for table in lists for page in table})  # fmt: skip

    def add(self, id: str, chunks: dict[bytes, Spot], pages: dict[str, Where]) -> None:
        """What one checkpoint needs; the oldest of what others need goes."""
        _renew(self.chunks, chunks)
        _renew(self.pages, pages)
        _renew(self.checkpoints, {id: None})


@dataclass(frozen=True)
class _Wanted:
    """A chunk to read, and what of it and of its bases is to be stored, the deepest first."""

    spot: Spot
    nbytes: int
    links: list[Spot]

    def narrowed(self, main: set[bytes], is_main: bool) -> _Wanted:
        """Of what is to be stored, that which is needed for more than optimizer state, or the rest."""
        return replace(self, links=[link for link in self.links if (link.hash in main) is is_main])


@dataclass
class _Piece:
    """A link on its way into a pack. What is written is let go; for another attempt it is read again."""

    link: Spot
    wanted: _Wanted
    read: Callable[[Sequence[tuple[Spot, int]]], Stored]
    data: memoryview | None
    slot: Slot | None = None

    @property
    def nbytes(self) -> int:
        return self.link.length

    def pieces(self) -> list[memoryview]:
        data, self.data = self.data, None
        if data is None:
            place = self.link.pack, self.link.offset, self.link.length
            data = self.read([(self.wanted.spot, self.wanted.nbytes)])[place]
        return [data]


@dataclass
class _Draft:
    """A checkpoint on its way: what was read of its manifest, and what is being written."""

    commit: Committed
    thin: bool
    where: str
    bodies: dict[str, bytes] = field(default_factory=dict)
    """Pages by their hash, those that were read and those that were made."""
    fresh: dict[str, Where] = field(default_factory=dict)
    """Pages in the manifest's new pack."""
    used: dict[str, Where] = field(default_factory=dict)
    """Pages that the target has already."""
    pieces: dict[bytes, _Piece] = field(default_factory=dict)
    """Chunks that are stored anew, by hash."""
    spots: dict[bytes, Spot] = field(default_factory=dict)
    """Where the target has what the checkpoint needs."""
    main: set[PackName] = field(default_factory=set)
    all: set[PackName] = field(default_factory=set)
    """Packs that chunks lie in; `main`: not for optimizer state alone."""
    lost: PackName | None = None


class _Packs:
    """The packs of one checkpoint, as a save writes them: optimizer state apart, and one for the manifest."""

    def __init__(self, target: RunVault, term: Term) -> None:
        s = target.settings
        self.optimizer, self.main, self.manifest = (
            PackWriter(target.storage, target.folder, term.writer, term.next_pack, target.seam, s, limit)
            for limit in (s.pack_bytes_max, s.pack_bytes_max, MANIFEST_BYTES_MAX)
        )

    @property
    def nbytes(self) -> int:
        return sum(length for one in (self.optimizer, self.main, self.manifest) for _, length in one.stored)


class Sender:
    """Sends checkpoints from one run's packs to another's. Nothing counts until a record names what was sent.

    Args:
        told: told the stored bytes as they are sent.
    """

    def __init__(self, source: RunVault, target: RunVault, told: Callable[[int], None]) -> None:
        self._source, self._target, self._told = source, target, told
        self._there = There()

    def forget(self) -> None:
        """Refers to nothing that lies there: something of it was freed."""
        self._there = There()

    def committed(self, sent: Sent) -> None:
        """A checkpoint that was sent is one: from here on others may refer to what it needs."""
        self._there.add(sent.event.id, sent.chunks, sent.pages)

    def send(self, commit: Committed, term: Term, near: Iterable[tuple[Committed, bool]], *, thin: bool) -> Sent:
        """Stores what a checkpoint needs and the target lacks.

        Args:
            near: checkpoints of the target that may hold some of it, the likeliest first, and whether each is thin.
            thin: without its optimizer state.

        Raises:
            ObjectMissing: if the source has freed or moved it meanwhile.
            Damaged: if a byte of it is not what was saved.
        """
        draft = _Draft(commit, thin, f"{self._source.where} checkpoint {commit.event.id}")
        manifest = self._read(draft)
        self._recall(manifest, near)
        packs = _Packs(self._target, term)
        needs = [needed_of(view, thin=thin) for view in manifest.views]
        self._copy(draft, packs, manifest, needs)
        parts = [
            self._write_part(draft, packs, view, needed, at, term)
            for view, needed, at in zip(manifest.views, needs, manifest.parts)
        ]
        event, own = self._close(draft, packs, parts, term)
        read_manifest(event, lambda pages, where: b"".join(draft.bodies[page.blake3] for page in pages), draft.where)
        return Sent(event, draft.lost, packs.nbytes, draft.spots, {**draft.used, **own})

    def send_file(self, event: Attach, term: Term) -> Attach:
        """Stores an attached file."""
        s = self._target.settings
        packs = PackWriter(
            self._target.storage, self._target.folder, term.writer, term.next_pack, self._target.seam, s,
            s.pack_bytes_max,
        )  # fmt: skip
        placed = []
        for page in event.where:
            body = self._source.read_pages([page], f"{self._source.where} attachment {event.name}")
            placed.append(packs.add_page(body, page.blake3))
            self._told(page.length)
        packs.flush()
        return msgspec.structs.replace(event, where=[settle(page, slot.name) for page, slot in placed])

    # reading

    def _read(self, draft: _Draft) -> Manifest:
        """The source's manifest; its pages stay in the draft."""
        reading = Pages(self._source.storage, self._source.folder, self._source.seam)

        def fetch(pages: Sequence[Where], where: str) -> bytes:
            for page in pages:
                if page.blake3 not in draft.bodies:
                    draft.bodies[page.blake3] = reading.fetch([page], where)
            return b"".join(draft.bodies[page.blake3] for page in pages)

        return read_manifest(draft.commit.event, fetch, draft.where, reading.ahead)

    def _recall(self, manifest: Manifest, near: Iterable[tuple[Committed, bool]]) -> None:
        """Learns what the target holds that this checkpoint may share, or lean on: no more manifests than need be."""
        bases = [hash.tobytes() for view in manifest.views for hash in view.base_hashes]
        for commit, thin in near:
            if commit.event.id not in self._there.checkpoints:
                try:
                    self._there.learn(commit.event.id, self._target.manifest(commit), thin=thin)
                except (Damaged, ObjectMissing):
                    continue  # what cannot be read is not referred to
            if all(hash in self._there.chunks for hash in bases):
                return

    # chunks

    def _copy(self, draft: _Draft, packs: _Packs, manifest: Manifest, needs: Sequence[Needed]) -> None:
        vault, main = self._source, _hashes(manifest, needs)
        wanted = self._missing(draft, manifest, needs)
        readers = max(vault.settings.workers, min(vault.storage.fan_out, READERS_MAX))
        with closing(vault.seam.pool(readers, "everystep-send")) as pool, self._sending() as uploads:
            for writer, is_main in ((packs.optimizer, False), (packs.main, True)):
                mine = [one.narrowed(main, is_main) for one in wanted]
                writer.store(self._loads(draft, pool, [one for one in mine if one.links]), uploads)

    @contextmanager
    def _sending(self) -> Iterator[Uploads | None]:
        """For a place that takes several packs at once; all have arrived when it is left."""
        settings, seam = self._target.settings, self._target.seam
        count = min(settings.uploads, self._target.storage.fan_out)
        if count <= 1:
            yield None
            return
        with closing(Uploads(seam, settings, count)) as uploads:
            yield uploads
            uploads.finish()

    def _loads(self, draft: _Draft, pool: Pool, wanted: Iterable[_Wanted]) -> Iterator[_Piece]:
        """What is to be stored, as it is read and verified, each thread with a batch of its own."""
        read = self._source.read_links

        def links(batch: list[_Wanted]) -> tuple[list[_Wanted], Stored]:
            return batch, read([(one.spot, one.nbytes) for one in batch])

        with closing(pool.map(links, _batches(wanted), pool.workers + 1)) as found:
            for batch, stored in found:
                for one in batch:
                    for link in one.links:
                        place = link.pack, link.offset, link.length
                        piece = draft.pieces[link.hash] = _Piece(link, one, read, stored[place])
                        yield piece
                        self._told(link.length)

    def _missing(self, draft: _Draft, manifest: Manifest, needs: Sequence[Needed]) -> list[_Wanted]:
        """What the target lacks. Of a chain only what lies in front of the first link that is there, or is coming."""
        deep, coming, found = self._target.settings.base_depth_max, set[bytes](), list[_Wanted]()
        for view, needed in zip(manifest.views, needs):
            for index in np.flatnonzero(needed.chunks).tolist():
                spot = view.spot(index)
                front: list[Spot] = []
                for link in spot.links():
                    if link.hash in coming or self._is_there(draft, link, deep):
                        break
                    front.append(link)
                links = []
                for link in reversed(front):
                    if link.hash not in coming:  # a chain may come back to bytes that it began with
                        coming.add(link.hash)
                        links.append(link)
                if links:
                    found.append(_Wanted(spot, view.layout.chunks[index].nbytes, links))
        return sorted(found, key=lambda one: (one.spot.pack, one.spot.offset))

    def _is_there(self, draft: _Draft, link: Spot, deep: int) -> bool:
        """Whether the target has it. What was found once is not stored anew for another chain: none gets a loop."""
        if link.hash not in draft.spots:
            found = self._there.find(link, deep)
            if found is None:
                return False
            draft.spots[link.hash] = found
        return True

    def _spot(self, draft: _Draft, hash: bytes) -> Spot:
        """Where the target has these bytes."""
        if hash not in draft.spots:
            piece = draft.pieces[hash]
            link, slot = piece.link, piece.slot
            assert slot is not None
            base = self._spot(draft, link.base.hash) if link.base is not None else None
            draft.spots[hash] = Spot(slot.name, slot.offset, slot.length, link.codec, hash, base)
        return draft.spots[hash]

    # the manifest

    def _write_part(self, draft: _Draft, packs: _Packs, view: PartView, needed: Needed, at: Where, term: Term) -> Where:
        hashes = [hash.tobytes() for hash in view.hashes]
        if not needed.chunks.all() and draft.lost is None:
            draft.lost = PackName(term.writer, term.next_pack())
        spots = [
            self._spot(draft, hash) if there else Spot(draft.lost or PackName("", 0), 0, 0, RAW, hash)
            for hash, there in zip(hashes, needed.chunks.tolist())
        ]
        for spot, main in zip(spots, needed.main_chunks.tolist()):
            mine = {link.pack for link in spot.links()}
            draft.all |= mine
            draft.main |= mine if main else set()
        bases: dict[tuple[PackName, int], int] = {}
        links: list[Spot] = []
        for spot in spots:
            for link in spot.base.links() if spot.base is not None else ():
                if (link.pack, link.offset) not in bases:
                    bases[link.pack, link.offset] = len(links)
                    links.append(link)
        names = list(dict.fromkeys(spot.pack for spot in (*spots, *links)))
        number = {name: index for index, name in enumerate(names)}

        def rows(table: list[Spot]) -> list[Where]:
            made = [
                (number[s.pack], s.offset, s.length, s.codec, s.depth,
                 bases[s.base.pack, s.base.offset] if s.base is not None else NO_BASE)
                for s in table
            ]  # fmt: skip
            return self._table(draft, packs, np.array(made, SPOT).tobytes(), SPOT.itemsize)

        old = view.placement
        tree, values, chunks = (
            [self._page(draft, packs, draft.bodies[page.blake3]) for page in table]
            for table in (old.tree, old.values, old.chunks)
        )
        placement = Placement(
            [(name.writer, name.number) for name in names], tree, values, chunks, rows(spots), rows(links),
            self._table(draft, packs, b"".join(link.hash for link in links), HASH_BYTES),
        )  # fmt: skip
        return self._page(draft, packs, _with_placement(draft.bodies[at.blake3], placement))

    def _table(self, draft: _Draft, packs: _Packs, table: bytes, entry: int) -> list[Where]:
        return [self._page(draft, packs, bytes(page)) for page in pages(table, entry)]

    def _page(self, draft: _Draft, packs: _Packs, body: bytes) -> Where:
        hash = blake3(body).hexdigest()
        draft.bodies[hash] = body
        if hash in self._there.pages:
            return draft.used.setdefault(hash, self._there.pages[hash])
        if hash not in draft.fresh:
            draft.fresh[hash] = packs.manifest.add_page(body, hash)[0]
        return draft.fresh[hash]

    def _close(self, draft: _Draft, packs: _Packs, parts: list[Where], term: Term) -> tuple[Commit, dict[str, Where]]:
        """Stores the manifest: the commit event, and where its own pages lie."""
        old = draft.commit.event
        root = self._page(draft, packs, _with_placement(draft.bodies[old.root.blake3], parts))
        packs.manifest.flush()
        here = packs.manifest.stored[-1][0]
        manifest = {here, *(PackName(page.writer, page.number) for page in draft.used.values())}
        own = {hash: settle(page, here) for hash, page in draft.fresh.items()}
        needs = draft.all | manifest
        term.ordinal += 1
        cost = msgspec.structs.replace(old.cost, stored_bytes=packs.nbytes)
        event = msgspec.structs.replace(
            old, root=settle(root, here), packs=roll_up(needs), optimizer=roll_up(draft.all - draft.main - manifest),
            nonce=term.nonce, ordinal=term.ordinal, cost=cost,
        )  # fmt: skip
        return event, own


def _renew(known: dict[K, V], new: dict[K, V]) -> None:
    """Puts what is used now behind what was used before, of which the oldest goes."""
    for key, value in new.items():
        known.pop(key, None)
        known[key] = value
    for key in list(known)[: max(0, len(known) - SPANS * len(new))]:
        del known[key]


def _hashes(manifest: Manifest, needs: Sequence[Needed]) -> set[bytes]:
    """Chunks and bases that are needed for more than optimizer state."""
    return {
        link.hash
        for view, needed in zip(manifest.views, needs)
        for index in np.flatnonzero(needed.main_chunks).tolist()
        for link in view.spot(index).links()
    }


def _batches(chunks: Iterable[_Wanted]) -> Iterator[list[_Wanted]]:
    batch: list[_Wanted] = []
    total = 0
    for chunk in chunks:
        if batch and total + chunk.nbytes > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(chunk)
        total += chunk.nbytes
    if batch:
        yield batch


def _with_placement(document: bytes, placement: object) -> bytes:
    """A document of two halves with another second one."""
    return pack_halves(msgspec.Raw(document.partition(b"\n")[0]), placement)
