"""Object stores: S3 and what speaks like it, Google Cloud Storage, Azure; through obstore, without its event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from everystep.errors import Damaged, Error, ObjectMissing, StorageError, Unsupported, UsageError
from everystep.seam import Seam
from everystep.settings import VERSION, Settings
from everystep.storage import cloud_azure, cloud_gcs, cloud_s3
from everystep.storage.cloud_account import Account
from everystep.storage.cloud_errors import explain
from everystep.storage.retrying import take
from everystep.storage.stat import Stat

T = TypeVar("T")
SCHEMES = {"s3": cloud_s3.account, "gs": cloud_gcs.account, "az": cloud_azure.account}
_EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
PUT_BYTES_MAX = 64 << 20
"""What goes out in one request; an upload in parts that is broken off leaves them behind."""
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
_SMALL_BYTES = 1 << 20
_CONNECT_SECONDS = 5
_LISTED_AT_ONCE = 1000
_STARTED: list[int] = []
"""The process in which obstore's threads run."""


class CloudStorage:
    """A prefix of a bucket. An object appears with the answer to its PUT, whole or not at all.

    Nothing is tried twice in here, but for the parts of a long upload. What obstore says goes no further than
    `explain`, for it quotes requests.
    """

    fan_out = 32

    def __init__(self, account: Account, seam: Seam, settings: Settings) -> None:
        self._account, self._seam, self._answered = account, seam, False
        self.url, self.identity = account.address.url, account.identity
        self._prefix = account.address.prefix
        self._obstore = _library(account.address.scheme)
        client = {
            "allow_http": account.endpoint.startswith("http://"),
            "connect_timeout": f"{_CONNECT_SECONDS}s",
            "user_agent": f"everystep/{VERSION}",
        }
        silence = f"{settings.request_seconds * 1000:.0f}ms"
        slowest = f"{settings.upload_seconds * 1000:.0f}ms"
        once = {"max_retries": 0}
        # What comes in may take as long as it keeps coming; of what goes out only the whole time can be bounded.
        self._in = self._connect({**client, "read_timeout": silence, "timeout": "1h"}, once)
        self._out = self._connect({**client, "timeout": slowest}, once)
        self._parts = self._connect({**client, "timeout": slowest}, {"max_retries": 5})

    @staticmethod
    def open(scheme: str, rest: str, seam: Seam, settings: Settings) -> CloudStorage:
        """
        Raises:
            UsageError: for a URL or a configuration that makes no sense.
            Unsupported: if the library is not installed.
        """
        _library(scheme)
        return CloudStorage(SCHEMES[scheme](rest, seam), seam, settings)

    def __repr__(self) -> str:
        return f"<storage {self.url}>"

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        path, get = self._path(key), self._obstore.get
        if stop is not None and stop <= start:  # no range that could be asked for
            return self._nothing(key, stop)
        options: dict[str, Any] = {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        try:
            found = self._ask("get", key, lambda: get(self._in, path, options=options).bytes())
        except Damaged:
            if stop is None:
                return self._nothing(key, 0)  # from its end on
            raise
        data = memoryview(found)
        if stop is not None and len(data) != stop - start:
            raise self._short(key, start + len(data), stop)
        return data

    def put(self, key: str, data: Iterable[Any]) -> None:
        path, put = self._path(key), self._obstore.put
        held, rest = take(data, PUT_BYTES_MAX)
        if rest is not None:
            self._put_parts(key, chain(held, rest))
            return
        nbytes = sum(map(len, held))
        body = held if nbytes > _SMALL_BYTES else b"".join(held)
        self._ask("put", key, lambda: put(self._way(nbytes), path, body, use_multipart=False))

    def _put_parts(self, key: str, pieces: Iterator[memoryview]) -> None:
        """An upload in parts. Where making the pieces fails, obstore drops it, and that failure is what is raised."""
        failed: list[BaseException] = []

        def watched() -> Iterator[memoryview]:
            try:
                yield from pieces
            except BaseException as error:
                failed.append(error)
                raise

        def upload() -> None:
            self._obstore.put(
                self._parts, self._path(key), watched(),
                use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE,
            )  # fmt: skip

        try:
            self._ask("put", key, upload)
        except Error:
            if failed:
                raise failed[0] from None
            raise

    def put_new(self, key: str, data: bytes) -> None:
        path, put, store = self._path(key), self._obstore.put, self._way(len(data))
        self._ask("put_new", key, lambda: put(store, path, bytes(data), mode="create", use_multipart=False))

    def _way(self, nbytes: int) -> Any:
        """For what goes out in one request: while it does the store is silent, and only of little is that no sign."""
        return self._out if nbytes > _SMALL_BYTES else self._in

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        if deep:
            yield from self._walk(prefix, after)
        elif after:
            last = ""
            for key in self._walk(prefix, after):
                head, slash, _ = key[len(prefix) :].partition("/")
                if head + slash != last:
                    last = head + slash
                    yield prefix + last
        else:
            yield from self._entries(prefix)

    def _walk(self, prefix: str, after: str) -> Iterator[str]:
        keys = self._pages(prefix, after)
        yield from keys if self._account.is_sorted else sorted(keys)

    def _pages(self, prefix: str, after: str) -> Iterator[str]:
        root, offset = self._path(prefix.rstrip("/")) or None, self._path(after.rstrip("/")) if after else None
        pages: Any = None

        def turn() -> Any:
            nonlocal pages
            if pages is None:  # by itself it asks nothing
                pages = self._obstore.list(self._in, root, offset=offset, chunk_size=_LISTED_AT_ONCE)
            return next(pages, None)

        while page := self._ask("list", prefix, turn):
            for found in page:
                key = found["path"][len(self._prefix) :]
                if key.startswith(prefix) and key > after:
                    yield key

    def _entries(self, prefix: str) -> Iterable[str]:
        root = self._path(prefix.rstrip("/")) or None
        found = self._ask("list", prefix, lambda: self._obstore.list_with_delimiter(self._in, root))
        folders = [f"{path}/" for path in found["common_prefixes"]]
        keys = [path[len(self._prefix) :] for path in (*folders, *(one["path"] for one in found["objects"]))]
        return sorted(key for key in keys if key.startswith(prefix) and key != prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            self._ask("delete", key, lambda: self._obstore.delete(self._out, path))
        except ObjectMissing:
            return  # as S3 has it; other stores say so

    def stat(self, key: str) -> Stat:
        path = self._path(key)
        found = self._ask("stat", key, lambda: self._obstore.head(self._in, path))
        return Stat(found["size"], found["last_modified"].timestamp())

    def _nothing(self, key: str, stop: int) -> memoryview:
        """No bytes of an object that is there, and reaches to `stop`."""
        nbytes = self.stat(key).nbytes
        if nbytes < stop:
            raise self._short(key, nbytes, stop)
        return memoryview(b"")

    def _short(self, key: str, end: int, stop: int) -> Damaged:
        return Damaged(f"the object ends at {end}, before {stop}", where=self._where(key), do="run fsck")

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _path(self, key: str) -> str:
        if any(part in ("", ".", "..") for part in key.split("/")) and key:
            raise StorageError(f"not a key: {key!r}", where=self.url)
        return f"{self._prefix}{key}".rstrip("/")

    def _connect(self, client: dict[str, Any], retry: dict[str, Any]) -> Any:
        try:
            return self._account.connect(client, retry)
        except Error:
            raise
        except Exception as error:  # noqa: BLE001  obstore's classes have no base of their own; the words may be secret
            name = type(error).__name__
        raise UsageError(
            f"the configuration of this store makes no sense to obstore ({name})",
            where=self.url,
            do=f"credentials come from {self._account.credentials}: check them, and docs/storage.md",
        )

    def _ask(self, verb: str, key: str, request: Callable[[], T]) -> T:
        """One request. What obstore raises is left behind before ours is raised: a traceback would print it."""
        self._check_process()
        try:
            found = request()
        except Error:
            raise
        except Exception as error:  # noqa: BLE001  as above
            problem = explain(error, self._account, verb, self._where(key), first=not self._answered)
        else:
            self._answered = True
            return found
        raise problem

    def _check_process(self) -> None:
        """Its threads do not come along into a forked process: a request there would wait for ever."""
        own = self._seam.pid()
        if not _STARTED:
            _STARTED.append(own)
        if _STARTED[0] != own:
            raise UsageError(
                "this process was forked from one that uses an object store, and cannot use one itself",
                where=self.url,
                do='start it anew: multiprocessing.get_context("spawn"); multiprocessing_context="spawn" of a loader',
            )


def _library(scheme: str) -> Any:
    try:
        import obstore
    except ImportError:
        raise Unsupported(
            f"{scheme}:// needs the library obstore", do=f'pip install "everystep[{_EXTRAS[scheme]}]"'
        ) from None
    return obstore
