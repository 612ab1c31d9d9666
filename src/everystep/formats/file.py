"""Foreign files in and out through the seam: reads stay inside the file, writes appear whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from everystep.errors import (
    Conflict,
    Damaged,
    Error,
    NotFound,
    ReadOnly,
    StorageError,
    StorageFull,
    Unsupported,
    UsageError,
)
from everystep.seam import Seam

Array = np.ndarray[Any, Any]
_PIECE = 8 << 20
_AGAIN = "get the file again from where it came from"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)


def is_whole(array: Array) -> bool:
    """False for truth values that are neither 0 nor 1: those would be one value here and another there."""
    return array.dtype.kind != "b" or not array.size or int(array.view(np.uint8).max()) < 2


class Source:
    """The bytes of one file. Also the little of a Python file object (read, seek, tell) that `zipfile` asks for.

    Args:
        open_beside: opens a file of the same folder; None where there is no folder.
    """

    def __init__(
        self,
        name: str,
        size: int,
        read: Callable[[memoryview, int], int],
        open_beside: Callable[[str], Source] | None = None,
    ) -> None:
        self.name, self.size = name, size
        self._read, self._open_beside = read, open_beside
        self._position = 0

    def beside(self, name: str) -> Source:
        """Another file of the same folder, open until this one is closed.

        Raises:
            Damaged: for a name that leads out of the folder.
            NotFound: if there is no such file.
            Unsupported: if the bytes did not come from a file.
            StorageError: if it cannot be read.
        """
        if not is_file_name(name):
            raise self.damaged(f"it names a file outside of its folder: {name[:200]!r}")
        if self._open_beside is None:
            do = "give the path of the file, with the others in its folder"
            raise Unsupported(f"one of several files, {name[:200]!r} is missing", where=self.name, do=do)
        return self._open_beside(name)

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
        return Damaged(what, where=self.name, do=_AGAIN)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors say which file they are of, and what to do."""
        try:
            yield
        except Error as error:
            if error.where != self.name:
                error.where = f"{self.name}: {error.where}" if error.where else self.name
            error.do = error.do or _AGAIN
            raise

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
    with ExitStack() as closing:
        yield _open(seam.files.absolute(source), seam, closing)


def _open(path: str, seam: Seam, closing: ExitStack) -> Source:
    """A file, and through it those beside it; `closing` closes them all."""
    others: dict[str, Source] = {}

    def beside(name: str) -> Source:
        if name not in others:
            others[name] = _open(f"{path.rpartition('/')[0]}/{name}", seam, closing)
        return others[name]

    def read(into: memoryview, start: int) -> int:
        with _errors(path, "read"):
            return seam.files.read(fd, into, start)

    with _errors(path, "read"):
        size = seam.files.size(path)
        if not size:  # nothing is opened: the end of a pipe would never come
            return Source(path, 0, lambda into, start: 0, beside)
        fd = seam.files.open_read(path)
        closing.callback(seam.files.close, fd)
    return Source(path, size, read, beside)


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in a folder, and leads nowhere else."""
    return 0 < len(name.encode("utf-8", "replace")) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")


def _from_memory(view: memoryview, into: memoryview, start: int) -> int:
    part = view[start : start + len(into)]
    into[: len(part)] = part
    return len(part)


class Target:
    """A file on its way: bytes are appended, nothing is ever written twice."""

    def __init__(self, seam: Seam, fd: int, name: str, make_beside: Callable[[str], Target] | None = None) -> None:
        self._files, self._fd, self.name = seam.files, fd, name
        self._make_beside = make_beside
        self.nbytes = 0
        self._ended = False
        self._others: list[Target] = []

    @property
    def nbytes_in_all(self) -> int:
        """With the files beside it."""
        return self.nbytes + sum(other.nbytes for other in self._others)

    def beside(self, name: str) -> Target:
        """Another file of the same folder. All get their names together, this one last: who finds it finds the others.

        Raises:
            UsageError: for a name that leads out of the folder.
            Conflict: if there is such a file, and it is not to be replaced.
        """
        if self._make_beside is None or not is_file_name(name):
            raise UsageError(f"no name for a file beside another: {name[:200]!r}", where=self.name, do="give another")
        self._others.append(self._make_beside(name))
        return self._others[-1]

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


class _Making:
    """Files under temporary names, all of them in one folder."""

    def __init__(self, path: str, seam: Seam, overwrite: bool) -> None:
        self._seam, self._overwrite = seam, overwrite
        self._folder = path.rpartition("/")[0] or "/"
        self._open: list[tuple[Target, int, str]] = []
        self._named: list[str] = []
        self._aside: list[tuple[str, str]] = []
        self.target = self._make(path)

    def _make(self, path: str) -> Target:
        if any(path == target.name for target, _, _ in self._open):
            raise UsageError("two files of one name", where=path, do="give the second another name")
        if not self._overwrite and _exists(self._seam, path):
            raise _taken(path)
        temporary = self._temporary()
        fd = self._seam.files.create(temporary)
        target = Target(self._seam, fd, path, lambda name: self._make(f"{self._folder}/{name}"))
        self._open.append((target, fd, temporary))
        return target

    def end(self, whole: bool) -> None:
        """Closes all; the bytes of whole files are on the disk then."""
        errors: list[OSError] = []
        for target, fd, _ in self._open:
            target.end()
            try:
                try:
                    if whole and not errors:
                        self._seam.files.fsync(fd)
                finally:
                    self._seam.files.close(fd)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def name(self) -> None:
        """Gives all their names. Of several, what was there before is set aside first, and comes back on failure: never
        is one of the old beside the others new."""
        if self._overwrite and len(self._open) > 1:
            for target, _, _ in self._open:
                if _exists(self._seam, target.name):
                    aside = self._temporary()
                    self._seam.files.rename(target.name, aside)
                    self._aside.append((aside, target.name))
        for target, _, temporary in reversed(self._open):
            _name(self._seam, temporary, target.name, self._overwrite)
            self._named.append(target.name)
        for aside, _ in self._aside:
            _discard(self._seam, aside)

    def discard(self) -> None:
        """Leaves nothing behind, and what was there before as it was."""
        for target, _, temporary in self._open:
            _discard(self._seam, target.name if target.name in self._named else temporary)
        for aside, path in self._aside:
            try:
                self._seam.files.rename(aside, path)
            except OSError:
                continue  # the disk fails: the first error is the one to tell, and the bytes are under that name

    def _temporary(self) -> str:
        return f"{self._folder}/.tmp-{self._seam.token(8)}"


@contextmanager
def made(path: str, seam: Seam, overwrite: bool) -> Iterator[Target]:
    """A new file, and what belongs beside it: written under other names, synced, and only then given their names.

    Raises:
        Conflict: if a name is taken and `overwrite` is False.
    """
    with _errors(path, "write"):
        making = _Making(path, seam, overwrite)
        try:
            try:
                yield making.target
            except BaseException:
                making.end(whole=False)
                raise
            making.end(whole=True)
            making.name()
        except BaseException:
            making.discard()
            raise
        try:
            seam.files.fsync_folder(path.rpartition("/")[0] or "/")
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
