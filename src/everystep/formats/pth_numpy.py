"""NumPy's dtypes, arrays and scalars as a pickle spells them, made again from the closed table of dtypes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from everystep.errors import Damaged
from everystep.formats.content import Opaque
from everystep.formats.file import Array, is_whole
from everystep.formats.pth_stream import Malformed, Name
from everystep.schema.dtype import ML_DTYPES, parse

FIELDS_MAX = 1000
OBJECTS = "numpy.ndarray of objects"


class NumpyDtype:
    """A dtype on its way; its `dtype` stays None where it is one that is not taken (objects)."""

    __slots__ = ("code", "dtype", "fields")

    def __init__(self, code: Any) -> None:
        self.code, self.fields = code, 1
        self.dtype: np.dtype[Any] | None = None
        if type(code) is Name and code.module == "ml_dtypes":
            self.dtype = ML_DTYPES.get(code.name)

    def build(self, state: Any) -> None:
        """The state: (version, byte order, subarray, names, fields, size, alignment, flags[, (metadata, unit)])."""
        _, order, subarray, names, fields, itemsize, _, _, *more = state
        if type(self.code) is not str or len(self.code) > 12 or subarray is not None:
            self.dtype = None if order == ">" or subarray is not None else self.dtype
        elif names is not None:
            self._structured(names, fields, itemsize)
        else:
            try:
                self.dtype = parse(f"{order}{self.code}{_unit(more[0][1]) if more else ''}")
            except Damaged:
                self.dtype = None  # objects, and whatever else is not in the table of dtypes

    def _structured(self, names: Any, fields: Any, itemsize: Any) -> None:
        parts = [fields[name] for name in names]
        # Counted through all levels: fields of fields of fields could be more than anybody can walk.
        self.fields = 1 + sum(part[0].fields for part in parts)
        if self.fields > FIELDS_MAX or any(part[0].dtype is None for part in parts):
            return
        formats, offsets = [part[0].dtype for part in parts], [part[1] for part in parts]
        spec: Any = {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": itemsize}
        self.dtype = np.dtype(spec)


def _unit(unit: Any) -> str:
    """The unit of a time: (name, count, divisor, event)."""
    name, count, divisor, _ = unit
    if type(count) is not int or divisor != 1:
        raise Malformed("not a unit of time")
    return "" if name == b"generic" else f"[{count if count != 1 else ''}{name.decode()}]"


class NumpyArray:
    """An array on its way."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = Opaque("numpy.ndarray")

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = array(data, dtype, shape, "F" if fortran else "C")


def array(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array | Opaque:
    """A fresh array from bytes."""
    if type(dtype) is not NumpyDtype or dtype.dtype is None or type(data) is not bytes:
        return Opaque(OBJECTS)
    if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape) or order not in ("C", "F", "K"):
        raise Malformed("not an array")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise Malformed("a shape that does not fit its bytes")
    made: Array = np.ndarray(shape, dtype.dtype, bytearray(data or b"\0"), order="F" if order == "F" else "C")
    if not is_whole(made):
        raise Malformed("truth values that are neither 0 nor 1")
    return made if axes is None else made.transpose(axes)


def scalar(data: Any, dtype: Any) -> Any:
    made = array(data, dtype, (), "C")
    return made if isinstance(made, Opaque) else made[()]
