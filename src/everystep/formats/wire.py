"""The encoding of protocol buffers on the wire, as much of it as a stream of small messages needs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from everystep.formats.file import Array, Source

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
RECORD_MAX = 64 << 20
"""The size that the libraries of most languages take for one message."""
VARINT_BYTES = 10
_WINDOW_MIN, _WINDOW_MAX = 1 << 12, 1 << 20
_UINT64 = (1 << 64) - 1


class Malformed(ValueError):
    """What no writer makes; whoever reads a file says which it is."""


Field = tuple[int, int, Any]
"""(number, wire type, value): an int, or a memoryview of what has a length."""


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; what is negative as 64 bits."""
    value &= _UINT64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    return varint(field << 3 | VARINT) + varint(value)


def double(field: int, value: float) -> bytes:
    return varint(field << 3 | FIXED64) + struct.pack("<d", value)


def fixed32(field: int, value: int) -> bytes:
    return varint(field << 3 | FIXED32) + struct.pack("<I", value)


def message(field: int, *parts: bytes) -> bytes:
    """Text, bytes or a message within another: it has a length."""
    body = b"".join(parts)
    return varint(field << 3 | LENGTH) + varint(len(body)) + body


def head(field: int, nbytes: int) -> bytes:
    """What stands before `nbytes` bytes of text, bytes or a message."""
    return varint(field << 3 | LENGTH) + varint(nbytes)


def zigzag(value: int) -> int:
    """Small numbers of either sign as small ones without."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unzigzag(value: int) -> int:
    return value >> 1 if not value & 1 else -(value >> 1) - 1


def signed(value: int) -> int:
    """What `varint` made of a negative number."""
    return value - (1 << 64) if value >> 63 else value


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of a message, in the order that they stand in.

    Raises:
        Malformed: for what is not one.
    """
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        field, wire = key >> 3, key & 7
        if not 0 < field < 1 << 29:
            raise Malformed("a field without a number")
        if wire == VARINT:
            value, at = read_varint(data, at)
            yield field, wire, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire)
        if size is None:
            if wire != LENGTH:
                raise Malformed(f"a field of wire type {wire}")
            size, at = read_varint(data, at)
        if size > len(data) - at:
            raise Malformed("a field that is longer than its message")
        part, at = data[at : at + size], at + size
        yield field, wire, part if wire == LENGTH else int.from_bytes(part, "little")


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = 0
    for shift in range(0, 7 * VARINT_BYTES, 7):
        if at >= len(data):
            raise Malformed("a number that is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _UINT64:
                break
            return value, at
    raise Malformed("a number of more than 64 bits")


class Stream:
    """The bytes of a file from its beginning, a window of them at a time; `seen` is told all that is not skipped. The
    window grows as long as nothing is skipped."""

    def __init__(self, source: Source, seen: Callable[[memoryview], None]) -> None:
        self._source, self._seen = source, seen
        self._held: memoryview = memoryview(b"")
        self._begin = self._at = 0
        self._window = _WINDOW_MIN

    @property
    def left(self) -> int:
        return self._source.size - self._begin - self._at

    def ahead(self, count: int) -> memoryview:
        """The next bytes, as many of `count` as there are, which stay ahead.

        Raises:
            Damaged, StorageError: if the file cannot be read.
        """
        count = min(count, self.left)
        if count > len(self._held) - self._at:
            self._begin += self._at
            data: Array = self._source.bytes_at(
                self._begin, min(max(count, self._window), self._source.size - self._begin)
            )
            self._held, self._at, self._window = memoryview(data), 0, min(2 * self._window, _WINDOW_MAX)
        return self._held[self._at : self._at + count]

    def take(self, count: int) -> memoryview:
        """The next bytes; Damaged if there are fewer."""
        data = self.ahead(count)
        if len(data) < count:
            raise self._source.damaged(f"the file ends {count - len(data)} bytes too early")
        self._at += count
        self._seen(data)
        return data

    def skip(self, count: int) -> None:
        if count > self.left:
            raise self._source.damaged(f"the file ends {count - self.left} bytes too early")
        self._at += count
        if self._at > len(self._held):
            self._begin, self._at, self._held = self._begin + self._at, 0, memoryview(b"")
            self._window = _WINDOW_MIN

    def length(self) -> tuple[int, int]:
        """(bytes of the record ahead, bytes that say so).

        Raises:
            Malformed: if there is none, or it is larger than any may be.
        """
        size, width = read_varint(self.ahead(VARINT_BYTES), 0)
        if size > RECORD_MAX:
            raise Malformed(f"a record of {size} bytes, at most {RECORD_MAX}")
        return size, width
