"""Which boxes of a tensor a rank of a mesh holds, as PyTorch cuts tensors; numbers only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from everystep.schema import Box

Run = tuple[int, int]
"""Positions [start, stop) along one axis."""
Split = tuple[int, int] | None
"""How a dimension of the mesh cuts: an axis of the tensor, and in how many strides; None where all hold the same."""
Index = tuple[slice, ...]


class Untold(Exception):
    """Which part of a tensor a rank holds."""


@lru_cache(maxsize=4096)
def held_boxes(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    at: tuple[int, ...],
    splits: tuple[Split, ...],
    order: tuple[tuple[int, ...], ...] = (),
) -> tuple[tuple[Box, Index], ...]:
    """The boxes that the rank at this place of a mesh holds, each with where it lies in the rank's own tensor.

    Args:
        order: the dimensions of the mesh that cut one axis, in their order, where that is not from left to right.

    Raises:
        Untold: where it cannot be told.
    """
    runs = [_runs(axis, length, mesh, at, splits, order) for axis, length in enumerate(shape)]
    placed = [[(run, position) for run, position in zip(own, _positions(own))] for own in runs]
    found = []
    for combination in itertools.product(*placed):
        box = Box(tuple(run[0] for run, _ in combination), tuple(run[1] - run[0] for run, _ in combination))
        found.append((box, tuple(slice(*position) for _, position in combination)))
    return tuple(found)


def replica(mesh: Sequence[int], at: Sequence[int], splits: Sequence[Split]) -> tuple[int, int]:
    """Which copy this rank has, and how many ranks have one."""
    number, count = 0, 1
    for size, place, split in zip(mesh, at, splits):
        if split is None:
            number, count = number * size + place, count * size
    return number, count


def _positions(runs: list[Run]) -> list[Run]:
    """Where runs lie when they are put one behind the other."""
    ends = list(itertools.accumulate(stop - start for start, stop in runs))
    return list(zip([0, *ends], ends))


def _runs(
    axis: int,
    length: int,
    mesh: tuple[int, ...],
    at: tuple[int, ...],
    splits: tuple[Split, ...],
    order: tuple[tuple[int, ...], ...],
) -> list[Run]:
    mine = [(number, split[1]) for number, split in enumerate(splits) if split is not None and split[0] == axis]
    numbers = [number for number, _ in mine]
    sizes = [mesh[number] for number in numbers]
    factors = [factor for _, factor in mine]
    if all(factor == 1 for factor in factors):
        row = next((found for found in order if sorted(found) == numbers), numbers)
        return _cut_by_turns(length, [(mesh[number], at[number]) for number in row])
    return _strided(length, sizes, [at[number] for number in numbers], factors)


def _cut_by_turns(length: int, turns: list[tuple[int, int]]) -> list[Run]:
    runs = [(0, length)] if length else []
    for parts, number in turns:
        runs = _pick(runs, parts, number, 1)
    return runs


def _strided(length: int, sizes: list[int], at: list[int], factors: list[int]) -> list[Run]:
    """With strides, a dimension of the mesh to the left cuts what one to its right has cut before it.

    Where the lengths do not come out even, the two ways to read that may differ, and nobody can tell which was meant.
    """

    def by_strides(place: Sequence[int]) -> list[Run]:
        runs = [(0, length)] if length else []
        for parts, number, factor in zip(sizes, place, factors):
            runs = _pick(runs, parts, number, factor)
        return runs

    turns = _turns(sizes, factors)
    if turns is not None and length % math.prod(sizes):
        for place in itertools.product(*(range(size) for size in sizes)):
            if by_strides(place) != _cut_by_turns(length, [(sizes[i], place[i]) for i in turns]):
                raise Untold(f"an axis of {length} that {' x '.join(map(str, sizes))} ranks cut unevenly")
    return by_strides(at)


def _turns(sizes: list[int], factors: list[int]) -> list[int] | None:
    """The order in which dimensions of the mesh cut, told from their strides; None for strides of no such order."""
    turns: list[int] = []
    for i in reversed(range(len(sizes))):
        product, at = 1, 0
        while product != factors[i] and at < len(turns):
            product, at = product * sizes[turns[at]], at + 1
        if product != factors[i]:
            return None
        turns.insert(at, i)
    return turns


def _pick(runs: list[Run], parts: int, number: int, factor: int) -> list[Run]:
    """One of `parts` parts of what these runs hold: of each of `factor` pieces of it, the part of that number."""
    length = sum(stop - start for start, stop in runs)
    found: list[Run] = []
    for piece in range(factor):
        start, stop = _chunk(length, factor, piece)
        first, last = _chunk(stop - start, parts, number)
        found += _between(runs, start + first, start + last)
    return _joined(found)


def _chunk(length: int, parts: int, number: int) -> Run:
    """As torch.chunk: all of one length but the last ones, which may be shorter, or nothing."""
    full = -(-length // parts)
    return min(full * number, length), min(full * (number + 1), length)


def _between(runs: list[Run], first: int, last: int) -> list[Run]:
    """What lies at positions [first, last) of runs that are put one behind the other."""
    found = []
    for (start, _), (begin, end) in zip(runs, _positions(runs)):
        a, b = max(first, begin), min(last, end)
        if a < b:
            found.append((start + a - begin, start + b - begin))
    return found


def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
