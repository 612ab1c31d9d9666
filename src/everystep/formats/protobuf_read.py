"""The records of a checkpoint as a stream of protocol buffers, checked one by one as they come."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from everystep.errors import Damaged, Unsupported
from everystep.formats import wire
from everystep.formats.file import Array, Source
from everystep.schema import ROLES, Leaf, plain
from everystep.schema.dtype import parse
from everystep.schema.tree import DEPTH_MAX

FORMAT, VERSION = "everystep-checkpoint", 1
KINDS = ("", "dict", "ordered", "counter", "list", "tuple", "namedtuple", "dataclass")
FORMS = ("array", "scalar", "str", "bytes")
DIMENSIONS_MAX = 64
_RECORDS = ("namedtuple", "dataclass")
_HEADER, _STRUCTURE, _LEAF, _PIECE, _END = range(1, 6)
_BEGINS_PIECE = wire.head(_PIECE, 0)[:1]


class Reading:
    """Reads a file from its beginning; what it holds at the end is in its attributes.

    Args:
        wanted: asked with each leaf and the number of its bytes whether those are held.
        skip: whether the others are passed over in the file; then the checksum is not compared.
    """

    def __init__(self, source: Source, wanted: Callable[[Leaf, int], bool], skip: bool = False) -> None:
        self._source, self._wanted, self._skip = source, wanted, skip
        self._stream = wire.Stream(source, self._seen)
        self._crc = self._nbytes = self._filled = self._expected = 0
        self._last = memoryview(b"")
        self._passed = self._begun = self._ended = False
        self._open: list[tuple[list[Any], int]] = []
        """Containers whose children are not all there, with how many are missing."""
        self.metadata: dict[str, str] = {}
        self.nodes: list[list[Any]] = []
        self.values: list[Any] = []
        self.leaves: list[Leaf] = []
        self.data: list[Array | None] = []

    def pieces(self) -> Iterator[tuple[int, int, memoryview]]:
        """(number of the leaf, place in its bytes, bytes) of every piece that is not passed over, as they come; the
        bytes are there until the next is asked for.

        Raises:
            Damaged: for records that are cut off, out of order or make no sense, and for a wrong checksum.
            Unsupported: for a file of another kind or a newer version.
        """
        while self._stream.left:
            self._last = memoryview(b"")
            try:
                with self._source.told():
                    self._record()
            except (ValueError, TypeError, OverflowError, struct.error, RecursionError) as error:
                raise self._source.damaged(f"a record makes no sense: {str(error)[:200]}") from error
            if self._last:
                yield len(self.leaves) - 1, self._filled - len(self._last), self._last
        if not self._ended:
            raise self._source.damaged("the file ends before its last record")

    def all(self) -> None:
        """Reads to the end, as `pieces` does, and holds what is wanted."""
        for _ in self.pieces():
            pass

    def _seen(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)

    def _record(self) -> None:
        before = self._crc
        size, width = self._stream.length()
        if self._begun and self._pass_over(size, width):
            return
        self._stream.take(width)
        record = self._stream.take(size)
        kind, body = _one_of(record)
        if self._ended:
            raise ValueError("a record behind the end")
        if not self._begun and kind != _HEADER:
            raise ValueError("the first record is no header")
        if kind != _PIECE:
            self._leaf_is_whole()
        if kind == _HEADER:
            self._header(body)
        elif kind == _STRUCTURE:
            self._structure(body)
        elif kind == _LEAF:
            self._leaf(body)
        elif kind == _PIECE:
            self._piece(body)
        else:
            self._end(body, before)

    def _pass_over(self, size: int, width: int) -> bool:
        """Whether the record ahead is a piece of a leaf that nobody wants; then the file goes on behind it."""
        if not self._skip or not self.leaves or self.data[-1] is not None or self._filled >= self._expected:
            return False
        ahead = self._stream.ahead(width + 1 + wire.VARINT_BYTES + 1 + wire.VARINT_BYTES)[width:]
        if ahead[:1] != _BEGINS_PIECE:
            return False
        inner, at = wire.read_varint(ahead, 1)
        if at + inner != size or ahead[at : at + 1] != wire.head(1, 0)[:1]:
            return False
        nbytes, begin = wire.read_varint(ahead, at + 1)
        if begin + nbytes != size:
            return False
        self._count(nbytes)
        self._stream.skip(width + size)
        self._passed = True
        return True

    def _header(self, body: memoryview) -> None:
        if self._begun:
            raise ValueError("a second header")
        self._begun = True
        metrics: dict[str, Any] = {}
        named: dict[int, Any] = {}
        for field, form, value in wire.fields(body):
            if field == 4 and form == wire.LENGTH:
                key, entry = _entry(value)
                metrics[key] = _value(entry)
            elif field == 5 and form == wire.LENGTH:
                key, entry = _entry(value)
                self.metadata[key] = _text(entry)
            else:
                named[field] = value
        if named.get(1) != FORMAT.encode():
            raise ValueError("the header of another format")
        if named.get(2) != VERSION:
            do = "read it with a newer everystep"
            raise Unsupported(f"a checkpoint of version {named.get(2)}, not {VERSION}", do=do)
        if 3 in named:
            self.metadata["step"] = str(wire.signed(named[3]))
        if metrics:
            self.metadata["metrics"] = json.dumps(
                {k: v if plain.is_plain(v) else str(v) for k, v in metrics.items()}, default=str
            )

    def _structure(self, body: memoryview) -> None:
        if self.leaves:
            raise ValueError("structure behind the first leaf")
        for field, form, value in wire.fields(body):
            if field == 1 and form == wire.LENGTH:
                self._node(value)

    def _node(self, body: memoryview) -> None:
        key: Any = None
        kind, inner = 0, None
        for field, _, value in wire.fields(body):
            if field == 1:
                key = value
            elif field in (2, 3, 4):
                kind, inner = field, value
        self._under(key)
        if kind == 4:
            self.nodes.append(["leaf", inner])
        elif kind == 3:
            self.nodes.append(["value", len(self.values)])
            self.values.append(plain.encode(_value(inner)))
        elif kind == 2:
            self._container(inner)
        else:
            raise ValueError("a node that is nothing")
        while self._open and not self._open[-1][1]:
            self._open.pop()

    def _under(self, key: Any) -> None:
        """Gives the container that is not full yet the key of its next child."""
        if not self._open:
            if self.nodes:
                raise ValueError("a tree that goes on after its last node")
            return
        node, missing = self._open[-1]
        self._open[-1] = node, missing - 1
        if node[0] in ("list", "tuple"):
            return
        if key is None:
            raise ValueError("a child of a dictionary without a key")
        found = _value(key)
        node[-1].append(plain.encode(found) if node[0] not in _RECORDS else found)

    def _container(self, body: Any) -> None:
        named = {field: value for field, _, value in wire.fields(body)}
        kind, size = named.get(1, 0), named.get(2, 0)
        if not 0 < kind < len(KINDS) or size > self._source.size:
            raise ValueError("a container of an unknown kind, or of more parts than the file has bytes")
        if len(self._open) > DEPTH_MAX:
            raise ValueError(f"nested deeper than {DEPTH_MAX} levels")
        name = KINDS[kind]
        node: list[Any] = [name, size] if name in ("list", "tuple") else [name, []]
        if name in _RECORDS:
            node = [name, _text(named.get(3, b"")), []]
        self.nodes.append(node)
        if size:
            self._open.append((node, size))

    def _leaf(self, body: memoryview) -> None:
        if self._open:
            raise ValueError("the structure ends before its last node")
        named: dict[int, Any] = {}
        shape: list[int] = []
        for field, form, value in wire.fields(body):
            if field == 3:
                shape += _packed(value) if form == wire.LENGTH else [value]
            else:
                named[field] = value
            if len(shape) > DIMENSIONS_MAX:
                raise ValueError(f"an array of more than {DIMENSIONS_MAX} dimensions")
        path, dtype, nbytes, form = _text(named.get(1, b"")), _text(named.get(2, b"")), named.get(6, 0), named.get(5, 0)
        if math.prod(shape) * parse(dtype).itemsize != nbytes:
            raise ValueError(f"the shape of {path[:200]!r} does not fit its bytes")
        if nbytes > self._stream.left:
            raise ValueError(f"{path[:200]!r} says that it has {nbytes} bytes, more than the file")
        if form >= len(FORMS):
            raise ValueError(f"{path[:200]!r} is of a newer kind")
        role = _text(named.get(4, b"")) or "other"
        leaf = Leaf(path, dtype, tuple(shape), role if role in ROLES else "other", FORMS[form])
        self.leaves.append(leaf)
        self.data.append(np.empty(nbytes, np.uint8) if self._wanted(leaf, nbytes) else None)
        self._filled, self._expected = 0, nbytes

    def _piece(self, body: memoryview) -> None:
        for field, form, value in wire.fields(body):
            if field == 1 and form == wire.LENGTH:
                start = self._filled
                self._count(len(value))
                self._last = value
                data = self.data[-1]
                if data is not None:
                    data[start : self._filled] = np.frombuffer(value, np.uint8)

    def _count(self, nbytes: int) -> None:
        if not self.leaves or self._filled + nbytes > self._expected:
            raise ValueError("a piece that belongs to no leaf, or is more than its leaf has")
        self._filled += nbytes
        self._nbytes += nbytes

    def _leaf_is_whole(self) -> None:
        if self._filled != self._expected:
            path = self.leaves[-1].path[:200]
            raise ValueError(f"{path!r} has {self._filled} of its {self._expected} bytes")

    def _end(self, body: memoryview, crc: int) -> None:
        named = {field: value for field, _, value in wire.fields(body)}
        if self._open:
            raise ValueError("the structure ends before its last node")
        if (named.get(1, 0), named.get(2, 0)) != (len(self.leaves), self._nbytes):
            raise ValueError("leaves or bytes are missing, or there are too many")
        if not self._passed and named.get(3, 0) != crc:
            raise Damaged("the bytes are not those that were written (CRC)")
        self._ended = True


def _one_of(record: memoryview) -> tuple[int, memoryview]:
    """(number, message) of what a record holds; the last, should there be several."""
    found = [(field, value) for field, form, value in wire.fields(record) if form == wire.LENGTH and field <= _END]
    if not found:
        raise ValueError("a record of an unknown kind")
    return found[-1]


def _entry(body: memoryview) -> tuple[str, Any]:
    """(key, value) of an entry of a map."""
    named = {field: value for field, form, value in wire.fields(body) if form == wire.LENGTH}
    return _text(named.get(1, b"")), named.get(2, b"")


def _packed(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = wire.read_varint(data, at)
        found.append(value)
        if len(found) > DIMENSIONS_MAX:
            break
    return found


def _text(data: Any) -> str:
    if isinstance(data, int):
        raise ValueError("a number in place of text")
    return bytes(data).decode()


def _value(body: Any) -> Any:
    """A plain value; a tuple too, which serves as a key."""
    found = [(field, value) for field, _, value in wire.fields(memoryview(body)) if 0 < field < 8]
    if not found:
        raise ValueError("a value that is nothing")
    field, value = found[-1]
    if field in (5, 6, 7) and isinstance(value, int):
        raise ValueError("a number in place of text")
    if field == 1:
        return None
    if field == 2:
        return bool(value)
    if field == 3:
        return wire.unzigzag(value)
    if field == 4:
        return struct.unpack("<d", struct.pack("<Q", value))[0]
    if field == 6:
        return bytes(value)
    text = _text(value)
    return text if field == 5 else plain.decode(json.loads(text))
