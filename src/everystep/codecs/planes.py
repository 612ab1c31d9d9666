"""Byte planes: the sign of floats turned to the low bit, bytes of equal significance together, zstd on each plane."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from everystep.codecs.native import HAS_KERNEL, kernel
from everystep.errors import Damaged

Array = np.ndarray[Any, Any]
Piece = bytes | memoryview
_HEAD = struct.Struct("<BBH")  # width in bytes, 1 if the sign was turned, number of planes
_PLANE = struct.Struct("<BI")  # 0 raw or 1 zstd, stored bytes
_SLICES = 8
_SAMPLE_BYTES_MIN = 8 << 10
# Exponents change along a leaf: with symbol codes for each 32 KiB those of Adam's average come to .336 instead of .341.
_BLOCK_BYTES = 32 << 10
WORDS: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8"),
}  # fmt: skip
_FLOATS = {
    "<f2": 2, "bfloat16": 2, "<f4": 4, "<f8": 8, "<c8": 4, "<c16": 8,
    "complex32": 2, "bcomplex32": 2, "torch.complex32": 2,
}  # fmt: skip
_WIDE = {"<i2": 2, "<u2": 2, "<i4": 4, "<u4": 4, "<i8": 8, "<u8": 8}


def form_of(dtype: str, nbytes: int) -> tuple[int, bool]:
    """(element width, whether to turn the sign) for an element type."""
    width = _FLOATS.get(dtype) or _WIDE.get(dtype) or (8 if dtype[:3] in ("<m8", "<M8") else 1)
    return (width, dtype in _FLOATS) if nbytes % width == 0 else (1, False)


def encode(
    data: Array, form: tuple[int, bool], level: int, sample_bytes: int, worth_ratio: float
) -> list[Piece] | None:
    """Header and planes, or None where no plane shrinks."""
    width, turn = form
    pieces: list[Piece] = [_HEAD.pack(width, turn, width)]
    gained = False
    ways = compressors(level)
    for row in rows_of(data, form):
        ends = [*range(_BLOCK_BYTES, row.size, _BLOCK_BYTES), row.size] if width > 1 else [row.size]
        body = shrink(row, ends, ways, sample_bytes, worth_ratio)
        pieces.append(_PLANE.pack(body is not None, len(body) if body is not None else row.nbytes))
        pieces.append(body if body is not None else memoryview(row))
        gained = gained or body is not None
    return pieces if gained else None


# one plane ---------------------------------------------------------------------------------------------------------


def shrink(
    row: Array, ends: list[int], ways: list[zstandard.ZstdCompressor], sample_bytes: int, worth_ratio: float
) -> bytes | None:
    """One zstd frame, or None where slices spread over a long row do not shrink below `worth_ratio`.

    Args:
        ends: where a block, and so a new set of symbol codes, begins; and last the row's end.
        ways: the compressors to try on the sample.
    """
    sample = memoryview(spread(row, share_of(row.nbytes, sample_bytes)))
    tried = [(len(compressor.compress(sample)), compressor) for compressor in ways]
    size, best = min(tried, key=lambda pair: pair[0])
    if size > worth_ratio * sample.nbytes and row.nbytes > 2 * sample_bytes:
        return None
    stream, out, start = best.compressobj(size=row.size), [], 0
    for end in ends:
        out.append(stream.compress(memoryview(row[start:end])))
        if end < row.size:
            out.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        start = end
    body = b"".join([*out, stream.flush()])
    return body if len(body) < row.nbytes else None


def compressors(level: int) -> list[zstandard.ZstdCompressor]:
    """The compressors worth trying, the one for planes of numbers first."""
    plain = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    if level != 1:
        return [plain]
    # With the smallest table there is, zstd finds runs and no other matches, which in planes of real numbers cost more
    # than coding their bytes one by one: exponents of a GPT's weights come to .333 instead of .363, in a third of the
    # time; the differences of a bf16 average to .205 instead of .220.
    return [zstandard.ZstdCompressor(compression_params=_SYMBOLS), plain]


_SYMBOLS = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, hash_log=6, min_match=7, write_checksum=False, write_content_size=True
)


def share_of(nbytes: int, sample_bytes: int) -> int:
    """How many bytes to look at: a sixteenth, so that looking never costs much of the work."""
    return min(sample_bytes, max(nbytes >> 4, _SAMPLE_BYTES_MIN))


def spread(row: Array, count: int) -> Array:
    """About `count` elements of a row, in slices spread over it; all of a short one."""
    length = count // _SLICES
    if not length:
        return row[:count]
    if row.size <= 2 * count:
        return row
    starts = [i * (row.size - length) // (_SLICES - 1) for i in range(_SLICES)]
    return np.concatenate([row[start : start + length] for start in starts])


# words and their bytes ---------------------------------------------------------------------------------------------


def turned(data: Array, form: tuple[int, bool]) -> Array:
    """The data as words, in floats the sign at the low end."""
    width, turn = form
    words = data.view(WORDS[width])
    return (words << 1) | (words >> (8 * width - 1)) if turn else words


def rows_of(data: Array, form: tuple[int, bool]) -> Array:
    """Rows of bytes of equal significance, least significant first, of the data as turned words."""
    width, turn = form
    if not HAS_KERNEL:
        return split(turned(data, form))
    rows = np.empty((width, data.nbytes // width), np.uint8)
    kernel.split(data, width, turn, rows)
    return rows


def split(words: Array) -> Array:
    """Rows of bytes of equal significance, least significant first."""
    width = words.dtype.itemsize
    if width == 1:
        return words.reshape(1, -1)
    rows = np.empty((width, words.size), np.uint8)
    # Shift and narrow: 8.5 GB/s where a transposing copy of the bytes has 4.
    for number, row in enumerate(rows):
        np.copyto(row, words >> (8 * number) if number else words, casting="unsafe")
    return rows


def join(rows: Sequence[Array], width: int) -> Array:
    """The words that `split` made the rows of."""
    if width == 1:
        return rows[0]
    words = rows[-1].astype(WORDS[width])
    for row in rows[-2::-1]:
        words <<= 8
        words |= row
    return words


def decode(stored: memoryview, nbytes: int, out: Array | None = None) -> Array:
    """The inverse of `encode`, into `out` if given; time and memory are bounded by `nbytes`, whatever is stored."""
    try:
        width, turn, count = _HEAD.unpack_from(stored)
        if count != width or turn > 1 or width not in WORDS or nbytes % width:
            raise Damaged("a chunk whose header makes no sense")
        rows = []
        at = _HEAD.size
        for _ in range(width):
            packed, size = _PLANE.unpack_from(stored, at)
            at += _PLANE.size
            if packed not in (0, 1):
                raise Damaged("a plane of an unknown kind")
            rows.append(read_row(bool(packed), stored[at : at + size], size, nbytes // width))
            at += size
    except struct.error as error:
        raise Damaged("a chunk that ends early") from error
    if at != len(stored):
        raise Damaged("a chunk with bytes left over")
    if HAS_KERNEL:
        into = np.empty(nbytes, np.uint8) if out is None else out
        kernel.join(tuple(rows), bool(turn), into)
        return into
    words = join(rows, width)
    if turn:
        words = (words >> 1) | (words << (8 * width - 1))
    if out is None:
        return words.view(np.uint8)
    out[:] = words.view(np.uint8)
    return out


def read_row(packed: bool, body: memoryview, size: int, count: int) -> Array:
    """One plane of `count` bytes, stored in `size` bytes.

    Raises:
        Damaged: if it is anything else.
    """
    if len(body) != size:
        raise Damaged("a plane that ends early")
    plain: bytes | memoryview = body
    if packed:
        try:
            if zstandard.frame_content_size(body) != count:
                raise Damaged("a plane of another size")
            plain = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"a plane that zstd cannot read: {error}") from error
    if len(plain) != count:
        raise Damaged("a plane of another size")
    return np.frombuffer(plain, np.uint8)
