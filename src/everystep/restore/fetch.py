"""Fetch leaves, or boxes of them: which chunks hold them, read and verified in parallel, put where they belong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from everystep.errors import Damaged, Mismatch
from everystep.restore.boxes import Range, boxes_of, common, range_of, within, without
from everystep.restore.room import make_rooms
from everystep.schema import Box, Leaf, Region
from everystep.schema.dtype import parse
from everystep.seam import Pool
from everystep.vault import Manifest, PartView, RunVault

Array = np.ndarray[Any, Any]
Progress = Callable[[int], None]
_WORDS = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}


def fetch_leaves(
    vault: RunVault, manifest: Manifest, paths: Iterable[str], pool: Pool, progress: Progress | None = None
) -> dict[str, Array]:
    """path -> the whole leaf's bytes (flat uint8 that nobody else uses), every chunk of it verified.

    Args:
        progress: told the number of plain bytes as they come in.
    """
    found = fetch_boxes(vault, manifest, dict.fromkeys(paths), pool, progress)
    return {path: arrays[0] for path, arrays in found.items()}


def fetch_boxes(
    vault: RunVault,
    manifest: Manifest,
    wanted: Mapping[str, Sequence[Box] | None],
    pool: Pool,
    progress: Progress | None = None,
) -> dict[str, list[Array]]:
    """path -> the bytes of each box that is wanted of the leaf there. Only chunks that hold some of them are read.

    Args:
        wanted: by path, boxes at global coordinates; None for the whole leaf.

    Raises:
        Damaged: if no rank holds a leaf, or all together too little of it.
        Mismatch: if what they hold belongs to leaves of different shapes.
    """
    targets: dict[str, list[_Target]] = {}
    parts: list[_Part] = []
    for path, sources in _find(manifest, wanted).items():
        leaf, boxes = sources[0].leaf, wanted[path]
        targets[path] = [_Target(path, leaf, box) for box in ((Box.whole(leaf.shape),) if boxes is None else boxes)]
        for target in targets[path]:
            parts += _plan(target, sources)
    _make_room(target for own in targets.values() for target in own)
    by_view: dict[int, list[_Part]] = {}
    for part in parts:
        by_view.setdefault(id(part.view), []).append(part)
    with vault.host_share() as share:
        for view in manifest.views:
            placing = _Placing(view, by_view.get(id(view), []))
            # Of what is cut up each rank takes its own part, and all of them what none cuts.
            alike = placing.whole() if share is not None else set()
            for indices, handed in ((alike, share), (placing.users.keys() - alike, None)):
                for done in vault.read_chunks(view, sorted(indices), pool, placing, share=handed):
                    if progress is not None:
                        progress(sum(view.layout.chunks[index].nbytes for index in done))
    return {path: [target.room for target in own] for path, own in targets.items()}


# what is there, and what is wanted -----------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Source:
    """A box of a leaf, as a rank has saved it."""

    view: PartView
    leaf: Leaf
    region: Region


def _find(manifest: Manifest, paths: Iterable[str]) -> dict[str, list[_Source]]:
    """path -> the boxes of the leaf there, those of lower ranks first; of replicas that of the lowest."""
    found: dict[str, dict[Box, _Source]] = {path: {} for path in paths}
    for view in manifest.views:
        leaves = view.tree.leaves
        for region in view.layout.regions:
            leaf = leaves[region.leaf]
            if leaf.path in found:
                found[leaf.path].setdefault(region.box, _Source(view, leaf, region))
    sources = {path: list(boxes.values()) for path, boxes in found.items()}
    for path, held in sources.items():
        _check(held, path)
    return sources


def _check(sources: list[_Source], path: str) -> None:
    if not sources:
        raise Damaged("no rank holds this leaf", where=path, do="run fsck")
    leaf = sources[0].leaf
    if any((one.leaf.shape, one.leaf.dtype) != (leaf.shape, leaf.dtype) for one in sources):
        raise Mismatch("ranks saved this leaf with different shapes", where=path, do="save it under one path per shape")
    elements, held = math.prod(leaf.shape), sum(one.region.box.size for one in sources)
    if held < elements:  # before memory is taken for the shape, which may be a lie
        raise _uncovered(held, elements, path)


class _Target:
    """A box of a leaf that is wanted, and the memory for it."""

    __slots__ = ("box", "itemsize", "leaf", "nbytes", "path", "room")

    def __init__(self, path: str, leaf: Leaf, box: Box) -> None:
        self.path, self.leaf, self.box = path, leaf, box
        self.itemsize = _itemsize(leaf.dtype)
        self.nbytes = box.size * self.itemsize
        self.room: Array

    @property
    def is_whole(self) -> bool:
        return self.nbytes == math.prod(self.leaf.shape) * self.itemsize

    @property
    def grid(self) -> Array:
        """The memory in the box's shape, element by element."""
        return self.room.view(_word(self.itemsize)).reshape(self.box.shape)


