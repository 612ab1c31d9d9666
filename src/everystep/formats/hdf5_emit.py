"""Writes HDF5 from front to back: the library makes all but the elements, whose places are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from everystep.formats.file import Array, Target

_PAGE = 1 << 16
_PIECE = 8 << 20


class _Sparse:
    """The file as the library writes it, held in pages; what it never touches takes no memory."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self.size = self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for at in self._steps(self._at, self._at + len(view)):
            page, start, count = at // _PAGE, at % _PAGE, self._count(at, self._at + len(view))
            begin = at - self._at
            self._pages.setdefault(page, bytearray(_PAGE))[start : start + count] = view[begin : begin + count]
        self._at += len(view)
        self.size = max(self.size, self._at)
        return len(view)

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        view[:] = self.bytes_at(self._at, len(view))
        self._at += len(view)
        return len(view)

    def read(self, count: int = -1) -> bytes:
        data = self.bytes_at(self._at, max(0, self.size - self._at) if count < 0 else count)
        self._at += len(data)
        return data

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def flush(self) -> None:
        """Nothing is held back."""

    def bytes_at(self, start: int, count: int) -> bytes:
        out = bytearray()
        for at in self._steps(start, start + count):
            page, begin, some = at // _PAGE, at % _PAGE, self._count(at, start + count)
            held = self._pages.get(page)
            out += held[begin : begin + some] if held is not None else bytes(some)
        return bytes(out)

    def _steps(self, start: int, stop: int) -> list[int]:
        return [] if start >= stop else [start, *range((start // _PAGE + 1) * _PAGE, stop, _PAGE)]

    def _count(self, at: int, stop: int) -> int:
        return min(_PAGE - at % _PAGE, stop - at)


def emit(
    h5: Any,
    target: Target,
    arrays: Mapping[str, Array],
    links: Mapping[str, str] | None = None,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """An HDF5 file of contiguous datasets.

    Args:
        arrays: by their paths in the file.
        links: further paths, each to one of those.
        attributes: of datasets and groups, by path; a group that is named here is made.
    """
    sparse = _Sparse()
    places: list[tuple[int, str]] = []
    with h5.File(sparse, "w") as file:
        create = h5.h5p.create(h5.h5p.DATASET_CREATE)
        create.set_layout(h5.h5d.CONTIGUOUS)
        create.set_alloc_time(h5.h5d.ALLOC_TIME_EARLY)
        create.set_fill_time(h5.h5d.FILL_TIME_NEVER)
        create.set_obj_track_times(False)
        between = h5.h5p.create(h5.h5p.LINK_CREATE)
        between.set_create_intermediate_group(True)
        between.set_char_encoding(h5.h5t.CSET_UTF8)
        for path, array in arrays.items():
            space = h5.h5s.create_simple(array.shape) if array.shape else h5.h5s.create(h5.h5s.SCALAR)
            kind = h5.h5t.py_create(array.dtype, logical=True)
            dataset = h5.h5d.create(file.id, None, kind, space, create)
            h5.h5o.link(dataset, file.id, path.encode("utf-8", "surrogateescape"), between)
            if array.nbytes:
                places.append((dataset.get_offset(), path))
        for path, kept in (links or {}).items():
            file.id.links.create_hard(path.encode(), file.id, kept.encode(), between)
        for path, named in (attributes or {}).items():
            owner = file.require_group(path or "/") if path not in arrays else file[path]
            for name, value in named.items():
                owner.attrs[name] = value
    at = 0
    for start, path in sorted(places):
        _copy(sparse, target, at, start)
        array = np.asarray(arrays[path], order="C")
        target.write(array.reshape(-1).view(np.uint8))
        at = start + array.nbytes
    _copy(sparse, target, at, sparse.size)


def _copy(sparse: _Sparse, target: Target, start: int, stop: int) -> None:
    for at in range(start, stop, _PIECE):
        target.write(sparse.bytes_at(at, min(_PIECE, stop - at)))
