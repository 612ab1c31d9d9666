"""A POSIX file system in memory that knows what a power cut may leave of it."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everystep.seam import Files

ROOT = 0
SECTOR = 512
"""What a direct write is made of, by its place in the file, its length and its address."""
Op = tuple[Any, ...]


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


@dataclass
class _Handle:
    inode: int
    direct: bool = False


@dataclass
class Tree:
    """What a disk holds: the entries of each folder and the bytes of each file, by inode."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    data: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Tree:
        return Tree({inode: dict(entries) for inode, entries in self.folders.items()}, dict(self.data))

    def paths(self) -> dict[str, bytes | None]:
        """Everything that can be reached, by path; None for a folder."""
        found: dict[str, bytes | None] = {}
        todo = [("", ROOT)]
        while todo:
            path, inode = todo.pop()
            for name, child in self.folders[inode].items():
                if child in self.folders:
                    found[f"{path}/{name}"] = None
                    todo.append((f"{path}/{name}", child))
                else:
                    found[f"{path}/{name}"] = self.data.get(child, b"")
        return found


class Disk(Files):
    """What a program sees of it; `ops` is everything that changed it, in order, and everything that was synced.

    An op is ("entries", folder, {name: inode or None}, verb), ("write", inode, bytes), ("fsync", inode),
    ("fsync_folder", folder) or ("ack", label). An operation that failed leaves none.
    """

    def __init__(self, ops: Sequence[Op] = (), tree: Tree | None = None) -> None:
        self.tree = tree.copy() if tree is not None else Tree()
        self.ops: list[Op] = []
        self._handles: dict[int, _Handle] = {}
        self._next = itertools.count(max([ROOT, *self.tree.folders, *self.tree.data]) + 1)
        self._fds = itertools.count(3)
        for op in ops:
            self._apply(op)
            self.ops.append(op)
            self._next = itertools.count(max([ROOT, *self.tree.folders, *self.tree.data]) + 1)

    def ack(self, label: Any) -> None:
        self.ops.append(("ack", label))

    # the calls -----------------------------------------------------------------------------------------------------

    def create(self, path: str) -> int:
        folder, name = self._split(path)
        if name in self.tree.folders[folder]:
            raise _error(errno.EEXIST, path)
        inode = next(self._next)
        self._do("entries", folder, {name: inode}, "create")
        return self._open(inode)

    def open_read(self, path: str) -> int:
        return self._open(self._find(path))

    def write(self, fd: int, data: memoryview) -> int:
        handle = self._handles[fd]
        at, address = len(self.tree.data.get(handle.inode, b"")), np.frombuffer(data, np.uint8).ctypes.data
        if handle.direct and (at % SECTOR or len(data) % SECTOR or address % SECTOR):
            raise _error(errno.EINVAL, "")
        self._do("write", handle.inode, bytes(data))
        return len(data)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        inode = self._handles[fd].inode
        if inode in self.tree.folders:
            raise _error(errno.EISDIR, "")
        piece = self.tree.data.get(inode, b"")[offset : offset + len(into)]
        into[: len(piece)] = piece
        return len(piece)

    def set_direct(self, fd: int, on: bool) -> bool:
        self._handles[fd].direct = on
        return True

    def begin_sync(self, fd: int, start: int, nbytes: int) -> None:
        """Nothing is more durable for it."""

    def fsync(self, fd: int) -> None:
        self._do("fsync", self._handles[fd].inode)

    def close(self, fd: int) -> None:
        del self._handles[fd]

    def rename(self, source: str, target: str) -> None:
        folder, name = self._split(source)
        other, new = self._split(target)
        inode = self._find(source)
        assert folder == other, "an object is renamed within its folder"
        self._do("entries", folder, {name: None, new: inode}, "rename")

    def link(self, source: str, target: str) -> None:
        inode = self._find(source)
        folder, name = self._split(target)
        if name in self.tree.folders[folder]:
            raise _error(errno.EEXIST, target)
        self._do("entries", folder, {name: inode}, "link")

    def unlink(self, path: str) -> None:
        self._find(path)
        folder, name = self._split(path)
        self._do("entries", folder, {name: None}, "unlink")

    def mkdir(self, path: str) -> None:
        folder, name = self._split(path)
        if name in self.tree.folders[folder]:
            raise _error(errno.EEXIST, path)
        inode = next(self._next)
        self.tree.folders[inode] = {}
        self._do("entries", folder, {name: inode}, "mkdir")

    def fsync_folder(self, path: str) -> None:
        inode = self._find(path)
        if inode not in self.tree.folders:
            raise _error(errno.ENOTDIR, path)
        self._do("fsync_folder", inode)

    def names(self, path: str) -> list[tuple[str, bool]]:
        inode = self._find(path)
        if inode not in self.tree.folders:
            raise _error(errno.ENOTDIR, path)
        return [(name, child in self.tree.folders) for name, child in self.tree.folders[inode].items()]

    def size(self, path: str) -> int:
        return len(self.tree.data.get(self._find(path), b""))

    def modified(self, path: str) -> float:
        self._find(path)
        return 0.0

    def is_folder(self, path: str) -> bool:
        try:
            return self._find(path) in self.tree.folders
        except OSError:
            return False

    def absolute(self, path: str) -> str:
        return os.path.normpath(path)

    # inside --------------------------------------------------------------------------------------------------------

    def _open(self, inode: int) -> int:
        fd = next(self._fds)
        self._handles[fd] = _Handle(inode)
        return fd

    def _find(self, path: str) -> int:
        inode = ROOT
        for name in path.split("/"):
            if name:
                if inode not in self.tree.folders:
                    raise _error(errno.ENOTDIR, path)
                if name not in self.tree.folders[inode]:
                    raise _error(errno.ENOENT, path)
                inode = self.tree.folders[inode][name]
        return inode

    def _split(self, path: str) -> tuple[int, str]:
        head, _, name = path.rpartition("/")
        folder = self._find(head)
        if folder not in self.tree.folders:
            raise _error(errno.ENOTDIR, path)
        return folder, name

    def _do(self, *op: Any) -> None:
        self._apply(op)
        self.ops.append(op)

    def _apply(self, op: Op) -> None:
        if op[0] == "write":
            self.tree.data[op[1]] = self.tree.data.get(op[1], b"") + op[2]
        elif op[0] == "entries":
            if op[3] == "mkdir":
                for inode in op[2].values():
                    self.tree.folders.setdefault(inode, {})
            _enter(self.tree.folders[op[1]], op[2])


