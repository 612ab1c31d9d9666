"""The manifest of a checkpoint: what it holds (logical, hashed into one root) and where the bytes lie (placement)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from blake3 import blake3

from everystep.errors import Damaged, NewerFormat
from everystep.schema import Box, Layout, Leaf, Tree, lay_out, paths_of
from everystep.schema.dtype import parse
from everystep.settings import FORMAT
from everystep.vault.lines import parse_json
from everystep.vault.names import PackName
from everystep.vault.record import Commit, Where

HASH_BYTES = 32
HERE = ""  # instead of a writer: the pack that holds the document which names it
NO_BASE = 0xFFFFFFFF
SPOT = np.dtype(
    [("pack", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("codec", "u1"), ("depth", "u1"), ("base", "<u4")]
)
PAGE_ENTRIES = 4096
BEFORE_BYTES = 64 << 10
"""Read in front of a document: its pages were written before it, so that a small manifest is one request."""
_PAGES = ("tree", "values", "chunks", "spots", "bases", "base_hashes")
Array = np.ndarray[Any, Any]
T = TypeVar("T")
R = TypeVar("R")


DEPTH_MAX = 64
"""Longest chain of bases that is followed; the writer keeps far below."""


class Spot(NamedTuple):
    """Where a chunk lies, the BLAKE3 of its plain bytes, and the chunk of equal length that it is encoded against."""

    pack: PackName
    offset: int
    length: int
    codec: int
    hash: bytes
    base: Spot | None = None

    @property
    def depth(self) -> int:
        """Bases behind it."""
        return 0 if self.base is None else 1 + self.base.depth

    def links(self) -> Iterator[Spot]:
        """The chunk itself, its base, the base's base …"""
        at: Spot | None = self
        while at is not None:
            yield at
            at = at.base


class Logical(msgspec.Struct, frozen=True):
    """What a part holds, by hashes. Everything here is signed and verified; nothing here says where it lies."""

    rank: int
    chunk_bytes_max: int
    small_leaf_bytes: int
    tree: str
    values: str
    chunks: list[str]
    count: int


class Placement(msgspec.Struct, frozen=True):
    """Where a part's pages lie. `bases` and `base_hashes` are tables like `spots` and `chunks`, of chunks that are no
    part of the checkpoint and that chunks of it are encoded against."""

    packs: list[tuple[str, int]]
    tree: list[Where]
    values: list[Where]
    chunks: list[Where]
    spots: list[Where]
    bases: list[Where]
    base_hashes: list[Where]

    def pages(self) -> list[Where]:
        lists = (self.tree, self.values, self.chunks, self.spots, self.bases, self.base_hashes)
        return [page for pages in lists for page in pages]


class Root(msgspec.Struct, frozen=True):
    """The root of a manifest: its first line, of which the commit event holds the hash."""

    format: int
    checkpoint: str
    step: int
    parent: str | None
    metrics: dict[str, Any]
    parts: list[tuple[int, str]]
    """(rank, BLAKE3 of the first line of the rank's part)."""


class _LeafRow(msgspec.Struct, array_like=True, frozen=True):
    path: str
    dtype: str
    shape: list[int]
    role: str
    kind: str
    boxes: list[tuple[list[int], list[int], bool]]


class _TreePage(msgspec.Struct, frozen=True):
    nodes: list[list[Any]]
    leaves: list[_LeafRow]


def pack_halves(logical: Any, placement: Any) -> bytes:
    """A document of two lines: what holds wherever the bytes lie, and where they lie now."""
    return msgspec.json.encode(logical) + b"\n" + msgspec.json.encode(placement)


def logical_hash(document: bytes) -> str:
    """BLAKE3 of the first line: the half that is vouched for."""
    return blake3(document.partition(b"\n")[0]).hexdigest()


def tree_page(tree: Tree) -> bytes:
    rows = [
        _LeafRow(
            leaf.path, leaf.dtype, list(leaf.shape), leaf.role, leaf.kind,
            [(list(box.start), list(box.shape), box.flat) for box in leaf.boxes],
        )
        for leaf in tree.leaves
    ]  # fmt: skip
    return msgspec.json.encode(_TreePage(tree.nodes, rows))


def values_page(tree: Tree) -> bytes:
    return msgspec.json.encode(tree.values)


