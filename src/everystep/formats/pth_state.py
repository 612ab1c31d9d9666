"""Puts the state together from what a stream described: tensors become arrays, wrapped things plain ones, each once."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.errors import Damaged, Unsupported
from everystep.formats.content import Note, Opaque
from everystep.formats.file import Array, is_whole
from everystep.formats.pth_numpy import NumpyArray, NumpyDtype
from everystep.formats.pth_objects import Storage, Tensor, constant
from everystep.formats.pth_stream import Name, Wrapped
from everystep.schema import join
from everystep.schema.box import AXES_MAX
from everystep.schema.tree import DEPTH_MAX

PARTS_MAX = 1 << 24
"""Containers may share their parts: as many as a reader who walks every path may meet."""
LOGICAL_MIN, LOGICAL_TIMES = 1 << 30, 4
"""Expanded and overlapping tensors may have this many bytes (or times the file) in all: copies of them cost that."""
_ATOMS = (bool, int, float, complex, str, bytes)
_Path = tuple[Any, ...]


class Assembly:
    """One state. `fetch` gives the bytes of a storage by its key; `swapped`: they are in the other byte order."""

    def __init__(self, fetch: Callable[[str], Array], file_bytes: int, swapped: bool, where: str) -> None:
        self._fetch, self._swapped, self._where = fetch, swapped, where
        self._left = max(LOGICAL_MIN, LOGICAL_TIMES * file_bytes)
        self.not_understood: list[Opaque] = []
        self.changed: list[Note] = []
        self._done: dict[int, tuple[Any, int]] = {}
        self._open: set[int] = set()
        self._buffers: dict[tuple[str, int], Array] = {}
        self._arrays: dict[Any, Any] = {}

    def state(self, value: Any) -> Any:
        """The state that a value of the stream stands for.

        Raises:
            Damaged: for tensors that reach outside their storage.
            Unsupported: for a state that contains itself, nests too deep or shares its parts without bound.
        """
        try:
            return self._settle(value, ())[0]
        except RecursionError as error:
            raise Unsupported("a state nested too deep for this program's stack", do="save it flat") from error

    def _settle(self, value: Any, path: _Path) -> tuple[Any, int]:
        """(what it is, how many parts a walk over it meets)"""
        if value is None or type(value) in _ATOMS:
            return value, 1
        known = self._done.get(id(value))
        if known is not None:
            return known
        if id(value) in self._open or len(path) > DEPTH_MAX or len(self._open) > 2 * DEPTH_MAX:
            what = f"a state that contains itself, or nests deeper than {DEPTH_MAX} levels"
            raise Unsupported(what, where=_text(path[:8]), do="save it flat")
        self._open.add(id(value))
        made = self._make(value, path)
        if made[1] > PARTS_MAX:
            raise Unsupported(f"a state of more than {PARTS_MAX} parts", where=_text(path), do="save it in parts")
        self._open.discard(id(value))
        self._done[id(value)] = made
        return made

    def _make(self, value: Any, path: _Path) -> tuple[Any, int]:
        kind = type(value)
        if kind in (dict, OrderedDict, Counter):
            return self._dict(value, path)
        if kind in (list, tuple):
            parts = [self._settle(item, (*path, i)) for i, item in enumerate(value)]
            return kind(part for part, _ in parts), 1 + sum(count for _, count in parts)
        if kind is Wrapped:
            made, count = self._settle(value.value, path)
            self.changed.append(Note(_text(path), value.text))
            return made, count
        if kind is Tensor:
            return self._tensor(value, path), 1
        if kind is Storage:
            self.changed.append(Note(_text(path), "a storage is an array here"))
            return self._bytes(value, value.dtype, path).view(value.dtype), 1
        if kind is NumpyArray:
            return self._settle(value.value, path)
        if kind is Name and (text := constant(value)) is not None:
            self.changed.append(Note(_text(path), "a constant of torch is text here"))
            return text, 1
        if kind in (Name, Opaque, NumpyDtype):
            name = value.text if kind is Name else value.class_name if kind is Opaque else "numpy.dtype"
            self.not_understood.append(Opaque(name, _text(path)))
            return self.not_understood[-1], 1
        return value, 1  # an array or a NumPy scalar, finished

    def _dict(self, value: Any, path: _Path) -> tuple[Any, int]:
        made = type(value)()
        total = 1
        for key, item in value.items():
            if isinstance(key, Opaque) and key.class_name not in value and key.class_name not in made:
                key = key.class_name
                self.changed.append(Note(_text((*path, key)), "a class as a key is its name here"))
            elif isinstance(key, Opaque):
                self.not_understood.append(Opaque(key.class_name, _text(path)))
                continue
            part, count = self._settle(item, (*path, key))
            made[key] = part
            total += count
        return made, total

    def _tensor(self, tensor: Tensor, path: _Path) -> Any:
        # Axes of one element may have any stride. Empty tensors have no memory to share.
        strides = tuple(s if n > 1 else 0 for s, n in zip(tensor.strides, tensor.shape))
        storage = tensor.storage
        key = (storage.key, storage.start, tensor.dtype, tensor.offset, tensor.shape, strides, tensor.conj, tensor.neg)
        if key not in self._arrays:
            array = self._view(tensor, strides, path)
            if tensor.conj:
                array = np.conj(array)
            self._arrays[key] = np.negative(array) if tensor.neg else array
            if 0 in tensor.shape:
                return self._arrays.pop(key)
        return self._arrays[key]

    def _view(self, tensor: Tensor, strides: tuple[int, ...], path: _Path) -> Array:
        unit = tensor.dtype.itemsize
        try:
            if len(tensor.shape) > AXES_MAX:
                raise ValueError(f"{len(tensor.shape)} axes")
            count = math.prod(tensor.shape)
            if count == 0:
                return np.empty(tensor.shape, tensor.dtype)
            data = self._bytes(tensor.storage, tensor.dtype, path)
            last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, strides))
            if (last + 1) * unit > len(data):
                raise ValueError(f"it reaches element {last} of {len(data) // unit}")
            self._left -= count * unit
            if self._left < 0:
                what = "tensors that are far larger than the file that holds them"
                raise Unsupported(what, where=self._at(path), do="save them without expand() and overlapping views")
            view: Array = np.ndarray(
                tensor.shape, tensor.dtype, data, tensor.offset * unit, [s * unit for s in strides]
            )
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise self._damaged(f"a tensor that does not lie in its storage: {str(error)[:200]}", path) from error
        if not is_whole(view):
            raise self._damaged("truth values that are neither 0 nor 1", path)
        return view

    def _bytes(self, storage: Storage, dtype: np.dtype[Any], path: _Path) -> Array:
        """The bytes of a storage, in this machine's order for elements of this type."""
        data = self._buffers.get((storage.key, 1))
        if data is None:
            data = self._buffers[storage.key, 1] = self._fetch(storage.key)
        size = storage.dtype.itemsize
        if len(data) != storage.whole * size:
            raise self._damaged(f"a storage of {len(data)} bytes, where {storage.whole * size} are said", path)
        unit = dtype.itemsize // (2 if np.issubdtype(dtype, np.complexfloating) else 1)
        if self._swapped and unit > 1:
            if (storage.key, unit) not in self._buffers:
                self._buffers[storage.key, unit] = data.view(f"u{unit}").byteswap().view(np.uint8)
            data = self._buffers[storage.key, unit]
        return data[storage.start * size : (storage.start + storage.size) * size]

    def _at(self, path: _Path) -> str:
        return f"{self._where}: {_text(path)}"

    def _damaged(self, what: str, path: _Path) -> Damaged:
        return Damaged(what, where=self._at(path), do="get the file again from where it came from")


def _text(path: _Path) -> str:
    text = ""
    for key in path:
        text = join(text, key)
    return text
