"""Fetch leaves: which chunks hold them, read and verified in parallel, put together from the boxes of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from everystep.errors import Damaged, Mismatch
from everystep.restore.room import make_rooms
from everystep.schema import Box, Leaf, Region
from everystep.schema.dtype import parse
from everystep.seam import Pool
from everystep.vault import Manifest, PartView, RunVault

Array = np.ndarray[Any, Any]
Progress = Callable[[int], None]


@dataclass(eq=False)
class _Piece:
    """A box of a leaf, and the memory that its bytes go into: a part of the whole leaf's, if that can be."""

    view: PartView
    leaf: Leaf
    region: Region
    buffer: Array | None = None

    def holds(self, start: int, stop: int) -> bool:
        """Whether bytes [start, stop) of the stream are all its own."""
        return self.region.start <= start and stop <= self.region.start + self.region.nbytes

    def span(self, start: int, stop: int) -> Array:
        """The memory of bytes [start, stop) of the stream."""
        assert self.buffer is not None
        return self.buffer[start - self.region.start : stop - self.region.start]


def fetch_leaves(
    vault: RunVault, manifest: Manifest, paths: Iterable[str], pool: Pool, progress: Progress | None = None
) -> dict[str, Array]:
    """path -> the whole leaf's bytes (flat uint8 that nobody else uses), every chunk of it verified.

    Args:
        progress: told the number of plain bytes as they come in.
    """
    pieces = _find(manifest, paths)
    wholes = _make_room(pieces)
    by_view: dict[int, list[_Piece]] = {}
    for piece in chain.from_iterable(pieces.values()):
        by_view.setdefault(id(piece.view), []).append(piece)
    for view in manifest.views:
        placing = _Placing(view, by_view.get(id(view), []))
        for done in vault.read_chunks(view, sorted(placing.users), pool, placing):
            if progress is not None:
                progress(sum(view.layout.chunks[index].nbytes for index in done))
    return {path: wholes[path] if path in wholes else _assembled(found, path) for path, found in pieces.items()}


# which boxes, and where they go ------------------------------------------------------------------------------------


def _find(manifest: Manifest, paths: Iterable[str]) -> dict[str, list[_Piece]]:
    """path -> the boxes of the leaf there; of replicas that of the lowest rank.

    Raises:
        Damaged: if no rank holds it, or all together too little of it.
        Mismatch: if they belong to leaves of different shapes.
    """
    found: dict[str, dict[Box, _Piece]] = {path: {} for path in paths}
    for view in manifest.views:
        for region in view.layout.regions:
            leaf = view.tree.leaves[region.leaf]
            if leaf.path in found:
                found[leaf.path].setdefault(region.box, _Piece(view, leaf, region))
    pieces = {path: list(boxes.values()) for path, boxes in found.items()}
    for path, held in pieces.items():
        _check(held, path)
    return pieces


def _check(pieces: list[_Piece], path: str) -> None:
    if not pieces:
        raise Damaged("no rank holds this leaf", where=path, do="run fsck")
    leaf = pieces[0].leaf
    if any((piece.leaf.shape, piece.leaf.dtype) != (leaf.shape, leaf.dtype) for piece in pieces):
        raise Mismatch("ranks saved this leaf with different shapes", where=path, do="save it under one path per shape")
    elements, held = math.prod(leaf.shape), sum(piece.region.box.size for piece in pieces)
    if held < elements:  # before memory is taken for the shape, which may be a lie
        raise _uncovered(held, elements, path)


