"""NumPy's .npz files: what np.load reads and np.savez writes, never with objects, and nested states beside."""

from __future__ import annotations

import ast
import re
from typing import Any

import numpy as np

from everystep.errors import Error
from everystep.formats import named
from everystep.formats.content import Content, Note, Opaque
from everystep.formats.file import Array, Source, Target, is_whole
from everystep.formats.zipped import MAGIC, Archive, Writer

EXTENSIONS: tuple[str, ...] = (".npz",)
_EMPTY = b"PK\x05\x06"  # an archive without entries
_MAGIC = b"\x93NUMPY"
_TABLE = f"__{named.KEY}__"
_HEADER_MAX = 10_000  # NumPy's own limit
_LONG = re.compile(r"(?<=\d)L\b")  # how Python 2 wrote its integers


def owns(source: Source) -> bool:
    head = source.head()
    names = Archive(source).names if head.startswith((MAGIC, _EMPTY)) else ["no archive"]
    return all(name.endswith(".npy") for name in names)


def read(source: Source) -> Content:
    """Arrays by name; the nested state where the file was written by `write`. Arrays of objects are not understood.

    Raises:
        Damaged, Unsupported: see `everystep.formats.read`.
    """
    archive = Archive(source)
    state: dict[str, Any] = {}
    opaque: list[Opaque] = []
    for entry in archive.names:
        name, data = entry.removesuffix(".npy"), archive.read(entry)
        if name in state:
            raise source.damaged(f"two arrays of one name: {name[:80]!r}")
        value = _array(data, f"{source.name}:{entry[:200]}", source) if entry != name else data.tobytes()
        if value is None:
            opaque.append(Opaque("numpy.ndarray of objects", name))
        state[name] = opaque[-1] if value is None else value
    table = state.pop(_TABLE, None)
    if table is None or opaque:
        return Content(state, "npz", tuple(opaque))
    if not isinstance(table, np.ndarray) or table.dtype != np.uint8:
        raise source.damaged("the table of the state is no array of bytes")
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    try:
        return Content(named.put_together(table.tobytes(), arrays, source.name), "npz")
    except Error as error:
        error.where = error.where or source.name
        raise


def _array(data: Array, where: str, source: Source) -> Array | None:
    """An array in NumPy's own file format; None if it holds objects."""
    try:
        if data[:6].tobytes() != _MAGIC:
            raise ValueError("it does not begin like an array of NumPy")
        version, width = int(data[6]), 2 if data[6] == 1 else 4
        begin = 8 + width + int.from_bytes(data[8 : 8 + width].tobytes(), "little")
        if version not in (1, 2, 3) or begin > min(len(data), _HEADER_MAX):
            raise ValueError("an unknown version, or a header that is too long")
        text = data[8 + width : begin].tobytes().decode("utf-8" if version == 3 else "latin1")
        header = ast.literal_eval((text if version == 3 else _LONG.sub("", text)).strip())
        if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
            raise ValueError("not the header of an array")
        dtype, shape, order = np.lib.format.descr_to_dtype(header["descr"]), header["shape"], header["fortran_order"]
        if dtype.hasobject:
            return None
        if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape) or type(order) is not bool:
            raise ValueError("not a shape")
        if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data) - begin:
            raise ValueError("a shape that does not fit its bytes")
        # Over a byte that is not there, empty arrays have a buffer too.
        array: Array = np.ndarray(
            shape, dtype, data if len(data) > begin else bytearray(1), begin % len(data), order="F" if order else "C"
        )
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        SyntaxError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise source.damaged(f"{where} is no array: {str(error)[:200]}") from error
    if not is_whole(array):
        raise source.damaged(f"{where} has truth values that are neither 0 nor 1")
    return array


def write(state: Any, target: Target) -> list[Note]:
    """Arrays under their paths, as np.load finds them (a tied array under all of them), and the table of the state."""
    parts = named.take_apart(state, _is_native)
    archive = Writer(target)
    entries = {**parts.arrays, **{name: parts.arrays[kept] for name, kept in parts.aliases.items()}}
    for name, array in (*entries.items(), (_TABLE, np.frombuffer(parts.table, np.uint8))):
        with archive.entry(f"{name}.npy", array.nbytes + _HEADER_MAX) as entry:
            np.lib.format.write_array(entry, array, None, False)
    archive.close()
    return parts.changed


def _is_native(dtype: np.dtype[Any]) -> bool:
    """Whether np.load gives it back."""
    try:
        return np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(dtype)) == dtype and dtype.metadata is None
    except (TypeError, ValueError):
        return False
