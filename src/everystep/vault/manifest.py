"""The manifest of a checkpoint: what it holds (logical, hashed into one root) and where the bytes lie (placement)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3

from everystep.errors import Damaged, NewerFormat
from everystep.schema import Box, Layout, Leaf, Tree, lay_out
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


class Spot(NamedTuple):
    """Where a chunk lies. `base` is an index into the same part's spots, NO_BASE for none."""

    pack: PackName
    offset: int
    length: int
    codec: int
    depth: int = 0
    base: int = NO_BASE


class Logical(msgspec.Struct, frozen=True):
    """What a part holds, by hashes. Everything here is signed and verified; nothing here says where it lies."""

    rank: int
    chunk_bytes_max: int
    small_leaf_bytes: int
    tree: str
    values: str
    chunks: list[str]
    count: int


class Part(msgspec.Struct, frozen=True):
    """One rank's share of a checkpoint."""

    logical: Logical
    packs: list[tuple[str, int]]
    tree: list[Where]
    values: list[Where]
    chunks: list[Where]
    spots: list[Where]


_PAGES = ("tree", "values", "chunks", "spots")


class RootPart(msgspec.Struct, frozen=True):
    rank: int
    content: str
    part: Where


class Root(msgspec.Struct, frozen=True):
    """The root of a manifest; its logical hash is what the commit event vouches for."""

    format: int
    checkpoint: str
    step: int
    parent: str | None
    metrics: dict[str, Any]
    parts: list[RootPart]


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


def content_of(logical: Logical) -> str:
    """BLAKE3 over what a part holds."""
    return blake3(msgspec.json.encode(logical)).hexdigest()


def logical_of(root: Root) -> str:
    """The Merkle root: BLAKE3 over everything but the placement."""
    parts = [[part.rank, part.content] for part in root.parts]
    body = [root.format, root.checkpoint, root.step, root.parent, root.metrics, parts]
    return blake3(msgspec.json.encode(body)).hexdigest()


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

    part: Part
    tree: Tree
    layout: Layout
    hashes: np.ndarray[Any, Any]
    """BLAKE3 of every chunk, shape (chunks, 32), uint8."""
    spots: np.ndarray[Any, Any]
    """SPOT per chunk, then per chunk that serves as a base only."""

    def spot(self, index: int) -> Spot:
        row = self.spots[index]
        pack = int(row["pack"])
        if pack >= len(self.part.packs):
            raise Damaged("a chunk points to a pack that its manifest does not list", do="run fsck")
        return Spot(
            PackName(*self.part.packs[pack]), int(row["offset"]), int(row["length"]), int(row["codec"]),
            int(row["depth"]), int(row["base"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's manifest, read and verified down to the hash of every chunk."""

    root: Root
    views: tuple[PartView, ...]

    @cached_property
    def raw_bytes(self) -> int:
        return sum(chunk.nbytes for view in self.views for chunk in view.layout.chunks)


Fetch = Callable[[list[Where], str], bytes]


def read_manifest(commit: Commit, fetch: Fetch, where: str) -> Manifest:
    """Reads a manifest through `fetch`, which answers the plain bytes of pages after checking their BLAKE3.

    Raises:
        Damaged: if anything in it is not what the commit event vouches for.
    """
    root = parse_json(fetch([commit.root], where), Root, where)
    if root.format > FORMAT:
        raise NewerFormat(
            f"a checkpoint of format {root.format}; this everystep reads up to {FORMAT}",
            where=where,
            do="update everystep: pip install -U everystep",
        )
    if logical_of(root) != commit.logical or (root.checkpoint, root.step) != (commit.id, commit.step):
        raise Damaged("the manifest is not the one that was committed", where=where, do="run fsck")
    here = PackName(commit.root.writer, commit.root.number)
    views = tuple(_read_part(entry, here, fetch, f"{where} rank {entry.rank}") for entry in root.parts)
    return Manifest(root, views)


def settle(page: Where, here: PackName) -> Where:
    """A page's place with its pack's name."""
    return page if page.writer != HERE else msgspec.structs.replace(page, writer=here.writer, number=here.number)


def _read_part(entry: RootPart, here: PackName, fetch: Fetch, where: str) -> PartView:
    at = settle(entry.part, here)
    part = parse_json(fetch([at], where), Part, where)
    own = PackName(at.writer, at.number)
    part = msgspec.structs.replace(
        part, **{name: [settle(page, own) for page in getattr(part, name)] for name in _PAGES}
    )
    logical = part.logical
    if content_of(logical) != entry.content or logical.rank != entry.rank:
        raise Damaged("a part is not the one that was committed", where=where, do="run fsck")
    for hashes, pages in (([logical.tree], part.tree), ([logical.values], part.values), (logical.chunks, part.chunks)):
        if [page.blake3 for page in pages] != hashes:
            raise Damaged("a part's pages are not the ones that were committed", where=where, do="run fsck")
    tree = parse_tree(fetch(part.tree, where), fetch(part.values, where), where)
    _check_count(tree, logical, where)
    layout = lay_out(tree.leaves, logical.chunk_bytes_max, logical.small_leaf_bytes)
    table = np.frombuffer(fetch(part.chunks, where), np.uint8)
    spots = fetch(part.spots, where)
    if len(layout.chunks) != logical.count or table.size != 32 * logical.count or len(spots) % SPOT.itemsize:
        raise Damaged("a part lists more or fewer chunks than its leaves have", where=where, do="run fsck")
    rows = np.frombuffer(spots, SPOT)
    if len(rows) < logical.count:
        raise Damaged("a part lacks the place of a chunk", where=where, do="run fsck")
    return PartView(part, tree, layout, table.reshape(-1, 32), rows)


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
    for start in range(0, max(len(view), 1), step):
        yield view[start : start + step]