def parse_tree(tree: bytes, values: bytes, where: str) -> Tree:
    page = parse_json(tree, _TreePage, where)
    leaves = [
        Leaf(
            row.path, row.dtype, tuple(row.shape), row.role, row.kind,
            tuple(Box(tuple(start), tuple(shape), flat) for start, shape, flat in row.boxes),
        )
        for row in page.leaves
    ]  # fmt: skip
    for leaf in leaves:
        boxes = leaf.boxes or (Box.whole(leaf.shape),)
        if any(n < 0 for n in leaf.shape) or not all(box.fits(leaf.shape) for box in boxes):
            raise Damaged("a leaf with an impossible shape or box", where=f"{where}: {leaf.path}", do="run fsck")
    return Tree(page.nodes, parse_json(values, list[Any], where), leaves)


@dataclass(frozen=True)
class PartView:
    """One rank's part, read and verified: its tree, how its leaves lie, the hash and the place of every chunk."""

    rank: int
    placement: Placement
    tree: Tree
    layout: Layout
    hashes: np.ndarray[Any, Any]
    """BLAKE3 of every chunk, shape (chunks, 32), uint8."""
    spots: np.ndarray[Any, Any]
    """SPOT per chunk."""
    bases: np.ndarray[Any, Any]
    """SPOT per chunk that only serves as a base."""
    base_hashes: np.ndarray[Any, Any]
    _linked: dict[int, Spot] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def paths(self) -> dict[str, tuple[int, int]]:
        """Path -> its node, and the one behind its last descendant."""
        return {path: (start, end) for path, start, end in paths_of(self.tree)}

    def there(self, *, thin: bool) -> list[int]:
        """The chunks that are still there: of a thinned checkpoint, those without optimizer state."""
        streams, chunks = self.layout.streams, self.layout.chunks
        return [i for i, chunk in enumerate(chunks) if not thin or streams[chunk.stream].role != "optimizer"]

    def spot(self, index: int) -> Spot:
        """Where a chunk lies, with all that it leans on."""
        return self._link(self.spots[index], self.hashes[index].tobytes())

    def _link(self, row: np.void, hash: bytes) -> Spot:
        pack, offset, length, codec, depth, base = row.item()
        if pack >= len(self.placement.packs):
            raise Damaged("a chunk points to a pack that its manifest does not list", do="run fsck")
        if depth > DEPTH_MAX or (base == NO_BASE) != (depth == 0) or (depth and base >= len(self.bases)):
            raise Damaged("a chunk leans on a base that its manifest does not list", do="run fsck")
        return Spot(
            PackName(*self.placement.packs[pack]), offset, length, codec, hash,
            self._base(base, depth - 1) if depth else None,
        )  # fmt: skip

    def _base(self, index: int, depth: int) -> Spot:
        """Each base has one link less behind it than what leans on it: no chain has an end of its own in front."""
        row = self.bases[index]
        if row["depth"] != depth:
            raise Damaged("a chain of bases of another length than its manifest says", do="run fsck")
        if index not in self._linked:
            self._linked[index] = self._link(row, self.base_hashes[index].tobytes())
        return self._linked[index]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's manifest, read and verified down to the hash of every chunk."""

    root: Root
    views: tuple[PartView, ...]
    parts: tuple[Where, ...] = ()
    """Where the ranks' parts lie."""

    @cached_property
    def raw_bytes(self) -> int:
        return sum(chunk.nbytes for view in self.views for chunk in view.layout.chunks)


Fetch = Callable[[list[Where], str], bytes]


class Ahead(Protocol):
    """Told which pages will be asked for, and that `before` bytes in front of each may be, too."""

    def __call__(self, pages: Iterable[Where], *, before: int = 0) -> None: ...


def _one_by_one(pages: Iterable[Where], *, before: int = 0) -> None:
    return


def read_manifest(commit: Commit, fetch: Fetch, where: str, ahead: Ahead = _one_by_one) -> Manifest:
    """Reads a manifest through `fetch`, which answers the plain bytes of pages after checking their BLAKE3.

    Raises:
        Damaged: if anything in it is not what the commit event vouches for.
    """
    ahead([commit.root], before=BEFORE_BYTES)
    document = fetch([commit.root], where)
    root, parts = _halves(document, Root, list[Where], where)
    if root.format > FORMAT:
        raise NewerFormat(
            f"a checkpoint of format {root.format}; this everystep reads up to {FORMAT}",
            where=where,
            do="update everystep: pip install -U everystep",
        )
    told = (root.checkpoint, root.step, root.parent, root.metrics)
    meant = (commit.id, commit.step, commit.parent, commit.metrics)
    if logical_hash(document) != commit.logical or told != meant or len(parts) != len(root.parts):
        raise Damaged("the manifest is not the one that was committed", where=where, do="run fsck")
    here = PackName(commit.root.writer, commit.root.number)
    places = tuple(settle(part, here) for part in parts)
    ahead(places, before=BEFORE_BYTES)
    told_parts = [
        _read_half(rank, content, part, fetch, f"{where} rank {rank}")
        for (rank, content), part in zip(root.parts, places)
    ]
    ahead([page for _, placement in told_parts for page in placement.pages()])
    views = tuple(
        _read_part(logical, placement, fetch, f"{where} rank {logical.rank}") for logical, placement in told_parts
    )
    return Manifest(root, views, places)


