"""Boxes against boxes: what two have in common, and the boxes that make up a range of elements."""

from __future__ import annotations

import math
from collections.abc import Iterator

from everystep.schema import Box

Range = tuple[int, int]


def range_of(box: Box, shape: tuple[int, ...]) -> Range | None:
    """The elements [start, stop) of a leaf, in C order, that a box is; None for a box of elements that lie apart."""
    if box.flat:
        return box.start[0], box.start[0] + box.size
    start, stride, whole = 0, 1, True
    for at, size, length in zip(reversed(box.start), reversed(box.shape), reversed(shape)):
        if not whole and size != 1:
            return None
        start, stride, whole = start + at * stride, stride * length, whole and size == length
    return start, start + box.size


def common(one: Box, other: Box) -> Box | None:
    """What two boxes of a leaf have in common, neither of them flat; None for nothing."""
    starts, sizes = [], []
    for a, n, b, m in zip(one.start, one.shape, other.start, other.shape):
        first = max(a, b)
        size = min(a + n, b + m) - first
        if size <= 0:
            return None
        starts.append(first)
        sizes.append(size)
    return Box(tuple(starts), tuple(sizes))


def within(box: Box, outer: Box) -> Box:
    """A box as seen from where another begins."""
    return Box(tuple(a - b for a, b in zip(box.start, outer.start)), box.shape)


def boxes_of(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The boxes that elements [start, stop) of an array are made of, in C order: at most two for each axis."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # all in one row
        yield from _below(last, start - last * row, stop - last * row, shape)
        return
    yield from _below(first - 1, start - (first - 1) * row, row, shape) if start < first * row else ()
    if first < last:
        yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _below(last, 0, stop - last * row, shape)


def _below(index: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The same for the elements of one row."""
    for box in boxes_of(start, stop, shape[1:]):
        yield Box((index, *box.start), (1, *box.shape))


def without(span: Range, taken: list[Range]) -> list[Range]:
    """What of a range is not taken yet; takes it. `taken` is kept in order, and what touches in one."""
    left, at = [], span[0]
    kept: list[Range] = []
    first, last = span
    for start, stop in taken:
        if stop < span[0] or start > span[1]:
            kept.append((start, stop))
            continue
        if at < start:
            left.append((at, min(start, span[1])))
        at = max(at, stop)
        first, last = min(first, start), max(last, stop)
    if at < span[1]:
        left.append((at, span[1]))
    if first < last:
        kept.append((first, last))
    taken[:] = sorted(kept)
    return left
