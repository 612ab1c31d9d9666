"""How an HDF5 file lies on disk: headers of objects, the links of groups, where chunks are. Read here and not by HDF5's
library, which files that lie lead into endless loops and beyond its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from everystep.errors import Unsupported
from everystep.formats import hdf5_heap
from everystep.formats.file import Source
from everystep.formats.hdf5_words import NOWHERE, Malformed, begins, lookup3, number, part

MAGIC = b"\x89HDF\r\n\x1a\n"
SPACE, LINK_INFO, TYPE, OLD_FILL, FILL, LINK, OUTSIDE, LAYOUT, FILTERS, ATTRIBUTE = 1, 2, 3, 4, 5, 6, 7, 8, 11, 12
CONTINUED, TABLE, ATTRIBUTE_INFO = 16, 17, 21
SHARED = 2
"""The flag of a message that stands elsewhere."""
HARD, SOFT, EXTERNAL = 0, 1, 64
MESSAGES_MAX, NAME_MAX = 1 << 16, 1 << 16
_WORK_MIN, _WORK_TIMES = 16 << 20, 32
"""Bytes that may be looked at: of a file that points to one place again and again, there is no end."""
_LEVELS_MAX = 32
_SYMBOL = 40


@dataclass(frozen=True)
class Message:
    kind: int
    flags: int
    data: memoryview


@dataclass(frozen=True)
class Link:
    """`address` is that of an object's header; only hard links have one."""

    name: bytes
    kind: int
    address: int = NOWHERE


@dataclass(frozen=True)
class Chunk:
    chunk_offset: tuple[int, ...]
    size: int
    filter_mask: int
    byte_offset: int


