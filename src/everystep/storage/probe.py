"""What a store does when several writers create one object: found out by trying, with a few tiny objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from everystep.errors import (
    AlreadyExists,
    Damaged,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageFull,
    UnknownOutcome,
    Unreachable,
)
from everystep.seam import Seam
from everystep.settings import Settings

T = TypeVar("T")
YES, IGNORED, REFUSED = "yes", "ignored", "refused"
WRITERS, ROUNDS = 4, 2
_TRIES_LEAST = 2
_KEY = re.compile(r"probe-[0-9a-f]{32}")


class Finding(msgspec.Struct, frozen=True):
    """What was found; `create_only` is "yes", "ignored" (a second put of the same key wins) or "refused" (the store
    answers a create-only put with an error, in the words of `said`)."""

    create_only: str
    reads_own: bool = True
    lists_own: bool = True
    said: str = ""

    @property
    def safe(self) -> bool:
        """Whether the place keeps several writers apart."""
        return self.create_only == YES and self.reads_own and self.lists_own

    @property
    def why(self) -> str:
        """What is wrong with the store; nothing, if it is safe."""
        if self.create_only == REFUSED:
            return f"it answers a create-only put with an error ({self.said})"
        if self.create_only != YES:
            return "it ignores the condition of a create-only put: of several writers of one key all are told they won"
        if not self.reads_own:
            return "what was written cannot be read at once"
        return "" if self.lists_own else "what was written is not listed at once"


def is_probe(key: str) -> bool:
    """Whether a key is what a probe leaves behind that was killed, or may not delete."""
    return _KEY.fullmatch(key) is not None


def is_remote(storage: Any) -> bool:
    """Whether others answer for what the place does; of a disk and of memory it is known."""
    return "://" in storage.url and not storage.url.startswith("memory://")


def probe(storage: Any, seam: Seam, settings: Settings) -> Finding:
    """Tries the store at its root, with objects of a few bytes that are deleted again.

    Raises:
        StorageError: if the store fails, create-only or not.
    """
    made: list[str] = []

    def key() -> str:
        made.append(f"probe-{seam.token(16)}")
        return made[-1]

    try:
        return _probe(storage, seam, settings, key)
    finally:
        for one in made:
            _discard(storage, one)


def _probe(storage: Any, seam: Seam, settings: Settings, key: Callable[[], str]) -> Finding:
    pause = settings.retry_seconds
    finding = Finding(YES)
    # A bad finding must come out every time: a passing fault, or a prune beside it, may look like one.
    for number in range(max(_TRIES_LEAST, settings.put_attempts)):
        if number:
            seam.sleep(pause)
            pause *= 2
        finding = _patiently(lambda: _in_turn(storage, key), seam, settings)
        if finding.safe:
            break
    if finding.safe and is_remote(storage):
        for _ in range(ROUNDS):
            if not _patiently(lambda: _race(storage, seam, key), seam, settings):
                return Finding(IGNORED)
    return finding


def _patiently(step: Callable[[], T], seam: Seam, settings: Settings) -> T:
    """The step's answer; a fault that passes is tried again, under new keys."""
    pause = settings.retry_seconds
    attempt = 0
    while True:
        attempt += 1
        try:
            return step()
        except (StorageFull, ReadOnly):
            raise
        except StorageError:
            if attempt >= settings.put_attempts:
                raise
        seam.sleep(pause)
        pause *= 2


def _in_turn(storage: Any, key: Callable[[], str]) -> Finding:
    """One writer after the other."""
    mine, first, second = key(), b"the first", b"the second"
    try:
        storage.put_new(mine, first)
    except (UnknownOutcome, Unreachable):
        raise
    except StorageError as error:
        storage.put(key(), [first])  # fails as well: then it is not about the condition
        return Finding(REFUSED, said=error.what)
    try:
        storage.put_new(mine, second)
        created, there = IGNORED, second
    except AlreadyExists:
        created, there = YES, first
    try:
        reads = bytes(storage.get(mine)) == there
    except (ObjectMissing, Damaged):
        reads = False
    return Finding(created, reads, mine in storage.list("", deep=False))


def _race(storage: Any, seam: Seam, key: Callable[[], str]) -> bool:
    """Whether of several writers at the same time exactly one won, and its bytes are there."""
    mine = key()
    bodies = [b"writer %d" % number for number in range(WRITERS)]

    def create(body: bytes) -> bool | None:
        try:
            storage.put_new(mine, body)
        except AlreadyExists:
            return False
        except UnknownOutcome:
            return None
        return True

    pool = seam.pool(WRITERS, "everystep-probe")
    try:
        told = list(pool.map(create, bodies, WRITERS))
    finally:
        pool.close()
    won = [body for body, outcome in zip(bodies, told) if outcome]
    there = bytes(storage.get(mine))
    return len(won) <= 1 and there in (won or bodies)


def _discard(storage: Any, key: str) -> None:
    """Best effort: a writer may not be allowed to delete. What is left over is removed by a prune."""
    try:
        storage.delete(key)
    except StorageError:
        return