def _enter(entries: dict[str, int], changes: dict[str, int | None]) -> None:
    for name, inode in changes.items():
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


# the power cut -----------------------------------------------------------------------------------------------------


def acked(ops: Sequence[Op]) -> list[Any]:
    """What had been reported durable by then."""
    return [op[1] for op in ops if op[0] == "ack"]


def trees_after_cut(ops: Sequence[Op]) -> Iterator[Tree]:
    """Every state of the disk that a power cut after these operations may leave.

    Of a change to a folder that was not synced since: it is there or not, independently of all others. Of the bytes
    of a file that were not synced: none, half, all, or as many zeros or as much of something else.
    """
    pending: dict[int, bytes] = {}
    whole = Tree()
    changes: list[Op] = []
    synced: set[int] = set()
    for number, op in enumerate(ops):
        if op[0] == "write":
            pending[op[1]] = pending.get(op[1], b"") + op[2]
        elif op[0] == "fsync":
            whole.data[op[1]] = whole.data.get(op[1], b"") + pending.pop(op[1], b"")
        elif op[0] == "entries":
            changes.append((number, *op))
        elif op[0] == "fsync_folder":
            synced |= {change[0] for change in changes if change[2] == op[1]}
    free = [change[0] for change in changes if change[0] not in synced]
    for kept in itertools.product((False, True), repeat=len(free)):
        lost = {number for number, keep in zip(free, kept) if not keep}
        folders: dict[int, dict[str, int]] = {ROOT: {}}
        for number, _, folder, entries, verb in changes:
            if verb == "mkdir":
                folders.update({inode: {} for inode in entries.values() if inode is not None})
            if number not in lost:
                _enter(folders[folder], entries)
        yield from _with_data(Tree(folders, whole.data), pending)


def _with_data(tree: Tree, pending: dict[int, bytes]) -> Iterator[Tree]:
    """Only files that can be reached are worth telling apart."""
    linked = {inode for entries in tree.folders.values() for inode in entries.values()}
    files = [inode for inode in pending if inode in linked]
    for fates in itertools.product(*(_fates(pending[inode]) for inode in files)):
        data = dict(tree.data)
        for inode, fate in zip(files, fates):
            data[inode] = data.get(inode, b"") + fate
        yield Tree(tree.folders, data)


def _fates(unsynced: bytes) -> tuple[bytes, ...]:
    return b"", unsynced[: len(unsynced) // 2], unsynced, bytes(len(unsynced)), bytes(b ^ 0x5A for b in unsynced)


def key_of(tree: Tree) -> frozenset[tuple[str, bytes | None]]:
    """Equal for states that no program can tell apart."""
    return frozenset(tree.paths().items())
