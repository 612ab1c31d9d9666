"""The heaps in which HDF5 keeps the links and attributes of an object that has many, in its newer layout."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from everystep.formats.hdf5_words import NOWHERE, Malformed, begins, lookup3, number, part

Read = Callable[[int, int], memoryview]
"""The bytes at an address."""
_LEVELS_MAX, _ROWS_MAX = 8, 64


@dataclass(frozen=True)
class _Heap:
    id_size: int
    offset_size: int
    length_size: int
    width: int
    start: int
    direct_max: int
    rows: int
    root: int


def messages(read: Read, heap: int, index: int) -> Iterator[memoryview]:
    """Every message in a heap, by the records of its index of names.

    Raises:
        Malformed: for what no library writes.
    """
    known = _heap(read, heap)
    blocks = list(_blocks(read, known))
    starts = [start for start, _ in blocks]
    for record in _records(read, index):
        # The record of a link begins with the hash of its name, that of an attribute ends with it.
        at = 4 if len(record) == 4 + known.id_size else 0
        place = part(record, at, known.id_size)
        if place[0] & 0xF0:
            raise Malformed("a message that is not where its heap keeps such")
        offset = number(place, 1, known.offset_size)
        size = number(place, 1 + known.offset_size, known.length_size)
        at = bisect_right(starts, offset) - 1
        if at < 0:
            raise Malformed("a message that is not in its heap")
        yield part(blocks[at][1], offset - starts[at], size)


def _heap(read: Read, address: int) -> _Heap:
    head = read(address, 22)
    if not begins(head, b"FRHP") or head[4] or number(head, 7, 2):
        raise Malformed("a heap that makes no sense")
    body = read(address, 146)
    if lookup3(body[:142]) != number(body, 142, 4):
        raise Malformed("a heap is not what was written (checksum)")
    offset_size, managed = (number(body, 128, 2) + 7) // 8, number(body, 10, 4)
    direct_max = number(body, 120, 8)
    lengths = min(_width(direct_max), _width(managed))
    found = _Heap(
        number(body, 5, 2), offset_size, lengths, number(body, 110, 2), number(body, 112, 8), direct_max,
        number(body, 140, 2), number(body, 132, 8),
    )  # fmt: skip
    powers = all(n and n & (n - 1) == 0 for n in (found.width, found.start, found.direct_max))
    if not powers or found.rows > _ROWS_MAX or found.width > 1 << 10 or found.start > found.direct_max:
        raise Malformed("a heap that makes no sense")
    return found


def _width(value: int) -> int:
    return (value.bit_length() - 1) // 8 + 1 if value else 1


def _row(heap: _Heap, row: int) -> int:
    """Bytes of each block in a row of the heap's table."""
    return heap.start << max(0, row - 1)


def _blocks(read: Read, heap: _Heap) -> Iterator[tuple[int, memoryview]]:
    """(where it begins in the heap, its bytes) of every block of messages."""
    if heap.root == NOWHERE:
        return
    if not heap.rows:
        yield 0, _direct(read, heap.root, heap.start)
        return
    yield from _indirect(read, heap, heap.root, 0, heap.rows, 0)


def _direct(read: Read, address: int, size: int) -> memoryview:
    body = read(address, size)
    if not begins(body, b"FHDB"):
        raise Malformed("a heap that points to no block")
    return body


def _indirect(
    read: Read, heap: _Heap, address: int, begin: int, rows: int, depth: int
) -> Iterator[tuple[int, memoryview]]:
    if depth > _LEVELS_MAX:
        raise Malformed("a heap that nests too deep")
    head = 13 + heap.offset_size
    body = read(address, head + 8 * heap.width * rows)
    if not begins(body, b"FHIB"):
        raise Malformed("a heap that points to no block")
    at = head
    for row in range(rows):
        size = _row(heap, row)
        for _ in range(heap.width):
            child, at = number(body, at, 8), at + 8
            if child != NOWHERE and size <= heap.direct_max:
                yield begin, _direct(read, child, size)
            elif child != NOWHERE:
                inner = int(math.log2(size // (heap.start * heap.width))) + 1
                yield from _indirect(read, heap, child, begin, inner, depth + 1)
            begin += size


def _records(read: Read, address: int) -> Iterator[memoryview]:
    """The records of an index, in its order."""
    head = read(address, 38)
    if not begins(head, b"BTHD") or head[4] or lookup3(head[:34]) != number(head, 34, 4):
        raise Malformed("an index that makes no sense")
    node, record, depth = number(head, 6, 4), number(head, 10, 2), number(head, 12, 2)
    if not record or node < record + 10 or depth > _LEVELS_MAX:
        raise Malformed("an index that makes no sense")
    most = (node - 10) // record
    widths, total = [_width(most)], most
    for _ in range(depth):
        more = (node - 10 - 8 - widths[0] - (widths[-1] if len(widths) > 1 else 0)) // (
            record + 8 + widths[0] + (widths[-1] if len(widths) > 1 else 0)
        )
        total = total * (more + 1) + more
        widths.append(_width(total))
    yield from _node(read, number(head, 16, 8), number(head, 24, 2), depth, node, record, widths)


def _node(
    read: Read, address: int, count: int, depth: int, size: int, record: int, widths: list[int]
) -> Iterator[memoryview]:
    if not count or address == NOWHERE:
        return
    body = read(address, size)
    pointer = 8 + widths[0] + (widths[depth - 1] if depth > 1 else 0)
    end = 6 + count * record + (pointer * (count + 1) if depth else 0)
    if not begins(body, b"BTIN" if depth else b"BTLF") or lookup3(body[:end]) != number(body, end, 4):
        raise Malformed("an index is not what was written (checksum)")
    for number_of in range(count + 1):
        if depth:
            at = 6 + count * record + pointer * number_of
            inner = number(body, at, 8), number(body, at + 8, widths[0])
            yield from _node(read, *inner, depth - 1, size, record, widths)
        if number_of < count:
            yield part(body, 6 + number_of * record, record)