def _make_room(targets: Iterable[_Target]) -> None:
    """Gives each its memory, leaves of one role together."""
    by_role: dict[str, list[_Target]] = {}
    for target in targets:
        by_role.setdefault(target.leaf.role, []).append(target)
    for own in by_role.values():
        for target, room in zip(own, make_rooms([target.nbytes for target in own])):
            target.room = room


@lru_cache(maxsize=256)
def _itemsize(dtype: str) -> int:
    return parse(dtype).itemsize


def _word(itemsize: int) -> np.dtype[Any]:
    return _WORDS.get(itemsize) or np.dtype((np.void, itemsize))


# which parts of what is there make up what is wanted -----------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Span:
    """Bytes that lie together in a stream, and together in what is wanted: there from `at` on."""

    view: PartView
    region: Region
    target: _Target
    at: int

    def room(self, start: int, stop: int) -> Array | None:
        """The memory of bytes [start, stop) of the stream, if they all have theirs here."""
        begin = start - self.region.start
        if begin < 0 or stop > self.region.start + self.region.nbytes:
            return None
        return self.target.room[self.at + begin : self.at + begin + stop - start]

    def take(self, first: int, data: Array) -> None:
        """The bytes of the stream from `first` on, of which some are its own."""
        start = max(first, self.region.start)
        stop = min(first + data.nbytes, self.region.start + self.region.nbytes)
        at = self.at + start - self.region.start
        self.target.room[at : at + stop - start] = data[start - first : stop - first]

    def chunks(self) -> Iterable[int]:
        return self.view.layout.chunks_of(self.region)


