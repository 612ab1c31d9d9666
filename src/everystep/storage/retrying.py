"""A storage asked again: what a network loses for a while is repeated, after pauses that are random and grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from everystep.errors import StorageError, Unreachable
from everystep.seam import Seam
from everystep.settings import Settings
from everystep.storage.stat import Stat

T = TypeVar("T")
HELD_BYTES_MAX = 64 << 20
PAUSE_SECONDS_MAX = 10.0
FIRST_SECONDS_MAX = 15.0
"""How long a store is asked that has never answered: a wrong address is likelier then than an outage."""


class RetryingStorage:
    """Wraps a storage that is reached over a network, and whose `Unreachable` means: nothing is known to be wrong.

    A put is repeated because its key is used once: the same bytes again change nothing. What it repeats it holds, up to
    64 MiB; who puts more makes it again. `put_new` is repeated too, for there the storage raises `Unreachable` only
    where it is sure that nothing was created; whatever else became of it is for the caller to find out.
    """

    def __init__(self, inner: Any, seam: Seam, settings: Settings) -> None:
        self.inner, self.url, self.fan_out = inner, inner.url, inner.fan_out
        self.identity: str = getattr(inner, "identity", inner.url)
        self._seam, self._settings, self._answered = seam, settings, False

    def __repr__(self) -> str:
        return f"<storage {self.url}>"

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        return self._again(lambda: self.inner.get(key, start, stop))

    def put(self, key: str, data: Iterable[Any]) -> None:
        held, rest = take(data, HELD_BYTES_MAX)
        if rest is None:
            self._again(lambda: self.inner.put(key, held))
        else:
            self.inner.put(key, chain(held, rest))

    def put_new(self, key: str, data: bytes) -> None:
        self._again(lambda: self.inner.put_new(key, data))

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        if not deep:
            yield from self._again(lambda: tuple(self.inner.list(prefix, False, after)))
            return
        patience: _Patience | None = None
        while True:
            try:
                for entry in self.inner.list(prefix, True, after):
                    yield entry
                    after = entry  # a listing that breaks off goes on from here
                    self._answered, patience = True, None
                self._answered = True
                return
            except Unreachable as error:
                patience = patience or self._patience()
                patience.wait(error)

    def unfinished(self, prefix: str) -> tuple[str, ...]:
        """As the inner storage's, where it leaves such."""
        find = getattr(self.inner, "unfinished", None)
        return () if find is None else self._again(lambda: tuple(find(prefix)))

    def delete(self, key: str) -> None:
        self._again(lambda: self.inner.delete(key))

    def stat(self, key: str) -> Stat:
        return self._again(lambda: self.inner.stat(key))  # type: ignore[no-any-return]

    def _again(self, request: Callable[[], T]) -> T:
        patience = self._patience()
        while True:
            try:
                found = request()
                self._answered = True
                return found
            except Unreachable as error:
                patience.wait(error)
            except StorageError:
                self._answered = True
                raise

    def _patience(self) -> _Patience:
        seconds = self._settings.outage_seconds
        return _Patience(self._seam, self._settings, seconds if self._answered else min(seconds, FIRST_SECONDS_MAX))


class _Patience:
    """How long one request is repeated, and the pauses between: each anywhere between nothing and a limit that
    doubles, so that many who lost the same store do not come back to it together."""

    def __init__(self, seam: Seam, settings: Settings, seconds: float) -> None:
        self._seam, self._pause = seam, settings.retry_seconds
        self._begun, self._seconds, self._count = seam.monotonic(), seconds, 0

    def wait(self, error: StorageError) -> None:
        """Pauses; raises the error, with how often it was met, once the time is over."""
        self._count += 1
        spent = self._seam.monotonic() - self._begun
        if spent >= self._seconds:
            times = "once" if self._count == 1 else f"{self._count} times"
            raise type(error)(f"{error.what} (asked {times}, for {spent:.0f} s)", where=error.where, do=error.do)
        chance = int(self._seam.token(4), 16) / 2**32
        self._seam.sleep(min(chance * self._pause, self._seconds - spent))
        self._pause = min(2 * self._pause, PAUSE_SECONDS_MAX)


def take(data: Iterable[Any], nbytes_max: int) -> tuple[list[memoryview], Iterator[memoryview] | None]:
    """The pieces as flat bytes: all of them, or, where they are longer than `nbytes_max`, the first and the rest."""
    pieces = (memoryview(piece).cast("B") for piece in data)
    held: list[memoryview] = []
    nbytes = 0
    for piece in pieces:
        held.append(piece)
        nbytes += len(piece)
        if nbytes > nbytes_max:
            return held, pieces
    return held, None
