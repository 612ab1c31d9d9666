"""What changed between two states: leaf by leaf in bits and in distance, and the plain values beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep.analysis.describe import Array, blocks, is_numeric

SAME, CHANGED, ADDED, REMOVED, RESHAPED = "same", "changed", "added", "removed", "reshaped"


@dataclass(frozen=True)
class LeafChange:
    """One leaf of two states.

    `changed` is the share of elements of which any bit differs. `distance` is the Euclidean norm of the difference over
    that of the first (inf if that is zero), `largest` its largest absolute element; both over elements that are finite
    in both states, and None for what has no numbers.
    """

    path: str
    kind: str
    changed: float = 0.0
    distance: float | None = None
    largest: float | None = None
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class ValueChange:
    """One plain value of two nested structures."""

    path: str
    kind: str
    before: Any = None
    after: Any = None


def form(array: Array) -> str:
    """dtype and shape, as `float32[512, 768]`."""
    return f"{array.dtype.name}{list(array.shape)}"


def compare_leaf(path: str, before: Array | None, after: Array | None) -> LeafChange:
    """One leaf of two states; None where a state has none of that path."""
    if before is None or after is None:
        if after is not None:
            return LeafChange(path, ADDED, 1.0, after=form(after))
        return LeafChange(path, REMOVED, 1.0, before=form(before) if before is not None else "")
    if before.dtype != after.dtype or before.shape != after.shape:
        return LeafChange(path, RESHAPED, 1.0, before=form(before), after=form(after))
    share = _changed_share(before, after)
    distance, largest = _distance(before, after) if share and is_numeric(before.dtype) else (0.0, 0.0)
    numbers = is_numeric(before.dtype)
    return LeafChange(
        path, CHANGED if share else SAME, share,
        distance if numbers else None, largest if numbers else None, form(before), form(after),
    )  # fmt: skip


def _changed_share(before: Array, after: Array) -> float:
    """Share of elements whose bits differ: NaN equals the same NaN, and 0.0 differs from -0.0."""
    if before.size == 0 or before.dtype.itemsize == 0:
        return 0.0
    width = before.dtype.itemsize
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(-1, width) for x in (before, after))
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(width)
    if word is not None:
        return float((a.view(word) != b.view(word)).mean())
    return float((a != b).any(axis=1).mean())


def _distance(before: Array, after: Array) -> tuple[float, float]:
    squares = own = largest = 0.0
    for a, b in zip(blocks(before), blocks(after)):
        finite = np.isfinite(a) & np.isfinite(b)
        step = np.abs(b[finite] - a[finite])
        sizes = np.abs(a[finite])
        squares += float(np.dot(step, step))
        own += float(np.dot(sizes, sizes))
        largest = max(largest, float(step.max(initial=0.0)))
    if own == 0.0:
        return (math.inf if squares else 0.0), largest
    return math.sqrt(squares / own), largest


def compare_values(before: Any, after: Any, path: str = "") -> Iterator[ValueChange]:
    """Plain values of two nested structures that differ; arrays are left to `compare_leaf`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            at = f"{path}/{key}" if path else str(key)
            if key not in before:
                if (value := _plain_part(after[key])) is not None:
                    yield ValueChange(at, ADDED, after=value)
            elif key not in after:
                if (value := _plain_part(before[key])) is not None:
                    yield ValueChange(at, REMOVED, before=value)
            else:
                yield from compare_values(before[key], after[key], at)
    elif isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after):
        for index, (a, b) in enumerate(zip(before, after)):
            yield from compare_values(a, b, f"{path}/{index}")
    elif isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        return
    elif not _equal(before, after):
        yield ValueChange(path, CHANGED, before, after)


def _plain_part(value: Any) -> Any:
    """A value without the arrays in it; None if nothing else is."""
    if isinstance(value, np.ndarray):
        return None
    if isinstance(value, dict):
        kept = {key: part for key, inner in value.items() if (part := _plain_part(inner)) is not None}
        return kept or (None if value else value)
    if isinstance(value, (list, tuple)):
        parts = [part for inner in value if (part := _plain_part(inner)) is not None]
        return parts or (None if value else value)
    return value


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (float, complex)):
        return repr(a) == repr(b)
    return bool(a == b)
