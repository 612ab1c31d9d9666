"""Differences to a base: bit patterns subtracted as ordered integers, grouped by the base's exponent, zstd on planes.

Weights of real trainings come within .01 of raw of the entropy of the residual given the base's exponent. Tried on
them, and left out: finer groups than the exponent (.0005 of raw), the sign in the group (a loss), scaling the base by
least squares (.0003 in fp32), grouping without subtracting (a loss), turning words by 4 bits where a group's highest
plane holds little (.005 late in training, for one more plane to compress), packing small symbols with exceptions (.006,
at a third of the speed), zstd level 3 (a loss: short matches cost more than single symbols).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import zstandard

from everystep.codecs.planes import WORDS, Piece, compressors, join, read_row, shrink, split
from everystep.errors import Damaged

Array = np.ndarray[Any, Any]
_HEAD = struct.Struct("<BBB")  # width in bytes, 1 if sign and magnitude, lowest bit of the exponent or UNGROUPED
_PLANE = struct.Struct("<BI")  # how it is stored, in how many bytes
_RAW, _ZSTD, _CONSTANT = 0, 1, 2
UNGROUPED = 255
# A group's own symbol codes: .611 → .608 on a GPT's weights, .0188 → .0166 on a bf16 fine-tune's. Shorter groups share.
_GROUP_BYTES_MIN = 2048
_KEYS = np.arange(1, 256, dtype=np.uint8)
_BLOCK = 1 << 16  # words that stay in a core's cache: 4.4 GB/s where whole chunks have 2.8
_FLOATS = {
    "<f2": (2, 10), "bfloat16": (2, 7), "<f4": (4, 23), "<f8": (8, 52), "<c8": (4, 23), "<c16": (8, 52),
    "complex32": (2, 10), "torch.complex32": (2, 10), "bcomplex32": (2, 7),
    "float8_e3m4": (1, 0), "float8_e4m3": (1, 0), "float8_e4m3b11fnuz": (1, 0), "float8_e4m3fn": (1, 0),
    "float8_e4m3fnuz": (1, 0), "float8_e5m2": (1, 0), "float8_e5m2fnuz": (1, 0),
}  # fmt: skip
_INTS = {"i1": 1, "u1": 1, "b1": 1, "i2": 2, "u2": 2, "i4": 4, "u4": 4, "i8": 8, "u8": 8, "m8": 8, "M8": 8}


class Form(NamedTuple):
    """How the bytes are read."""

    width: int
    signed_magnitude: bool
    shift: int
    """Where the exponent begins, by which residuals are grouped (in floats of one byte: the whole magnitude)."""

    @property
    def grouped(self) -> bool:
        return self.shift != UNGROUPED


def form_of(dtype: str, nbytes: int) -> Form:
    """The form for an element type; bytes for what is neither float nor integer of this byte order."""
    if dtype in _FLOATS:
        width, shift = _FLOATS[dtype]
        form = Form(width, True, shift)
    else:
        form = Form(_INTS.get(dtype[1:3], 1) if dtype[:1] in ("<", "|") else 1, False, UNGROUPED)
    return form if nbytes % form.width == 0 else Form(1, False, UNGROUPED)


def encode(
    data: Array, base: Array, form: Form, level: int, sample_bytes: int, worth_ratio: float
) -> list[Piece] | None:
    """Header, table and planes of the residual to a base of equal length, or None where no plane shrinks."""
    words = residual(data, base, form)
    ends = [words.size]
    if not words.any():
        form = form._replace(shift=UNGROUPED)
    if form.grouped:
        words, ends = _group(words, base, form)
    table, bodies = [], []
    ways = compressors(level)
    for row in split(words):
        how, body = _shrink(row, ends, ways, sample_bytes, worth_ratio)
        table.append(_PLANE.pack(how, len(body)))
        bodies.append(body)
    if sum(map(len, bodies)) >= data.nbytes:
        return None
    return [b"".join([_HEAD.pack(*form), *table]), *bodies]


def decode(stored: memoryview, base: Array, nbytes: int) -> Array:
    """The inverse of `encode`; time and memory are bounded by `nbytes`, whatever the stored bytes say.

    Raises:
        Damaged: if the stored bytes cannot be what `encode` made, or the base has another length.
    """
    if base.nbytes != nbytes:
        raise Damaged(f"a base of {base.nbytes} bytes for a chunk of {nbytes}", do="run fsck")
    form, rows = _read(stored, nbytes)
    words = join(rows, form.width)
    blocks = _ungrouped(words, base, form) if form.grouped else pieces(words)
    return apply(blocks, base, form).view(np.uint8)


# words and planes --------------------------------------------------------------------------------------------------


def residual(data: Array, base: Array, form: Form) -> Array:
    """Zigzag of the difference of bit patterns, both brought into the order of the numbers they stand for."""
    signed, top = np.dtype(f"<i{form.width}"), 8 * form.width - 1
    new, old = data.view(signed), base.view(signed)
    out = np.empty(new.size, signed)
    for part in _blocks(new.size):
        a, b = new[part], old[part]
        if form.signed_magnitude:
            a, b = _ordered(a, top), _ordered(b, top)
        a = a - b
        np.bitwise_xor(a << 1, a >> top, out=out[part])
    return out.view(WORDS[form.width])


def apply(blocks: Iterable[Array], base: Array, form: Form) -> Array:
    """The data that `residual` turned into these blocks of words."""
    signed, top = np.dtype(f"<i{form.width}"), 8 * form.width - 1
    old = base.view(signed)
    out = np.empty(old.size, signed)
    spare = np.empty((2, min(_BLOCK, old.size)), signed)  # new memory for each step would cost more than the steps
    for part, words in zip(_blocks(old.size), blocks):
        new, flip = spare[:, : words.size]
        np.right_shift(words, 1, out=new.view(words.dtype))
        np.bitwise_and(words.view(signed), 1, out=flip)
        np.bitwise_xor(new, np.negative(flip, out=flip), out=new)
        if form.signed_magnitude:
            new += _ordered(old[part], top, flip)
            _ordered(new, top, flip, out[part])
        else:
            np.add(new, old[part], out=out[part])
    return out


def pieces(words: Array) -> Iterator[Array]:
    """Words as `apply` takes them."""
    return (words[part] for part in _blocks(words.size))


def _ordered(words: Array, top: int, flip: Array | None = None, out: Array | None = None) -> Array:
    """Sign and magnitude to two's complement and back: the numbers' order becomes the integers'. Its own inverse.

    Args:
        flip, out: memory to work in, and for the result; where it is worked in unless given.
    """
    flip = np.right_shift(words, top, out=flip)
    flip &= (1 << top) - 1
    return np.bitwise_xor(flip, words, out=flip if out is None else out)


def exponents(base: Array, form: Form) -> Array:
    """One byte per word: the exponent's lowest eight bits (fewer where it has fewer), without the sign."""
    words = base.view(WORDS[form.width])
    magnitude = words & ((1 << (8 * form.width - 1)) - 1)
    return (magnitude >> form.shift).astype(np.uint8) if form.shift else magnitude.astype(np.uint8)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


