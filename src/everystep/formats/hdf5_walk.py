"""The groups, datasets and attributes of an HDF5 file, walked without ever following it to another file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from everystep.errors import Unsupported
from everystep.formats.content import Note, Opaque
from everystep.formats.file import Source
from everystep.formats.hdf5_data import FILTERS as KNOWN
from everystep.formats.hdf5_data import SHUFFLE, Elements
from everystep.formats.hdf5_format import (
    ATTRIBUTE,
    ATTRIBUTE_INFO,
    EXTERNAL,
    FILL,
    FILTERS,
    HARD,
    LAYOUT,
    LINK_INFO,
    OLD_FILL,
    OUTSIDE,
    SHARED,
    SOFT,
    SPACE,
    TABLE,
    TYPE,
    Chunk,
    File,
    Link,
    Message,
)
from everystep.formats.hdf5_types import attribute_of, fill_of, filters_of, plain_of, shape_of, type_of
from everystep.formats.hdf5_words import NOWHERE, Malformed, number, part
from everystep.schema import join
from everystep.schema.dtype import ML_DTYPES

PARTS_MAX, DEPTH_MAX = 1 << 20, 64
_COMPACT, _CONTIGUOUS, _CHUNKED = 0, 1, 2
_SINGLE, _IMPLICIT, _LISTED = 1, 2, 3
_FAILURES = (ValueError, IndexError, OverflowError, RecursionError, TypeError, MemoryError)
Path = tuple[str, ...]


class Walk:
    """All of a file. `state` are nested dicts; `attributes` those of each path, by name; `arrays` all values by path.

    Raises:
        Damaged: for what no library writes.
        Unsupported: for what exceeds the bounds.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._elements = Elements(source)
        self._parts = 0
        self._known: dict[int, Any] = {}
        self._groups: set[int] = set()
        self.attributes: dict[Path, dict[str, Any]] = {}
        self.arrays: dict[Path, Any] = {}
        self.not_understood: list[Opaque] = []
        self.changed: list[Note] = []
        self.state: Any = self._all()

    def _all(self) -> Any:
        try:
            self._file = File(self._source)
            messages = self._file.messages(self._file.root)
            return self._group(self._file.root, messages, ())
        except _FAILURES as error:
            raise self._source.damaged(f"not a whole HDF5 file: {str(error)[:200]}") from error

    def _group(self, address: int, messages: list[Message], path: Path) -> Any:
        """The dict of a group. One that is met again, by a second name or within itself, is not walked again."""
        self._groups.add(address)
        self._read_attributes(messages, path)
        links = self._file.links(messages)
        if links is None:
            raise Malformed("a group without links")
        made: dict[str, Any] = {}
        for link in links:
            self._count()
            name = link.name.decode("utf-8", "surrogateescape")
            if name in made:
                raise Malformed("two links of one name")
            made[name] = self._linked(link, (*path, name))
        return made

    def _linked(self, link: Link, path: Path) -> Any:
        if link.kind != HARD:
            what = {SOFT: "soft link", EXTERNAL: "link to another file"}.get(link.kind, "link")
            return self._opaque(path, f"HDF5 {what}")
        if link.address in self._known:
            self.arrays[path] = self._known[link.address]
            return self._known[link.address]
        if link.address in self._groups:
            return self._opaque(path, "HDF5 group under a second name")
        if len(path) > DEPTH_MAX:
            return self._opaque(path, "HDF5 group within too many others")
        messages = self._file.messages(link.address)
        kinds = {message.kind for message in messages}
        if LAYOUT in kinds:
            self.arrays[path] = self._known[link.address] = self._dataset(messages, path)
            return self.arrays[path]
        if kinds & {TABLE, LINK_INFO}:
            return self._group(link.address, messages, path)
        return self._opaque(path, "HDF5 named type")

    def _count(self) -> None:
        self._parts += 1
        if self._parts > PARTS_MAX:
            do = "split it into several"
            raise Unsupported(f"an HDF5 file of more than {PARTS_MAX} parts", where=self._source.name, do=do)

    def _opaque(self, path: Path, what: str) -> Opaque:
        self.not_understood.append(Opaque(what, shown(path)))
        return self.not_understood[-1]

    # datasets -------------------------------------------------------------------------------------------------------

    def _dataset(self, messages: list[Message], path: Path) -> Any:
        self._read_attributes(messages, path)
        found = {message.kind: message for message in reversed(messages)}
        if not {SPACE, TYPE} <= found.keys():
            raise Malformed("a dataset without a type or a shape")
        if OUTSIDE in found:
            return self._opaque(path, "HDF5 dataset in other files")
        if any(found[kind].flags & SHARED for kind in (SPACE, TYPE, LAYOUT, FILTERS, FILL) if kind in found):
            return self._opaque(path, "HDF5 dataset of a named type")
        kind, shape = type_of(found[TYPE].data), shape_of(found[SPACE].data)
        if shape is None:
            return self._opaque(path, "HDF5 dataset without a value")
        dtype = np.dtype("V16") if kind.is_text else kind.dtype
        if dtype is None:
            return self._opaque(path, kind.name)
        value = self._laid_out(found, dtype, shape, path)
        if isinstance(value, Opaque):
            return value
        if kind.is_text:
            return self._elements.texts(shown(path), np.ascontiguousarray(value).reshape(-1).view(np.uint8), shape)
        return self._meant(value, path)

    def _laid_out(self, found: dict[int, Message], dtype: np.dtype[Any], shape: tuple[int, ...], path: Path) -> Any:
        layout, name = found[LAYOUT].data, shown(path)
        version, kind = number(layout, 0, 1), number(layout, 1, 1)
        if version not in (3, 4):
            return self._opaque(path, "HDF5 dataset in the layout of the oldest versions")
        nbytes = math.prod(shape) * dtype.itemsize
        if kind == _COMPACT:
            data = np.frombuffer(bytearray(part(layout, 4, number(layout, 2, 2))), np.uint8)
            if len(data) != nbytes:
                raise Malformed("a small dataset that does not fit its shape")
            return self._elements.array(name, data, dtype, shape)
        if kind == _CONTIGUOUS:
            start, size = number(layout, 2, 8), number(layout, 10, 8)
            if start == NOWHERE or not nbytes:
                return self._elements.filled(name, dtype, shape, self._fill(found, dtype))
            if size != nbytes:
                raise Malformed("a dataset that does not fit its shape")
            return self._elements.array(name, self._elements.contiguous(name, start, nbytes), dtype, shape)
        if kind == _CHUNKED and shape and dtype.subdtype is None:
            return self._chunked(found, dtype, shape, path)
        return self._opaque(path, "HDF5 dataset in other files" if kind == 3 else "HDF5 chunks of arrays")

    def _chunked(self, found: dict[int, Message], dtype: np.dtype[Any], shape: tuple[int, ...], path: Path) -> Any:
        filters = filters_of(found[FILTERS].data) if FILTERS in found else []
        for at, (kind, values) in enumerate(filters):
            if kind not in KNOWN:
                return self._opaque(path, f"HDF5 dataset packed by filter {kind}")
            if kind == SHUFFLE and (not values or not 0 < values[0] <= 1 << 16):
                filters[at] = (kind, (dtype.itemsize,))
        chunk, places = self._places(found[LAYOUT].data, dtype, shape)
        if places is None:
            return self._opaque(path, "HDF5 chunks in an index that libver='latest' wrote")
        name = shown(path)
        return self._elements.chunked(name, dtype, shape, self._fill(found, dtype), chunk, places, filters)

    def _places(self, layout: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
        """The shape of the chunks, and where they are; no places for an index that is not read."""
        if number(layout, 0, 1) == 3:
            axes = number(layout, 2, 1) - 1
            chunk = tuple(number(layout, 11 + 4 * axis, 4) for axis in range(axes))
            size = number(layout, 11 + 4 * axes, 4)
            places: Any = self._file.chunks(number(layout, 3, 8), axes)
        else:
            flags, axes, width = number(layout, 2, 1), number(layout, 3, 1) - 1, number(layout, 4, 1)
            chunk = tuple(number(layout, 5 + width * axis, width) for axis in range(axes))
            size = number(layout, 5 + width * axes, width)
            at = 5 + width * (axes + 1)
            nbytes = math.prod(chunk) * size
            if axes == len(shape) and all(chunk) and number(layout, at, 1) == _LISTED:
                grid = tuple(-(-n // c) for n, c in zip(shape, chunk))
                places = self._file.listed(number(layout, at + 2, 8), grid, chunk, nbytes)
            else:
                places = _unindexed(layout, at, flags, nbytes, chunk, shape)
        if axes != len(shape) or not all(chunk) or size != dtype.itemsize:
            raise Malformed("chunks that make no sense")
        return chunk, places

    def _fill(self, found: dict[int, Message], dtype: np.dtype[Any]) -> Any:
        """What an element is that was never written; None for zero."""
        for kind in (FILL, OLD_FILL):
            if kind in found:
                raw = fill_of(dtype.itemsize, found[kind].data, kind == OLD_FILL)
                if raw is not None and dtype.kind in "iufc" and any(raw):
                    return np.frombuffer(raw, dtype)[0]
        return None

    def _meant(self, array: Any, path: Path) -> Any:
        """Keras says beside the bytes which dtype of its own they have."""
        name = self.attributes.get(path, {}).get("dtype")
        dtype = ML_DTYPES.get(name) if isinstance(name, str) else None
        if dtype is not None and array.dtype.kind in "Vu" and array.dtype.itemsize == dtype.itemsize:
            del self.attributes[path]["dtype"]
            return array.view(dtype)
        return array

    # attributes -----------------------------------------------------------------------------------------------------

    def _read_attributes(self, messages: list[Message], path: Path) -> None:
        info = next((message.data for message in messages if message.kind == ATTRIBUTE_INFO), None)
        at = 2 + 2 * (number(info, 1, 1) & 1) if info is not None else 0
        for data in self._file.kept(messages, ATTRIBUTE, info, at):
            self._count()
            found = attribute_of(data)
            known = found.type is not None and found.shape is not None
            value = self._value(found.type, found.shape, found.data) if known else None
            if value is None:
                self.changed.append(Note(shown(path), f"the attribute {found.name[:200]!r} is left out"))
            else:
                self.attributes.setdefault(path, {})[found.name] = value

    def _value(self, kind: Any, shape: Any, data: memoryview) -> Any:
        """The value of an attribute; None for what is not plain."""
        raw = np.frombuffer(part(data, 0, math.prod(shape) * kind.size).tobytes() or b"\0", np.uint8)
        if kind.is_text:
            return self._elements.texts("an attribute", raw[: math.prod(shape) * kind.size], shape)
        if kind.dtype is None or kind.dtype.kind not in "biufS":
            return None
        return plain_of(np.ndarray(shape, kind.dtype, raw))


def _unindexed(
    layout: memoryview, at: int, flags: int, size: int, chunk: tuple[int, ...], shape: tuple[int, ...]
) -> Any:
    """The chunks of a dataset that needs no index: there is one, or they follow each other."""
    kind, at = number(layout, at, 1), at + 1
    if kind == _SINGLE:
        mask = 0
        if flags & 2:
            size, mask, at = number(layout, at, 8), number(layout, at + 8, 4), at + 12
        address = number(layout, at, 8)
        return iter([] if address == NOWHERE else [Chunk((0,) * len(chunk), size, mask, address)])
    if kind != _IMPLICIT:
        return None
    address = number(layout, at, 8)
    grid = [-(-n // c) for n, c in zip(shape, chunk) if c]
    count = 0 if address == NOWHERE else math.prod(grid)
    return (
        Chunk(tuple(int(i) * c for i, c in zip(np.unravel_index(n, grid), chunk)), size, 0, address + n * size)
        for n in range(count)
    )


def shown(path: Path) -> str:
    made = ""
    for name in path:
        made = join(made, name)
    return made
