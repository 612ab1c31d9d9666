"""A folder on a local or shared file system, durable through a power cut."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from everystep.errors import AlreadyExists, Damaged, ObjectMissing, ReadOnly, StorageError, StorageFull
from everystep.seam import Seam
from everystep.storage.blocks import Blocks, new_block
from everystep.storage.stat import Stat

TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # there the file system itself keeps its folders in order
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of `link`: exFAT, SMB, many kinds of FUSE
_PIECE = 8 << 20
_AHEAD = 4 << 20


class LocalStorage:
    """Objects as files. An object appears by rename or link of a file that was written and synced beside it.

    Order on disk: data, fsync of the file, rename or link, fsync of the folder; before that, of every folder above it
    that this process has not synced yet, whoever made it. A file whose fsync failed is never synced again: the next
    attempt is a new file.
    """

    fan_out = 1

    def __init__(self, folder: str, seam: Seam) -> None:
        self._files = seam.files
        self._seam = seam
        self.root = self._files.absolute(folder)
        self.url = self.root
        self._synced: set[str] = set()
        self._blocks: list[Any] = []
        """Memory for direct writes that nobody uses now."""

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        path = self._path(key)
        with self._errors(key, "read"):
            fd = self._files.open_read(path)
            try:
                size = self._files.size(path)
                end = size if stop is None else stop
                if end > size:  # before the buffer is made: what asks for it may be damaged
                    raise Damaged(f"the file ends at {size}, before {end}", where=path, do="run fsck")
                data = memoryview(np.empty(max(0, end - start), np.uint8))  # zeros first cost a fifth of the reading
                at = 0
                while at < len(data):
                    got = self._files.read(fd, data[at:], start + at)
                    if got == 0:
                        raise Damaged(f"the file ends at {start + at}, before {end}", where=path, do="run fsck")
                    at += got
            except IsADirectoryError:
                raise Damaged("a folder lies where a file belongs", where=path, do="run fsck") from None
            finally:
                self._files.close(fd)
        return data

    def put(self, key: str, data: Iterable[Any]) -> None:
        path = self._path(key)
        with self._errors(key):
            temporary = self._write(path, data, direct=True)
            try:
                self._files.rename(temporary, path)
            except OSError:
                self._discard(temporary)
                raise
            self._sync_folder(_parent(path))

    def put_new(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors(key):
            temporary = self._write(path, [data])
            try:
                self._files.link(temporary, path)
            except FileExistsError:
                self._sync_folder(_parent(path))  # what is there may be our own, or not durable yet
                raise AlreadyExists("the file is there already", where=path) from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StorageError(
                    "the file system has no hard links, which a create-only put is made of",
                    where=path,
                    do="take another file system; one process alone may write here, after a warning",
                ) from error
            finally:
                self._discard(temporary)
            self._sync_folder(_parent(path))

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        with self._errors(prefix, "read"):
            try:
                found = sorted(
                    self._files.names(self._path(prefix.rstrip("/"))), key=lambda entry: entry[0] + "/" * entry[1]
                )
            except (FileNotFoundError, NotADirectoryError):
                return
        for name, is_folder in found:
            if name.startswith(TEMPORARY):
                continue
            entry = f"{prefix}{name}/" if is_folder else f"{prefix}{name}"
            if is_folder and deep:
                yield from self.list(entry, after=after)
            elif entry > after:
                yield entry

    def unfinished(self, prefix: str) -> Iterator[str]:
        """What no listing shows below a folder: files that were begun and, by a process that was killed, not ended."""
        with self._errors(prefix, "read"):
            try:
                found = self._files.names(self._path(prefix.rstrip("/")))
            except (FileNotFoundError, NotADirectoryError):
                return
        for name, is_folder in found:
            if is_folder:
                yield from self.unfinished(f"{prefix}{name}/")
            elif name.startswith(TEMPORARY):
                yield f"{prefix}{name}"

    def delete(self, key: str) -> None:
        with self._errors(key):
            try:
                self._files.unlink(self._path(key))
            except FileNotFoundError:
                return

    def stat(self, key: str) -> Stat:
        path = self._path(key)
        with self._errors(key, "read"):
            return Stat(self._files.size(path), self._files.modified(path))

    def _path(self, key: str) -> str:
        if any(part in ("", ".", "..") for part in key.split("/")) and key:
            raise StorageError(f"not a key: {key!r}", where=self.root)
        return f"{self.root}/{key}" if key else self.root

    def _write(self, path: str, data: Iterable[Any], *, direct: bool = False) -> str:
        """A synced temporary file beside the target."""
        folder = _parent(path)
        self._make(folder)
        temporary = f"{folder}/{TEMPORARY}{self._seam.token(8)}"
        fd = self._files.create(temporary)
        try:
            try:
                if direct and self._files.set_direct(fd, True):
                    self._write_blocks(fd, data)
                else:
                    self._write_all(fd, data)
                self._files.fsync(fd)
            finally:
                self._files.close(fd)
        except BaseException:
            self._discard(temporary)
            raise
        return temporary

    def _write_blocks(self, fd: int, data: Iterable[Any]) -> None:
        """Through the system's memory a file costs several times the processor time, and pushes out of that memory what
        the training reads."""
        try:
            block = self._blocks.pop()
        except IndexError:
            block = new_block()
        blocks = Blocks(self._files, fd, block)
        for piece in data:
            blocks.add(piece)
        blocks.end()
        self._blocks.append(block)

    def _write_all(self, fd: int, data: Iterable[Any]) -> None:
        """The disk begins while the rest is still being made: 256 MB are durable in 112 ms instead of 164."""
        end = begun = 0
        for piece in data:
            view, at = memoryview(piece).cast("B"), 0
            while at < len(view):
                taken = self._files.write(fd, view[at : at + _PIECE])
                if taken <= 0:
                    raise OSError(errno.EIO, "the file takes no bytes")
                at += taken
            end += at
            if end - begun >= _AHEAD:
                self._files.begin_sync(fd, begun, end - begun)
                begun = end

    def _discard(self, temporary: str) -> None:
        """Best effort: what is left over is invisible; of packs, collection removes it."""
        try:
            self._files.unlink(temporary)
        except OSError:
            return

    def _make(self, folder: str) -> None:
        """Creates a folder and those above it, each synced into its parent once per process, whoever made it."""
        parent = _parent(folder)
        if folder in self._synced or folder == parent:
            return
        self._make(parent)
        if f"{folder}/".startswith(f"{self.root}/") or not self._files.is_folder(folder):
            try:
                self._files.mkdir(folder)
            except FileExistsError:
                pass
            self._sync_folder(parent)
        else:
            self._sync_above(parent)
        self._synced.add(folder)

    def _sync_folder(self, folder: str) -> None:
        try:
            self._files.fsync_folder(folder)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise

    def _sync_above(self, folder: str) -> None:
        """Best effort for folders that were there before the repository: not all of them may be opened."""
        try:
            self._sync_folder(folder)
        except PermissionError:
            return

    @contextmanager
    def _errors(self, key: str, verb: str = "write") -> Iterator[None]:
        where = f"{self.root}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissing("no such file", where=where) from error
        except OSError as error:
            raise _typed(error, where, verb) from error


def _typed(error: OSError, where: str, verb: str) -> StorageError:
    what = error.strerror or str(error)
    if error.errno in _FULL:
        return StorageFull(
            f"no space left: {what}",
            where=where,
            do="free space or move the repository; every earlier checkpoint is whole",
        )
    if error.errno == errno.ENOTDIR:
        return StorageError(
            "a file lies where a folder should be", where=where, do="give another folder, or move that file away"
        )
    if error.errno in _READ_ONLY and verb == "read":
        return StorageError(f"cannot read this: {what}", where=where, do="check the owner and mode of this file")
    if error.errno in _READ_ONLY:
        return ReadOnly(f"cannot write here: {what}", where=where, do="check the owner and the mount of this folder")
    return StorageError(
        f"the file system failed: {what}", where=where, do="check the disk; earlier checkpoints are whole"
    )


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"
