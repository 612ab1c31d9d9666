"""HDF5's element types and attributes as NumPy's dtypes and plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep.formats.file import Array
from everystep.formats.hdf5_words import Malformed, number, part
from everystep.schema.dtype import ML_DTYPES

FIELDS_MAX, DEPTH_MAX = 1000, 8
_INTEGER, _FLOAT, _TIME, _STRING, _BITS, _OPAQUE, _COMPOUND, _REFERENCE, _ENUM, _VARIABLE, _ARRAY = range(11)
_NAMES = {_TIME: "time", _REFERENCE: "reference", _VARIABLE: "variable-length array", _COMPOUND: "compound"}
_FLOATS: dict[tuple[int, ...], str] = {
    (2, 0, 16, 10, 5, 0, 10, 15, 15): "f2",
    (4, 0, 32, 23, 8, 0, 23, 127, 31): "f4",
    (8, 0, 64, 52, 11, 0, 52, 1023, 63): "f8",
    (2, 0, 16, 7, 8, 0, 7, 127, 15): "bfloat16",
}
"""By size, offset, precision, place and size of exponent and mantissa, bias, place of the sign."""


@dataclass(frozen=True)
class Type:
    """`dtype` is None for what has no such bytes; `is_text` for text of any length; `end` is where its words end."""

    name: str
    size: int
    end: int
    dtype: np.dtype[Any] | None = None
    is_text: bool = False


def type_of(data: memoryview, at: int = 0, depth: int = 0) -> Type:
    """
    Raises:
        Malformed: for what is no type.
    """
    if depth > DEPTH_MAX:
        raise Malformed("a type that nests too deep")
    kind, version = number(data, at, 1) & 15, number(data, at, 1) >> 4
    bits, size, at = number(data, at + 1, 3), number(data, at + 4, 4), at + 8
    name = f"HDF5 {_NAMES.get(kind, 'type')} of {size} bytes"
    if not size or size > 1 << 30 or not 0 < version < 6:
        raise Malformed("a type that makes no sense")
    dtype: np.dtype[Any] | None = None
    is_text = False
    order = ">" if bits & 1 else "<"
    if kind in (_INTEGER, _BITS):
        dtype, at = _integer(data, at, size, order, kind == _INTEGER and bool(bits & 8)), at + 4
    elif kind == _FLOAT:
        dtype, at = _float(data, at, size, order, bits), at + 12
    elif kind == _STRING:
        dtype = np.dtype(f"S{size}")
    elif kind == _OPAQUE:
        dtype, at = np.dtype(f"V{size}"), at + (bits & 255) + -(bits & 255) % 8
    elif kind == _COMPOUND:
        dtype, at = _compound(data, at, size, bits & 0xFFFF, version, depth)
    elif kind == _ENUM:
        dtype, at = _enumeration(data, at, bits & 0xFFFF, version, depth)
    elif kind == _VARIABLE:
        inner = type_of(data, at, depth + 1)
        at, is_text = inner.end, bits & 15 == 1 and size == 16
    elif kind == _ARRAY:
        dtype, at = _array(data, at, version, depth)
    elif kind == _TIME:
        at += 2
    elif kind != _REFERENCE:
        raise Malformed("a type that is none")
    return Type(name, size, at, dtype if dtype is not None and dtype.itemsize == size else None, is_text)


def _integer(data: memoryview, at: int, size: int, order: str, signed: bool) -> np.dtype[Any] | None:
    offset, precision = number(data, at, 2), number(data, at + 2, 2)
    if size not in (1, 2, 4, 8) or offset or precision != 8 * size:
        return None
    return np.dtype(f"{order}{'i' if signed else 'u'}{size}")


def _float(data: memoryview, at: int, size: int, order: str, bits: int) -> np.dtype[Any] | None:
    places = [number(data, at + 4 + n, 1) for n in range(4)]
    layout = (size, number(data, at, 2), number(data, at + 2, 2), *places, number(data, at + 8, 4), bits >> 8 & 255)
    found = _FLOATS.get(layout)
    if found is None or bits >> 4 & 3 != 2 or bits & 64:
        return None
    if found not in ML_DTYPES:
        return np.dtype(f"{order}{found}")
    return ML_DTYPES[found].newbyteorder(">") if order == ">" else ML_DTYPES[found]


def _padded_name(data: memoryview, at: int, version: int) -> tuple[str, int]:
    head = part(data, at, min(1 << 16, len(data) - at)).tobytes()
    raw, zero, _ = head.partition(b"\0")
    if not zero:
        raise Malformed("a name without an end")
    size = len(raw) + 1
    return raw.decode("utf-8", "surrogateescape"), at + size + (-size % 8 if version < 3 else 0)


def _compound(
    data: memoryview, at: int, size: int, count: int, version: int, depth: int
) -> tuple[np.dtype[Any] | None, int]:
    if not 0 < count <= FIELDS_MAX:
        raise Malformed("a type of too many fields")
    names, formats, offsets = [], [], []
    width = 4 if version < 3 else max(1, ((size).bit_length() + 7) // 8)
    for _ in range(count):
        name, at = _padded_name(data, at, version)
        offsets.append(number(data, at, width))
        at += width
        axes: tuple[int, ...] = ()
        if version == 1:
            axes = tuple(number(data, at + 12 + 4 * n, 4) for n in range(min(4, number(data, at, 1))))
            at += 28
        inner = type_of(data, at, depth + 1)
        at = inner.end
        names.append(name)
        formats.append(np.dtype((inner.dtype, axes)) if axes and inner.dtype is not None else inner.dtype)
    if any(found is None for found in formats) or len(set(names)) < count:
        return None, at
    first = formats[0]
    if names == ["r", "i"] and first == formats[1] and first in _HALVES and offsets == [0, size // 2]:
        return np.dtype(f"{'>' if first.byteorder == '>' else '<'}c{size}"), at
    spec: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": size}
    try:
        return np.dtype(spec), at
    except (ValueError, TypeError):
        return None, at


_HALVES = {np.dtype(f"{order}f{size}") for order in "<>" for size in (4, 8)}


def _enumeration(data: memoryview, at: int, count: int, version: int, depth: int) -> tuple[np.dtype[Any] | None, int]:
    """Truth values, as h5py writes them; any other is its numbers."""
    base = type_of(data, at, depth + 1)
    at = base.end
    names = []
    for _ in range(count):
        name, at = _padded_name(data, at, version)
        names.append(name)
    values = part(data, at, count * base.size)
    at += len(values)
    if base.size == 1 and dict(zip(names, values)) == {"FALSE": 0, "TRUE": 1}:
        return np.dtype("?"), at
    return base.dtype, at


def _array(data: memoryview, at: int, version: int, depth: int) -> tuple[np.dtype[Any] | None, int]:
    axes = number(data, at, 1)
    at += 1 if version >= 3 else 4
    shape = tuple(number(data, at + 4 * n, 4) for n in range(axes))
    at += 4 * axes * (1 if version >= 3 else 2)
    inner = type_of(data, at, depth + 1)
    if inner.dtype is None or not shape or axes > 32 or math.prod(shape) * inner.size > 1 << 30:
        return None, inner.end
    return np.dtype((inner.dtype, shape)), inner.end


def shape_of(data: memoryview) -> tuple[int, ...] | None:
    """The axes of a dataset; None for one that has no value.

    Raises:
        Malformed: for what is none.
    """
    version, axes, flags = number(data, 0, 1), number(data, 1, 1), number(data, 2, 1)
    if version not in (1, 2) or axes > 32:
        raise Malformed("a shape that makes no sense")
    if version == 2 and number(data, 3, 1) == 2:
        return None
    at = 8 if version == 1 else 4
    shape = tuple(number(data, at + 8 * n, 8) for n in range(axes))
    if flags > 3 or any(n >= 1 << 62 for n in shape):
        raise Malformed("a shape that makes no sense")
    return shape


@dataclass(frozen=True)
class Attribute:
    name: str
    type: Type | None
    shape: tuple[int, ...] | None
    data: memoryview


def attribute_of(data: memoryview) -> Attribute:
    """
    Raises:
        Malformed: for what is none.
    """
    version, flags = number(data, 0, 1), number(data, 1, 1)
    if not 0 < version < 4:
        raise Malformed("an attribute of an unknown version")
    sizes = [number(data, at, 2) for at in (2, 4, 6)]
    at = 9 if version == 3 else 8
    parts = []
    for size in sizes:
        parts.append(part(data, at, size))
        at += size + (-size % 8 if version == 1 else 0)
    name = parts[0].tobytes().partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if version > 1 and flags & 3:  # a named type, which stands elsewhere
        return Attribute(name, None, None, data[:0])
    return Attribute(name, type_of(parts[1]), shape_of(parts[2]), data[at:])


def filters_of(data: memoryview) -> list[tuple[int, tuple[int, ...]]]:
    """(id, values) of each filter, in the order in which they packed."""
    version, count = number(data, 0, 1), number(data, 1, 1)
    at = 8 if version == 1 else 2
    if version not in (1, 2) or count > 32:
        raise Malformed("filters that make no sense")
    found = []
    for _ in range(count):
        kind, at = number(data, at, 2), at + 2
        named = version == 1 or kind >= 256
        size, at = (number(data, at, 2), at + 2) if named else (0, at)
        values, at = number(data, at + 2, 2), at + 4
        at += size + (-size % 8 if version == 1 else 0)
        found.append((kind, tuple(number(data, at + 4 * n, 4) for n in range(values))))
        at += 4 * values + (4 if version == 1 and values % 2 else 0)
    return found


def fill_of(kind: int, data: memoryview, is_old: bool) -> memoryview | None:
    """The bytes of an element that was never written; None for zero."""
    if is_old:
        at, size = 4, number(data, 0, 4)
    else:
        version, flags = number(data, 0, 1), number(data, 1, 1)
        defined = bool(flags & 32) if version == 3 else version == 1 or bool(number(data, 3, 1))
        if not defined:
            return None
        at = 6 if version == 3 else 8
        size = number(data, at - 4, 4)
    return part(data, at, size) if 0 < size < 1 << 16 and size == kind else None


def plain_of(array: Array) -> Any:
    """The value of an attribute: a number, text, bytes, or lists of them; None for what is none."""
    if array.dtype.kind in "biuf":
        return array.tolist()
    if array.dtype.kind == "S":
        found = [text_of(item) for item in array.reshape(-1).tolist()]
        return found[0] if array.shape == () else found
    return None


def text_of(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
