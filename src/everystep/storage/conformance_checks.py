"""The checks of the conformance suite, one function a need; each tries a store and says what it saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from everystep.errors import AlreadyExists, Damaged, Error, ObjectMissing, StorageError, UnknownOutcome
from everystep.seam import Seam

RACERS, ROUNDS = 16, 5
MANY = 1_100
"""More than one page of a listing; pages of most stores hold 1,000."""
LARGE = 64
"""MiB; packs are as large at most."""
MIB = 1 << 20


class Broken(Exception):
    """What a check saw that must not be."""


@dataclass(frozen=True)
class Scratch:
    """A folder in the store that belongs to one check."""

    storage: Any
    seam: Seam
    pool: Any
    folder: str

    def key(self, name: str) -> str:
        return f"{self.folder}{name}"

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        return bytes(self.storage.get(key, start, stop))

    def together(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return list(self.pool.map(function, items, RACERS))

    def noise(self, nbytes: int) -> bytes:
        return bytes.fromhex(self.seam.token(nbytes))


@dataclass(frozen=True)
class Check:
    """A need: what it proves, and what breaks without it."""

    name: str
    proves: str
    without: str
    run: Callable[[Scratch], str]
    needed: bool = True


CHECKS: list[Check] = []


def _check(
    name: str, proves: str, without: str, *, needed: bool = True
) -> Callable[[Callable[[Scratch], str]], Callable[[Scratch], str]]:
    def add(run: Callable[[Scratch], str]) -> Callable[[Scratch], str]:
        CHECKS.append(Check(name, proves, without, run, needed))
        return run

    return add


def _expect(good: bool, what: str) -> None:
    if not good:
        raise Broken(what)


def _raises(kind: type[Error], call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except kind:
        return
    raise Broken(what)


def _is_missing(s: Scratch, key: str, when: str) -> None:
    _raises(ObjectMissing, lambda: s.storage.get(key), f"{when}, get does not say that it is missing")
    _raises(ObjectMissing, lambda: s.storage.stat(key), f"{when}, stat does not say that it is missing")


# creating ----------------------------------------------------------------------------------------------------------


@_check(
    "create-only put",
    "a key that is taken cannot be created again",
    "two jobs overwrite each other's records: checkpoints are lost",
)
def _create_only(s: Scratch) -> str:
    key = s.key("key")
    s.storage.put_new(key, b"first")
    _raises(AlreadyExists, lambda: s.storage.put_new(key, b"second"), "a second create-only put was accepted")
    _expect(s.read(key) == b"first", "a create-only put that was refused has replaced the bytes")
    taken = s.key("put")
    s.storage.put(taken, [b"first"])
    _raises(AlreadyExists, lambda: s.storage.put_new(taken, b"second"), "it was accepted where a put had been")
    _expect(s.read(taken) == b"first", "it has replaced the bytes of a put")
    return "the second was refused, the first is unchanged"


@_check(
    "the same bytes again",
    "creating a key again with its own bytes is refused as well",
    "a writer whose reply was lost cannot tell whether a record is there",
)
def _same_again(s: Scratch) -> str:
    key = s.key("key")
    s.storage.put_new(key, b"the same")
    _raises(AlreadyExists, lambda: s.storage.put_new(key, b"the same"), "the same bytes were accepted again")
    return "refused as taken"


@_check(
    "one winner",
    f"of {RACERS} writers that create one key at the same time exactly one wins",
    "two jobs believe that they own a run: mixed checkpoints",
)
def _one_winner(s: Scratch) -> str:
    unknown = 0
    for number in range(ROUNDS):
        key = s.key(str(number))
        bodies = [b"racer %d " % racer * 200 for racer in range(RACERS)]

        def create(body: bytes, key: str = key) -> bool | None:
            try:
                s.storage.put_new(key, body)
            except AlreadyExists:
                return False
            except UnknownOutcome:
                return None
            return True

        told = s.together(create, bodies)
        won = [body for body, outcome in zip(bodies, told) if outcome]
        unknown += told.count(None)
        _expect(len(won) <= 1, f"{len(won)} of {RACERS} writers were told that they won")
        _expect(len(won) == 1 or None in told, "nobody won")
        _expect(s.read(key) in (won or bodies), "what is there is not what the winner wrote")
    lost = f"; {unknown} replies were lost" if unknown else ""
    return f"one of {RACERS} won in each of {ROUNDS} rounds{lost}"


# reading what was written ------------------------------------------------------------------------------------------


@_check(
    "read after write",
    "what was written is read at once, also after it was asked for too early",
    "a commit does not find its own packs; ranks wait for receipts that are there",
)
def _read_after_write(s: Scratch) -> str:
    for number in range(12):
        key, body = s.key(str(number)), b"body %d" % number
        _is_missing(s, key, "before it was written")
        if number % 2:
            s.storage.put(key, [body])
        else:
            s.storage.put_new(key, body)
        _expect(s.read(key) == body, f"object {number} reads as something else right after it was written")
        _expect(s.storage.stat(key).nbytes == len(body), "stat gives another length right after the write")
    return "12 of 12"


@_check(
    "read after delete",
    "what was deleted is missing at once",
    "collection frees packs that readers still believe in",
)
def _read_after_delete(s: Scratch) -> str:
    for number in range(6):
        key = s.key(str(number))
        s.storage.put(key, [b"body"])
        s.read(key)
        s.storage.delete(key)
        _is_missing(s, key, "after it was deleted")
    return "6 of 6"


@_check(
    "delete what is missing",
    "deleting twice, or what never was, is no error",
    "a collection that was killed cannot be repeated",
)
def _delete_missing(s: Scratch) -> str:
    s.storage.delete(s.key("never"))
    s.storage.put(s.key("once"), [b"body"])
    s.storage.delete(s.key("once"))
    s.storage.delete(s.key("once"))
    s.storage.delete(s.key("no/such/folder"))
    return "no error"


# listing -----------------------------------------------------------------------------------------------------------


@_check(
    "list after write",
    "what was written is listed at once, what was deleted is not",
    "a process that opens a run misses its newest records; collection misses packs",
)
def _list_after_write(s: Scratch) -> str:
    there: list[str] = []
    _expect(list(s.storage.list(s.folder)) == [], "a folder that never was lists something")
    for number in range(10):
        there.append(s.key(f"{number:02d}"))
        s.storage.put_new(there[-1], b"body")
        _expect(list(s.storage.list(s.folder)) == there, f"object {number} is not listed right after it was written")
    for number in range(10):
        s.storage.delete(there.pop())
        _expect(list(s.storage.list(s.folder)) == there, f"object {9 - number} is listed after it was deleted")
    return "10 of 10, written and deleted"


_ORDERED = ["-/x", "0", "00", "C", "_", "a.b", "a/x", "a/y/z", "a0", "b%20", "b/%2F"]


@_check(
    "order of listings",
    "keys are listed in the order of their bytes, a folder with what is in it and nothing beside it",
    "logs are folded in another order than they were written",
)
def _list_order(s: Scratch) -> str:
    for name in reversed(_ORDERED):
        s.storage.put(s.key(name), [name.encode()])
    deep = [key.removeprefix(s.folder) for key in s.storage.list(s.folder)]
    _expect(deep == _ORDERED, f"listed as {', '.join(deep)}")
    entries = sorted({head + slash for head, slash, _ in (name.partition("/") for name in _ORDERED)})
    flat = [key.removeprefix(s.folder) for key in s.storage.list(s.folder, deep=False)]
    _expect(flat == entries, f"the entries of the folder are listed as {', '.join(flat)}")
    inside = [key.removeprefix(s.folder) for key in s.storage.list(s.key("a/"))]
    _expect(inside == ["a/x", "a/y/z"], f"the folder a/ lists {', '.join(inside)}")
    return f"{len(_ORDERED)} keys"


@_check(
    "long listings",
    f"{MANY:,} keys are listed, all and once, from the beginning and from any key on",
    "of a long run only the first page is seen",
)
def _list_many(s: Scratch) -> str:
    keys = [s.key(f"{number:020d}") for number in range(MANY)]
    s.together(lambda key: s.storage.put(key, [b"x"]), keys)
    _expect(list(s.storage.list(s.folder)) == keys, "the listing is not what was written")
    _expect(list(s.storage.list(s.folder, deep=False)) == keys, "the entries of the folder are not what was written")
    for at in (0, 998, 999, MANY - 1):
        behind = list(s.storage.list(s.folder, deep=False, after=keys[at]))
        _expect(behind == keys[at + 1 :], f"behind key {at} there are {len(behind)} keys, not {MANY - at - 1}")
    return f"{MANY:,} keys"


# ranges and sizes --------------------------------------------------------------------------------------------------


@_check("ranges", "any part of an object can be read, an empty one too", "chunks cannot be read one by one")
def _ranges(s: Scratch) -> str:
    body = s.noise(100_003)
    key, n = s.key("object"), len(body)
    s.storage.put(key, [body])
    edges = [(0, n), (0, 1), (n - 1, n), (0, None), (n - 5, None), (7, 7), (n, n), (4096, 8192), (1, n - 1)]
    for start, stop in [*edges, *((at, at + 997) for at in range(0, n - 1000, 9973))]:
        _expect(s.read(key, start, stop) == body[start:stop], f"bytes {start} to {stop} read as something else")
    return f"{len(edges) + 10} ranges"


@_check(
    "beyond the end",
    "a range that ends behind the object is an error",
    "a pack that was cut off reads as if it were whole",
)
def _beyond(s: Scratch) -> str:
    key = s.key("object")
    s.storage.put(key, [b"0123456789"])
    for start, stop in ((0, 11), (8, 12), (10, 11), (20, 30)):
        _raises(Damaged, partial(s.storage.get, key, start, stop), f"{start} to {stop} of 10 bytes is no error")
    _raises(ObjectMissing, lambda: s.storage.get(s.key("none"), 5, 9), "a range of what is not there is no error")
    return "refused as damage"


@_check("empty objects", "an object of no bytes is one", "attachments of no bytes are lost")
def _empty(s: Scratch) -> str:
    s.storage.put(s.key("put"), [])
    s.storage.put_new(s.key("put_new"), b"")
    for name in ("put", "put_new"):
        _expect(s.read(s.key(name)) == b"", f"{name}: bytes came back")
        _expect(s.read(s.key(name), 0, 0) == b"", f"{name}: bytes came back for an empty range")
        _expect(s.storage.stat(s.key(name)).nbytes == 0, f"{name}: stat says that there are bytes")
    _raises(Damaged, lambda: s.storage.get(s.key("put"), 0, 1), "one byte of none is no error")
    listed = list(s.storage.list(s.folder))
    _expect(listed == [s.key("put"), s.key("put_new")], "an empty object is not listed")
    return "put and create-only put"


@_check("large objects", f"{LARGE} MiB in one object", "packs cannot be written")
def _large(s: Scratch) -> str:
    base = np.frombuffer(s.noise(MIB), np.uint8)
    key = s.key("object")

    def piece(number: int) -> np.ndarray[Any, Any]:
        return base ^ np.uint8(number)

    begun = s.seam.monotonic()
    s.storage.put(key, (piece(number) for number in range(LARGE)))
    written = s.seam.monotonic()
    whole = np.frombuffer(s.storage.get(key), np.uint8)
    read = s.seam.monotonic()
    _expect(len(whole) == LARGE * MIB == s.storage.stat(key).nbytes, "another length came back")
    for number in range(LARGE):
        part = whole[number * MIB : (number + 1) * MIB]
        _expect(bool((part == piece(number)).all()), f"MiB {number} reads as something else")
    rates = [LARGE * MIB / max(seconds, 1e-9) / 1e6 for seconds in (written - begun, read - written)]
    return f"written at {rates[0]:,.0f} MB/s, read at {rates[1]:,.0f} MB/s"


@_check("pieces", "an object is put together from pieces that are asked for once", "packs come out mixed up")
def _pieces(s: Scratch) -> str:
    asked: list[int] = []
    kinds: list[Any] = [
        b"bytes", bytearray(b"bytearray"), b"", memoryview(b"a view")[2:], np.arange(7, dtype=np.uint8),
        np.zeros(0, np.uint8), memoryview(np.arange(9, dtype=np.uint8)),
    ]  # fmt: skip

    def pieces() -> Iterator[Any]:
        for number, piece in enumerate(kinds):
            asked.append(number)
            yield piece

    s.storage.put(s.key("object"), pieces())
    _expect(s.read(s.key("object")) == b"".join(bytes(piece) for piece in kinds), "they read as something else")
    _expect(asked == list(range(len(kinds))), "pieces were asked for twice, or in another order")
    return f"{len(kinds)} pieces"


# names -------------------------------------------------------------------------------------------------------------


def _named(s: Scratch, names: list[str]) -> str:
    for name in names:
        s.storage.put_new(s.key(name), name.encode())
    for name in names:
        _expect(s.read(s.key(name)) == name.encode(), f"{name!r} reads as something else")
    found = list(s.storage.list(s.folder))
    _expect(found == sorted(map(s.key, names)), f"listed as {[key.removeprefix(s.folder) for key in found]}")
    for name in names:
        s.storage.delete(s.key(name))
    _expect(list(s.storage.list(s.folder)) == [], "not all of them can be deleted")
    return f"{len(names)} names"


@_check("names of runs", "names as runs get them: with %, dots, 180 characters", "some names cannot be given to a run")
def _run_names(s: Scratch) -> str:
    return _named(
        s, ["%20/a", "%25", "%2E.", "a%2Fb/0", "gr%C3%B6%C3%9Fe%2F1.x", "x" * 180, "x.y-z_0", "%E2%9C%93/p/0"]
    )


@_check(
    "odd names",
    "spaces, letters of any language and both cases, and signs in names",
    "nothing: everystep writes such names with %",
    needed=False,
)
def _odd_names(s: Scratch) -> str:
    return _named(
        s, ["a b", "A B", "größe", "名前", "+", "#1", "q?x=1&y", "it's", "~", "(x)", "a=b;c,d", "@", "!", "[x]"]
    )


# time and order ----------------------------------------------------------------------------------------------------


@_check(
    "times",
    "the time that the store gives an object stands still, and later ones are later",
    "what can still be undone is freed too early, or never",
)
def _times(s: Scratch) -> str:
    pause = 1.2
    s.storage.put_new(s.key("first"), b"first")
    before = s.storage.stat(s.key("first")).time
    begun = s.seam.monotonic()
    s.seam.sleep(pause)
    s.storage.put_new(s.key("second"), b"second")
    took = s.seam.monotonic() - begun
    s.read(s.key("first"))
    after = s.storage.stat(s.key("second")).time
    _expect(s.storage.stat(s.key("first")).time == before, "the time of an object has changed by itself")
    apart = after - before
    _expect(0.1 < apart < took + 2, f"two objects were written {took:.1f} s apart; by their times, {apart:.1f} s")
    return f"{took:.1f} s apart, {apart:.1f} s by the store's clock"


@_check(
    "whole or not at all",
    "a put that breaks off leaves nothing, and one under way is not seen",
    "half a pack is taken for a pack",
)
def _whole(s: Scratch) -> str:
    block = s.noise(MIB)

    def breaking() -> Iterator[bytes]:
        yield from [block] * 9
        raise StorageError("the pieces end here")

    broken = s.key("broken")
    _raises(StorageError, lambda: s.storage.put(broken, breaking()), "a put whose pieces broke off was no error")
    _is_missing(s, broken, "after a put that broke off")
    _expect(broken not in list(s.storage.list(s.folder)), "a put that broke off is listed")
    ended: list[bool] = []

    def put(key: str) -> None:
        try:
            s.storage.put(key, (block for _ in range(16)))
        finally:
            ended.append(True)

    watched = s.key("watched")
    task = s.pool.start(put, watched)
    while not ended:
        _is_whole(s, watched, 16 * MIB)
        s.seam.sleep(0.002)
    task.result()
    _expect(_is_whole(s, watched, 16 * MIB) == 1, "a put that has ended cannot be seen")
    return "no part was seen"


def _is_whole(s: Scratch, key: str, nbytes: int) -> int:
    """1 if the object is there, whole; 0 if it is not there."""
    listed = key in list(s.storage.list(s.folder))
    try:
        length = s.storage.stat(key).nbytes
    except ObjectMissing:
        _expect(not listed, "a put under way is listed before it can be read")
        return 0
    _expect(length == nbytes, f"a put under way is seen with {length} of {nbytes} bytes")
    return 1


@_check(
    "many at once",
    f"{RACERS} requests at the same time do not disturb each other",
    "parallel reads and uploads mix up bytes",
)
def _at_once(s: Scratch) -> str:
    sizes = [number * number * 37 for number in range(64)]
    bodies = {s.key(str(size)): s.noise(size) for size in sizes}
    s.together(lambda key: s.storage.put(key, [bodies[key]]), bodies)
    for key, body in zip(bodies, s.together(s.read, bodies)):
        _expect(body == bodies[key], f"an object of {len(bodies[key])} bytes reads as something else")
    s.together(s.storage.delete, bodies)
    _expect(list(s.storage.list(s.folder)) == [], "not all of them were deleted")
    return f"{len(sizes)} objects written, read and deleted"