def _make_room(pieces: dict[str, list[_Piece]]) -> dict[str, Array]:
    """Gives each piece its memory, leaves of one role together.

    Returns:
        path -> the memory of the whole leaf, where its pieces are parts of that.
    """
    tiled = {path for path, found in pieces.items() if _tile(found)}
    wanted: dict[str, list[tuple[str, int, list[_Piece]]]] = {}
    for path, found in pieces.items():
        for mine in [found] if path in tiled else [[piece] for piece in found]:
            nbytes = sum(piece.region.nbytes for piece in mine)
            wanted.setdefault(found[0].leaf.role, []).append((path, nbytes, mine))
    wholes: dict[str, Array] = {}
    for rows in wanted.values():
        for (path, _, mine), room in zip(rows, make_rooms([nbytes for _, nbytes, _ in rows])):
            if path in tiled:
                wholes[path] = room
            at = 0
            for piece in mine:
                piece.buffer = room[at : at + piece.region.nbytes]
                at += piece.region.nbytes
    return wholes


def _tile(pieces: list[_Piece]) -> bool:
    """Whether the pieces, which are put into that order, lie one behind the other in the leaf and make up all of it."""
    shape = pieces[0].leaf.shape
    if len(pieces) == 1 and pieces[0].region.box.shape == shape:
        return True
    starts = {piece: _start(piece.region.box, shape) for piece in pieces}
    if any(start is None for start in starts.values()):
        return False
    ordered = sorted(pieces, key=lambda piece: (starts[piece], piece.region.box.size))
    end = 0
    for piece in ordered:
        if starts[piece] != end:
            return False
        end += piece.region.box.size
    pieces[:] = ordered
    return end == math.prod(shape)


def _start(box: Box, shape: tuple[int, ...]) -> int | None:
    """The first element of a box whose elements lie together in the leaf, in C order; None for another."""
    if box.flat:
        return box.start[0]
    start, stride, whole = 0, 1, True
    for at, size, length in zip(reversed(box.start), reversed(box.shape), reversed(shape)):
        if not whole and size != 1:
            return None
        start, stride, whole = start + at * stride, stride * length, whole and size == length
    return start


# what goes there ---------------------------------------------------------------------------------------------------


class _Placing:
    """Puts the chunks of one part where they belong; threads write to different bytes."""

    def __init__(self, view: PartView, pieces: list[_Piece]) -> None:
        self._chunks = view.layout.chunks
        self.users: dict[int, list[_Piece]] = {}
        for piece in pieces:
            for index in view.layout.chunks_of(piece.region):
                self.users.setdefault(index, []).append(piece)

    def room(self, index: int) -> Array | None:
        chunk, (user, *others) = self._chunks[index], self.users[index]
        stop = chunk.start + chunk.nbytes
        return user.span(chunk.start, stop) if not others and user.holds(chunk.start, stop) else None

    def take(self, index: int, data: Array) -> None:
        first = self._chunks[index].start
        for piece in self.users[index]:
            start = max(first, piece.region.start)
            stop = min(first + data.nbytes, piece.region.start + piece.region.nbytes)
            piece.span(start, stop)[:] = data[start - first : stop - first]


def _assembled(pieces: list[_Piece], path: str) -> Array:
    """One leaf from boxes of any form, which may overlap.

    Raises:
        Damaged: if they do not cover it.
    """
    leaf = pieces[0].leaf
    elements = math.prod(leaf.shape)
    dtype = np.dtype((np.void, parse(leaf.dtype).itemsize))
    out = np.empty(elements * dtype.itemsize, np.uint8)
    if not dtype.itemsize:
        return out
    covered = np.zeros(elements, bool)
    for piece in pieces:
        box, buffer = piece.region.box, piece.buffer
        _shaped(covered, leaf, box)[box.index()] = True
        if buffer is not None and buffer.nbytes:
            _shaped(out.view(dtype), leaf, box)[box.index()] = buffer.view(dtype).reshape(box.shape)
    if not covered.all():
        raise _uncovered(int(covered.sum()), elements, path)
    return out


def _uncovered(held: int, elements: int, path: str) -> Damaged:
    return Damaged(f"the ranks hold {held} of {elements} elements of this leaf", where=path, do="run fsck")


def _shaped(flat: Array, leaf: Leaf, box: Box) -> Array:
    return flat if box.flat else flat.reshape(leaf.shape)
