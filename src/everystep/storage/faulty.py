"""A storage that fails operation k, once or for ever, before or after it was applied: what tests break things with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from everystep.errors import Error, UnknownOutcome
from everystep.storage.stat import Stat


class FaultyStorage:
    """Wraps a storage. Counts every operation in `calls`; operation number `fail_at` (from 0) raises `error()`.

    Args:
        for_ever: every later operation fails as well.
        applied: the operation takes effect first, and its acknowledgement is what is lost.
        verbs: only these count.
    """

    def __init__(
        self,
        inner: Any,
        fail_at: int | None = None,
        error: Callable[[], Error] = lambda: UnknownOutcome("the acknowledgement was lost"),
        *,
        for_ever: bool = False,
        applied: bool = False,
        verbs: tuple[str, ...] = ("get", "put", "put_new", "list", "delete", "stat"),
    ) -> None:
        self.inner, self.url, self.fan_out = inner, inner.url, inner.fan_out
        self.fail_at, self.error, self.for_ever, self.applied, self.verbs = fail_at, error, for_ever, applied, verbs
        self.calls: list[tuple[str, str]] = []

    def _call(self, verb: str, key: str, run: Callable[[], Any]) -> Any:
        if verb not in self.verbs:
            return run()
        number = len(self.calls)
        self.calls.append((verb, key))
        failing = self.fail_at is not None and (number == self.fail_at or (self.for_ever and number > self.fail_at))
        if failing and not self.applied:
            raise self.error()
        result = run()
        if failing:
            raise self.error()
        return result

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        return self._call("get", key, lambda: self.inner.get(key, start, stop))  # type: ignore[no-any-return]

    def put(self, key: str, data: Iterable[Any]) -> None:
        self._call("put", key, lambda: self.inner.put(key, data))

    def put_new(self, key: str, data: bytes) -> None:
        self._call("put_new", key, lambda: self.inner.put_new(key, data))

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        return iter(self._call("list", prefix, lambda: list(self.inner.list(prefix, deep, after))))

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self.inner.delete(key))

    def stat(self, key: str) -> Stat:
        return self._call("stat", key, lambda: self.inner.stat(key))  # type: ignore[no-any-return]
