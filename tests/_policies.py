"""A store that lets its user do what a policy says, as S3 decides it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from everystep.errors import ObjectMissing, ReadOnly, StorageError
from everystep.storage import MemoryStorage, Stat

KNOWN = {"Sid", "Effect", "Action", "Resource", "Condition", "Principal"}


def allows(document: dict[str, Any], action: str, resource: str, **context: str | None) -> bool:
    """Whether some statement allows an action; `context` has the condition keys of the request, None if absent."""
    return any(_holds(statement, action, resource, context) for statement in document["Statement"])


def _holds(statement: dict[str, Any], action: str, resource: str, context: dict[str, str | None]) -> bool:
    assert statement.keys() <= KNOWN and statement["Effect"] == "Allow"
    return (
        any(fnmatchcase(action, pattern) for pattern in statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in statement["Resource"])
        and all(_meets(operator, wanted, context) for operator, wanted in statement.get("Condition", {}).items())
    )


def _meets(operator: str, wanted: dict[str, Any], context: dict[str, str | None]) -> bool:
    for key, values in wanted.items():
        found = context.get(key.removeprefix("s3:").replace("-", "_"))
        if operator == "Null":
            if (found is None) != (values == "true"):
                return False
        elif operator == "StringLikeIfExists":
            if found is not None and not any(fnmatchcase(found, value) for value in values):
                return False
        else:
            raise AssertionError(f"no operator that is known here: {operator}")
    return True


class Guarded:
    """One user's view of a bucket in memory."""

    fan_out = 1

    def __init__(self, inner: MemoryStorage, document: dict[str, Any], bucket: str = "bucket", prefix: str = "runs/"):
        self.inner, self.url, self.document = inner, inner.url, document
        self._bucket, self._prefix = f"arn:aws:s3:::{bucket}", prefix
        self.refused: list[tuple[str, str]] = []

    def _ask(self, action: str, key: str, **context: str | None) -> None:
        if not allows(self.document, f"s3:{action}", f"{self._bucket}/{self._prefix}{key}", **context):
            self.refused.append((action, key))
            kind = StorageError if action == "GetObject" else ReadOnly
            raise kind("the store does not let this user do this: 403 AccessDenied", where=key)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        self._ask("GetObject", key)
        with _Hidden(self, key):
            return self.inner.get(key, start, stop)

    def stat(self, key: str) -> Stat:
        self._ask("GetObject", key)
        with _Hidden(self, key):
            return self.inner.stat(key)

    def put(self, key: str, data: Iterable[Any]) -> None:
        self._ask("PutObject", key)
        self.inner.put(key, data)

    def put_new(self, key: str, data: bytes) -> None:
        self._ask("PutObject", key, if_none_match="*")
        self.inner.put_new(key, data)

    def delete(self, key: str) -> None:
        self._ask("DeleteObject", key)
        self.inner.delete(key)

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        if not self.may_list(prefix):
            self.refused.append(("ListBucket", prefix))
            raise StorageError("the store does not let this user do this: 403 AccessDenied", where=prefix)
        return self.inner.list(prefix, deep, after)

    def may_list(self, prefix: str | None) -> bool:
        whole = None if prefix is None else f"{self._prefix}{prefix}"
        return allows(self.document, "s3:ListBucket", self._bucket, prefix=whole)


class _Hidden:
    """What is missing is missing only for those who may list: others are told 403."""

    def __init__(self, storage: Guarded, key: str) -> None:
        self._storage, self._key = storage, key

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ObjectMissing) and not self._storage.may_list(None):
            raise StorageError("the store does not let this user do this: 403 AccessDenied", where=self._key)
