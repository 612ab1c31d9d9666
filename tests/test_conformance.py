"""The conformance suite: what is right passes, and for every check there is a store that it finds wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from _bad_stores import FORGETS, GOOD, IGNORES, LATE, RACY, REFUSES, serving
from typer.testing import CliRunner

import everystep
from everystep.cli.app import app
from everystep.errors import AlreadyExists, ObjectMissing, ReadOnly, StorageError, StorageFull, UsageError
from everystep.seam import Seam
from everystep.storage import LocalStorage, MemoryStorage, Stat, open_storage
from everystep.storage.conformance import StorageReport, check
from everystep.storage.conformance_checks import CHECKS

NAMES = [each.name for each in CHECKS]


class BriskSeam(Seam):
    """Long pauses are over at once, and have been, by the clock."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead = 0.0

    def now(self) -> float:
        return super().now() + self._ahead

    def monotonic(self) -> float:
        return super().monotonic() + self._ahead

    def sleep(self, seconds: float) -> None:
        if seconds > 0.5:
            self._ahead += seconds
        else:
            time.sleep(seconds)


def tried(storage: Any, *only: str, seam: Seam | None = None) -> StorageReport:
    return check(storage, seam or BriskSeam(), only=list(only) or None)


# stores that are right ---------------------------------------------------------------------------------------------


def test_memory_does_all_of_it() -> None:
    seam = BriskSeam()
    storage = MemoryStorage("", seam)
    storage.put("mine", [b"left alone"])
    told: list[tuple[str, int, int]] = []
    report = check(storage, seam, lambda *now: told.append(now))
    assert report.ok and report.failed == [] and [each.name for each in report.checks] == NAMES
    assert list(storage.objects) == ["mine"] and report.left == ""
    assert [done for _, done, _ in told] == list(range(len(NAMES) + 1)) and told[0][0] == NAMES[0]
    assert all(each.found and each.proves and each.without for each in report.checks)


def test_a_folder_does_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("left alone")
    report = everystep.check_storage(str(tmp_path))
    assert report.ok and report.failed == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        everystep.check_storage(str(tmp_path / "typo"))


# a store for every check, broken in what that check is about ---------------------------------------------------------


class CreatesOverPuts(MemoryStorage):
    """A create-only put knows only of its own kind."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._created: set[str] = set()

    def put_new(self, key: str, data: bytes) -> None:
        if key in self._created:
            raise AlreadyExists("taken")
        self._created.add(key)
        self.put(key, [data])


class ForgivesTheSame(MemoryStorage):
    def put_new(self, key: str, data: bytes) -> None:
        if self.objects.get(key) != data:
            super().put_new(key, data)


class LooksThenWrites(MemoryStorage):
    def put_new(self, key: str, data: bytes) -> None:
        if key in self.objects:
            raise AlreadyExists("taken")
        time.sleep(0.02)
        self.put(key, [data])


class RemembersMisses(MemoryStorage):
    """What was asked for too early stays missing once more."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._missed: set[str] = set()

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        if key in self._missed and key in self.objects:
            self._missed.discard(key)
            raise ObjectMissing("cached")
        self._missed.add(key)
        return super().get(key, start, stop)