# grouping: sorted block by block, where the sort stays in a core's cache, then put together group by group ----------


def _group(words: Array, base: Array, form: Form) -> tuple[Array, list[int]]:
    """The words by the base's exponent, in their order within one; and where groups end."""
    within = np.empty_like(words)
    bounds = []
    for part, order, bound in _orders(base, form):
        np.take(words[part], order, out=within[part], mode="clip")
        bounds.append(bound)
    runs, ends = _runs(bounds)
    return np.concatenate([within[start:end] for start, end in runs]), ends


def _ungrouped(words: Array, base: Array, form: Form) -> Iterator[Array]:
    """The inverse of `_group`, block by block, each in the memory of the one before."""
    orders, bounds = [], []
    for _, order, bound in _orders(base, form):
        orders.append(order.astype(np.uint16))  # a block's positions fit, in a quarter of the memory
        bounds.append(bound)
    within, out = np.empty((2, min(_BLOCK, words.size)), words.dtype)
    runs, at = [list[tuple[int, int]]() for _ in orders], 0
    for start, end in _runs(bounds)[0]:
        runs[start // _BLOCK].append((at, at + end - start))
        at += end - start
    for order, pieces in zip(orders, runs):
        np.concatenate([words[start:end] for start, end in pieces], out=within[: order.size])
        out[order.astype(np.intp)] = within[: order.size]
        yield out[: order.size]


def _orders(base: Array, form: Form) -> Iterator[tuple[slice, Array, Array]]:
    """By block: where it lies, its order by exponent, and where each of the 256 groups begins and the last ends."""
    itemsize = form.width
    for part in _blocks(base.nbytes // itemsize):
        key = exponents(base[part.start * itemsize : part.stop * itemsize], form)
        order = np.argsort(key, kind="stable")
        inner = np.searchsorted(key, _KEYS, sorter=order)
        yield part, order, part.start + np.concatenate([[0], inner, [key.size]])


def _runs(bounds: list[Array]) -> tuple[list[tuple[int, int]], list[int]]:
    """Runs of one group in one block, by group and then by block; and where groups end once they lie in that order."""
    table = np.array(bounds).T
    starts, ends = table[:-1], table[1:]
    group, block = np.nonzero(ends > starts)
    runs = zip(starts[group, block].tolist(), ends[group, block].tolist())
    totals = np.cumsum((ends - starts).sum(1))
    return list(runs), _merge(totals.tolist())


def _merge(totals: list[int]) -> list[int]:
    """Ends of groups, short ones joined to the next."""
    ends, last = [], 0
    for end in totals:
        if end - last >= _GROUP_BYTES_MIN:
            ends.append(end)
            last = end
    return [*ends[: -1 if last == totals[-1] else None], totals[-1]]


def _shrink(
    row: Array, ends: list[int], ways: list[zstandard.ZstdCompressor], sample_bytes: int, worth_ratio: float
) -> tuple[int, Piece]:
    if row.size and row[0] == row[-1] and (row == row[0]).all():
        return _CONSTANT, bytes(row[:1])
    body = shrink(row, ends, ways, sample_bytes, worth_ratio)
    return (_RAW, memoryview(row)) if body is None else (_ZSTD, body)


def _read(stored: memoryview, nbytes: int) -> tuple[Form, list[Array]]:
    try:
        form = Form(*_HEAD.unpack_from(stored))
        known = form.width in WORDS and form.signed_magnitude in (0, 1)
        if not known or not nbytes or nbytes % form.width or (form.grouped and form.shift >= 8 * form.width):
            raise Damaged("a delta whose header makes no sense")
        at = _HEAD.size + form.width * _PLANE.size
        rows = []
        for number in range(form.width):
            how, size = _PLANE.unpack_from(stored, _HEAD.size + number * _PLANE.size)
            rows.append(_read_row(how, stored[at : at + size], size, nbytes // form.width))
            at += size
    except struct.error as error:
        raise Damaged("a delta that ends early") from error
    if at != len(stored):
        raise Damaged("a delta with bytes left over")
    return form, rows


def _read_row(how: int, body: memoryview, size: int, count: int) -> Array:
    if how == _CONSTANT:
        if size != 1 or len(body) != 1:
            raise Damaged("a constant plane of more than one byte")
        return np.full(count, body[0], np.uint8)
    if how not in (_RAW, _ZSTD):
        raise Damaged("a plane of an unknown kind")
    return read_row(how == _ZSTD, body, size, count)
