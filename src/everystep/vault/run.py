"""One run in a repository: its log, the term a process holds in it, and verified reading of pages and chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from everystep import codecs
from everystep.errors import Damaged
from everystep.seam import Pool
from everystep.vault.history import Committed, History
from everystep.vault.log import Log, OpenTerm
from everystep.vault.manifest import Manifest, PartView, Spot, read_manifest
from everystep.vault.names import PackName, pack_key, run_folder
from everystep.vault.place import Place
from everystep.vault.record import Open, Where

Array = np.ndarray[Any, Any]
READ_BYTES_MAX = 16 << 20
# Below that a request of its own costs more than another thread gains.
READ_BYTES_SHARED = 1 << 20
GAP_BYTES_MAX = 64 << 10
PAGE_BYTES_MAX = 1 << 28


@dataclass
class Term:
    """What a writing process holds: the number and nonce of its term, and the counters behind its names."""

    number: int
    nonce: str
    writer: str
    packs: int = 0
    ordinal: int = 0
    steps: dict[int, tuple[str, str]] = field(default_factory=dict)
    """step -> (content, checkpoint id) of what this term has committed."""

    def next_pack(self) -> int:
        self.packs += 1
        return self.packs - 1


class RunVault:
    """What one run has on disk. Reading never writes; only `open_term` takes the run."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name
        self.storage, self.seam, self.settings = place.storage, place.seam, place.settings
        self.folder = run_folder(name)
        self._log: Log | None = None
        self._held: History | None = None

    @property
    def where(self) -> str:
        return f"{self.storage.url}/{self.folder}".rstrip("/")

    @property
    def author(self) -> str:
        """Who this process is, for the records that it writes."""
        process = self.seam.process()
        return f"{process.host}:{process.pid}"

    @property
    def log(self) -> Log:
        """The run's log; asking for it creates the repository."""
        if self._log is None:
            self._log = Log(self.storage, self.folder, self.place.identity(), self.seam, self.settings)
        return self._log

    def history(self) -> History:
        """The fold of the log as it is now; an empty one where there is no repository yet."""
        if self._held is not None:
            return self._held
        return self.log.refresh() if self.place.exists else History("")

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within it, `history()` is what it was when it began: many questions, one look at the log."""
        self._held = self.history()
        try:
            yield
        finally:
            self._held = None

    def open_term(self, event: Callable[[History], Open], author: str) -> Term:
        """Takes the run: every lower term is fenced from here on."""
        taken: list[OpenTerm] = []

        def decide(history: History) -> list[Any]:
            # A record that cannot be read may have opened a term: stay above it.
            number = history.term + 1 + history.lost
            taken.append(OpenTerm(event(history), number))
            return [taken[-1]]

        self.log.append(decide, author)
        won = taken[-1]
        return Term(won.term, won.event.nonce, f"{self.seam.token(16)}-{won.term}")

    # reading -------------------------------------------------------------------------------------------------------

    def manifest(self, commit: Committed) -> Manifest:
        return read_manifest(commit.event, self.read_pages, f"{self.where} checkpoint {commit.event.id}")

    def read_pages(self, pages: Sequence[Where], where: str) -> bytes:
        """The plain bytes of manifest pages, each checked against its BLAKE3."""
        out = bytearray()
        for page in pages:
            if not 0 <= page.nbytes <= PAGE_BYTES_MAX:
                raise Damaged("a manifest page of an impossible size", where=where, do="run fsck")
            key = pack_key(self.folder, PackName(page.writer, page.number))
            stored = self.storage.get(key, page.offset, page.offset + page.length)
            data = codecs.decode(page.codec, stored, page.nbytes)
            if blake3(data).hexdigest() != page.blake3:
                raise Damaged("a manifest page is damaged", where=f"{self.storage.url}/{key}", do="run fsck")
            out += memoryview(data)
        return bytes(out)

    def read_chunks(self, view: PartView, indices: Sequence[int], pool: Pool) -> Iterator[list[tuple[int, Array]]]:
        """Verified plain bytes of chunks, in groups that lie together and are read in one piece, in parallel."""
        spots = [(view.spot(index), index) for index in indices]
        share = sum(spot.length for spot, _ in spots) // (2 * self.settings.workers)
        limit = min(READ_BYTES_MAX, max(share, READ_BYTES_SHARED))
        groups = list(_coalesce(sorted(spots, key=lambda pair: (pair[0].pack, pair[0].offset)), limit))
        yield from pool.map(lambda group: self._read_group(view, group), groups, 2 * self.settings.workers)

    def read_chunk(self, spot: Spot, nbytes: int) -> Array:
        """The verified plain bytes of one chunk."""
        return self._read_spots([(spot, nbytes)])[0]

    def read_stored(self, wanted: list[tuple[Spot, int]]) -> list[memoryview]:
        """Chunks as they are stored, given with their plain lengths; each is verified as what it decodes to."""
        stored: dict[int, memoryview] = {}
        self._read_spots(wanted, stored)
        return [stored[i] for i in range(len(wanted))]

    def _read_group(self, view: PartView, group: list[tuple[Spot, int]]) -> list[tuple[int, Array]]:
        plain = self._read_spots([(spot, view.layout.chunks[index].nbytes) for spot, index in group])
        return [(index, data) for (_, index), data in zip(group, plain)]

    def _read_spots(self, wanted: list[tuple[Spot, int]], encoded: dict[int, memoryview] | None = None) -> list[Array]:
        """Verified plain bytes of chunks, given with their lengths; what they lean on is read and verified first.

        Args:
            encoded: gets the stored bytes of each, too.
        """
        leaning = [(spot.base, nbytes) for spot, nbytes in wanted if spot.base is not None]
        bases = iter(self._read_spots(leaning) if leaning else [])
        based = [(spot, nbytes, next(bases) if spot.base is not None else None) for spot, nbytes in wanted]
        order = sorted(range(len(based)), key=lambda i: (based[i][0].pack, based[i][0].offset))
        out: dict[int, Array] = {}
        for group in _coalesce([(based[i][0], i) for i in order]):
            first, last = group[0][0], max(spot.offset + spot.length for spot, _ in group)
            stored = self.storage.get(pack_key(self.folder, first.pack), first.offset, last)
            for spot, i in group:
                at = spot.offset - first.offset
                piece = stored[at : at + spot.length]
                out[i] = self._decode(piece, *based[i])
                if encoded is not None:
                    encoded[i] = piece
        return [out[i] for i in range(len(based))]

    def _decode(self, stored: memoryview, spot: Spot, nbytes: int, base: Array | None) -> Array:
        data = codecs.decode(spot.codec, stored, nbytes, base)
        if blake3(data).digest() != spot.hash:
            raise Damaged(
                "a chunk is not what was saved",
                where=f"{self.storage.url}/{pack_key(self.folder, spot.pack)} at {spot.offset}",
                do="run fsck to see which checkpoints are whole, and load one of them",
            )
        return data


def _coalesce(spots: list[tuple[Spot, int]], limit: int = READ_BYTES_MAX) -> Iterator[list[tuple[Spot, int]]]:
    group: list[tuple[Spot, int]] = []
    for spot, index in spots:
        if group:
            first, last = group[0][0], group[-1][0]
            apart = spot.offset - (last.offset + last.length)
            whole = spot.offset + spot.length - first.offset
            if spot.pack != first.pack or apart > GAP_BYTES_MAX or whole > limit:
                yield group
                group = []
        group.append((spot, index))
    if group:
        yield group
