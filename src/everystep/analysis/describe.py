"""What one leaf looks like in numbers: norm, range, mean, and how many values are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BLOCK_ELEMENTS = 1 << 18
"""Elements that are widened to float64 at a time: what is compared stays in the cache, and memory is bounded."""


@dataclass(frozen=True)
class LeafSummary:
    """Over the finite elements; all zero for what has none, and None for what has no numbers."""

    norm: float
    """Euclidean."""
    mean: float
    low: float
    high: float
    not_finite: int
    zeros: int


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether elements have a size and a distance; ml_dtypes' kinds say 'V' and convert to float all the same."""
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.names is None and dtype.type is not np.void)


def blocks(array: Array) -> Iterator[Array]:
    """The elements in C order, as float64 or complex128, a bounded number at a time."""
    flat = array.reshape(-1)
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    for start in range(0, flat.size, BLOCK_ELEMENTS):
        yield flat[start : start + BLOCK_ELEMENTS].astype(wide)


def summarize(array: Array) -> LeafSummary | None:
    """Sums are taken in float64, whatever the leaf's own precision is."""
    if not is_numeric(array.dtype):
        return None
    squares = total = 0.0
    low, high = math.inf, -math.inf
    count = bad = zeros = 0
    for block in blocks(array):
        finite = np.isfinite(block)
        sizes = np.abs(block) if block.dtype.kind == "c" else block
        if not finite.all():
            bad += int(block.size - finite.sum())
            sizes = sizes[finite]
        if sizes.size:
            count += sizes.size
            zeros += int((sizes == 0).sum())
            squares += float(np.dot(sizes, sizes))
            total += float(sizes.sum())
            low, high = min(low, float(sizes.min())), max(high, float(sizes.max()))
    if not count:
        return LeafSummary(0.0, 0.0, 0.0, 0.0, bad, 0)
    return LeafSummary(math.sqrt(squares), total / count, low, high, bad, zeros)
