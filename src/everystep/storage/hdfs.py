"""HDFS, through hdfs-native: a file is written beside its place, and renamed to it if nothing is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import numpy as np

from everystep.errors import AlreadyExists, Damaged, Error, ObjectMissing, StorageError, Unsupported, UsageError
from everystep.seam import Pool, Seam, Task
from everystep.settings import Settings
from everystep.storage.hdfs_errors import explain, silent
from everystep.storage.stat import Stat

T = TypeVar("T")
TEMPORARY = ".tmp-"
THREADS = 16
_STEP = 8 << 20
"""Bytes that go over in one call, so that each can be given up after a time."""
_AUTHORITY = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])?(:[0-9]{1,5})?")


class _Connection(NamedTuple):
    """A client, and the threads in which it is asked: it waits for ever for a NameNode that does not answer."""

    client: Any
    pool: Pool


_CONNECTIONS: dict[tuple[str | None, ...], _Connection] = {}
_STARTED: list[int] = []
"""The process in which the library's threads run."""
_UNDER_WAY: WeakSet[Task[Any]] = WeakSet()
_LEAVING: list[int] = []
"""The process that waits for them at its end."""
LEAVE_SECONDS = 2.0


class HdfsStorage:
    """A folder in HDFS.

    The library's close has each DataNode sync its blocks before it acknowledges the last of them, and the NameNode logs
    the end of the file and its new name before it answers: what `put` and `put_new` come back from is on disks.
    """

    fan_out = 8

    def __init__(self, authority: str, root: str, seam: Seam, settings: Settings) -> None:
        self._authority, self._root, self._seam, self._settings = authority, root, seam, settings
        self.url = self.identity = f"hdfs://{authority}{root}"

    @staticmethod
    def open(rest: str, seam: Seam, settings: Settings) -> HdfsStorage:
        """
        Args:
            rest: host:port/path, nameservice/path, or /path of the default file system.

        Raises:
            UsageError: for what is no such place.
            Unsupported: if the library is not installed.
        """
        _library()
        if seam.pid() not in _LEAVING:  # before any run, so that what a run does at the end comes first
            _LEAVING[:] = [seam.pid()]
            seam.at_exit(partial(_leave, seam))
        authority, slash, path = rest.partition("/")
        if "@" in authority:
            raise UsageError("a URL of HDFS names no user", do="set HADOOP_USER_NAME, or kinit")
        parts = [part for part in path.split("/") if part]
        if not _AUTHORITY.fullmatch(authority) or not slash or any(part in (".", "..") for part in parts):
            raise UsageError(
                "not a place in HDFS", where=f"hdfs://{rest}", do="hdfs://host:port/path or hdfs://nameservice/path"
            )
        return HdfsStorage(authority, "".join(f"/{part}" for part in parts), seam, settings)

    def __repr__(self) -> str:
        return f"<storage {self.url}>"

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        path = self._path(key)
        reader = self._ask("get", key, lambda client: client.read(path))
        length = len(reader)
        end = length if stop is None else stop
        if end > length:
            raise Damaged(f"the file ends at {length}, before {end}", where=self._where(key), do="run fsck")
        if end - start <= _STEP:
            nbytes = max(0, end - start)
            return memoryview(self._ask("get", key, partial(_read, reader, start, nbytes)) if nbytes else b"")
        data = memoryview(np.empty(end - start, np.uint8))
        for at in range(start, end, _STEP):
            nbytes = min(_STEP, end - at)
            data[at - start : at - start + nbytes] = self._ask("get", key, partial(_read, reader, at, nbytes))
        return data

    def put(self, key: str, data: Iterable[Any]) -> None:
        temporary, nbytes = self._write(key, data)
        try:
            self._rename(temporary, key)
        except AlreadyExists:  # from the attempt before this one: a key is used once
            if self.stat(key).nbytes != nbytes:
                raise

    def put_new(self, key: str, data: bytes) -> None:
        temporary, _ = self._write(key, [data])
        self._rename(temporary, key)

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        folder = self._path(prefix.rstrip("/")) or "/"
        try:
            found = self._ask("list", prefix, lambda client: list(client.list_status(folder)), whole=True)
        except ObjectMissing:
            return
        entries = []
        for status in found:
            parent, _, name = status.path.rpartition("/")
            if not name.startswith(TEMPORARY) and (parent or "/") == folder:
                entries.append(f"{prefix}{name}{'/' * status.isdir}")
        for entry in sorted(entries):
            if deep and entry.endswith("/"):
                if entry > after or after.startswith(entry):
                    yield from self.list(entry, after=after)
            elif entry > after:
                yield entry

    def unfinished(self, prefix: str) -> Iterator[str]:
        """What no listing shows below a folder: files that were begun and, by a process that was killed, not ended."""
        folder = self._path(prefix.rstrip("/"))
        try:
            found = self._ask("list", prefix, lambda client: list(client.list_status(folder, True)), whole=True)
        except ObjectMissing:
            return
        for status in found:
            below, name = status.path.removeprefix(f"{folder}/"), status.path.rpartition("/")[2]
            if not status.isdir and name.startswith(TEMPORARY):
                yield f"{prefix}{below}"

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            self._ask("delete", key, lambda client: client.delete(path, False))
        except ObjectMissing:
            return

    def stat(self, key: str) -> Stat:
        path = self._path(key)
        found = self._ask("stat", key, lambda client: client.get_file_info(path))
        if found.isdir:
            raise ObjectMissing("a folder, no file", where=self._where(key))
        return Stat(found.length, found.modification_time / 1000)

    def remove_folder(self, prefix: str) -> None:
        """Removes a folder with all that is in it; empty folders are left by deletes."""
        folder = self._path(prefix.rstrip("/"))
        self._ask("delete", prefix, lambda client: client.delete(folder, True))

    def _write(self, key: str, data: Iterable[Any]) -> tuple[str, int]:
        """A closed temporary file beside the target, and its length."""
        path = self._path(key)
        temporary = f"{path.rpartition('/')[0]}/{TEMPORARY}{self._seam.token(8)}"
        nbytes = 0
        try:
            writer = self._ask("put", key, lambda client: client.create(temporary))
            for piece in data:
                view = memoryview(piece).cast("B")
                for at in range(0, len(view), _STEP):
                    self._ask("put", key, partial(_write, writer, bytes(view[at : at + _STEP])), whole=True)
                nbytes += len(view)
            self._ask("put", key, lambda _: writer.close(), whole=True)
        except BaseException:
            self._discard(temporary)
            raise
        return temporary, nbytes

    def _rename(self, temporary: str, key: str) -> None:
        path = self._path(key)
        try:
            self._ask("rename", key, lambda client: client.rename(temporary, path, False))
        except Error:
            self._discard(temporary)
            raise

    def _discard(self, temporary: str) -> None:
        """Best effort, and nobody waits for it: what is left over is invisible."""
        _, connection = self._connected()
        _start(connection, lambda client: client.delete(temporary, False))

    def _path(self, key: str) -> str:
        if any(part in ("", ".", "..") for part in key.split("/")) and key:
            raise StorageError(f"not a key: {key!r}", where=self.url)
        return f"{self._root}/{key}" if key else self._root

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _ask(self, verb: str, key: str, request: Callable[[Any], T], *, whole: bool = False) -> T:
        """One call of the library.

        Args:
            whole: it may take as long as an upload.
        """
        name, connection = self._connected()
        limit = self._settings.upload_seconds if whole else self._settings.request_seconds
        task = _start(connection, request)
        if not task.settle(limit):
            if _CONNECTIONS.get(name) is connection:  # what hangs in there stays there
                del _CONNECTIONS[name]
            raise silent(verb, self._where(key), limit)
        try:
            return task.result()
        except (Error, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  most are RuntimeError; a panic of the library is no Exception
            problem = explain(error, verb, self._where(key))
        raise problem

    def _connected(self) -> tuple[tuple[str | None, ...], _Connection]:
        own = self._seam.pid()
        if not _STARTED:
            _STARTED.append(own)
        if _STARTED[0] != own:
            raise UsageError(
                "this process was forked from one that uses HDFS, and cannot use it itself",
                where=self.url,
                do='start it anew: multiprocessing.get_context("spawn"); multiprocessing_context="spawn" of a loader',
            )
        environment = map(self._seam.environ, ("HADOOP_CONF_DIR", "HADOOP_HOME", "HADOOP_USER_NAME"))
        name = (self._authority, *environment)
        found = _CONNECTIONS.get(name)
        if found is None:
            made = _Connection(self._connect(), self._seam.pool(THREADS, "everystep-hdfs"))
            found = _CONNECTIONS.setdefault(name, made)
            if found is not made:
                made.pool.close()
        return name, found

    def _connect(self) -> Any:
        try:
            return _library().Client(f"hdfs://{self._authority}" if self._authority else None)
        except Exception as error:  # noqa: BLE001  as above
            what = str(error)
        raise UsageError(
            f"the configuration of HDFS makes no sense ({what[:200]})",
            where=self.url,
            do="a name without a port is a nameservice of HADOOP_CONF_DIR's hdfs-site.xml; else hdfs://host:port/path",
        )


def _start(connection: _Connection, request: Callable[[Any], T]) -> Task[T]:
    task = connection.pool.start(request, connection.client)
    _UNDER_WAY.add(task)
    return task


def _leave(seam: Seam) -> None:
    """Waits for calls that nobody waits for. One that comes back while the interpreter ends aborts the process: its
    thread is unwound there, and the library's frames cannot be."""
    until = seam.monotonic() + LEAVE_SECONDS
    for task in list(_UNDER_WAY) if [seam.pid()] == _LEAVING else ():  # a forked process has none of the threads
        task.settle(max(0.0, until - seam.monotonic()))


def _read(reader: Any, start: int, nbytes: int, _: Any) -> bytes:
    return reader.read_range(start, nbytes)  # type: ignore[no-any-return]


def _write(writer: Any, part: bytes, _: Any) -> None:
    writer.write(part)


def _library() -> Any:
    try:
        import hdfs_native
    except ImportError:
        raise Unsupported("hdfs:// needs the library hdfs-native", do='pip install "everystep[hdfs]"') from None
    return hdfs_native
