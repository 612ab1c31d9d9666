"""A look into a file that leaves its arrays where they are: counts, metrics and keys, and what stands for the rest."""

from __future__ import annotations

import ast
import enum
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from everystep import formats
from everystep.exchange.facts import is_wanted
from everystep.formats import FORMATS, Opaque, named, params, protobuf, safetensors, shards
from everystep.formats.file import Source, opened
from everystep.formats.pth_numpy import NumpyArray
from everystep.formats.pth_objects import Objects, Tensor
from everystep.formats.pth_state import Assembly
from everystep.formats.pth_stream import Machine, Name, Wrapped
from everystep.formats.zipped import MAGIC, Archive
from everystep.schema import Leaf, Tree, unflatten
from everystep.seam import Seam

DEPTH_MAX, PARTS_MAX, LIST_MAX, TEXT_MAX = 5, 1 << 20, 64, 1000
SMALL_BYTES = 1 << 20
"""A tensor of one element is read if what it lies in has at most this many bytes."""
NPY_HEADER_MAX = 10_000  # NumPy's own limit


class Stand(enum.Enum):
    """Stands for what was not looked at."""

    ARRAY = "array"
    OTHER = "other"


@dataclass(frozen=True)
class Peeked:
    """`top` has dicts, lists, numbers and text, and a `Stand` for all else. `class_name`: the file is one object."""

    top: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    class_name: str = ""


def peek(path: str, seam: Seam) -> Peeked:
    """
    Raises:
        Error: as `formats.read` does; not for damage within arrays, which are not read.
    """
    with opened(path, seam) as source:
        name = next((name for name, form in FORMATS.items() if form.owns(source)), "")
        found = _WAYS[name](source) if name in _WAYS else None
    if found is not None:
        return found
    content = formats.read(path, seam=seam)  # also says best what is wrong with a file
    return _peeked(content.state, _item, content.metadata)


def _peeked(value: Any, number: Callable[[Any], Any], metadata: Mapping[str, str]) -> Peeked:
    class_name = value.class_name if isinstance(value, Opaque) else value.text if type(value) is Name else ""
    return Peeked(_Light(number).of(value, 0), metadata, class_name)


