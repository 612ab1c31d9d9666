"""Hugging Face's .safetensors files. Read here rather than by their package, which gives bf16 and fp8 to torch only and
takes part of its checks on trust; the format is a JSON header and bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from everystep.errors import Error, Unsupported, UsageError
from everystep.formats import named
from everystep.formats.content import Content, Note, Opaque
from everystep.formats.file import Array, Source, Target, is_whole
from everystep.schema.dtype import ML_DTYPES

EXTENSIONS: tuple[str, ...] = (".safetensors",)
HEADER_MAX = 100_000_000
"""The limit that the format's own reader has."""
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"), "F16": np.dtype("<f2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"), "BF16": ML_DTYPES["bfloat16"], "F8_E5M2": ML_DTYPES["float8_e5m2"],
    "F8_E4M3": ML_DTYPES["float8_e4m3fn"], "F8_E8M0": ML_DTYPES["float8_e8m0fnu"],
    "F8_E5M2FNUZ": ML_DTYPES["float8_e5m2fnuz"], "F8_E4M3FNUZ": ML_DTYPES["float8_e4m3fnuz"],
}  # fmt: skip
_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Several elements to a byte: NumPy has no form for them."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


def owns(source: Source) -> bool:
    head = source.head()
    return len(head) > 8 and int.from_bytes(head[:8], "little") <= source.size - 8 and head[8:9] == b"{"


def read(source: Source) -> Content:
    """Arrays by name; the nested state where the file was written by `write`.

    Raises:
        Damaged: for a header that is not what the format says: offsets that overlap, leave holes or go outside.
        Unsupported: for a header larger than the format allows.
    """
    header, begin = _header(source)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise source.damaged("its metadata is not text by name")
    places = {name: _place(name, entry, source) for name, entry in header.items()}
    at = 0
    for name, (_, _, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if start != at:
            raise source.damaged(f"the bytes of {name[:200]!r} overlap others, or leave a hole")
        at = stop
    if begin + at != source.size:
        raise source.damaged(f"the file has {source.size} bytes, its header says {begin + at}")
    arrays: dict[str, Any] = {}
    for name, (kind, shape, start, stop) in places.items():
        data = source.bytes_at(begin + start, stop - start) if kind in DTYPES else None
        arrays[name] = Opaque(f"safetensors {kind}", name) if data is None else _array(name, data, kind, shape, source)
    opaque = tuple(value for value in arrays.values() if isinstance(value, Opaque))
    if named.KEY not in metadata or opaque:
        return Content(arrays, "safetensors", opaque, metadata=metadata)
    table = metadata.pop(named.KEY)
    try:
        return Content(named.put_together(table, arrays, source.name), "safetensors", metadata=metadata)
    except Error as error:
        error.where = error.where or source.name
        raise


def _header(source: Source) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(source.bytes_at(0, 8).tobytes(), "little")
    if length > HEADER_MAX:
        do = "is it a .safetensors file at all?"
        raise Unsupported(f"a header of {length} bytes, at most {HEADER_MAX}", where=source.name, do=do)
    try:
        header = json.loads(source.bytes_at(8, length).tobytes().decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise source.damaged(f"its header is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise source.damaged("its header is not a table")
    return header, 8 + length


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For JSON in which no name may be there twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _place(name: str, entry: Any, source: Source) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, stop), with as many bytes as that makes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise source.damaged(f"the entry of {name[:200]!r} makes no sense")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(kind, str) and (kind in DTYPES or kind in _PACKED_BITS)
    if not known or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise source.damaged(f"the entry of {name[:200]!r} makes no sense, or is of a newer kind")
    if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 1 << 62 for n in (*shape, *offsets)):
        raise source.damaged(f"the shape or place of {name[:200]!r} makes no sense")
    bits = _PACKED_BITS.get(kind) or DTYPES[kind].itemsize * 8
    if math.prod(shape) * bits != (offsets[1] - offsets[0]) * 8:
        raise source.damaged(f"the shape of {name[:200]!r} does not fit its bytes")
    return kind, tuple(shape), offsets[0], offsets[1]


def _array(name: str, data: Array, kind: str, shape: tuple[int, ...], source: Source) -> Array:
    try:
        array: Array = np.ndarray(shape, DTYPES[kind], data if len(data) else bytearray(1))
    except (ValueError, MemoryError) as error:
        raise source.damaged(f"no array can have the shape of {name[:200]!r}") from error
    if not is_whole(array):
        raise source.damaged(f"{name[:200]!r} has truth values that are neither 0 nor 1")
    return array


def write(state: Any, target: Target, metadata: Mapping[str, str] | None = None) -> list[Note]:
    """Arrays under their paths, largest elements first so that all are aligned; the nested state in the metadata.

    A tied array is there once, as the format wants it, under the first of its names.

    Args:
        metadata: text beside the state.

    Raises:
        Unsupported: for a header larger than the format allows.
    """
    parts = take_apart(state)
    pack(parts.arrays, {**checked(metadata, target), named.KEY: parts.table.decode()}, target)
    return notes(parts)


def take_apart(state: Any) -> named.Named:
    return named.take_apart(state, lambda dtype: dtype.newbyteorder("<") in _NAMES)


def notes(parts: named.Named) -> list[Note]:
    """What is kept in another form."""
    return [
        *parts.changed,
        *(Note(name, f"the same array as {kept}: it is there once") for name, kept in parts.aliases.items()),
    ]


def checked(metadata: Mapping[str, str] | None, target: Target) -> dict[str, str]:
    """Text by name, which the format asks for.

    Raises:
        UsageError: for anything else.
    """
    found = dict(metadata or {})
    wrong = [key for key, value in found.items() if type(key) is not str or type(value) is not str or key == named.KEY]
    if wrong:
        do = f"give text by name, and no name {named.KEY!r}"
        raise UsageError(f"metadata that has no place in this format: {wrong[0]!r}", where=target.name, do=do)
    return found


def pack(arrays: Mapping[str, Array], metadata: Mapping[str, str], target: Target) -> None:
    """A whole file of these arrays."""
    arrays = {name: np.asarray(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()}
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    at = 0
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in names:
        array = arrays[name]
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    body = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    if len(body) > HEADER_MAX:
        do = "write fewer arrays, or plain values elsewhere"
        raise Unsupported(f"names, plain values and structure take {len(body)} bytes", where=target.name, do=do)
    target.write(len(body).to_bytes(8, "little") + body)
    for name in names:
        target.write(arrays[name].reshape(-1).view(np.uint8))