def _halves(document: bytes, logical: type[T], placement: type[R], where: str) -> tuple[T, R]:
    first, _, second = document.partition(b"\n")
    return parse_json(first, logical, where), parse_json(second, placement, where)


def settle(page: Where, here: PackName) -> Where:
    """A page's place with its pack's name."""
    return page if page.writer != HERE else msgspec.structs.replace(page, writer=here.writer, number=here.number)


def settle_all(placement: Placement, here: PackName) -> Placement:
    """A part's placement with every page's pack named."""
    named = {name: [settle(page, here) for page in getattr(placement, name)] for name in _PAGES}
    return msgspec.structs.replace(placement, **named)


def moved(document: bytes, move: Callable[[Where], Where], where: str) -> tuple[bytes, list[Where]]:
    """A part's document with its pages at other places, and those places."""
    first, _, second = document.partition(b"\n")
    placement = parse_json(second, Placement, where)
    placed = {name: [move(page) for page in getattr(placement, name)] for name in _PAGES}
    placement = msgspec.structs.replace(placement, **placed)
    return pack_halves(msgspec.Raw(first), placement), placement.pages()


def _read_half(rank: int, content: str, at: Where, fetch: Fetch, where: str) -> tuple[Logical, Placement]:
    """A part's document: what it holds, and where its pages lie."""
    document = fetch([at], where)
    logical, placement = _halves(document, Logical, Placement, where)
    placement = settle_all(placement, PackName(at.writer, at.number))
    if logical_hash(document) != content or logical.rank != rank:
        raise Damaged("a part is not the one that was committed", where=where, do="run fsck")
    promised = ([logical.tree], [logical.values], logical.chunks)
    for meant, pages in zip(promised, (placement.tree, placement.values, placement.chunks)):
        if [page.blake3 for page in pages] != meant:
            raise Damaged("a part's pages are not the ones that were committed", where=where, do="run fsck")
    return logical, placement


def _read_part(logical: Logical, placement: Placement, fetch: Fetch, where: str) -> PartView:
    tree = parse_tree(fetch(placement.tree, where), fetch(placement.values, where), where)
    _check_count(tree, logical, where)
    layout = lay_out(tree.leaves, logical.chunk_bytes_max, logical.small_leaf_bytes)
    hashes, spots = _table(fetch, placement.chunks, placement.spots, where)
    if not len(layout.chunks) == logical.count == len(spots):
        raise Damaged("a part lists more or fewer chunks than its leaves have", where=where, do="run fsck")
    base_hashes, bases = _table(fetch, placement.base_hashes, placement.bases, where)
    return PartView(logical.rank, placement, tree, layout, hashes, spots, bases, base_hashes)


def _table(fetch: Fetch, hashes: list[Where], spots: list[Where], where: str) -> tuple[Array, Array]:
    """Hashes, shape (chunks, 32), and the spots of as many chunks."""
    first, second = fetch(hashes, where), fetch(spots, where)
    if len(first) * SPOT.itemsize != len(second) * HASH_BYTES or len(first) % HASH_BYTES:
        raise Damaged("a part has other numbers of hashes and of places", where=where, do="run fsck")
    return np.frombuffer(first, np.uint8).reshape(-1, HASH_BYTES), np.frombuffer(second, SPOT)


def _check_count(tree: Tree, logical: Logical, where: str) -> None:
    """Before anything is made from the shapes: they may not ask for more chunks than the part says it has."""
    total = 0
    for leaf in tree.leaves:
        itemsize = parse(leaf.dtype).itemsize
        total += sum(box.size * itemsize for box in leaf.boxes or (Box.whole(leaf.shape),))
    if not 4096 <= logical.chunk_bytes_max <= 1 << 30 or total // logical.chunk_bytes_max > logical.count:
        raise Damaged("a part's leaves do not fit its number of chunks", where=where, do="run fsck")


def pages(data: bytes, entry: int) -> Iterator[memoryview]:
    """A table cut into pages of PAGE_ENTRIES entries, so that pages that stand still can be shared."""
    view = memoryview(data)
    step = PAGE_ENTRIES * entry
    for start in range(0, len(view), step):
        yield view[start : start + step]
