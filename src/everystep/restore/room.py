"""Memory for leaves: large ones together in blocks of huge pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Fresh memory in pages of 4 KiB comes at 2 GB/s, in pages of 2 MiB at 12 to 17: the whole of a large load is one or the
# other. NumPy asks for huge pages from 4 MiB on.
_PAGE = 2 << 20
_HUGE_BYTES_MIN = 4 << 20
# Who keeps one leaf of a load keeps its block: small ones, which are most, have memory of their own.
_BLOCK_BYTES = 16 << 20
_OWN_BYTES_MAX = 128 << 10
_ALIGN = 64


def make_rooms(sizes: Sequence[int]) -> list[Array]:
    """Flat uint8 of these sizes, not initialised."""
    rooms: list[Array | None] = [np.empty(size, np.uint8) if size < _OWN_BYTES_MAX else None for size in sizes]
    for members in _blocks([i for i, room in enumerate(rooms) if room is None], sizes):
        block = _block(sum(_aligned(sizes[i]) for i in members))
        at = 0
        for i in members:
            rooms[i] = block[at : at + sizes[i]]
            at += _aligned(sizes[i])
    return [room for room in rooms if room is not None]


def _blocks(numbers: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    blocks: list[list[int]] = []
    used = _BLOCK_BYTES
    for i in numbers:
        if used + sizes[i] > _BLOCK_BYTES:
            blocks.append([])
            used = 0
        blocks[-1].append(i)
        used += _aligned(sizes[i])
    return blocks


def _block(nbytes: int) -> Array:
    """Memory that begins with a huge page where it has room for some."""
    if nbytes < _HUGE_BYTES_MIN:
        return np.empty(nbytes, np.uint8)
    whole = np.empty(nbytes + _PAGE, np.uint8)
    start = -int(whole.__array_interface__["data"][0]) % _PAGE
    return whole[start : start + nbytes]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
