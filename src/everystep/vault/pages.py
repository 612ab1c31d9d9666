"""Pages of manifests read back: what lies together in one piece, pieces at once, every page held against its hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from blake3 import blake3

from everystep import codecs
from everystep.errors import Damaged
from everystep.seam import Seam
from everystep.vault.names import PackName, pack_key
from everystep.vault.record import Where
from everystep.vault.together import together

PAGE_BYTES_MAX = 1 << 28
PIECE_BYTES_MAX = 16 << 20
GAP_BYTES_MAX = 64 << 10


class _Piece(NamedTuple):
    """Bytes [start, stop) of a pack."""

    pack: PackName
    start: int
    stop: int


class Pages:
    """Reads pages of one run. What was read ahead is kept, so it is made for one manifest and let go with it."""

    def __init__(self, storage: Any, folder: str, seam: Seam) -> None:
        self._storage, self._folder, self._seam = storage, folder, seam
        self._held: dict[PackName, list[tuple[int, memoryview]]] = {}

    def ahead(self, pages: Iterable[Where], *, before: int = 0) -> None:
        """Reads what will be asked for, in few requests.

        Args:
            before: as many bytes in front of each page, too.
        """
        unread = {page for page in pages if _possible(page) and self._find(page) is None}
        pieces = list(_coalesce(sorted(_piece(page, before) for page in unread)))
        for piece, data in zip(pieces, together(self._storage, self._seam, self._get, pieces)):
            self._held.setdefault(piece.pack, []).append((piece.start, data))

    def fetch(self, pages: Sequence[Where], where: str) -> bytes:
        """The plain bytes of pages, one behind the other, each checked against its BLAKE3."""
        out = bytearray()
        for page in pages:
            if not _possible(page):
                raise Damaged("a manifest page of an impossible size", where=where, do="run fsck")
            stored = self._find(page)
            if stored is None:
                stored = self._get(_piece(page, 0))
            out += check_page(page, stored, f"{self._storage.url}/{pack_key(self._folder, _pack(page))}")
        return bytes(out)

    def _find(self, page: Where) -> memoryview | None:
        for start, data in self._held.get(_pack(page), ()):
            if start <= page.offset and page.offset + page.length <= start + len(data):
                return data[page.offset - start : page.offset - start + page.length]
        return None

    def _get(self, piece: _Piece) -> memoryview:
        return memoryview(self._storage.get(pack_key(self._folder, piece.pack), piece.start, piece.stop))


def check_page(page: Where, stored: memoryview, where: str) -> bytes:
    """The plain bytes of a page.

    Raises:
        Damaged: if they are not those with its BLAKE3.
    """
    data = codecs.decode(page.codec, stored, page.nbytes)
    if blake3(data).hexdigest() != page.blake3:
        raise Damaged("a manifest page is damaged", where=where, do="run fsck")
    return bytes(memoryview(data))


def _pack(page: Where) -> PackName:
    return PackName(page.writer, page.number)


def _possible(page: Where) -> bool:
    return page.offset >= 0 and 0 <= page.length <= PAGE_BYTES_MAX and 0 <= page.nbytes <= PAGE_BYTES_MAX


def _piece(page: Where, before: int) -> _Piece:
    return _Piece(_pack(page), max(0, page.offset - before), page.offset + page.length)


def _coalesce(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Sorted pieces as fewer: those that touch, or nearly, in one, unless that would be too long."""
    run: _Piece | None = None
    for piece in pieces:
        near = run is not None and piece.pack == run.pack and piece.start - run.stop <= GAP_BYTES_MAX
        if run is not None and near and max(run.stop, piece.stop) - run.start <= PIECE_BYTES_MAX:
            run = run._replace(stop=max(run.stop, piece.stop))
            continue
        if run is not None:
            yield run
        run = piece
    if run is not None:
        yield run
