"""zstd over each checkpoint as one file: level 3, all cores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import zstandard

from benchmarks.peers import Array, Coded


class Zstd(Coded):
    name = "zstd per file"
    most = 3.0
    needs = ("zstandard",)
    where = frozenset({"blocking", "link", "whole"})

    def encode(self, data: Array, base: Array | None) -> Iterable[Any]:
        yield zstandard.ZstdCompressor(level=3, threads=-1).compress(memoryview(data))

    def decode(self, stored: bytes, base: Array | None) -> Array:
        out = np.empty(self.flat.nbytes, np.uint8)
        zstandard.ZstdDecompressor().stream_reader(stored).readinto(memoryview(out))
        return out


PEERS = (Zstd,)