class File:
    """The structures of one file. Everything raises Malformed for what no library writes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._work_left = max(_WORK_MIN, _WORK_TIMES * source.size)
        self._heaps: dict[int, memoryview] = {}
        self.root = self._superblock()

    def bytes_at(self, address: int, count: int) -> memoryview:
        self.spend(count)
        return memoryview(self._source.bytes_at(address, count))

    def spend(self, count: int) -> None:
        self._work_left -= count
        if self._work_left < 0:
            raise Malformed("its parts overlap, or point to each other without end")

    def _superblock(self) -> int:
        """Where the root group is."""
        head = self.bytes_at(0, min(96, self._source.size))
        version = number(head, 8, 1)
        if not begins(head, MAGIC) or version > 3:
            raise Malformed("it does not begin like an HDF5 file")
        sizes, base, end, root = ((13, 24, 40, 64), (13, 28, 44, 68), (9, 12, 28, 36), (9, 12, 28, 36))[version]
        if number(head, sizes, 2) != 0x0808 or number(head, base, 8):
            do = "write it again with h5py"
            raise Unsupported("an HDF5 file of an unusual layout", where=self._source.name, do=do)
        if version >= 2 and lookup3(part(head, 0, 44)) != number(head, 44, 4):
            raise Malformed("its beginning is not what was written (checksum)")
        if number(head, end, 8) > self._source.size:
            raise Malformed(f"it has {self._source.size} bytes and says {number(head, end, 8)}: it is cut off")
        return number(head, root, 8)

    # headers of objects ---------------------------------------------------------------------------------------------

    def messages(self, address: int) -> list[Message]:
        """What the header of an object says."""
        head = self.bytes_at(address, min(16, self._source.size - min(address, self._source.size)))
        found: list[Message] = []
        if begins(head, b"OHDR"):
            begin, size, order = self._newer(address)
            blocks = [(begin, size)]
            body = self.bytes_at(address, begin - address + size + 4)
            if lookup3(body[:-4]) != number(body, len(body) - 4, 4):
                raise Malformed("a header is not what was written (checksum)")
        else:
            if number(head, 0, 1) != 1:
                raise Malformed("an object that has no header")
            order = -1
            blocks = [(address + 16, number(head, 8, 4))]
        seen: set[int] = set()
        for start, size in blocks:
            if start in seen:
                raise Malformed("a header that continues in itself")
            seen.add(start)
            for message in self._block(start, size, order):
                if message.kind == CONTINUED:
                    blocks.append(self._continued(message, order))
                else:
                    found.append(message)
                if len(found) + len(blocks) > MESSAGES_MAX:
                    raise Malformed("a header of too many parts")
        return found

    def _newer(self, address: int) -> tuple[int, int, int]:
        """(where its messages begin, their bytes, bytes of each message's order) of a header of version 2."""
        head = self.bytes_at(address, min(34, self._source.size - address))
        if number(head, 4, 1) != 2:
            raise Malformed("a header of an unknown version")
        flags = number(head, 5, 1)
        at = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        return address + at + width, number(head, at, width), 2 if flags & 4 else 0

    def _continued(self, message: Message, order: int) -> tuple[int, int]:
        start, size = number(message.data, 0, 8), number(message.data, 8, 8)
        if order < 0:
            return start, size
        body = self.bytes_at(start, size)
        if size < 8 or not begins(body, b"OCHK") or lookup3(body[:-4]) != number(body, size - 4, 4):
            raise Malformed("a part of a header is not what was written (checksum)")
        return start + 4, size - 8

    def _block(self, start: int, size: int, order: int) -> Iterator[Message]:
        data = self.bytes_at(start, size)
        at, head = 0, 8 if order < 0 else 4 + order
        while at + head <= size:
            if order < 0:
                kind, length, flags = number(data, at, 2), number(data, at + 2, 2), data[at + 4]
            else:
                kind, length, flags = data[at], number(data, at + 1, 2), data[at + 3]
            yield Message(kind, flags, part(data, at + head, length))
            at += head + length

    # groups ---------------------------------------------------------------------------------------------------------

    def links(self, messages: list[Message]) -> Iterator[Link] | None:
        """The links of a group; None for an object that is none."""
        table = next((message.data for message in messages if message.kind == TABLE), None)
        if table is not None:
            return self._symbols(number(table, 0, 8), self._heap(number(table, 8, 8)))
        info = next((message.data for message in messages if message.kind == LINK_INFO), None)
        if info is None:
            return None
        at = 2 + 8 * (number(info, 1, 1) & 1)
        found = (_link(data) for data in self.kept(messages, LINK, info, at))
        # A heap has them by the hashes of their names.
        return found if number(info, at, 8) == NOWHERE else iter(sorted(found, key=lambda link: link.name))

    def kept(self, found: list[Message], kind: int, info: memoryview | None, at: int) -> Iterator[memoryview]:
        """Messages of a kind: those in the header, or in the heap that stands there."""
        yield from (message.data for message in found if message.kind == kind and not message.flags & SHARED)
        if info is not None and number(info, at, 8) != NOWHERE:
            yield from hdf5_heap.messages(self.bytes_at, number(info, at, 8), number(info, at + 8, 8))

    def _heap(self, address: int) -> memoryview:
        """The names of a group, each ended by a zero."""
        if address not in self._heaps:
            head = self.bytes_at(address, 32)
            if not begins(head, b"HEAP") or head[4]:
                raise Malformed("a group without names")
            self._heaps[address] = self.bytes_at(number(head, 24, 8), number(head, 8, 8))
        return self._heaps[address]

    def _symbols(self, address: int, heap: memoryview) -> Iterator[Link]:
        for node in self._leaves(address, 0, 8, set()):
            head = self.bytes_at(node, 8)
            if not begins(head, b"SNOD") or head[4] != 1:
                raise Malformed("a group that points to no links")
            count = number(head, 6, 2)
            body = self.bytes_at(node + 8, count * _SYMBOL)
            for at in range(0, len(body), _SYMBOL):
                name = self._name(heap, number(body, at, 8))
                cached = number(body, at + 16, 4)
                yield Link(name, SOFT) if cached == 2 else Link(name, HARD, number(body, at + 8, 8))

    def _name(self, heap: memoryview, at: int) -> bytes:
        head = part(heap, at, min(NAME_MAX, max(0, len(heap) - at))).tobytes()
        name, zero, _ = head.partition(b"\0")
        self.spend(len(name))
        if not zero:
            raise Malformed("a name without an end")
        return name

    def _leaves(self, address: int, kind: int, key: int, seen: set[int], level: int = -1) -> Iterator[int]:
        """What the nodes of a tree on its lowest level point to."""
        for _, child in self._entries(address, kind, key, seen, level):
            yield child

    def _entries(
        self, address: int, kind: int, key: int, seen: set[int], level: int = -1
    ) -> Iterator[tuple[memoryview, int]]:
        if address == NOWHERE and level < 0:
            return
        head = self.bytes_at(address, 24)
        if address in seen or not begins(head, b"TREE") or head[4] != kind or head[5] > _LEVELS_MAX:
            raise Malformed("a tree that makes no sense")
        if level >= 0 and head[5] != level:
            raise Malformed("a tree whose levels make no sense")
        seen.add(address)
        body = self.bytes_at(address + 24, number(head, 6, 2) * (key + 8))
        for at in range(0, len(body), key + 8):
            child = number(body, at + key, 8)
            if head[5]:
                yield from self._entries(child, kind, key, seen, head[5] - 1)
            else:
                yield body[at : at + key], child

    def chunks(self, address: int, axes: int) -> Iterator[Chunk]:
        """The chunks of a dataset that are there."""
        for key, child in self._entries(address, 1, 8 + 8 * (axes + 1), set()):
            offset = tuple(number(key, 8 + 8 * axis, 8) for axis in range(axes))
            yield Chunk(offset, number(key, 0, 4), number(key, 4, 4), child)

    def listed(self, address: int, grid: tuple[int, ...], chunk: tuple[int, ...], nbytes: int) -> Iterator[Chunk]:
        """The chunks of a dataset whose shape cannot change, in the newer layout: one after the other in a list."""
        if address == NOWHERE:
            return
        head = self.bytes_at(address, 28)
        if (
            not begins(head, b"FAHD")
            or lookup3(head[:24]) != number(head, 24, 4)
            or number(head, 8, 8) != math.prod(grid)
        ):
            raise Malformed("a list of chunks that makes no sense")
        width, page = number(head, 6, 1), 1 << min(number(head, 7, 1), 32)
        count, start = number(head, 8, 8), number(head, 16, 8)
        if width not in (8, *range(13, 21)) or start == NOWHERE:
            raise Malformed("a list of chunks that makes no sense")
        at = 0
        for entries in self._pages(start, count, width, page):
            for entry in range(0, len(entries), width):
                found = number(entries, entry, 8)
                if found != NOWHERE:
                    size = nbytes if width == 8 else number(entries, entry + 8, width - 12)
                    mask = 0 if width == 8 else number(entries, entry + width - 4, 4)
                    offset = tuple(int(i) * c for i, c in zip(np.unravel_index(at, grid), chunk))
                    yield Chunk(offset, size, mask, found)
                at += 1

    def _pages(self, start: int, count: int, width: int, page: int) -> Iterator[memoryview]:
        """The entries of a list; a long one is cut into pages, of which those that were never used are left out."""
        pages = -(-count // page) if count > page else 0
        head = 14 + -(-pages // 8)
        body = self.bytes_at(start, head + (0 if pages else count * width) + 4)
        if not begins(body, b"FADB") or lookup3(body[:-4]) != number(body, len(body) - 4, 4):
            raise Malformed("a list of chunks is not what was written (checksum)")
        if not pages:
            yield body[14:-4]
        at = start + len(body)
        for number_of in range(pages):
            size = min(page, count - number_of * page) * width
            if body[14 + number_of // 8] & 128 >> number_of % 8:
                entries = self.bytes_at(at, size + 4)
                if lookup3(entries[:-4]) != number(entries, size, 4):
                    raise Malformed("a list of chunks is not what was written (checksum)")
                yield entries[:-4]
            else:
                yield memoryview(b"\xff" * size)
            at += size + 4


def _link(data: memoryview) -> Link:
    if number(data, 0, 1) != 1:
        raise Malformed("a link of an unknown version")
    flags, at = number(data, 1, 1), 2
    kind = number(data, at, 1) if flags & 8 else HARD
    at += (1 if flags & 8 else 0) + (8 if flags & 4 else 0) + (1 if flags & 16 else 0)
    width = 1 << (flags & 3)
    size = number(data, at, width)
    name = part(data, at + width, size).tobytes()
    return Link(name, kind, number(data, at + width + size, 8) if kind == HARD else NOWHERE)
