"""LevelDB's table files, in which TensorFlow keeps the names of a checkpoint: sorted keys with values, in blocks."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from everystep.errors import Unsupported
from everystep.formats.file import Source
from everystep.formats.tf_bundle_crc import crc32c, mask
from everystep.formats.wire import Malformed, read_varint, varint

FOOTER, MAGIC = 48, b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_TRAILER = struct.Struct("<BI")
_BLOCK, _RESTART_EVERY = 4096, 16
_PLAIN, _SNAPPY = 0, 1
_GROW_MIN, _GROW_TIMES = 16 << 20, 64
"""What compressed blocks, and keys that share their beginnings, may grow to: a file can claim any size of both."""


def is_table(source: Source) -> bool:
    size = source.size
    return size >= FOOTER and source.bytes_at(size - len(MAGIC), len(MAGIC)).tobytes() == MAGIC


def entries(source: Source) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values, in the order of the keys.

    Raises:
        Damaged: for what no writer of tables makes; every block is checked.
        Unsupported: for a table that grows beyond all measure.
    """
    work = _Reading(source)
    try:
        if source.size < FOOTER:
            raise Malformed("it is too short to have an end")
        footer = memoryview(source.bytes_at(source.size - FOOTER, FOOTER))
        if footer[-len(MAGIC) :] != MAGIC:
            raise Malformed("its end is not that of a table")
        _, at = _handle(footer, 0)
        place, _ = _handle(footer, at)
        last: bytes | None = None
        for _, value in work.block(place):
            place, end = _handle(memoryview(value), 0)
            if end != len(value):
                raise Malformed("the place of a block makes no sense")
            for key, body in work.block(place):
                if last is not None and key <= last:
                    raise Malformed("its names are not in order")
                last = key
                yield key, body
    except (ValueError, IndexError, struct.error) as error:
        raise source.damaged(f"not a whole index: {error}") from error


class _Reading:
    """Reads blocks, and counts what they cost."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._stored_left = source.size
        self._left = max(_GROW_MIN, _GROW_TIMES * source.size)

    def block(self, place: tuple[int, int]) -> list[tuple[bytes, bytes]]:
        start, size = place
        self._stored_left -= size
        if self._stored_left < 0:
            raise Malformed("its blocks overlap")
        data = memoryview(self._source.bytes_at(start, size + _TRAILER.size))
        kind, checksum = _TRAILER.unpack(data[size:])
        if mask(crc32c(data[: size + 1])) != checksum:
            raise Malformed(f"the block at {start} is not what was written (CRC)")
        if kind == _SNAPPY:
            data = memoryview(unpacked(data[:size], self._left))
            self._spend(len(data))
        elif kind == _PLAIN:
            data = data[:size]
        else:
            do = "write it again with a release of TensorFlow"
            raise Unsupported(f"an index packed by an unknown method ({kind})", where=self._source.name, do=do)
        return self._pairs(data)

    def _pairs(self, data: memoryview) -> list[tuple[bytes, bytes]]:
        count = int.from_bytes(data[-4:], "little")
        end = len(data) - 4 * (count + 1)
        if len(data) < 4 or end < 0:
            raise Malformed("a block without an end")
        pairs: list[tuple[bytes, bytes]] = []
        key, at = b"", 0
        while at < end:
            shared, at = read_varint(data, at)
            more, at = read_varint(data, at)
            size, at = read_varint(data, at)
            if shared > len(key) or more + size > end - at:
                raise Malformed("an entry that is longer than its block")
            key = key[:shared] + data[at : at + more].tobytes()
            at += more
            self._spend(len(key))
            pairs.append((key, data[at : at + size].tobytes()))
            at += size
        return pairs

    def _spend(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            do = "is it a checkpoint of TensorFlow at all?"
            raise Unsupported("an index that unpacks to much more than its file", where=self._source.name, do=do)


def _handle(data: memoryview, at: int) -> tuple[tuple[int, int], int]:
    start, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return (start, size), at


def unpacked(data: memoryview, limit: int) -> bytes:
    """What Snappy packed: literal bytes, and copies of what came out before.

    Raises:
        Malformed: for what it does not make, or more than `limit` bytes.
    """
    size, at = read_varint(data, 0)
    if size > min(limit, 32 * len(data)):  # three bytes copy 64 at most
        raise Malformed("a packed block that claims to be too large")
    out = bytearray()
    while at < len(data):
        tag = data[at]
        kind, length = tag & 3, tag >> 2
        at += 1
        if kind == 0:
            more = max(0, length - 59)
            length = int.from_bytes(data[at : at + more], "little") + 1 if more else length + 1
            at += more
            part = data[at : at + length].tobytes()
            if len(part) < length:
                raise Malformed("a packed block that is cut off")
            out += part
            at += length
        else:
            width = (1, 2, 4)[kind - 1]
            if at + width > len(data):
                raise Malformed("a packed block that is cut off")
            back = int.from_bytes(data[at : at + width], "little") | ((tag >> 5) << 8 if kind == 1 else 0)
            length = (length & 7) + 4 if kind == 1 else length + 1
            at += width
            if not 0 < back <= len(out):
                raise Malformed("a packed block that copies from before its beginning")
            begin = len(out) - back
            part = bytes(out[begin : begin + length])
            out += (part * (length // back + 1))[:length]
        if len(out) > size:
            raise Malformed("a packed block that is larger than it says")
    if len(out) != size:
        raise Malformed("a packed block that is smaller than it says")
    return bytes(out)


def table(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A table file of keys in ascending order, not compressed: every release of TensorFlow reads it."""
    out, index, block = bytearray(), _Block(), _Block()
    last = b""
    for key, value in pairs:
        if block.nbytes >= _BLOCK:
            index.add(last, _put(out, block))
            block = _Block()
        block.add(key, value)
        last = key
    index.add(last + b"\0", _put(out, block))
    footer = _put(out, _Block()) + _put(out, index)
    return bytes(out + footer.ljust(FOOTER - len(MAGIC), b"\0") + MAGIC)


class _Block:
    """Entries that leave out what their key has in common with the one before."""

    def __init__(self) -> None:
        self._out, self._restarts = bytearray(), [0]
        self._count, self._last = 0, b""

    @property
    def nbytes(self) -> int:
        return len(self._out)

    def add(self, key: bytes, value: bytes) -> None:
        shared = 0
        if self._count and self._count % _RESTART_EVERY == 0:
            self._restarts.append(len(self._out))
        else:
            most = min(len(key), len(self._last))
            shared = next((at for at in range(most) if key[at] != self._last[at]), most)
        self._out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        self._count, self._last = self._count + 1, key

    def whole(self) -> bytes:
        restarts = (*self._restarts, len(self._restarts))
        return bytes(self._out) + struct.pack(f"<{len(restarts)}I", *restarts)


def _put(out: bytearray, block: _Block) -> bytes:
    """Appends a block; where it lies."""
    body = block.whole()
    place = varint(len(out)) + varint(len(body))
    out += body + _TRAILER.pack(_PLAIN, mask(crc32c(body + bytes([_PLAIN]))))
    return place
