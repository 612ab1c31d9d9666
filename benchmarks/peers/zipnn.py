"""zipnn over each checkpoint as one file: alone, and with its own difference (XOR) to the one before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from benchmarks.peers import Array, Coded


class ZipNN(Coded):
    name = "zipnn"
    most = 5.0
    needs = ("zipnn=pip install --no-deps zipnn",)
    where = frozenset({"blocking", "link", "whole"})
    options: ClassVar[dict[str, Any]] = {}

    def encode(self, data: Array, base: Array | None) -> Iterable[Any]:
        """From a copy where the data is needed again: compress() changes its input in place."""
        whole = bytearray(data) if self.leans else data.base
        if base is None:
            yield self._made().compress(whole)
        else:
            yield self._made(**self.options).compress(whole, delta_second_data=bytearray(base))

    def decode(self, stored: bytes, base: Array | None) -> Array:
        if base is None:
            plain = self._made().decompress(stored)
        else:
            plain = self._made(**self.options).decompress(stored, delta_second_data=bytearray(base))
        return np.frombuffer(plain if isinstance(plain, bytearray) else bytearray(plain), np.uint8)

    def _made(self, **options: Any) -> Any:
        import zipnn

        dtype = str(self.flat.dtype).removeprefix("torch.")
        return zipnn.ZipNN(bytearray_dtype=dtype, input_format="byte", **options)


class ZipNNDelta(ZipNN):
    name = "zipnn XOR"
    where = frozenset({"blocking", "restore", "whole"})
    leans = True
    hungry = True
    options: ClassVar[dict[str, Any]] = {"delta_compressed_type": "byte"}


PEERS = (ZipNN, ZipNNDelta)
