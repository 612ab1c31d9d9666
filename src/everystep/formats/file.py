"""Foreign files in and out through the seam: reads stay inside the file, writes appear whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from everystep.errors import Conflict, Damaged, NotFound, ReadOnly, StorageError, StorageFull
from everystep.seam import Seam

Array = np.ndarray[Any, Any]
_PIECE = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)


def is_whole(array: Array) -> bool:
    """False for truth values that are neither 0 nor 1: those would be one value here and another there."""
    return array.dtype.kind != "b" or not array.size or int(array.view(np.uint8).max()) < 2


class Source:
    """The bytes of one file. Also the little of a Python file object (read, seek, tell) that `zipfile` asks for."""

    def __init__(self, name: str, size: int, read: Callable[[memoryview, int], int]) -> None:
        self.name, self.size = name, size
        self._read = read
        self._position = 0

    def bytes_at(self, start: int, count: int) -> Array:
        """`count` bytes from `start`, as a fresh flat uint8 array.

        Raises:
            Damaged: if they lie outside the file, before anything is allocated.
        """
        if start < 0 or count < 0 or start + count > self.size:
            raise self.damaged(f"the file has {self.size} bytes, and bytes up to {start + count} are asked for")
        data = np.empty(count, np.uint8)
        view, at = memoryview(data), 0
        while at < count:
            got = self._read(view[at : at + _PIECE], start + at)
            if got <= 0:
                raise self.damaged(f"the file ends at {start + at}, before {start + count}")
            at += got
        return data

    def head(self) -> bytes:
        return self.bytes_at(0, min(self.size, 512)).tobytes()

    def damaged(self, what: str) -> Damaged:
        return Damaged(what, where=self.name, do="get the file again from where it came from")

    def read(self, count: int | None = None) -> bytes:
        left = max(0, self.size - self._position)
        data = self.bytes_at(self._position, left if count is None or count < 0 else min(count, left)).tobytes()
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True


@contextmanager
def opened(source: Any, seam: Seam) -> Iterator[Source]:
    """The bytes of a path, or of a bytes-like object."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        view = memoryview(source).cast("B")
        yield Source("the bytes given", len(view), lambda into, start: _from_memory(view, into, start))
        return
    path = seam.files.absolute(source)
    with _errors(path, "read"):
        fd = seam.files.open_read(path)
        try:
            yield Source(path, seam.files.size(path), lambda into, start: seam.files.read(fd, into, start))
        finally:
            seam.files.close(fd)


def _from_memory(view: memoryview, into: memoryview, start: int) -> int:
    part = view[start : start + len(into)]
    into[: len(part)] = part
    return len(part)


class Target:
    """A file on its way: bytes are appended, nothing is ever written twice."""

    def __init__(self, seam: Seam, fd: int, name: str) -> None:
        self._files, self._fd, self.name = seam.files, fd, name
        self.nbytes = 0
        self._ended = False

    def write(self, data: Any) -> int:
        """Bytes behind those that are there. After an error and after the end they go nowhere: a zip archive that was
        given up writes its end when it is collected, and the descriptor may be another file's by then."""
        view = memoryview(data)
        if self._ended or not view.nbytes:
            return view.nbytes
        view, at = view.cast("B"), 0
        try:
            while at < len(view):
                taken = self._files.write(self._fd, view[at : at + _PIECE])
                if taken <= 0:
                    raise OSError(errno.EIO, "the file takes no bytes")
                at += taken
        except BaseException:
            self._ended = True
            raise
        self.nbytes += len(view)
        return len(view)

    def end(self) -> None:
        self._ended = True

    def flush(self) -> None:
        """Nothing is held back."""


@contextmanager
def made(path: str, seam: Seam, overwrite: bool) -> Iterator[Target]:
    """A new file: written beside its place, synced, and only then given its name.

    Raises:
        Conflict: if the name is taken and `overwrite` is False.
    """
    files = seam.files
    folder = path.rpartition("/")[0] or "/"
    temporary = f"{folder}/.tmp-{seam.token(8)}"
    with _errors(path, "write"):
        if not overwrite and _exists(seam, path):
            raise _taken(path)
        fd = files.create(temporary)
        try:
            target = Target(seam, fd, path)
            try:
                yield target
                files.fsync(fd)
            finally:
                target.end()
                files.close(fd)
            _name(seam, temporary, path, overwrite)
        except BaseException:
            _discard(seam, temporary)
            raise
        try:
            files.fsync_folder(folder)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise


def _name(seam: Seam, temporary: str, path: str, overwrite: bool) -> None:
    if overwrite:
        seam.files.rename(temporary, path)
        return
    try:
        seam.files.link(temporary, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if _exists(seam, path):
            raise _taken(path) from None
        seam.files.rename(temporary, path)  # this file system has no links
    else:
        _discard(seam, temporary)


def _exists(seam: Seam, path: str) -> bool:
    try:
        seam.files.size(path)
    except FileNotFoundError:
        return False
    return True


def _taken(path: str) -> Conflict:
    return Conflict("there is a file of this name already", where=path, do="give another name, or overwrite=True")


def _discard(seam: Seam, temporary: str) -> None:
    try:
        seam.files.unlink(temporary)
    except OSError:
        return  # it has its name already, or the disk fails: the first error is the one to tell


@contextmanager
def _errors(path: str, verb: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        what = "no such file" if verb == "read" else "no such folder"
        raise NotFound(what, where=path, do="check the path") from error
    except OSError as error:
        what = f"cannot {verb} this file: {error.strerror or error}"
        if error.errno in _FULL:
            raise StorageFull(what, where=path, do="free space, or write elsewhere") from error
        if error.errno in _READ_ONLY and verb == "write":
            raise ReadOnly(what, where=path, do="check the owner and mode of this folder") from error
        raise StorageError(what, where=path, do="check the path, its owner and mode, and the disk") from error
