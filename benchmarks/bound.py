"""What a chunk cannot be coded below, symbol by symbol: the entropy of its residual given the base's exponent.

Written on its own, not with the codecs that it judges. Codes that follow runs, or the parts of a leaf, can come below
it: what it takes for one distribution may be several.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
FLOATS = {"<f2": (2, 10), "bfloat16": (2, 7), "<f4": (4, 23), "<f8": (8, 52)}
"""Type -> bytes of an element, lowest bit of the exponent."""
INTEGERS = {"<i2": 2, "<u2": 2, "<i4": 4, "<u4": 4, "<i8": 8, "<u8": 8}


def of(data: Array, base: Array | None, dtype: str) -> float:
    """Bytes; of the residual, or of the values alone where that is less.

    Args:
        data, base: flat uint8.
    """
    alone = min(of_values(data, dtype), float(data.nbytes))
    return alone if base is None else min(of_residual(data, base, dtype), alone)


def of_residual(data: Array, base: Array, dtype: str) -> float:
    """Of sign, bit length and three more bits of the difference, given the base's exponent; the rest counts in full."""
    width, shift = FLOATS.get(dtype, (INTEGERS.get(dtype, 1), None))
    signed, unsigned, top = np.dtype(f"<i{width}"), np.dtype(f"<u{width}"), 8 * width - 1
    new, old = data.view(signed), base.view(signed)
    key = np.zeros(old.size, np.int64)
    if shift is not None:
        new, old = (_ordered(words, top) for words in (new, old))
        key = ((base.view(unsigned) & ((1 << top) - 1)) >> shift).astype(np.int64)
    difference = new - old
    zigzag = ((difference << 1) ^ (difference >> top)).view(unsigned)
    length = np.frexp(zigzag.astype(np.float64))[1].astype(np.int64)
    below = np.maximum(length - 4, 0)
    symbol = (length << 4) + (zigzag >> below.astype(unsigned)).astype(np.int64)
    cells = np.bincount((key << 11) + np.minimum(symbol, 2047))
    return (_bits(cells) - _bits(np.bincount(key)) + float(below.sum())) / 8


def of_values(data: Array, dtype: str) -> float:
    """Of the exponent and up to three more bits; sign and bits below count in full."""
    width, _ = FLOATS.get(dtype, (INTEGERS.get(dtype, 1), None))
    words = data.view(f"<u{width}")
    if dtype in FLOATS:
        words = (words << 1) | (words >> (8 * width - 1))
    below = max(0, 8 * width - 11)
    return (_bits(np.bincount((words >> below).astype(np.int64))) + below * words.size) / 8


def _ordered(words: Array, top: int) -> Array:
    """Sign and magnitude to two's complement, so that neighbours differ by one."""
    return words ^ ((words >> top) & ((1 << top) - 1))


def _bits(cells: Array) -> float:
    seen = cells[cells > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum())
