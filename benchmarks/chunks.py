"""The arrays of a checkpoint as a save lays them out: chunks of one role and one type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.sequences import Array
from everystep.schema.dtype import name_of
from everystep.settings import DEFAULT


@dataclass
class Chunk:
    dtype: str
    data: Array


def chunks(checkpoint: dict[str, Array], roles: dict[str, str], role: str) -> Iterator[Chunk]:
    """Large leaves for themselves, small ones of one type together."""
    small: dict[str, list[Array]] = {}
    for name, value in checkpoint.items():
        if roles[name] != role:
            continue
        flat, dtype = np.ascontiguousarray(value).reshape(-1).view(np.uint8), name_of(value.dtype)
        if flat.nbytes < DEFAULT.small_leaf_bytes:
            small.setdefault(dtype, []).append(flat)
        else:
            yield from _cut(dtype, flat)
    for dtype, flats in small.items():
        yield from _cut(dtype, np.concatenate(flats))


def _cut(dtype: str, flat: Array) -> Iterator[Chunk]:
    size = DEFAULT.chunk_bytes_max
    return (Chunk(dtype, np.array(flat[start : start + size])) for start in range(0, flat.nbytes, size))
