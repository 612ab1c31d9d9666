"""Bytes to fewer bytes and exactly back: pure functions, and the closed table of codecs that a manifest may name."""

from __future__ import annotations

from typing import Any

import numpy as np

from everystep.codecs import choice, delta, planes
from everystep.errors import Damaged

RAW = 0
PLANES = 1
DELTA = 2
NAMES = {RAW: "raw", PLANES: "planes", DELTA: "delta"}
Array = np.ndarray[Any, Any]


def encode(
    data: Array,
    dtype: str,
    level: int,
    sample_bytes: int,
    worth_ratio: float,
    base: Array | None = None,
    base_ratio: float = 0.97,
) -> tuple[int, list[Any]]:
    """(codec, pieces) of a flat uint8 array; never larger than raw.

    Args:
        dtype: the element type's name, a hint for the split into planes.
        level: of zstd.
        sample_bytes, worth_ratio: a plane is kept raw unless a sample of it shrinks below this share.
        base: flat uint8 of equal length that decoding will have; others are not used.
        base_ratio: the base is used only where a sample comes below this share of standing alone.
    """
    if base is not None and base.nbytes == data.nbytes > 0:
        form = choice.delta_form(data, base, dtype, level, sample_bytes, base_ratio)
        pieces = delta.encode(data, base, form, level, sample_bytes, worth_ratio) if form is not None else None
        if pieces is not None and sum(map(len, pieces)) < data.nbytes:
            return DELTA, pieces
    pieces = planes.encode(data, planes.form_of(dtype, data.nbytes), level, sample_bytes, worth_ratio)
    if pieces is None or sum(map(len, pieces)) >= data.nbytes:
        return RAW, [memoryview(data)]
    return PLANES, pieces


def decode(
    codec: int, stored: memoryview, nbytes: int, base: Array | None = None, out: Array | None = None
) -> Array:
    """The flat uint8 array of `nbytes` that was encoded.

    Args:
        base: what it was encoded against, for a delta.
        out: memory for the result, which may be that of the base.

    Raises:
        Damaged: if the stored bytes cannot be what `encode` made.
    """
    data = _decode(codec, stored, nbytes, base)
    if out is None:
        return data
    out[:] = data
    return out


def _decode(codec: int, stored: memoryview, nbytes: int, base: Array | None) -> Array:
    if codec == RAW:
        if len(stored) != nbytes:
            raise Damaged(f"a raw chunk of {len(stored)} bytes where {nbytes} belong")
        return np.frombuffer(stored, np.uint8)
    if codec == PLANES:
        return planes.decode(stored, nbytes)
    if codec == DELTA:
        if base is None:
            raise Damaged("a delta without its base", do="run fsck")
        return delta.decode(stored, base, nbytes)
    raise Damaged(f"unknown codec {codec}", do="was it written by a newer everystep?")
