"""Fetch leaves: which chunks hold them, read and verified in parallel, put together from the boxes of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep.errors import Damaged, Mismatch
from everystep.schema import Box, Leaf, Region
from everystep.schema.dtype import parse
from everystep.seam import Pool
from everystep.vault import Manifest, PartView, RunVault

Array = np.ndarray[Any, Any]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class _Piece:
    """A box of a leaf, and the buffer that its bytes go into."""

    leaf: Leaf
    region: Region
    buffer: Array


def fetch_leaves(
    vault: RunVault, manifest: Manifest, paths: Iterable[str], pool: Pool, progress: Progress | None = None
) -> dict[str, Array]:
    """path -> the whole leaf's bytes (flat uint8, owned by the caller), every chunk of it verified.

    Args:
        progress: told the number of plain bytes as they come in.
    """
    wanted = set(paths)
    pieces: dict[str, list[_Piece]] = {path: [] for path in wanted}
    for view in manifest.views:
        for piece in _fetch_part(vault, view, _missing_regions(view, pieces), pool, progress):
            pieces[piece.leaf.path].append(piece)
    return {path: _whole(found, path) for path, found in pieces.items()}


def _missing_regions(view: PartView, pieces: dict[str, list[_Piece]]) -> list[Region]:
    """The regions of wanted leaves that no earlier rank held already: replicas are read once."""
    out = []
    for region in view.layout.regions:
        have = pieces.get(view.tree.leaves[region.leaf].path)
        if have is not None and all(piece.region.box != region.box for piece in have):
            out.append(region)
    return out


def _fetch_part(
    vault: RunVault, view: PartView, regions: list[Region], pool: Pool, progress: Progress | None
) -> list[_Piece]:
    pieces = [_Piece(view.tree.leaves[r.leaf], r, np.empty(r.nbytes, np.uint8)) for r in regions]
    users: dict[int, list[_Piece]] = {}
    for piece in pieces:
        for index in view.layout.chunks_of(piece.region):
            users.setdefault(index, []).append(piece)
    for group in vault.read_chunks(view, sorted(users), pool):
        for index, data in group:
            start = view.layout.chunks[index].start
            for piece in users[index]:
                _overlap(data, start, piece)
            if progress is not None:
                progress(data.nbytes)
    return pieces


def _overlap(data: Array, start: int, piece: _Piece) -> None:
    """Copies what a chunk (from byte `start` of the stream on) and a piece have in common."""
    begin = max(start, piece.region.start)
    end = min(start + data.nbytes, piece.region.start + piece.region.nbytes)
    piece.buffer[begin - piece.region.start : end - piece.region.start] = data[begin - start : end - start]


def _whole(pieces: list[_Piece], path: str) -> Array:
    """One leaf from its boxes.

    Raises:
        Damaged: if they do not cover it.
    """
    if not pieces:
        raise Damaged("no rank holds this leaf", where=path, do="run fsck")
    leaf = pieces[0].leaf
    if len(pieces) == 1 and not leaf.boxes:
        return pieces[0].buffer
    if any((piece.leaf.shape, piece.leaf.dtype) != (leaf.shape, leaf.dtype) for piece in pieces):
        raise Mismatch("ranks saved this leaf with different shapes", where=path, do="save it under one path per shape")
    elements, held = math.prod(leaf.shape), sum(piece.region.box.size for piece in pieces)
    if held < elements:  # before memory is taken for the shape, which may be a lie
        raise _uncovered(held, elements, path)
    dtype = np.dtype((np.void, parse(leaf.dtype).itemsize))
    out = np.empty(elements * dtype.itemsize, np.uint8)
    if not dtype.itemsize:
        return out
    covered = np.zeros(elements, bool)
    for piece in pieces:
        box = piece.region.box
        _shaped(covered, leaf, box)[box.index()] = True
        if piece.buffer.nbytes:
            _shaped(out.view(dtype), leaf, box)[box.index()] = piece.buffer.view(dtype).reshape(box.shape)
    if not covered.all():
        raise _uncovered(int(covered.sum()), elements, path)
    return out


def _uncovered(held: int, elements: int, path: str) -> Damaged:
    return Damaged(f"the ranks hold {held} of {elements} elements of this leaf", where=path, do="run fsck")


def _shaped(flat: Array, leaf: Leaf, box: Box) -> Array:
    return flat if box.flat else flat.reshape(leaf.shape)
