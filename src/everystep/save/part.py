"""Encode and write one rank's part: chunks into packs, then the manifest pages that say where they went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from everystep import codecs
from everystep.errors import Damaged
from everystep.save.arena import Array
from everystep.save.bases import Base, Leaning
from everystep.save.snapshot import Snapshot
from everystep.seam import Pool
from everystep.vault import Manifest, PackName, PackWriter, RunVault, Spot, Term, Uploads
from everystep.vault.manifest import (
    HASH_BYTES,
    HERE,
    NO_BASE,
    SPOT,
    Logical,
    Placement,
    logical_hash,
    moved,
    pack_halves,
    pages,
    settle,
    settle_all,
    tree_page,
    values_page,
)
from everystep.vault.packs import Slot
from everystep.vault.pages import check_page
from everystep.vault.record import Where

MANIFEST_BYTES_MAX = 1 << 30
LONE_PAGE_BYTES = 4 << 10
"""Where every request takes its time, a page up to this length is written again rather than left alone in an older
pack: reading it there would be a request more."""
ALONE = Leaning()


@dataclass
class Known:
    """What a checkpoint holds, by hash: a chunk or page that is known is referenced, not written again."""

    chunks: dict[bytes, Spot] = field(default_factory=dict)
    pages: dict[str, Where] = field(default_factory=dict)

    @staticmethod
    def of(manifest: Manifest) -> Known:
        """Everything that a checkpoint's manifest lists."""
        known = Known()
        for view in manifest.views:
            for index in range(len(view.layout.chunks)):
                spot = view.spot(index)
                known.chunks[spot.hash] = spot
            for page in (*view.placement.tree, *view.placement.values, *view.placement.chunks):
                known.pages[page.blake3] = page
        return known


@dataclass
class Stored:
    """A part that is durable: its content and place, every pack it leans on, the packs that are new."""

    content: str
    where: Where
    needs: set[PackName]
    optimizer: set[PackName]
    """Those of `needs` that nothing but the optimizer state leans on."""
    new: list[tuple[PackName, int]]
    raw_bytes: int
    changed: bool
    """Whether any byte but the random state differs from what was known; true where there is no other."""
    known: Known
    spots: list[Spot]
    """Where each chunk lies."""
    pages: bytes | None = None
    """What would be the pack of its manifest, if another is to store it: places in it name no pack."""

    @property
    def stored_bytes(self) -> int:
        return sum(length for _, length in self.new)


@dataclass(frozen=True)
class _Form:
    """A chunk as it is stored."""

    codec: int
    pieces: list[Any]
    base: Spot | None


@dataclass
class _Encoded:
    """A chunk on its way into a pack, or, if it is known, where it lies already.

    What is written is let go: an attempt that failed is repeated with what `again` encodes, of the same snapshot. So
    what a save holds does not grow with the packs that it fills.
    """

    hash: bytes
    known: Spot | None = None
    form: _Form | None = None
    again: Callable[[], _Form] | None = None
    slot: Slot | None = None
    codec: int = codecs.RAW
    base: Spot | None = None

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.form.pieces)) if self.form is not None else 0

    def pieces(self) -> list[Any]:
        assert self.again is not None
        form, self.form = self.form or self.again(), None
        self.codec, self.base = form.codec, form.base
        return form.pieces

    def spot(self) -> Spot:
        """Its place, once the pack that it lies in has a name."""
        if self.known is not None:
            return self.known
        assert self.slot is not None
        return Spot(self.slot.name, self.slot.offset, self.slot.length, self.codec, self.hash, self.base)


class _Coming:
    """The encoded chunks as they come: those that lie nowhere yet go on, each once."""

    def __init__(self, encoded: Iterator[tuple[int, _Encoded]]) -> None:
        self._encoded = encoded
        self._first: dict[bytes, _Encoded] = {}
        self.found: dict[int, _Encoded] = {}
        """By the number of the chunk."""

    def up_to(self, count: int) -> Iterator[_Encoded]:
        while len(self.found) < count:
            index, one = next(self._encoded)
            self.found[index] = first = self._first.setdefault(one.hash, one)
            if first is one and one.known is None:
                yield one


