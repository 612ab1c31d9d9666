"""A rectangular part of a leaf at global coordinates."""

from __future__ import annotations

import math

import msgspec

AXES_MAX = 64
"""NumPy's own limit; a product of more axes than any array has costs time that grows with their square."""


class Box(msgspec.Struct, frozen=True, gc=False):
    """`start` and `shape` in elements per axis; with `flat`, one axis over the leaf's elements in C order."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    flat: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the box lies within a leaf of this global shape."""
        if len(shape) > AXES_MAX:
            return False
        whole = (math.prod(shape),) if self.flat else shape
        return len(whole) == len(self.start) == len(self.shape) and all(
            a >= 0 and n >= 0 and a + n <= limit for a, n, limit in zip(self.start, self.shape, whole)
        )

    def index(self) -> tuple[slice, ...]:
        """The slices that cut the box out of a whole leaf (of its flat form, if `flat`)."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape))

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        return Box((0,) * len(shape), tuple(shape))


NOTHING = Box((0,), (0,), flat=True)
"""The box of a rank that holds nothing of a leaf, or leaves it to others."""
