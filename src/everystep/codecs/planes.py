"""Byte planes: the sign of floats turned to the low bit, bytes of equal significance together, zstd on each plane."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import zstandard

from everystep.errors import Damaged

Array = np.ndarray[Any, Any]
_HEAD = struct.Struct("<BBH")  # width in bytes, 1 if the sign was turned, number of planes
_PLANE = struct.Struct("<BI")  # 0 raw or 1 zstd, stored bytes
_WIDTHS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_FLOATS = {"<f2": 2, "bfloat16": 2, "<f4": 4, "<f8": 8, "<c8": 4, "<c16": 8}
_WIDE = {"<i2": 2, "<u2": 2, "<i4": 4, "<u4": 4, "<i8": 8, "<u8": 8}


def form_of(dtype: str, nbytes: int) -> tuple[int, bool]:
    """(element width, whether to turn the sign) for an element type."""
    width = _FLOATS.get(dtype) or _WIDE.get(dtype) or 1
    return (width, dtype in _FLOATS) if nbytes % width == 0 else (1, False)


def encode(
    data: Array, form: tuple[int, bool], level: int, sample_bytes: int, worth_ratio: float
) -> list[bytes | memoryview] | None:
    """Header and planes, or None where no plane shrinks."""
    width, turn = form
    split = _split(data, width, turn)
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    pieces: list[bytes | memoryview] = [_HEAD.pack(width, turn, width)]
    gained = False
    for row in split:
        body = _shrink(compressor, row, sample_bytes, worth_ratio)
        pieces.append(_PLANE.pack(body is not None, len(body) if body is not None else row.nbytes))
        pieces.append(body if body is not None else memoryview(row))
        gained = gained or body is not None
    return pieces if gained else None


def _shrink(compressor: zstandard.ZstdCompressor, row: Array, sample_bytes: int, worth_ratio: float) -> bytes | None:
    if row.nbytes > 2 * sample_bytes:
        middle = (row.nbytes - sample_bytes) // 2
        sample = row[middle : middle + sample_bytes]
        if len(compressor.compress(memoryview(sample))) > worth_ratio * sample.nbytes:
            return None
    body = compressor.compress(memoryview(row))
    return body if len(body) < row.nbytes else None


def _split(data: Array, width: int, turn: bool) -> Array:
    """Rows of bytes of equal significance, least significant first."""
    if width == 1:
        return data.reshape(1, -1)
    words = data.view(_WIDTHS[width])
    if turn:
        words = (words << 1) | (words >> (8 * width - 1))
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, width).T)


def decode(stored: memoryview, nbytes: int) -> Array:
    """The inverse of `encode`; time and memory are bounded by `nbytes`, whatever the stored bytes say."""
    try:
        width, turn, count = _HEAD.unpack_from(stored)
        if count != width or turn > 1 or (width != 1 and width not in _WIDTHS) or nbytes % width:
            raise Damaged("a chunk whose header makes no sense")
        rows = np.empty((width, nbytes // width), np.uint8)
        at = _HEAD.size
        for row in rows:
            packed, size = _PLANE.unpack_from(stored, at)
            at += _PLANE.size
            _fill(row, packed, stored[at : at + size], size)
            at += size
    except struct.error as error:
        raise Damaged("a chunk that ends early") from error
    if at != len(stored):
        raise Damaged("a chunk with bytes left over")
    return _join(rows, width, bool(turn))


def _fill(row: Array, packed: int, body: memoryview, size: int) -> None:
    if packed not in (0, 1) or len(body) != size:
        raise Damaged("a plane that ends early")
    if packed:
        try:
            if zstandard.frame_content_size(body) != row.nbytes:
                raise Damaged("a plane of another size")
            body = memoryview(zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise Damaged(f"a plane that zstd cannot read: {error}") from error
    if len(body) != row.nbytes:
        raise Damaged("a plane of another size")
    row[:] = np.frombuffer(body, np.uint8)


def _join(rows: Array, width: int, turn: bool) -> Array:
    if width == 1:
        return rows.reshape(-1)
    words = np.ascontiguousarray(rows.T).reshape(-1).view(_WIDTHS[width])
    if turn:
        words = (words >> 1) | (words << (8 * width - 1))
    return words.view(np.uint8)
