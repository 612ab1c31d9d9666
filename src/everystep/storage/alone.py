"""A place without a safe create-only put, for one writer alone."""

from __future__ import annotations

from typing import Any

from everystep.errors import AlreadyExists, ObjectMissing


class AloneStorage:
    """Looks whether a key is taken, then puts. Between the two another writer could come: there must be none."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.url = inner, inner.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def put_new(self, key: str, data: bytes) -> None:
        try:
            self.inner.stat(key)
        except ObjectMissing:
            self.inner.put(key, [data])
            return
        raise AlreadyExists("the key is taken", where=f"{self.url}/{key}")
