"""Several requests in flight at once, as many as a storage says are worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

from everystep.seam import Seam

AHEAD = 16
"""Answers that may wait, for each request in flight, until one that is slow has come: a request in a thousand takes a
second, and 1,024 receipts would stand still for each such."""
T = TypeVar("T")
R = TypeVar("R")


def together(storage: Any, seam: Seam, request: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """The answers in the order of the items; the first error ends it."""
    width = min(storage.fan_out, len(items))
    if width <= 1:
        yield from map(request, items)
        return
    with closing(seam.pool(width, "everystep-requests")) as pool:
        yield from pool.map(request, items, AHEAD * width)
