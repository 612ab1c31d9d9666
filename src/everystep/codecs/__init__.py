"""Bytes to fewer bytes and exactly back: pure functions, and the closed table of codecs that a manifest may name."""

from __future__ import annotations

from typing import Any

import numpy as np

from everystep.codecs import choice, delta, packed, planes
from everystep.codecs.kinds import DELTA, LEANING, NAMES, PACKED, PLANES, RAW, SPARSE
from everystep.codecs.native import HAS_KERNEL, KERNEL
from everystep.errors import Damaged

__all__ = ["DELTA", "HAS_KERNEL", "KERNEL", "LEANING", "NAMES", "PACKED", "PLANES", "RAW", "SPARSE", "decode", "encode"]
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
        sample_bytes, worth_ratio: a plane is kept raw unless a sample of it shrinks below this share; 0 bytes: all is.
        base: flat uint8 of equal length that decoding will have; others are not used.
        base_ratio: the base is used only where a sample comes below this share of standing alone.
    """
    if base is not None and base.nbytes == data.nbytes > 0 and sample_bytes > 0:
        found = choice.against(data, base, dtype, level, sample_bytes, worth_ratio, base_ratio)
        if found is not None and sum(map(len, found[1])) < data.nbytes:
            return found
    pieces = planes.encode(data, planes.form_of(dtype, data.nbytes), level, sample_bytes, worth_ratio)
    if pieces is None or sum(map(len, pieces)) >= data.nbytes:
        return RAW, [memoryview(data)]
    return PLANES, pieces


def decode(codec: int, stored: memoryview, nbytes: int, base: Array | None = None, out: Array | None = None) -> Array:
    """The flat uint8 array of `nbytes` that was encoded.

    Args:
        base: what it was encoded against, for a delta.
        out: memory for the result, which may be that of the base.

    Raises:
        Damaged: if the stored bytes cannot be what `encode` made.
    """
    if codec in (PACKED, SPARSE):
        into = np.empty(nbytes, np.uint8) if out is None else out
        packed.unpack(stored, _there(base), into, sparse=codec == SPARSE)
        return into
    if codec == PLANES:
        return planes.decode(stored, nbytes, out)
    if codec == RAW:
        if len(stored) != nbytes:
            raise Damaged(f"a raw chunk of {len(stored)} bytes where {nbytes} belong")
        data = np.frombuffer(stored, np.uint8)
    elif codec == DELTA:
        data = delta.decode(stored, _there(base), nbytes)
    else:
        raise Damaged(f"unknown codec {codec}", do="was it written by a newer everystep?")
    if out is None:
        return data
    out[:] = data
    return out


def _there(base: Array | None) -> Array:
    if base is None:
        raise Damaged("a delta without its base", do="run fsck")
    return base