class DeletesLater(MemoryStorage):
    """Listings know of a delete at once; who asks for the object still gets it."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._gone: dict[str, bytes] = {}

    def delete(self, key: str) -> None:
        if key in self.objects:
            self._gone[key] = self.objects[key]
        super().delete(key)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        if key not in self.objects and key in self._gone:
            return memoryview(self._gone.pop(key))
        return super().get(key, start, stop)


class MissesDeletes(MemoryStorage):
    def delete(self, key: str) -> None:
        self.stat(key)
        super().delete(key)


class ListsLate(MemoryStorage):
    """The newest object is not listed yet."""

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        newest = list(self.objects)[-1:]
        there = set(super().list(prefix, deep, after))
        return iter(sorted(there - set(newest) if len(there) < 12 and "list after" in prefix else there))


class ListsByName(MemoryStorage):
    """Folder by folder, each sorted by name: a folder comes before a file whose name goes on with a dot."""

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        return iter(sorted(super().list(prefix, deep, after), key=lambda key: key.rstrip("/").split("/")))


class ListsAPage(MemoryStorage):
    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        return iter([*super().list(prefix, deep, after)][:1000])


class ListsFromTheKey(MemoryStorage):
    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        yield from [after] if after else []
        yield from super().list(prefix, deep, after)


class GivesAllForNothing(MemoryStorage):
    """An empty range cannot be said in a header, and without one everything comes."""

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        whole = super().get(key)
        return whole if start == stop and len(whole) else super().get(key, start, stop)


class EndsEarly(MemoryStorage):
    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        length = len(super().get(key))
        return super().get(key, min(start, length), None if stop is None else min(stop, length))


class DropsTheEmpty(MemoryStorage):
    def put(self, key: str, data: Iterable[Any]) -> None:
        body = b"".join(data)
        if body:
            super().put(key, [body])


class Holds32MiB(MemoryStorage):
    def put(self, key: str, data: Iterable[Any]) -> None:
        super().put(key, [b"".join(data)[: 32 << 20]])


class MixesPieces(MemoryStorage):
    def put(self, key: str, data: Iterable[Any]) -> None:
        pieces = [bytes(piece) for piece in data]
        super().put(key, sorted(pieces) if len(pieces) == 7 else pieces)


class Unquotes(MemoryStorage):
    """%2F and a slash are one to it, as to some gateways."""

    def put_new(self, key: str, data: bytes) -> None:
        super().put_new(unquote(key), data)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        return super().get(unquote(key), start, stop)


class OneCase(MemoryStorage):
    def put_new(self, key: str, data: bytes) -> None:
        super().put_new(key.lower(), data)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        return super().get(key.lower(), start, stop)

    def stat(self, key: str) -> Stat:
        return super().stat(key.lower())

    def put(self, key: str, data: Iterable[Any]) -> None:
        super().put(key.lower(), data)


class TimesOfReading(MemoryStorage):
    def stat(self, key: str) -> Stat:
        return Stat(super().stat(key).nbytes, self._now())


class NoTimes(MemoryStorage):
    def stat(self, key: str) -> Stat:
        return Stat(super().stat(key).nbytes, 0.0)


class ShowsParts(MemoryStorage):
    """An object grows under its own name; what breaks off stays."""

    def put(self, key: str, data: Iterable[Any]) -> None:
        for number, piece in enumerate(data):
            before = self.objects.get(key, b"") if number else b""
            super().put(key, [before, piece])
            if len(piece) >= 1 << 20:
                time.sleep(0.002)


class ShowsWhatIsUnderWay(ShowsParts):
    """As above, but cleans up after what broke off."""

    def put(self, key: str, data: Iterable[Any]) -> None:
        try:
            super().put(key, data)
        except StorageError:
            self.delete(key)
            raise


class OneBuffer(MemoryStorage):
    """All uploads go through the same memory."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._buffer = b""
        self._own = threading.Lock()

    def put(self, key: str, data: Iterable[Any]) -> None:
        self._buffer = b"".join(data)
        time.sleep(0.001)
        super().put(key, [self._buffer])


BROKEN: list[tuple[str, type[MemoryStorage]]] = [
    ("create-only put", CreatesOverPuts), ("the same bytes again", ForgivesTheSame), ("one winner", LooksThenWrites),
    ("read after write", RemembersMisses), ("read after delete", DeletesLater),
    ("delete what is missing", MissesDeletes), ("list after write", ListsLate), ("order of listings", ListsByName),
    ("long listings", ListsAPage), ("long listings", ListsFromTheKey), ("ranges", GivesAllForNothing),
    ("beyond the end", EndsEarly), ("empty objects", DropsTheEmpty), ("large objects", Holds32MiB),
    ("pieces", MixesPieces), ("names of runs", Unquotes), ("odd names", OneCase), ("times", TimesOfReading),
    ("times", NoTimes), ("whole or not at all", ShowsParts), ("whole or not at all", ShowsWhatIsUnderWay),
    ("many at once", OneBuffer),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), BROKEN, ids=[kind.__name__ for _, kind in BROKEN])
def test_each_check_finds_the_store_that_breaks_it(name: str, kind: type[MemoryStorage]) -> None:
    seam = BriskSeam()
    (found,) = check(kind("", seam), seam, only=[name]).checks
    assert not found.ok and found.found and "untyped" not in found.found