@dataclass(eq=False, slots=True)
class _Cut:
    """A box of which a part is wanted, where elements that lie together in one lie apart in the other."""

    view: PartView
    region: Region
    target: _Target
    free: Array | None
    """Of what is wanted, the elements that no lower rank brings; None for all."""

    def room(self, start: int, stop: int) -> Array | None:
        return None

    def take(self, first: int, data: Array) -> None:
        grid, size = self.target.grid, self.target.itemsize
        begin = max(self.region.start - first, 0)
        end = min(self.region.start + self.region.nbytes - first, data.nbytes)
        elements = data[begin:end].view(_word(size))
        offset = first + begin - self.region.start
        at = 0
        for box in self._boxes(offset // size, offset // size + len(elements)):
            found = common(box, self.target.box)
            if found is not None:
                source = elements[at : at + box.size].reshape(box.shape)[within(found, box).index()]
                where = within(found, self.target.box).index()
                np.copyto(grid[where], source, where=True if self.free is None else self.free[where])
            at += box.size

    def chunks(self) -> Iterable[int]:
        """Those that hold some of what is wanted."""
        layout, size = self.view.layout, self.target.itemsize
        for index in layout.chunks_of(self.region):
            start = max(layout.chunks[index].start - self.region.start, 0)
            stop = min(layout.chunks[index].start + layout.chunks[index].nbytes - self.region.start, self.region.nbytes)
            if any(common(box, self.target.box) for box in self._boxes(start // size, stop // size)):
                yield index

    def _boxes(self, start: int, stop: int) -> Iterator[Box]:
        """The boxes of the leaf that elements [start, stop) of the region are."""
        own = self.region.box
        if own.flat:
            yield from boxes_of(own.start[0] + start, own.start[0] + stop, self.target.leaf.shape)
            return
        for box in boxes_of(start, stop, own.shape):
            yield Box(tuple(a + b for a, b in zip(box.start, own.start)), box.shape)


_Part = _Span | _Cut


def _plan(target: _Target, sources: list[_Source]) -> list[_Part]:
    """The parts that bring each wanted element once, from the lowest rank that holds it.

    Raises:
        Damaged: if nobody holds some of them.
    """
    if not target.nbytes:
        return []
    for source in sources:
        if source.region.box == target.box:
            return [_Span(source.view, source.region, target, 0)]
    span = range_of(target.box, target.leaf.shape)
    ranges = [range_of(source.region.box, target.leaf.shape) for source in sources] if span is not None else []
    if span is None or None in ranges:
        return _cuts(target, sources)
    return _spans(target, span, [(source, held) for source, held in zip(sources, ranges) if held is not None])


def _spans(target: _Target, span: Range, sources: list[tuple[_Source, Range]]) -> list[_Part]:
    taken: list[Range] = []
    parts: list[_Part] = []
    size = target.itemsize
    for source, (start, stop) in sources:
        first, last = max(start, span[0]), min(stop, span[1])
        for a, b in without((first, last), taken) if first < last else ():
            region = source.region
            piece = Region(region.leaf, region.box, region.stream, region.start + (a - start) * size, (b - a) * size)
            parts.append(_Span(source.view, piece, target, (a - span[0]) * size))
    held = sum(stop - start for start, stop in taken)
    if held < target.box.size:
        raise _uncovered(held, target.box.size, target.path)
    return parts


def _cuts(target: _Target, sources: list[_Source]) -> list[_Part]:
    shape = target.leaf.shape
    found: list[tuple[_Source, list[Box]]] = []
    for source in sources:
        box = source.region.box
        pieces = boxes_of(box.start[0], box.start[0] + box.size, shape) if box.flat else (box,)
        mine = [both for piece in pieces if (both := common(piece, target.box)) is not None]
        if mine:
            found.append((source, mine))
    held = sum(box.size for _, mine in found for box in mine)
    if held < target.box.size:  # before memory is taken for a shape that may be a lie
        raise _uncovered(held, target.box.size, target.path)
    covered = np.zeros(target.box.shape, bool)
    parts: list[_Part] = []
    for source, mine in found:
        places = [within(box, target.box).index() for box in mine]
        overlaps = any(covered[place].any() for place in places)
        free = ~covered if overlaps else None
        if free is None or any(free[place].any() for place in places):
            parts.append(_Cut(source.view, source.region, target, free))
        for place in places:
            covered[place] = True
    if not covered.all():
        raise _uncovered(int(covered.sum()), target.box.size, target.path)
    return parts


def _uncovered(held: int, elements: int, path: str) -> Damaged:
    return Damaged(f"the ranks hold {held} of {elements} elements of this leaf", where=path, do="run fsck")


# chunk by chunk ------------------------------------------------------------------------------------------------------


class _Placing:
    """Puts the chunks of one part where they belong; threads write to different bytes."""

    def __init__(self, view: PartView, parts: list[_Part]) -> None:
        self._chunks = view.layout.chunks
        self.users: dict[int, list[_Part]] = {}
        for part in parts:
            for index in part.chunks():
                self.users.setdefault(index, []).append(part)

    def whole(self) -> set[int]:
        """Chunks that hold something of leaves which are wanted whole."""
        return {index for index, users in self.users.items() if any(user.target.is_whole for user in users)}

    def room(self, index: int) -> Array | None:
        chunk, (user, *others) = self._chunks[index], self.users[index]
        return user.room(chunk.start, chunk.start + chunk.nbytes) if not others else None

    def take(self, index: int, data: Array) -> None:
        for user in self.users[index]:
            user.take(self._chunks[index].start, data)
