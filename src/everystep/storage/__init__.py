"""Named bytes in a place: six verbs, one file a kind of place, and the list of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from everystep.errors import UsageError
from everystep.seam import Seam
from everystep.settings import DEFAULT, Settings
from everystep.storage.local import LocalStorage
from everystep.storage.memory import MemoryStorage
from everystep.storage.stat import Stat


class Storage(Protocol):
    """A place. Keys are relative, with '/' between parts; no part is empty, '.' or '..'."""

    url: str
    fan_out: int
    """Requests that are worth having in flight at once: 1 where the place answers without delay."""

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes [start, stop) of an object. Raises ObjectMissing; Damaged where the object ends before `stop`."""

    def put(self, key: str, data: Iterable[Any]) -> None:
        """Writes an object from pieces, durably and whole or not at all. The key must not have been used before.
        Pieces may be made as they are asked for: what is taken need not be held, and each is asked for once."""

    def put_new(self, key: str, data: bytes) -> None:
        """Creates an object, durably and whole. Raises AlreadyExists if the key is taken, UnknownOutcome if the
        acknowledgement was lost: then the object may or may not be there."""

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        """Keys below a folder ('' or ending in '/'), sorted; with deep=False its entries, folders ending in '/'. Given
        a key in `after`, only what comes behind it; of folders those that hold such a key."""

    def delete(self, key: str) -> None:
        """Removes an object; no error if it is not there."""

    def stat(self, key: str) -> Stat:
        """An object's length, and when the store created it. Raises ObjectMissing."""


def _cloud(scheme: str) -> Callable[[str, Seam, Settings], Any]:
    def connect(rest: str, seam: Seam, settings: Settings) -> Any:
        from everystep.storage.cloud import CloudStorage
        from everystep.storage.retrying import RetryingStorage

        return RetryingStorage(CloudStorage.open(scheme, rest, seam, settings), seam, settings)

    return connect


def _hdfs(rest: str, seam: Seam, settings: Settings) -> Any:
    from everystep.storage.hdfs import HdfsStorage
    from everystep.storage.retrying import RetryingStorage

    return RetryingStorage(HdfsStorage.open(rest, seam, settings), seam, settings)


_KINDS: dict[str, Callable[[str, Seam, Settings], Any]] = {
    "file": lambda rest, seam, settings: LocalStorage(rest, seam),
    "memory": lambda rest, seam, settings: MemoryStorage.shared(rest, seam),
    "s3": _cloud("s3"),
    "gs": _cloud("gs"),
    "az": _cloud("az"),
    "hdfs": _hdfs,
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BROKEN = re.compile(r"(s3|gs|az|hdfs):", re.IGNORECASE)
"""What is left of a URL whose slashes are lost: `pathlib.Path` makes one of two."""
_MEANT = {
    "s3a": "s3://bucket/prefix", "s3n": "s3://bucket/prefix", "gcs": "gs://bucket/prefix",
    "azure": "az://container/prefix", "abfs": "az://container/prefix", "abfss": "az://container/prefix",
    "wasb": "az://container/prefix", "wasbs": "az://container/prefix", "webhdfs": "hdfs://host:port/path",
    "http": "s3://bucket/prefix?endpoint=http://host:port", "https": "s3://bucket/prefix?endpoint=https://host:port",
}  # fmt: skip
"""How everystep writes what other programs write so."""
_SECRET = re.compile(r"^.*@|[?#].*$", re.DOTALL)
"""Where a URL may hold a credential: before the host, and behind the path."""


def open_storage(place: str, seam: Seam, settings: Settings = DEFAULT) -> Any:
    """The storage for a folder or URL.

    Raises:
        UsageError: for a URL whose scheme is not known, or what cannot be a path at all.
    """
    try:
        fits = b"\0" not in place.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise UsageError(f"{place[:80]!r} cannot be a path", do="give a folder, for example everystep.open('runs')")
    match = _URL.fullmatch(place)
    if match is None:
        _check_slashes(place)
        return LocalStorage(place, seam)
    scheme, rest = match[1].lower(), match[2]
    if scheme not in _KINDS:
        meant = _MEANT.get(scheme)
        raise UsageError(
            f"no storage for {scheme}://",
            where=f"{scheme}://{_SECRET.sub('', rest)}",
            do=f"write {meant}" if meant else f"give a folder, or a URL of {', '.join(sorted(_KINDS))}",
        )
    return _KINDS[scheme](rest, seam, settings)


def _check_slashes(place: str) -> None:
    """A training that saves into a folder called "s3:" believes its checkpoints are elsewhere.

    Raises:
        UsageError: for what looks like a URL and lacks a slash.
    """
    found = _BROKEN.match(place)
    if found is not None:
        scheme = found[1].lower()
        raise UsageError(
            f"a URL of {scheme} begins with {scheme}://, and this would be a folder",
            where=f"{scheme}:…",
            do=f"give the URL as text, not through a Path; for a folder of that name write ./{scheme}:…",
        )


__all__ = ["LocalStorage", "MemoryStorage", "Stat", "Storage", "open_storage"]