class _Light:
    """Makes a light copy of a value; `number` answers for an array: its number if it has one element, else None."""

    def __init__(self, number: Callable[[Any], Any]) -> None:
        self._number, self._left = number, PARTS_MAX

    def of(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > DEPTH_MAX:
            return Stand.OTHER
        if type(value) in (bool, int, float) or value is None:
            return value
        if type(value) is str:
            return value if len(value) <= TEXT_MAX else Stand.OTHER
        if isinstance(value, dict):
            return {self._key(key): self.of(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return [self.of(item, depth + 1) for item in value] if len(value) <= LIST_MAX else Stand.OTHER
        if type(value) is Wrapped:
            return self.of(value.value, depth + 1)
        if isinstance(value, np.generic):
            return _item(value)
        if type(value) is NumpyArray:
            return self.of(value.value, depth + 1)
        if isinstance(value, (Tensor, np.ndarray)):
            found = self._number(value) if math.prod(value.shape) == 1 else None
            return Stand.ARRAY if found is None else found
        return value if isinstance(value, Stand) else Stand.OTHER

    def _key(self, key: Any) -> str:
        return key.class_name if isinstance(key, Opaque) else str(key) if type(key) in (str, int) else repr(key)


def _item(value: Any) -> Any:
    """An array of one element as a number of Python; a stand for what is none."""
    array = np.asarray(value)
    if array.size != 1:
        return Stand.ARRAY
    try:
        item = array.reshape(-1)[0].item()
        return item if type(item) in (bool, int, float) else float(item)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return Stand.OTHER


# the formats --------------------------------------------------------------------------------------------------------


def _pth(source: Source) -> Peeked | None:
    """The stream of a zip file alone; None for the older kind, whose arrays lie between its streams."""
    if not source.head().startswith(MAGIC):
        return None
    archive = Archive(source)
    streams = (name for name in archive.names if name.endswith("/data.pkl") and name.count("/") == 1)
    prefix = next(streams).removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in archive.names:
        return None
    stream = archive.read(f"{prefix}data.pkl")
    value, _ = Machine(stream.data, Objects(len(stream)), f"{source.name}:{prefix}data.pkl").load(0)
    order = f"{prefix}byteorder"
    big = order in archive.names and archive.read(order).tobytes().strip() == b"big"

    def number(tensor: Any) -> Any:
        if tensor.storage.whole * tensor.storage.dtype.itemsize > SMALL_BYTES:
            return None
        work = Assembly(
            lambda key: archive.read(f"{prefix}data/{key}"), source.size, big != (sys.byteorder == "big"), source.name
        )
        return _item(work.state(tensor))

    return _peeked(value, number, {})


def _safetensors(source: Source) -> Peeked | None:
    length = int.from_bytes(source.bytes_at(0, 8).tobytes(), "little")
    if length > safetensors.HEADER_MAX:
        return None
    try:
        header = json.loads(source.bytes_at(8, length).tobytes().decode())
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}

        def number(name: str) -> Any:
            entry = header[name]
            start, stop = entry["data_offsets"]
            if math.prod(entry["shape"]) != 1 or not 0 < stop - start <= 16:
                return Stand.ARRAY
            data = source.bytes_at(8 + length + start, stop - start)
            return _item(np.frombuffer(data.tobytes(), safetensors.DTYPES[entry["dtype"]]))

        table = metadata.pop(named.KEY, None)
        top = {name: number(name) for name in header} if table is None else _from_table(table, number)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, msgspec.MsgspecError):
        return None  # the whole reader knows the words for what is wrong
    return _peeked(top, _item, metadata)


def _npz(source: Source) -> Peeked | None:
    archive = Archive(source)
    names = [entry.removesuffix(".npy") for entry in archive.names]
    key = f"__{named.KEY}__"

    def number(name: str) -> Any:
        return _item(_npy(archive.read(f"{name}.npy").tobytes(), 1))

    try:
        if key in names:
            top = _from_table(_npy(archive.read(f"{key}.npy").tobytes(), -1).tobytes(), number)
        else:
            top = {name: number(name) if is_wanted(name) else Stand.ARRAY for name in names}
    except (ValueError, KeyError, TypeError, SyntaxError, OverflowError, RecursionError, msgspec.MsgspecError):
        return None
    return _peeked(top, _item, {})


def _npy(data: bytes, count: int) -> Any:
    """The bytes of an array of NumPy's own file format as a flat array; of other than `count` elements: none."""
    width = 2 if data[6:7] == b"\1" else 4
    begin = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    header = ast.literal_eval(data[8 + width : min(begin, NPY_HEADER_MAX)].decode("latin1").strip())
    dtype = np.lib.format.descr_to_dtype(header["descr"])
    if dtype.hasobject or (count >= 0 and math.prod(header["shape"]) != count):
        return np.empty(0)
    return np.frombuffer(data[begin:], dtype)


def _from_table(table: bytes | str, number: Callable[[str], Any]) -> Any:
    """The nested state that a table of ours tells, with numbers for what was one."""
    known = msgspec.json.decode(table, type=named.Table)
    leaves = [Leaf(name, dtype, (), "other", kind) for name, dtype, kind in known.leaves]

    def leaf(index: int) -> Any:
        name, kind = leaves[index].path, leaves[index].kind
        if kind in ("str", "bytes"):
            return Stand.OTHER
        return number(name) if kind == "scalar" or is_wanted(name.rpartition("/")[2]) else Stand.ARRAY

    return unflatten(Tree(known.nodes, known.values, leaves), leaf, lambda composite: Stand.OTHER)


def _shards(source: Source) -> Peeked | None:
    """The index alone."""
    metadata, places = shards.index_of(source)
    table = metadata.pop(named.KEY, None)
    try:
        top = dict.fromkeys(places, Stand.ARRAY) if table is None else _from_table(table, lambda name: Stand.ARRAY)
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.MsgspecError):
        return None
    return _peeked(top, _item, metadata)


def _params(source: Source) -> Peeked | None:
    state, table = params.outline(source)
    if table is None:
        return _peeked(state, _item, {})
    try:
        return _peeked(_from_table(table, lambda name: _item(state[name])), _item, {})
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.MsgspecError):
        return None


def _protobuf(source: Source) -> Peeked | None:
    """Of the leaves, those that may be a number that counts."""

    def wanted(leaf: Leaf) -> bool:
        return leaf.kind in ("array", "scalar") and math.prod(leaf.shape) == 1

    tree, held, metadata = protobuf.outline(source, wanted)
    top = unflatten(tree, lambda at: _item(held[at]) if at in held else Stand.ARRAY, lambda composite: Stand.OTHER)
    return _peeked(top, _item, metadata)


_WAYS: dict[str, Callable[[Source], Peeked | None]] = {
    "pth": _pth, "safetensors": _safetensors, "npz": _npz, "shards": _shards, "params": _params, "protobuf": _protobuf,
}  # fmt: skip
