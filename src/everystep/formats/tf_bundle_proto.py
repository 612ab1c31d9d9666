"""What TensorFlow keeps of a checkpoint's tensors and objects: the messages in its index, and the keys there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everystep.formats import wire
from everystep.schema.dtype import ML_DTYPES

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
ATTRIBUTES, SLOTS = ".ATTRIBUTES", ".OPTIMIZER_SLOT"
VALUE = "VARIABLE_VALUE"
STRING, BOOL = 7, 10
AXES_MAX, SHARDS_MAX = 254, 99_999
DTYPES: dict[int, np.dtype[Any]] = {
    **{
        number: np.dtype(code)
        for number, code in {
            1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 8: "<c8", 9: "<i8", 10: "?", 11: "i1", 12: "u1",
            13: "<i4", 15: "<i2", 16: "<u2", 17: "<u2", 18: "<c16", 19: "<f2", 22: "<u4", 23: "<u8",
        }.items()
    },
    **{
        number: ML_DTYPES[name]
        for number, name in {
            14: "bfloat16", 24: "float8_e5m2", 25: "float8_e4m3fn", 26: "float8_e4m3fnuz", 27: "float8_e4m3b11fnuz",
            28: "float8_e5m2fnuz", 29: "int4", 30: "uint4", 31: "int2", 32: "uint2", 33: "float4_e2m1fn",
        }.items()
        if name in ML_DTYPES
    },
}  # fmt: skip
QUANTIZED = {11: "qint8", 12: "quint8", 13: "qint32", 15: "qint16", 16: "quint16"}
NUMBERS = {dtype: number for number, dtype in DTYPES.items() if number not in QUANTIZED and number < 31}
"""What is written: dtypes that all releases of the last years know."""
OTHERS = {20: "resource", 21: "variant"}
_VERSION = 1
_CONSUMER_MAX = 1


@dataclass(frozen=True)
class Header:
    shards: int
    big_endian: bool


Slice = tuple[tuple[int, int], ...]
"""(start, length) of each axis; a length of -1 is all of it."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies; one that was saved in slices lies under the keys of these."""

    dtype: int
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc: int = 0
    slices: tuple[Slice, ...] = ()

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def header_of(data: bytes) -> Header:
    """
    Raises:
        Malformed: for what is no header of a bundle.
    """
    found = _values(data, {1: wire.VARINT, 2: wire.VARINT, 3: wire.LENGTH})
    version = _values(found.get(3, b""), {1: wire.VARINT, 2: wire.VARINT})
    if version.get(2, 0) > _CONSUMER_MAX:
        raise wire.Malformed("it is of a newer TensorFlow, and says that older readers do not understand it")
    shards, order = found.get(1, 0), found.get(2, 0)
    if not 0 < shards <= SHARDS_MAX or order not in (0, 1):
        raise wire.Malformed("its header makes no sense")
    return Header(shards, order == 1)


def header(shards: int) -> bytes:
    return wire.number(1, shards) + wire.message(3, wire.number(1, _VERSION))


def entry_of(data: bytes) -> Entry:
    """
    Raises:
        Malformed: for what is no entry of a bundle.
    """
    kinds = {1: wire.VARINT, 2: wire.LENGTH, 3: wire.VARINT, 4: wire.VARINT, 5: wire.VARINT, 6: wire.FIXED32}
    found = _values(data, kinds)
    slices = tuple(_slice(part) for number, kind, part in wire.fields(memoryview(data)) if (number, kind) == (7, 2))
    made = Entry(
        found.get(1, 0), _shape(found.get(2, b"")), found.get(3, 0), found.get(4, 0), found.get(5, 0), found.get(6, 0),
        slices,
    )  # fmt: skip
    if made.shard > SHARDS_MAX or max(made.offset, made.size) >= 1 << 62:
        raise wire.Malformed("the place of a tensor makes no sense")
    return made


def entry(of: Entry) -> bytes:
    axes = b"".join(wire.message(2, wire.number(1, n)) for n in of.shape)
    return b"".join([
        wire.number(1, of.dtype), wire.message(2, axes), wire.number(4, of.offset), wire.number(5, of.size),
        wire.fixed32(6, of.crc),
    ])  # fmt: skip


def _values(data: Any, kinds: dict[int, int]) -> dict[int, Any]:
    """The last value of each field; others are passed over, as all readers of such messages do."""
    found: dict[int, Any] = {}
    for number, kind, value in wire.fields(memoryview(data)):
        if number in kinds:
            if kind != kinds[number]:
                raise wire.Malformed("a field of another type")
            found[number] = value
    return found


