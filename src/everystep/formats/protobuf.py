"""A checkpoint as a stream of protocol buffers, as `checkpoint.proto` beside this file describes it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from everystep.errors import Damaged, Unsupported
from everystep.formats import named, wire
from everystep.formats.content import Content, Note
from everystep.formats.file import Array, Source, Target, is_whole
from everystep.formats.protobuf_read import FORMAT, FORMS, KINDS, VERSION, Reading
from everystep.schema import Leaf, Tree, flatten, paths_of, plain, unflatten
from everystep.schema.dtype import parse

EXTENSIONS: tuple[str, ...] = (".pb",)
PIECE_BYTES = 1 << 20
STRUCTURE_BYTES = 1 << 20
_INT64 = 1 << 63


def owns(source: Source) -> bool:
    """Whether its first record is a header that begins with the name of the format."""
    data = memoryview(source.head())
    try:
        _, at = wire.read_varint(data, 0)
        if data[at : at + 1] != wire.head(1, 0)[:1]:
            return False
        _, at = wire.read_varint(data, at + 1)
    except ValueError:
        return False
    return bytes(data[at:]).startswith(wire.message(1, FORMAT.encode()))


def read(source: Source) -> Content:
    """The nested state; a table of arrays by path where the file does not say how they nest.

    Raises:
        Damaged: for records that are cut off, out of order or make no sense, and for a wrong checksum.
        Unsupported: for a file of another kind or a newer version.
    """
    if not owns(source):
        do = "is it a checkpoint? other protocol buffers, such as TensorFlow's graphs, are not read"
        raise Unsupported("a protocol buffer that is no checkpoint of everystep", where=source.name, do=do)
    reading = Reading(source, lambda leaf, nbytes: True)
    reading.all()
    with source.told():
        return Content(_state(reading), "protobuf", metadata=reading.metadata)


def _state(reading: Reading) -> Any:
    arrays = [_object(leaf, data) for leaf, data in zip(reading.leaves, reading.data)]
    if reading.nodes:
        return unflatten(Tree(reading.nodes, reading.values, reading.leaves), arrays.__getitem__, named.no_composite)
    by_path = {leaf.path: value for leaf, value in zip(reading.leaves, arrays)}
    if len(by_path) < len(arrays):
        raise Damaged("two leaves have one path, and nothing says how they nest")
    return by_path


def _object(leaf: Leaf, data: Array | None) -> Any:
    """A leaf as it was: `Reading` has checked that the bytes are as many as shape and dtype say."""
    if data is None:
        raise Damaged("a leaf without its bytes", where=leaf.path)
    try:
        array: Array = np.ndarray(leaf.shape, parse(leaf.dtype), data if len(data) else bytearray(1))
        if leaf.kind in ("str", "bytes"):
            body = array.reshape(-1).view(np.uint8).tobytes()
            return body if leaf.kind == "bytes" else body.decode("utf-8", "surrogatepass")
    except (ValueError, TypeError, MemoryError, UnicodeError) as error:
        raise Damaged(f"no array can be of this kind: {str(error)[:200]}", where=leaf.path) from error
    if not is_whole(array):
        raise Damaged("truth values that are neither 0 nor 1", where=leaf.path)
    return array[()] if leaf.kind == "scalar" and not leaf.shape else array


def write(
    state: Any, target: Target, metadata: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> list[Note]:
    """All of a state, exactly; of the file, one piece at a time is in memory beside it.

    Args:
        metadata: text beside it; a whole number under `step` and a table under `metrics` have places of their own.
        roles: of leaves, by path.
    """
    tree = flatten(state, named.describe)
    writer = Writer(target)
    writer.header(metadata or {})
    writer.structure(tree)
    for leaf, payload in zip(tree.leaves, tree.payloads):
        array: Array = payload if isinstance(payload, np.ndarray) else np.frombuffer(payload, np.uint8)
        writer.leaf(leaf, (roles or {}).get(leaf.path, leaf.role))
        writer.pieces(array)
    writer.end()
    return []


class Writer:
    """Writes the records of a file in their order: header, structure, each leaf with its pieces, end."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._crc = 0
        self._leaves = self._nbytes = 0

    def header(self, metadata: Mapping[str, str]) -> None:
        parts = [wire.message(1, FORMAT.encode()), wire.number(2, VERSION)]
        rest = dict(metadata)
        step, metrics = rest.get("step", ""), _table(rest.get("metrics", ""))
        if step.isdecimal() and str(int(step)) == step and int(step) < _INT64:
            parts.append(wire.number(3, int(rest.pop("step"))))
        if metrics is not None:
            del rest["metrics"]
            parts += [wire.message(4, _text(1, key), wire.message(2, _value(value))) for key, value in metrics.items()]
        parts += [wire.message(5, _text(1, key), _text(2, value)) for key, value in rest.items()]
        self._record(1, b"".join(parts))

    def structure(self, tree: Tree) -> None:
        held: list[bytes] = []
        size = 0
        for node in _nodes(tree):
            if held and size + len(node) > STRUCTURE_BYTES:
                self._record(2, b"".join(held))
                held, size = [], 0
            held.append(node)
            size += len(node)
        self._record(2, b"".join(held))

    def leaf(self, leaf: Leaf, role: str = "other") -> None:
        parts = [_text(1, leaf.path), _text(2, leaf.dtype)]
        parts.append(wire.message(3, *map(wire.varint, leaf.shape)) if leaf.shape else b"")
        parts.append(_text(4, role) if role != "other" else b"")
        parts += [wire.number(5, FORMS.index(leaf.kind)), wire.number(6, leaf.nbytes)]
        self._leaves += 1
        self._record(3, b"".join(parts))

    def pieces(self, array: Array) -> None:
        """All bytes of the leaf before."""
        flat = np.asarray(array, order="C").reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
        for start in range(0, len(flat), PIECE_BYTES):
            self.piece(flat[start : start + PIECE_BYTES])

    def piece(self, data: Array) -> None:
        """Bytes of the leaf before."""
        inner = wire.head(1, len(data))
        outer = wire.head(4, len(inner) + len(data))
        self._put(wire.varint(len(outer) + len(inner) + len(data)) + outer + inner)
        self._put(data)
        self._nbytes += len(data)

    def end(self) -> None:
        parts = [wire.number(1, self._leaves), wire.number(2, self._nbytes), wire.fixed32(3, self._crc)]
        self._record(5, b"".join(parts))

    def _record(self, field: int, body: bytes) -> None:
        record = wire.message(field, body)
        if len(record) > wire.RECORD_MAX:
            do = "put long text into the state itself"
            raise Unsupported(
                f"a record of {len(record)} bytes is more than readers take", where=self._target.name, do=do
            )
        self._put(wire.varint(len(record)) + record)

    def _put(self, data: Any) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._target.write(data)


