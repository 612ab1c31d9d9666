"""Bytes to fewer bytes and exactly back: pure functions, and the closed table of codecs that a manifest may name."""

from __future__ import annotations

from typing import Any

import numpy as np

from everystep.codecs import planes
from everystep.errors import Damaged

RAW = 0
PLANES = 1
NAMES = {RAW: "raw", PLANES: "planes"}
Array = np.ndarray[Any, Any]


def encode(data: Array, dtype: str, level: int, sample_bytes: int, worth_ratio: float) -> tuple[int, list[Any]]:
    """(codec, pieces) of a flat uint8 array; never larger than raw.

    Args:
        dtype: the element type's name, a hint for the split into planes.
        level: of zstd.
        sample_bytes, worth_ratio: a plane is kept raw unless a sample of it shrinks below this share.
    """
    pieces = planes.encode(data, planes.form_of(dtype, data.nbytes), level, sample_bytes, worth_ratio)
    if pieces is None or sum(len(piece) for piece in pieces) >= data.nbytes:
        return RAW, [memoryview(data)]
    return PLANES, pieces


def decode(codec: int, stored: memoryview, nbytes: int) -> Array:
    """The flat uint8 array of `nbytes` that was encoded.

    Raises:
        Damaged: if the stored bytes cannot be what `encode` made.
    """
    if codec == RAW:
        if len(stored) != nbytes:
            raise Damaged(f"a raw chunk of {len(stored)} bytes where {nbytes} belong")
        return np.frombuffer(stored, np.uint8)
    if codec == PLANES:
        return planes.decode(stored, nbytes)
    raise Damaged(f"unknown codec {codec}", do="was it written by a newer everystep?")
