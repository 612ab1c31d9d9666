"""MXNet's .params files, as mx.nd.save writes them (src/ndarray/ndarray.cc of MXNet 1.9.1), of all versions."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep.formats import named
from everystep.formats.content import Content, Note, Opaque
from everystep.formats.file import Array, Source, Target, is_whole
from everystep.schema.dtype import ML_DTYPES

EXTENSIONS: tuple[str, ...] = (".params",)
MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
"""Arrays with 64-bit dimensions; with a storage type; with the shapes of NumPy. Before them, the number of dimensions
stood in this place."""
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"), 1: np.dtype("<f8"), 2: np.dtype("<f2"), 3: np.dtype("u1"), 4: np.dtype("<i4"),
    5: np.dtype("i1"), 6: np.dtype("<i8"), 7: np.dtype("bool"), 8: np.dtype("<i2"), 9: np.dtype("<u2"),
    10: np.dtype("<u4"), 11: np.dtype("<u8"), 12: ML_DTYPES["bfloat16"],
}  # fmt: skip
_FLAGS = {dtype: flag for flag, dtype in DTYPES.items() if not 8 <= flag <= 11}
"""What is written: MXNet 1.9 ends at a file with 16-bit or unsigned integers, which only MXNet 2 has."""
_STORAGE = {0: "dense", 1: "row_sparse", 2: "csr"}
_BESIDE = {"dense": (), "row_sparse": ("indices",), "csr": ("indptr", "indices")}
LONG_BYTES = 4096
_DIMENSIONS_MAX = 32
_TABLE = f"__{named.KEY}__"
_CPU = struct.pack("<ii", 1, 0)


def owns(source: Source) -> bool:
    head = source.head()
    return len(head) >= 24 and int.from_bytes(head[:8], "little") == MAGIC


def read(source: Source) -> Content:
    """Arrays by name, or a list where they have none; the nested state where the file was written by `write`.

    A sparse array is a dict of its parts: `storage`, `shape`, `data`, `indices`, `indptr`. One that was never given
    values is None.

    Raises:
        Damaged: for what is cut off, of unknown kinds, of negative sizes or of more bytes than the file has.
    """
    cursor = _Cursor(source, [])
    state, table = _parse(cursor)
    if table is None:
        return Content(state, "params", changed=tuple(cursor.notes))
    held = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    with source.told():
        return Content(named.put_together(table, held, source.name), "params")


def outline(source: Source) -> tuple[Any, bytes | None]:
    """What `read` begins with, the table if there is one, and an `Opaque` in place of long arrays."""
    return _parse(_Cursor(source, [], LONG_BYTES))


def _parse(cursor: _Cursor) -> tuple[Any, bytes | None]:
    """(arrays as they are in the file, table of the state)."""
    source = cursor.source
    if cursor.number("<Q") != MAGIC:
        raise source.damaged("it does not begin like a .params file")
    cursor.number("<Q")
    arrays = [cursor.array() for _ in range(cursor.count(4))]
    names = [cursor.name() for _ in range(cursor.count(8))]
    if cursor.at != source.size:
        raise source.damaged(f"{source.size - cursor.at} bytes behind its end")
    if not names:
        return arrays, None
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise source.damaged(f"{len(set(names))} names for {len(arrays)} arrays")
    state = dict(zip(names, arrays))
    if _TABLE not in state:
        return state, None
    table = state.pop(_TABLE)
    if not isinstance(table, np.ndarray) or table.dtype != np.uint8:
        raise source.damaged("the table of the state is no array of bytes")
    return state, table.tobytes()


@dataclass
class _Cursor:
    """A place in a file that moves on with all that is read; nothing is allocated that the file cannot hold."""

    source: Source
    notes: list[Note]
    long_bytes: int | None = None
    """Arrays of more bytes are passed over, but for those of bytes, of which one may be the table."""
    at: int = 0

    def take(self, count: int) -> Array:
        data = self.source.bytes_at(self.at, count)
        self.at += count
        return data

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def count(self, least: int) -> int:
        """How many things of at least so many bytes follow."""
        count = self.number("<Q")
        if count * least > self.source.size - self.at:
            raise self.source.damaged(f"it says that {count} entries follow, more than the file has bytes for")
        return count

    def name(self) -> str:
        data = self.take(self.number("<Q")).tobytes()
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.source.damaged("a name that is not UTF-8") from error

    def shape(self, form: str = "<q", ndim: int | None = None) -> tuple[int, ...] | None:
        """None where it is not known."""
        ndim = self.number("<i") if ndim is None else ndim
        if ndim == -1:
            return None
        if not 0 <= ndim <= _DIMENSIONS_MAX:
            raise self.source.damaged(f"an array of {ndim} dimensions at byte {self.at}")
        shape = struct.unpack(f"<{ndim}{form[1]}", self.take(ndim * struct.calcsize(form)))
        if any(size < -1 for size in shape):
            raise self.source.damaged(f"an array of negative size at byte {self.at}: {list(shape)}")
        return None if -1 in shape else shape

    def array(self) -> Any:
        magic = self.number("<I")
        if magic in (V2, V3):
            return self._stored(magic == V3)
        shape = self.shape() if magic == V1 else self.shape("<I", magic)
        if not shape:
            return None
        self.take(len(_CPU))
        return self._values(self._dtype(), shape)

    def _stored(self, like_numpy: bool) -> Any:
        storage = _STORAGE.get(self.number("<i"))
        if storage is None:
            raise self.source.damaged(f"an array of an unknown storage type at byte {self.at - 4}")
        held = self.shape() if storage != "dense" else None
        shape = self.shape()
        if shape is None or not (shape or like_numpy):
            return None
        self.take(len(_CPU))
        dtype = self._dtype()
        if storage == "dense":
            return self._values(dtype, shape)
        beside = [(name, self._dtype(), self.shape()) for name in _BESIDE[storage]]
        if held is None or any(inner is None for _, _, inner in beside):
            raise self.source.damaged(f"a sparse array without a size at byte {self.at}")
        parts = {"storage": storage, "shape": list(shape), "data": self._values(dtype, held)}
        for name, kind, inner in beside:
            parts[name] = self._values(kind, inner or ())
        self.notes.append(Note("", f"a {storage} array of shape {list(shape)} is a dict of its parts"))
        return parts

    def _dtype(self) -> np.dtype[Any]:
        flag = self.number("<i")
        if flag not in DTYPES:
            raise self.source.damaged(f"an array of an unknown dtype ({flag}) at byte {self.at - 4}")
        return DTYPES[flag]

    def _values(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        nbytes = math.prod(shape) * dtype.itemsize
        if self.long_bytes is not None and nbytes > self.long_bytes and (dtype != np.uint8 or len(shape) > 1):
            if nbytes > self.source.size - self.at:
                raise self.source.damaged(f"the file ends before an array of {nbytes} bytes")
            self.at += nbytes
            return Opaque("not read")
        data = self.take(nbytes)
        try:
            array: Array = np.ndarray(shape, dtype, data if len(data) else bytearray(1))
        except (ValueError, MemoryError) as error:
            raise self.source.damaged(f"no array can have the shape {list(shape)}") from error
        if not is_whole(array):
            raise self.source.damaged("truth values that are neither 0 nor 1")
        return array


def write(state: Any, target: Target) -> list[Note]:
    """A dict of arrays, or a list of them, as mx.nd.save would; another state as arrays by their paths, and a table.

    Scalars and empty arrays exist in MXNet with the shapes of NumPy only: one of them, and the file is such a one.
    """
    parts = _table(state) if not _is_plain(state) else state
    notes: list[Note] = []
    if isinstance(parts, named.Named):
        notes = [
            *parts.changed,
            Note("", f"the structure is in the array {_TABLE}: load_parameters(ignore_extra=True)"),
        ]
        table = {_TABLE: np.frombuffer(parts.table, np.uint8)}
        parts = {**parts.arrays, **{name: parts.arrays[kept] for name, kept in parts.aliases.items()}, **table}
    arrays: list[Array] = list(parts.values() if isinstance(parts, dict) else parts)
    like_numpy = any(not array.size or not array.ndim for array in arrays)
    if like_numpy:
        notes.append(Note("", "there are scalars or empty arrays: MXNet reads it with mx.npx.load, not mx.nd.load"))
    target.write(struct.pack("<QQQ", MAGIC, 0, len(arrays)))
    for array in arrays:
        little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        target.write(struct.pack(f"<Iii{little.ndim}q", V3 if like_numpy else V2, 0, little.ndim, *little.shape))
        target.write(_CPU + struct.pack("<i", _FLAGS[little.dtype]))
        target.write(little.reshape(-1).view(np.uint8))
    names = [name.encode() for name in parts] if isinstance(parts, dict) else []
    target.write(struct.pack("<Q", len(names)) + b"".join(struct.pack("<Q", len(name)) + name for name in names))
    return notes


def _table(state: Any) -> named.Named:
    return named.take_apart(state, _is_native)


def _is_native(dtype: np.dtype[Any]) -> bool:
    return dtype.newbyteorder("<") in _FLAGS and dtype.isnative


def _is_plain(state: Any) -> bool:
    """Whether mx.nd.load gives it back as it is."""
    if type(state) is list:
        return bool(state) and all(_is_array(value) for value in state)
    return (
        type(state) is dict
        and bool(state)
        and all(type(name) is str and _is_name(name) and _is_array(value) for name, value in state.items())
    )


def _is_array(value: Any) -> bool:
    return type(value) is np.ndarray and _is_native(value.dtype) and not value.dtype.metadata


def _is_name(name: str) -> bool:
    """Names are text of C there."""
    try:
        return "\0" not in name and name != _TABLE and bool(name.encode())
    except UnicodeEncodeError:
        return False
