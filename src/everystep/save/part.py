"""Encode and write one rank's part: chunks into packs, then the manifest pages that say where they went."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from everystep import codecs
from everystep.errors import StorageError
from everystep.save.snapshot import Snapshot
from everystep.seam import Pool
from everystep.vault import Manifest, PackName, PackWriter, RunVault, Spot, Term
from everystep.vault.manifest import (
    HASH_BYTES,
    HERE,
    NO_BASE,
    SPOT,
    Logical,
    Part,
    content_of,
    pages,
    settle,
    tree_page,
    values_page,
)
from everystep.vault.packs import Slot
from everystep.vault.record import Where

MANIFEST_BYTES_MAX = 1 << 30


@dataclass
class Known:
    """What a checkpoint holds, by hash: a chunk or page that is known is referenced, not written again."""

    chunks: dict[bytes, Spot] = field(default_factory=dict)
    pages: dict[str, Where] = field(default_factory=dict)

    @staticmethod
    def of(manifest: Manifest) -> Known:
        """Only chunks that stand alone: a reference to one that leans on another would need its bases too."""
        known = Known()
        for view in manifest.views:
            for index in range(len(view.layout.chunks)):
                spot = view.spot(index)
                if spot.base == NO_BASE:
                    known.chunks[view.hashes[index].tobytes()] = spot
            for page in (*view.part.tree, *view.part.values, *view.part.chunks):
                known.pages[page.blake3] = page
        return known


@dataclass
class Stored:
    """A part that is durable: its content and place, every pack it leans on, the packs that are new."""

    content: str
    where: Where
    needs: set[PackName]
    new: list[tuple[PackName, int]]
    raw_bytes: int
    changed: bool
    """Whether any byte but the random state differs from what was known; true where there is no other."""
    known: Known

    @property
    def stored_bytes(self) -> int:
        return sum(length for _, length in self.new)


@dataclass(frozen=True)
class _Encoded:
    hash: bytes
    known: Spot | None
    codec: int
    pieces: list[Any]


class PartWriter:
    """Writes the part of one rank for one save."""

    def __init__(self, vault: RunVault, term: Term, known: Known, pool: Pool) -> None:
        self._vault, self._known, self._pool = vault, known, pool
        self._settings = vault.settings
        # Weights and optimizer state never share a pack, so that thinning frees whole files.
        self._optimizer, self._main, self._manifest = (
            PackWriter(vault.storage, vault.folder, term.writer, term.next_pack, vault.seam, vault.settings, limit)
            for limit in (vault.settings.pack_bytes_max, vault.settings.pack_bytes_max, MANIFEST_BYTES_MAX)
        )
        self._next = Known()

    def write(self, snapshot: Snapshot, rank: int) -> None:
        """Stores the chunks; the pages of the manifest wait for `close`."""
        self._hashes, slots, self._changed = self._write_chunks(snapshot)
        self._optimizer.flush()
        self._main.flush()
        spots = [self._settle(hash, slot) for hash, slot in zip(self._hashes, slots)]
        self._part = self._draft_part(snapshot, rank, spots)
        self._where = self.page(msgspec.json.encode(self._part))
        self._raw = sum(chunk.nbytes for chunk in snapshot.layout.chunks)

    @property
    def content(self) -> str:
        """BLAKE3 over what the part holds: equal for equal states."""
        return content_of(self._part.logical)

    @property
    def where(self) -> Where:
        """The part's document; still without a pack's name before `close`."""
        return self._where

    @property
    def write_seconds(self) -> float:
        """Spent in the storage so far."""
        return self._optimizer.seconds + self._main.seconds + self._manifest.seconds

    def page(self, body: bytes | memoryview) -> Where:
        """Adds a page to the manifest's pack, or answers where an equal one lies already."""
        data = np.frombuffer(body, np.uint8)
        hash = blake3(data).hexdigest()
        if hash in self._known.pages:
            self._next.pages[hash] = self._known.pages[hash]
            return self._known.pages[hash]
        s = self._settings
        codec, pieces = codecs.encode(data, "|u1", s.zstd_level, s.sample_bytes, s.worth_ratio)
        slot = self._manifest.add(pieces)
        return Where(HERE, 0, slot.offset, slot.length, data.nbytes, codec, hash)

    def close(self) -> Stored:
        """Stores the manifest's pack; from here on every name is known."""
        self._manifest.flush()
        here = self._manifest.stored[-1][0]
        pages = (*self._part.tree, *self._part.values, *self._part.chunks, *self._part.spots, self._where)
        placed = [settle(page, here) for page in pages]
        needs = {PackName(*name) for name in self._part.packs}
        needs |= {PackName(page.writer, page.number) for page in placed}
        self._next.pages.update({page.blake3: page for page in placed})
        new = [*self._optimizer.stored, *self._main.stored, *self._manifest.stored]
        return Stored(self.content, placed[-1], needs, new, self._raw, self._changed, self._next)

    # chunks

    def _write_chunks(self, snapshot: Snapshot) -> tuple[list[bytes], list[Slot | Spot], bool]:
        roles = [snapshot.layout.streams[chunk.stream].role for chunk in snapshot.layout.chunks]
        hashes: list[bytes] = []
        slots: list[Slot | Spot] = []
        self._fresh: dict[bytes, Slot] = {}
        self._codecs: dict[bytes, int] = {}
        self._whole = True
        changed = all(stream.role == "rng" or not stream.nbytes for stream in snapshot.layout.streams)
        encoded = self._pool.map(lambda i: self._encode(snapshot, i), range(len(roles)), 2 * self._settings.workers)
        # One thread stores, in order, while the others encode the next pack.
        ahead = 1 + self._settings.pack_bytes_max * len(roles) // max(snapshot.layout.nbytes, 1)
        with closing(self._vault.seam.pool(1, "everystep-store")) as storing:
            for found, role, slot in storing.map(self._store, zip(encoded, roles), ahead):
                hashes.append(found.hash)
                slots.append(slot)
                changed = changed or (found.known is None and role != "rng")
        return hashes, slots, changed

    def _store(self, item: tuple[_Encoded, str]) -> tuple[_Encoded, str, Slot | Spot]:
        """Adds a chunk to its pack, once for all that are equal; in the storing thread."""
        found, role = item
        if found.known is not None:
            return found, role, found.known
        if not self._whole:
            raise StorageError("a chunk before this one was not stored", where=self._vault.where)
        if found.hash not in self._fresh:
            self._whole = False
            packs = self._optimizer if role == "optimizer" else self._main
            self._fresh[found.hash] = packs.add(found.pieces)
            self._codecs[found.hash] = found.codec
            self._whole = True
        return found, role, self._fresh[found.hash]

    def _encode(self, snapshot: Snapshot, index: int) -> _Encoded:
        data = snapshot.chunk(index)
        hash = blake3(data).digest()
        known = self._known.chunks.get(hash)
        if known is not None:
            return _Encoded(hash, known, 0, [])
        dtype = snapshot.layout.streams[snapshot.layout.chunks[index].stream].dtype
        s = self._settings
        return _Encoded(hash, None, *codecs.encode(data, dtype, s.zstd_level, s.sample_bytes, s.worth_ratio))

    def _settle(self, hash: bytes, slot: Slot | Spot) -> Spot:
        """The place of a chunk, now that its pack has a name."""
        spot = slot if isinstance(slot, Spot) else Spot(slot.name, slot.offset, slot.length, self._codecs[hash])
        self._next.chunks[hash] = spot
        return spot

    # the manifest

    def _draft_part(self, snapshot: Snapshot, rank: int, spots: list[Spot]) -> Part:
        packs = list(dict.fromkeys(spot.pack for spot in spots))
        number = {pack: index for index, pack in enumerate(packs)}
        table = np.array([(number[s.pack], s.offset, s.length, s.codec, s.depth, s.base) for s in spots], SPOT)
        tree = self.page(tree_page(snapshot.tree))
        values = self.page(values_page(snapshot.tree))
        chunks = [self.page(page) for page in pages(b"".join(self._hashes), HASH_BYTES)]
        places = [self.page(page) for page in pages(table.tobytes(), SPOT.itemsize)]
        logical = Logical(
            rank, self._settings.chunk_bytes_max, self._settings.small_leaf_bytes,
            tree.blake3, values.blake3, [page.blake3 for page in chunks], len(spots),
        )  # fmt: skip
        return Part(logical, [(pack.writer, pack.number) for pack in packs], [tree], [values], chunks, places)
