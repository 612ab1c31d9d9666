"""The elements of HDF5's datasets, unpacked within bounds."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from everystep.errors import Damaged, Unsupported
from everystep.formats.file import Array, Source, is_whole
from everystep.formats.hdf5_format import Chunk
from everystep.formats.hdf5_types import text_of
from everystep.formats.lists import shaped
from everystep.formats.zipped import GROW_MIN, GROW_TIMES

DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3
FILTERS = (DEFLATE, SHUFFLE, FLETCHER32)
"""Ways of packing that are unpacked here."""
_CHUNKS_MIN, _CHUNK_BYTES = 1 << 20, 16
_HEAP, _HEAP_HEAD, _OBJECT_HEAD = b"GCOL\1", 16, 16
_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
_NOWHERE = (0, (1 << 64) - 1)


class Elements:
    """Reads elements, and counts what they cost: what lies in the file is read once, what grows has a limit."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._stored_left = self._heap_left = source.size
        self._grown_left = max(GROW_MIN, GROW_TIMES * source.size)
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}

    def contiguous(self, name: str, start: int, nbytes: int) -> Array:
        self._store(name, nbytes)
        return self._source.bytes_at(start, nbytes)

    def array(self, name: str, data: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        try:
            made: Array = np.ndarray(shape, dtype, data if len(data) else bytearray(1))
        except (ValueError, MemoryError) as error:
            raise self._damaged(name, "no array can have its shape") from error
        if not is_whole(made):
            raise self._damaged(name, "it has truth values that are neither 0 nor 1")
        return made

    def filled(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], fill: Any) -> Array:
        """An array that was never written, or not all of it."""
        self.grow(name, math.prod(shape) * dtype.itemsize)
        try:
            return np.zeros(shape, dtype) if fill is None else np.full(shape, fill, dtype)
        except (ValueError, MemoryError) as error:
            raise self._damaged(name, "no array can have its shape") from error

    def chunked(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        fill: Any,
        chunk: tuple[int, ...],
        places: Iterable[Chunk],
        filters: list[Any],
    ) -> Array:
        """An array, chunk by chunk.

        Args:
            fill: what an element is where no chunk is; None for zero.
            places: of the chunks that are there; asked for only once it is known that they are not too many.
            filters: (id, values) in the order in which they packed.
        """
        size = math.prod(chunk) * dtype.itemsize
        grid = math.prod(-(-n // c) for n, c in zip(shape, chunk))
        if grid > _CHUNKS_MIN + self._source.size // _CHUNK_BYTES:
            raise self._too_much(name)
        self.grow(name, grid * size)
        whole = self.filled(name, dtype, shape, fill)
        found: dict[tuple[int, ...], Chunk] = {}
        for info in places:
            if info.chunk_offset in found or len(found) >= grid:
                raise self._damaged(name, "it has a chunk twice, or more than fit")
            found[info.chunk_offset] = info
        for offset, info in found.items():
            if len(offset) != len(chunk) or any(at % c or at >= n for at, c, n in zip(offset, chunk, whole.shape)):
                raise self._damaged(name, "a chunk lies outside of it")
            self._store(name, info.size)
            raw = self._source.bytes_at(info.byte_offset, info.size)
            data = self._unpacked(name, raw, size, filters, info.filter_mask)
            block: Array = np.ndarray(chunk, whole.dtype, data)
            inside = tuple(slice(0, n - at) for at, n in zip(offset, whole.shape))
            whole[tuple(slice(at, at + c) for at, c in zip(offset, chunk))] = block[inside]
        if not is_whole(whole):
            raise self._damaged(name, "it has truth values that are neither 0 nor 1")
        return whole

    def _unpacked(self, name: str, data: Array, size: int, filters: list[Any], left_out: int) -> Array:
        for at, (kind, values) in reversed(list(enumerate(filters))):
            if left_out >> at & 1:
                continue
            if kind == FLETCHER32:
                data = self._checked(name, data)
            elif kind == SHUFFLE:
                data = _unshuffled(data, values[0] if values else 1)
            else:
                try:
                    stream = zlib.decompressobj()
                    # A little more than a chunk, so that a false claim shows, and for the checksum within.
                    data = np.frombuffer(bytearray(stream.decompress(data.data, size + 8)), np.uint8)
                except (zlib.error, MemoryError) as error:
                    raise self._damaged(name, f"a chunk does not unpack: {error}") from error
                if not stream.eof:
                    raise self._damaged(name, "a chunk does not unpack to its size")
        if len(data) != size:
            raise self._damaged(name, f"a chunk has {len(data)} bytes, not {size}")
        return data

    def _checked(self, name: str, data: Array) -> Array:
        body, checksum = data[:-4], data[-4:].tobytes()
        if len(data) < 4 or fletcher32(body) not in (checksum, checksum[1::-1] + checksum[:1:-1]):
            raise self._damaged(name, "a chunk is not what was written (checksum)")
        return body

    # text of any length --------------------------------------------------------------------------------------------

    def texts(self, name: str, data: Array, shape: tuple[int, ...]) -> Any:
        """Text in lists, from the heaps that the elements point into."""
        places = data.view(_REFERENCE)
        self.grow(name, int(places["length"].sum(dtype=np.uint64)))
        return shaped([self._text(name, *place) for place in places.tolist()], shape)

    def _text(self, name: str, length: int, address: int, index: int) -> str | bytes:
        if not length or address in _NOWHERE:
            return ""
        start, size = self._heap(name, address).get(index, (0, -1))
        if length > size:
            raise self._damaged(name, "a text that points beside its heap")
        return text_of(self._source.bytes_at(start, length).tobytes())

    def _heap(self, name: str, address: int) -> dict[int, tuple[int, int]]:
        """Where the objects of a heap lie, by their numbers."""
        if address in self._heaps:
            return self._heaps[address]
        head = self._source.bytes_at(address, _HEAP_HEAD).tobytes()
        size = int.from_bytes(head[8:], "little")
        self._heap_left -= size
        if not head.startswith(_HEAP) or self._heap_left < 0 or size < _HEAP_HEAD:
            raise self._damaged(name, "a text that points to no heap")
        body = self._source.bytes_at(address, size)
        found: dict[int, tuple[int, int]] = {}
        at = _HEAP_HEAD
        while at + _OBJECT_HEAD <= size:
            entry = body[at : at + _OBJECT_HEAD].tobytes()
            index, nbytes = int.from_bytes(entry[:2], "little"), int.from_bytes(entry[8:], "little")
            if not index:
                break  # the rest is free
            if nbytes > size - at - _OBJECT_HEAD or index in found:
                raise self._damaged(name, "a heap that makes no sense")
            found[index] = (address + at + _OBJECT_HEAD, nbytes)
            at += _OBJECT_HEAD + nbytes + -nbytes % 8
        self._heaps[address] = found
        return found

    def grow(self, name: str, nbytes: int) -> None:
        self._grown_left -= nbytes
        if self._grown_left < 0:
            raise self._too_much(name)

    def _store(self, name: str, nbytes: int) -> None:
        self._stored_left -= nbytes
        if self._stored_left < 0:
            raise self._damaged(name, "it overlaps others, or is larger than the file")

    def _too_much(self, name: str) -> Unsupported:
        do = "write it again without compression, if you trust it"
        what = f"{name[:200]!r} unpacks to much more than the file has"
        return Unsupported(what, where=self._source.name, do=do)

    def _damaged(self, name: str, what: str) -> Damaged:
        return self._source.damaged(f"{name[:200]!r}: {what}")


def _unshuffled(data: Array, size: int) -> Array:
    """Bytes of equal place lie together; what is left over at the end stays there."""
    if size < 2 or len(data) < size:
        return data
    count = len(data) // size
    body = data[: count * size].reshape(size, count).T.reshape(-1)
    return np.concatenate([body, data[count * size :]])


def fletcher32(data: Array) -> bytes:
    """HDF5's checksum of a chunk."""
    even = np.append(data, np.zeros(len(data) % 2, np.uint8)) if len(data) % 2 else data
    words = even.view(">u2").astype(np.uint64)
    one = other = 0
    for at in range(0, len(words), 1 << 16):
        part = words[at : at + (1 << 16)]
        weights = np.arange(len(part), 0, -1, dtype=np.uint64)
        other = (other + one * len(part) + int((part * weights).sum())) % 65535
        one = (one + int(part.sum())) % 65535
    nonzero = bool(len(words)) and bool(words.any())
    one, other = (n or 65535 * nonzero for n in (one, other))
    return (other << 16 | one).to_bytes(4, "little")