def _text(field: int, text: str) -> bytes:
    return wire.message(field, text.encode("utf-8", "replace"))


def _table(text: str) -> dict[str, Any] | None:
    """Metrics as `export` writes them; None where the text is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(plain.is_plain(value) for value in found.values()) else None


def _nodes(tree: Tree) -> Iterator[bytes]:
    """Each node of a tree with its key."""
    above: list[Iterator[bytes]] = []
    for _, at, _ in paths_of(tree):
        key = b""
        while above:
            found = next(above[-1], None)
            if found is not None:
                key = found
                break
            above.pop()
        node = tree.nodes[at]
        kind = node[0]
        if kind == "leaf":
            yield wire.message(1, key, wire.number(4, node[1]))
        elif kind == "value":
            yield wire.message(1, key, wire.message(3, _encoded(tree.values[node[1]])))
        else:
            size = node[1] if kind in ("list", "tuple") else len(node[-1])
            name = wire.message(3, node[1].encode()) if kind in ("namedtuple", "dataclass") else b""
            parts = wire.number(1, KINDS.index(kind)), wire.number(2, size), name
            yield wire.message(1, key, wire.message(2, *parts))
            above.append(_keys(node))


def _keys(node: list[Any]) -> Iterator[bytes]:
    if node[0] in ("list", "tuple"):
        return iter([b""] * node[1])
    return (wire.message(1, _encoded(key)) for key in node[-1])


def _value(value: Any) -> bytes:
    return _encoded(plain.encode(value))


def _encoded(value: Any) -> bytes:
    """A Value from the form that tables have plain values in; what it has no field for stays in that form."""
    if value is None:
        return wire.number(1, 1)
    if type(value) is bool:
        return wire.number(2, value)
    if type(value) is int:
        return wire.number(3, wire.zigzag(value))
    if type(value) is str:
        return wire.message(5, value.encode())
    decoded: Any = plain.decode(value)
    if type(decoded) is int and -_INT64 <= decoded < _INT64:
        return wire.number(3, wire.zigzag(decoded))
    if type(decoded) is float:
        return wire.double(4, decoded)
    if type(decoded) is bytes:
        return wire.message(6, decoded)
    return wire.message(7, json.dumps(value, separators=(",", ":")).encode())


def outline(source: Source, wanted: Callable[[Leaf], bool]) -> tuple[Tree, dict[int, Any], dict[str, str]]:
    """What is in a file beside its long arrays, which are passed over: the tree, leaves by number, text beside it.

    Without a structure, the tree is a table of leaves. The checksum is not compared.
    """
    reading = Reading(source, lambda leaf, nbytes: nbytes <= PIECE_BYTES and wanted(leaf), skip=True)
    reading.all()
    held = {
        at: _object(leaf, data) for at, (leaf, data) in enumerate(zip(reading.leaves, reading.data)) if data is not None
    }
    nodes = reading.nodes
    if not nodes:
        keys: list[Any] = [plain.encode(leaf.path) for leaf in reading.leaves]
        nodes = [["dict", keys], *(["leaf", at] for at in range(len(keys)))]
    return Tree(nodes, reading.values, reading.leaves), held, reading.metadata
