"""Differences of floats under gzip, added up again to load: small tools do this, and it is not exact."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from benchmarks.peers import Array, Coded


class FloatDifference(Coded):
    name = "float difference, gzip"
    where = frozenset()  # slow, and wrong: only where it is asked for
    leans = True
    exact = False

    def encode(self, data: Array, base: Array | None) -> Iterable[Any]:
        """Differences to the values that were saved: its reader finds others, and its errors add up."""
        yield gzip.compress(data if base is None else self._each(torch.sub, data, base), 6)

    def decode(self, stored: bytes, base: Array | None) -> Array:
        difference = np.frombuffer(bytearray(gzip.decompress(stored)), np.uint8)
        return difference if base is None else self._each(torch.add, base, difference)

    def _each(self, call: Any, one: Array, other: Array) -> Array:
        """Tensor by tensor, in its own type."""
        out = np.empty_like(one)
        states = [self.flat.state(each) for each in (one, other, out)]
        for part, values in states[0].items():
            for name, value in values.items():
                states[2][part][name].copy_(call(value, states[1][part][name]))
        return out


PEERS = (FloatDifference,)