def test_there_is_a_broken_store_for_every_check() -> None:
    assert {name for name, _ in BROKEN} == set(NAMES)


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        (ForgivesTheSame, set()), (LooksThenWrites, set()), (CreatesOverPuts, set()),
        (RemembersMisses, {"ranges", "beyond the end", "empty objects"}),
        (MissesDeletes, set()), (ListsAPage, set()), (ListsByName, set()), (MixesPieces, set()), (NoTimes, set()),
        (DropsTheEmpty, {"many at once"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_it_is_found_by_that_check_alone(kind: type[MemoryStorage], others: set[str]) -> None:
    seam = BriskSeam()
    own = {name for name, broken in BROKEN if broken is kind}
    failed = {each.name for each in check(kind("", seam), seam).failed}
    assert own <= failed <= own | others


def test_what_is_not_needed_does_not_fail_the_store() -> None:
    report = tried(OneCase("", BriskSeam()), "odd names", "ranges")
    assert [each.name for each in report.failed] == ["odd names"] and report.ok


def test_an_error_of_a_library_is_a_finding_and_its_words_are_not_repeated() -> None:
    class Raw(MemoryStorage):
        def stat(self, key: str) -> Stat:
            raise KeyError("https://somebody:secret@store/")

    (found,) = tried(Raw(), "read after write").checks
    assert not found.ok and "KeyError" in found.found and "secret" not in found.found


def test_who_may_not_write_is_told_at_once() -> None:
    class Closed(MemoryStorage):
        def put(self, key: str, data: Iterable[Any]) -> None:
            raise ReadOnly("not for you", where="here")

    with pytest.raises(ReadOnly):
        tried(Closed())


@pytest.mark.parametrize("error", [StorageFull("no space left", where="there"), KeyboardInterrupt()])
def test_a_check_that_ends_early_takes_away_what_it_wrote(error: BaseException) -> None:
    """A full store is no unsafe one: it is said as what it is."""

    class Small(MemoryStorage):
        def put(self, key: str, data: Iterable[Any]) -> None:
            if "large" in key:
                raise error
            super().put(key, data)

    storage = Small()
    with pytest.raises(type(error)):
        tried(storage, "ranges", "large objects")
    assert list(storage.list("")) == []


def test_what_cannot_be_deleted_is_said() -> None:
    class Keeps(MemoryStorage):
        def delete(self, key: str) -> None:
            raise ReadOnly("you may not delete", where="here")

    report = tried(Keeps(), "ranges")
    assert report.ok and report.left == "you may not delete"


# over a network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (GOOD, set()),
        (IGNORES, {"create-only put", "the same bytes again", "one winner"}),
        (REFUSES, {"create-only put", "the same bytes again", "one winner", "read after write"}),
        (RACY, {"one winner"}),
        (FORGETS, {"read after write"}),
        (LATE, {"list after write"}),
    ],
)
def test_stores_that_speak_s3(how: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(how) as (store, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        only = [
            "create-only put",
            "the same bytes again",
            "one winner",
            "read after write",
            "list after write",
            "ranges",
        ]
        url = "s3://bucket/prefix"
        storage = open_storage(url, BriskSeam())
        report = tried(storage, *only)
        assert {each.name for each in report.failed} >= expected
        assert report.ok == (how == GOOD)
        if how == GOOD:
            assert report.failed == [] and store.objects == {}


# the command line ----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_its_exit_code_says_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [each for each in CHECKS if each.name in ("create-only put", "ranges", "odd names")]
    monkeypatch.setattr("everystep.storage.conformance.CHECKS", chosen)
    good = CliRunner().invoke(app, ["storage", "check", "memory://command"])
    assert good.exit_code == 0 and "all that everystep needs is there" in good.stdout
    assert all(each.name in good.stdout for each in chosen)
    with serving(IGNORES) as (_, environment):
        bad = CliRunner().invoke(app, ["storage", "check", "s3://bucket/p"], env=environment)
        again = CliRunner().invoke(app, ["storage", "check", "s3://bucket/p", "--json"], env=environment)
    assert bad.exit_code == 12 and "create-only put  FAILED" in bad.stdout and "checkpoints are lost" in bad.stdout
    assert again.exit_code == 12
    document = json.loads(again.stdout)
    assert not document["ok"] and document["url"] == "s3://bucket/p"
    assert {each["name"]: each["ok"] for each in document["checks"]}["create-only put"] is False
    assert "a-secret-of-somebody" not in bad.stdout + again.stdout


def test_the_command_wants_a_place() -> None:
    found = CliRunner().invoke(app, ["storage", "check"])
    assert found.exit_code == 2


def test_a_disk_is_right_about_the_order(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path), BriskSeam())
    assert tried(storage, "order of listings", "names of runs", "odd names").failed == []
