"""A place in this process's memory: for tests, dry runs and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from everystep.errors import AlreadyExists, Damaged, ObjectMissing
from everystep.seam import REAL, Seam
from everystep.storage.stat import Stat

_PLACES: dict[str, MemoryStorage] = {}


class MemoryStorage:
    """Objects in a dict. `memory://name` names the same place for everybody in this process."""

    fan_out = 1

    def __init__(self, name: str = "", seam: Seam | None = None) -> None:
        self.url = f"memory://{name}"
        self.objects: dict[str, bytes] = {}
        self._times: dict[str, float] = {}
        self._now = (seam or REAL).now
        self._lock = (seam or REAL).lock()

    @staticmethod
    def shared(name: str, seam: Seam) -> MemoryStorage:
        return _PLACES.setdefault(name, MemoryStorage(name, seam))

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        whole = self._at(key)
        if stop is not None and stop > len(whole):
            raise Damaged(f"the object ends at {len(whole)}, before {stop}", where=f"{self.url}/{key}", do="run fsck")
        return memoryview(whole)[start:stop]

    def put(self, key: str, data: Iterable[Any]) -> None:
        body = b"".join(data)
        with self._lock:
            self.objects[key], self._times[key] = body, self._now()

    def put_new(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self.objects:
                raise AlreadyExists("the key is taken", where=f"{self.url}/{key}")
            self.objects[key], self._times[key] = bytes(data), self._now()

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        with self._lock:
            keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        if not deep:
            heads = {key[len(prefix) :].partition("/") for key in keys}
            keys = sorted({prefix + head + slash for head, slash, _ in heads})
        return iter(keys)

    def delete(self, key: str) -> None:
        with self._lock:
            self.objects.pop(key, None)
            self._times.pop(key, None)

    def stat(self, key: str) -> Stat:
        return Stat(len(self._at(key)), self._times.get(key, 0.0))

    def _at(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectMissing("no such object", where=f"{self.url}/{key}") from None