class PartWriter:
    """Writes the part of one rank for one save.

    Args:
        window: chunks that are encoded, or wait for the storage, at once.
        uploads: packs that are on their way to a place at once, where it can use that.
    """

    def __init__(
        self,
        vault: RunVault,
        term: Term,
        known: Known,
        pool: Pool,
        window: int,
        base: Base | None = None,
        leaning: Leaning = ALONE,
        uploads: int = 1,
    ) -> None:
        self._vault, self._known, self._pool, self._window = vault, known, pool, window
        self._base, self._leaning = base, leaning
        # What stood still leans on the anchor before: to refer to it would pin that one, and all before it.
        self._is_anchor = leaning.anchored and base is None
        self._settings = vault.settings
        self._uploads, self._sent_seconds = min(uploads, vault.storage.fan_out), 0.0
        # Weights and optimizer state never share a pack, so that thinning frees whole files.
        self._optimizer, self._main, self._manifest = (
            PackWriter(vault.storage, vault.folder, term.writer, term.next_pack, vault.seam, vault.settings, limit)
            for limit in (vault.settings.pack_bytes_max, vault.settings.pack_bytes_max, MANIFEST_BYTES_MAX)
        )
        self._lone_bytes = LONE_PAGE_BYTES if vault.storage.fan_out > 1 else 0
        self._next = Known()
        self._adopted: list[Where] = []

    def write(self, snapshot: Snapshot, rank: int) -> None:
        """Stores the chunks; the pages of the manifest wait for `close`."""
        self._spots = self._write_chunks(snapshot)
        self._next.chunks.update({spot.hash: spot for spot in self._spots})
        logical = self._draft_part(snapshot, rank)
        document = pack_halves(logical, self._placement)
        self._content = logical_hash(document)
        self._where = self.page(document)
        self._raw = sum(chunk.nbytes for chunk in snapshot.layout.chunks)

    @property
    def content(self) -> str:
        """BLAKE3 over what the part holds: equal for equal states."""
        return self._content

    @property
    def where(self) -> Where:
        """The part's document; still without a pack's name before `close`."""
        return self._where

    @property
    def write_seconds(self) -> float:
        """Spent in the storage so far."""
        return self._optimizer.seconds + self._main.seconds + self._manifest.seconds + self._sent_seconds

    def page(self, body: bytes | memoryview) -> Where:
        """Adds a page to the manifest's pack, or answers where an equal one lies already."""
        hash = blake3(body).hexdigest()
        known = self._known.pages.get(hash)
        if known is None or known.length <= self._lone_bytes:
            return self._manifest.add_page(body, hash)[0]
        self._next.pages[hash] = known
        return known

    def adopt(self, content: str, document: Where, pages: bytes, where: str) -> Where:
        """Takes the manifest of another rank's part, which that one has not stored, into this one's.

        Args:
            content: of that part.
            document: where it lies in `pages`.

        Returns:
            Where its document lies now; still without a pack's name.

        Raises:
            Damaged: if it is not whole.
        """

        def carry(page: Where) -> Where:
            if page.writer != HERE:
                return page
            stored = memoryview(pages)[page.offset : page.offset + page.length]
            check_page(page, stored, where)
            known = self._known.pages.get(page.blake3)
            if known is not None and known.length > self._lone_bytes:
                return known
            return msgspec.structs.replace(page, offset=self._manifest.add([stored]).offset)

        if document.writer != HERE:
            return document
        body = check_page(document, memoryview(pages)[document.offset : document.offset + document.length], where)
        if logical_hash(body) != content:
            raise Damaged("a part is not the one that its receipt names", where=where, do="save again")
        placed, places = moved(body, carry, where)
        at = self.page(placed)
        self._adopted += [*places, at]
        return at

    def close(self, *, hand_over: int = 0) -> Stored:
        """Stores the manifest's pack; from here on every name is known.

        Args:
            hand_over: a manifest of at most as many bytes is not stored, but handed to another that does it.
        """
        pages = self._manifest.take(hand_over) if hand_over else None
        if pages is None:
            self._manifest.flush()
        here = self._manifest.stored[-1][0] if self._manifest.stored else PackName(HERE, 0)
        placed = [*settle_all(self._placement, here).pages(), settle(self._where, here)]
        named = [page for page in (*placed, *(settle(page, here) for page in self._adopted)) if page.writer != HERE]
        manifest = {PackName(page.writer, page.number) for page in named}
        roles: dict[bool, set[PackName]] = {True: set(), False: set()}
        for role, spot in zip(self._roles, self._spots):
            roles[role == "optimizer"].update(link.pack for link in spot.links())
        needs = roles[True] | roles[False] | manifest
        optimizer = roles[True] - roles[False] - manifest
        self._next.pages.update({page.blake3: page for page in named})
        new = [*self._optimizer.stored, *self._main.stored, *self._manifest.stored]
        return Stored(
            self.content, placed[-1], needs, optimizer, new, self._raw, self._changed, self._next, self._spots, pages
        )

    # chunks

    def _write_chunks(self, snapshot: Snapshot) -> list[Spot]:
        """Where each chunk lies. Other threads encode what comes next while this one writes what is there."""
        streams, chunks = snapshot.layout.streams, snapshot.layout.chunks
        roles = self._roles = [streams[chunk.stream].role for chunk in chunks]
        order = sorted(range(len(roles)), key=lambda index: roles[index] != "optimizer")
        with closing(self._pool.map(lambda i: self._encode(snapshot, i), order, self._window)) as encoded:
            coming = _Coming(zip(order, encoded))
            with self._sending(snapshot.layout.nbytes) as uploads:
                self._optimizer.store(coming.up_to(roles.count("optimizer")), uploads)
                self._main.store(coming.up_to(len(roles)), uploads)
        found = coming.found
        new = any(one.known is None and roles[index] != "rng" for index, one in found.items())
        self._changed = new or all(stream.role == "rng" or not stream.nbytes for stream in streams)
        return [found[index].spot() for index in range(len(roles))]

    @contextmanager
    def _sending(self, nbytes: int) -> Iterator[Uploads | None]:
        """For a place that takes several packs at once; all have arrived when it is left."""
        if self._uploads == 1:
            yield None
            return
        with closing(Uploads(self._vault.seam, self._settings, self._uploads, nbytes)) as uploads:
            yield uploads
            uploads.finish()
            self._sent_seconds += uploads.seconds

    def _encode(self, snapshot: Snapshot, index: int) -> _Encoded:
        hash, data = snapshot.hash_of(index), None
        if hash is None:
            data = snapshot.chunk(index)
            hash = blake3(data).digest()
            snapshot.note_hash(index, hash)
        known = self._known.chunks.get(hash)
        if known is not None and not (self._is_anchor and known.base is not None):
            return _Encoded(hash, known)
        return _Encoded(hash, None, self._form(snapshot, index, data), lambda: self._form(snapshot, index))

    def _form(self, snapshot: Snapshot, index: int, data: Array | None = None) -> _Form:
        data = snapshot.chunk(index) if data is None else data
        stream = snapshot.layout.streams[snapshot.layout.chunks[index].stream]
        ratio = self._leaning.ratios.get(stream.role)
        s = self._settings
        found = (
            self._base.chunk(index, max(s.base_depth_max, s.base_depth_small))
            if self._base is not None and ratio is not None
            else None
        )
        base, old = found if found is not None else (None, None)
        codec, pieces = codecs.encode(
            data, stream.dtype, s.zstd_level, s.sample_bytes, s.worth_ratio, old, ratio or 0.0
        )
        return _Form(codec, pieces, base if codec in codecs.LEANING else None)

    # the manifest

    def _draft_part(self, snapshot: Snapshot, rank: int) -> Logical:
        bases: dict[tuple[PackName, int], tuple[int, Spot]] = {}
        for spot in self._spots:
            for link in spot.base.links() if spot.base is not None else ():
                bases.setdefault((link.pack, link.offset), (len(bases), link))
        links = [link for _, link in bases.values()]
        packs = list(dict.fromkeys(spot.pack for spot in (*self._spots, *links)))
        number = {pack: index for index, pack in enumerate(packs)}

        def rows(spots: list[Spot]) -> list[Where]:
            table = [
                (
                    number[s.pack], s.offset, s.length, s.codec, s.depth,
                    bases[s.base.pack, s.base.offset][0] if s.base is not None else NO_BASE,
                )
                for s in spots
            ]  # fmt: skip
            return self._pages(np.array(table, SPOT).tobytes(), SPOT.itemsize)

        tree = self.page(tree_page(snapshot.tree))
        values = self.page(values_page(snapshot.tree))
        chunks = self._pages(b"".join(spot.hash for spot in self._spots), HASH_BYTES)
        self._placement = Placement(
            [(pack.writer, pack.number) for pack in packs], [tree], [values], chunks, rows(self._spots), rows(links),
            self._pages(b"".join(link.hash for link in links), HASH_BYTES),
        )  # fmt: skip
        return Logical(
            rank, self._settings.chunk_bytes_max, self._settings.small_leaf_bytes,
            tree.blake3, values.blake3, [page.blake3 for page in chunks], len(self._spots),
        )  # fmt: skip

    def _pages(self, table: bytes, entry: int) -> list[Where]:
        return [self.page(page) for page in pages(table, entry)]