def _shape(data: Any) -> tuple[int, ...]:
    axes: list[int] = []
    for number, kind, value in wire.fields(memoryview(data)):
        if (number, kind) == (2, wire.LENGTH):
            axes.append(wire.signed(_values(value, {1: wire.VARINT}).get(1, 0)))
        elif number == 3 and value:
            raise wire.Malformed("a tensor without a shape")
    if len(axes) > AXES_MAX or any(not 0 <= n < 1 << 62 for n in axes):
        raise wire.Malformed("a shape that makes no sense")
    return tuple(axes)


def _slice(data: Any) -> Slice:
    extents: list[tuple[int, int]] = []
    for number, kind, value in wire.fields(memoryview(data)):
        if (number, kind) == (1, wire.LENGTH):
            found = _values(value, {1: wire.VARINT, 2: wire.VARINT})
            extents.append((wire.signed(found.get(1, 0)), wire.signed(found[2]) if 2 in found else -1))
    if len(extents) > AXES_MAX:
        raise wire.Malformed("a slice of too many axes")
    return tuple(extents)


def slice_key(name: bytes, part: Slice) -> bytes:
    """The key of a slice: numbers and text encoded so that their order is that of the bytes."""
    axes = _ordered(len(part))
    axes += b"".join(_ordered_signed(number) for extent in part for number in extent)
    marked = re.sub(rb"[\0\xff]", lambda found: found[0] + bytes([found[0][0] ^ 0xFF]), name)
    return b"\0" + marked + b"\0\1" + axes


def _ordered(value: int) -> bytes:
    size = (value.bit_length() + 7) // 8
    return bytes([size]) + value.to_bytes(size, "big")


def _ordered_signed(value: int) -> bytes:
    """In the first bits: how many bytes there are."""
    size = (value if value >= 0 else ~value).bit_length() // 7 + 1
    raw = int.from_bytes(value.to_bytes(10, "big", signed=True)[10 - size :], "big")
    ones = ((1 << size) - 1) << (7 * size) if size < 10 else 0xFFC0 << 64
    return (raw ^ ones).to_bytes(size, "big")


# the objects ---------------------------------------------------------------------------------------------------------


def full_names(graph: bytes) -> Iterator[tuple[str, str]]:
    """(key, the name that the program gave it) of each variable among the objects.

    Raises:
        Malformed: for what is no graph of objects.
    """
    for number, kind, node in wire.fields(memoryview(graph)):
        if (number, kind) != (1, wire.LENGTH):
            continue
        for inner, inner_kind, attribute in wire.fields(node):
            if (inner, inner_kind) == (2, wire.LENGTH):
                found = _values(attribute, {2: wire.LENGTH, 3: wire.LENGTH})
                yield bytes(found.get(3, b"")).decode(), bytes(found.get(2, b"")).decode()


@dataclass
class _Node:
    number: int
    children: dict[str, _Node] = field(default_factory=dict)
    key: str = ""


def graph_of(paths: Iterable[tuple[tuple[str, ...], str]]) -> bytes:
    """The objects that `tf.train.Checkpoint` looks for: one per dict, one per array.

    Args:
        paths: of each array the names that lead to it, and its key; two paths to one key are one object.
    """
    nodes = [_Node(0)]
    arrays: dict[str, _Node] = {}
    for path, key in paths:
        at = nodes[0]
        for place, name in enumerate(path, 1):
            known = at.children.get(name) or (arrays.get(key) if place == len(path) else None)
            if known is None:
                known = _Node(len(nodes))
                nodes.append(known)
            at.children[name] = known
            at = known
        at.key = key
        arrays[key] = at
    return b"".join(wire.message(1, _object(node)) for node in nodes)


def _object(node: _Node) -> bytes:
    children = [
        wire.message(1, wire.number(1, child.number), wire.message(2, name.encode()))
        for name, child in node.children.items()
    ]
    own = []
    if node.key:
        full = node.key.removesuffix(f"/{ATTRIBUTES}/{VALUE}")
        texts = ((1, VALUE), (2, full), (3, node.key))
        own = [wire.message(2, *(wire.message(number, text.encode()) for number, text in texts))]
    return b"".join((*children, *own))


def escaped(name: str) -> str:
    """A name as one part of a key."""
    return name.replace(".", "..").replace("/", ".S")


def plain(part: str) -> str:
    """A part of a key as the name that it was made of."""
    return part.replace("..", "\0").replace(".S", "/").replace("\0", ".")
