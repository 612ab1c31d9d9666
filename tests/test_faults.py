"""Every single operation fails, once and for ever: what was reported stays, errors are typed, retries count once."""

import contextlib
import errno
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _disk import Disk
from _seams import QuickSeam

import everystep
from everystep.errors import (
    AlreadyExists,
    NotFound,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageFull,
    UnknownOutcome,
    Unreachable,
)
from everystep.repository import Repository
from everystep.seam import Files, Seam
from everystep.settings import DEFAULT
from everystep.storage import LocalStorage, MemoryStorage
from everystep.storage.faulty import FaultyStorage
from everystep.vault import Place

STEPS = (1, 2, 3)
MORE_STEPS = (1, 2, 3, 4, 5)
TAG = "second"
PATIENCE = 60.0


def state_of(step: int) -> dict[str, Any]:
    return {"frozen": np.arange(9.0), "weights": np.arange(20, dtype=np.float32) * step, "count": step}


def same(state: Any, step: int) -> bool:
    good = state_of(step)
    return state["count"] == step and all(state[n].tobytes() == good[n].tobytes() for n in ("frozen", "weights"))


class Program:
    """A training that does not give up: notes what it was told, goes on after an error, and repeats what failed."""

    def __init__(self, open_repository: Callable[[], Repository], keep: everystep.Rule | None = None) -> None:
        self._open, self._keep = open_repository, keep
        self.steps = STEPS if keep is None else MORE_STEPS
        self._run: everystep.Run | None = None
        self.durable: dict[int, str] = {}
        self.tagged: str | None = None
        self.errors: list[everystep.Error] = []

    def pass_once(self) -> None:
        """Tries whatever is not done yet, each once."""
        for step in self.steps:
            if step not in self.durable:
                self._try(self._save, step)
            if step == 2 and 2 in self.durable and self.tagged is None:
                self._try(self._tag)
        writer = self._run._writer if self._run is not None else None
        if writer is not None:
            writer.wait()  # what it drops behind the last save is not dropped while somebody looks

    def _try(self, action: Callable[..., None], *args: Any) -> None:
        with self._quiet():
            try:
                action(*args)
            except everystep.Error as error:
                self.errors.append(error)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Old checkpoints that could not be freed are freed another time, and it is said."""
        with warnings.catch_warnings():
            if self._keep is not None:
                warnings.filterwarnings("ignore", "(?s).*could not be freed", everystep.EverystepWarning)
            yield

    def _save(self, step: int) -> None:
        if self._run is None:
            self._run = self._open().run("a", keep=self._keep).track(rng=False)
        self._run.record(step=step, loss=1 / step)
        saved = self._run.save(step, state=state_of(step), metrics={"double": 2 * step})
        self.durable[step] = saved.wait(PATIENCE).id

    def _tag(self) -> None:
        assert self._run is not None
        self._run.at(2).tag(TAG)
        self.tagged = self.durable[2]

    def close(self) -> None:
        assert self._run is not None
        with self._quiet():
            self._run.close()


def verify(repo: Repository, program: Program, done: bool) -> None:
    """What was reported is there, in what a new process sees; with `done`, exactly that and each once."""
    if not program.durable:
        return
    past = repo["a"]
    found = {checkpoint.id: checkpoint for checkpoint in past.checkpoints(all=True)}
    for step, id in program.durable.items():
        assert found[id].step == step
    for checkpoint in found.values():
        assert same(checkpoint.load(), checkpoint.step)
    if program.tagged is not None:
        assert past.tagged(TAG).id == program.tagged
    assert repo.check().ok
    if done:
        assert sorted(checkpoint.step for checkpoint in found.values()) == list(STEPS)
        assert past.latest.step in STEPS
        assert past.series("loss") == [(step, 1 / step) for step in STEPS]
        assert past.series("double") == [(step, 2 * step) for step in STEPS]


def check_typed(errors: list[everystep.Error]) -> None:
    for error in errors:
        assert type(error) is not everystep.Error, f"not a typed error: {error!r} from {error.__cause__!r}"
        assert error.kind not in ("error", "damaged", "foreign", "newer-format", "taken-over"), repr(error)
        assert error.what and error.where


def drive(program: Program, clear: Callable[[], None], fresh: Callable[[], Repository], for_ever: bool) -> None:
    """The story of every case: the fault, a look at what is there, the end of the fault, the same again."""
    program.pass_once()
    if not for_ever:
        program.pass_once()  # the fault has passed by itself
    broken = len(program.errors)
    clear()
    verify(fresh(), program, done=False)
    program.pass_once()
    assert len(program.errors) == broken, f"the fault has gone, and still: {program.errors[broken:]}"
    assert program.tagged is not None
    program.close()
    check_typed(program.errors)
    verify(fresh(), program, done=True)


# a storage that fails ----------------------------------------------------------------------------------------------

STORAGE_FAULTS: dict[str, tuple[Callable[[], everystep.Error], bool]] = {
    "I/O error": (lambda: StorageError("input/output error", where="here"), False),
    "I/O error after the fact": (lambda: StorageError("input/output error", where="here"), True),
    "full": (lambda: StorageFull("no space left", where="here"), False),
    "full after the fact": (lambda: StorageFull("no space left", where="here"), True),
    "read-only": (lambda: ReadOnly("read-only", where="here"), False),
    "timeout": (lambda: UnknownOutcome("timeout", where="here"), False),
    "lost acknowledgement": (lambda: UnknownOutcome("timeout", where="here"), True),
}


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("fault", STORAGE_FAULTS)
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_every_storage_operation_fails(place: str, fault: str, for_ever: bool) -> None:
    error, applied = STORAGE_FAULTS[fault]
    number, fired = 0, True
    while fired:
        seam = QuickSeam(Disk())
        inner = MemoryStorage() if place == "memory" else LocalStorage("/runs", seam)
        faulty = FaultyStorage(inner, number, error, for_ever=for_ever, applied=applied)

        def repository(storage: Any, seam: Seam = seam) -> Repository:
            return Repository(Place(storage, seam, DEFAULT))

        def clear(faulty: FaultyStorage = faulty) -> None:
            faulty.fail_at = None

        program = Program(functools.partial(repository, faulty))
        drive(program, clear, functools.partial(repository, inner), for_ever)
        fired = len(faulty.calls) > number
        number += 1
    assert number > 25


def test_only_a_lost_acknowledgement_needs_no_repetition() -> None:
    """Where the put had landed, the save succeeds, and its log holds it once."""
    storage = FaultyStorage(
        MemoryStorage(), 0, lambda: UnknownOutcome("timeout", where="here"), applied=True, verbs=("put_new",)
    )
    for number in range(6):
        storage.calls.clear()
        storage.inner.objects.clear()
        storage.fail_at = number
        program = Program(lambda: Repository(Place(storage, QuickSeam(), DEFAULT)))
        program.pass_once()
        assert program.errors == [] and len(program.durable) == 3 and program.tagged is not None
        program.close()


KEEP = everystep.last(2)


def verify_kept(repo: Repository) -> None:
    """Of a run whose rules drop: what they keep is there and whole, and so is whatever else can be seen."""
    if "a" not in repo:
        return
    history = repo["a"]._history()
    saved = list(history.commits.values())
    live = {checkpoint.id for checkpoint in repo["a"].checkpoints(all=True)}
    assert {commit.event.id for commit in saved[-2:]} <= live and {*history.tags.values()} <= live
    last: dict[int, str] = {}
    for commit in saved:
        before = last.get(commit.event.step)
        assert before is None or history.dropped[before].slot < commit.slot, "a step was committed twice"
        last[commit.event.step] = commit.event.id
    for checkpoint in repo["a"].checkpoints(all=True):
        assert same(checkpoint.load(), checkpoint.step)
    assert repo.check().ok


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize(
    "fault", ["I/O error after the fact", "full after the fact", "timeout", "lost acknowledgement"]
)
def test_every_storage_operation_fails_while_old_checkpoints_are_dropped(fault: str, for_ever: bool) -> None:
    """Nothing that the rules keep is ever deleted, and nothing that is needed by what they keep."""
    error, applied = STORAGE_FAULTS[fault]
    number, fired, freed = 0, True, 0
    while fired:
        inner = MemoryStorage()
        faulty = FaultyStorage(inner, number, error, for_ever=for_ever, applied=applied)

        def repository(storage: Any) -> Repository:
            return Repository(Place(storage, QuickSeam(), DEFAULT))

        program = Program(functools.partial(repository, faulty), KEEP)
        program.pass_once()
        fired = len(faulty.calls) > number
        verify_kept(repository(inner))
        faulty.fail_at = None
        program.pass_once()
        program.pass_once()
        assert len(program.durable) == len(MORE_STEPS)
        dropped = repository(inner)["a"]._history().dropped
        assert program.tagged is not None or program.durable[2] in dropped, "it may be gone before the tag comes"
        program.close()
        check_typed([error for error in program.errors if not isinstance(error, NotFound)])
        verify_kept(repository(inner))
        freed += ("delete", "x") in {(verb, "x") for verb, _ in faulty.calls}
        number += 1
    assert number > 25 and freed > 20


# an operating system that fails ------------------------------------------------------------------------------------


class FaultyFiles(Files):
    """Any file system, of which call `fail_at` fails, before or after it took effect.

    A file whose fsync failed must never be synced again: on many systems the second fsync succeeds, and the data is
    gone all the same.
    """

    VERBS = frozenset({"create", "open_read", "write", "read", "fsync", "close", "rename", "link", "unlink", "mkdir",
                       "fsync_folder", "names", "size", "modified"})  # fmt: skip

    def __init__(self, inner: Files, fail_at: int | None, number: int, *, for_ever: bool, applied: bool) -> None:
        self.inner, self.fail_at, self.number, self.for_ever, self.applied = inner, fail_at, number, for_ever, applied
        self.calls: list[str] = []
        self._bad: set[int] = set()
        self._open: set[int] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in FaultyFiles.VERBS:
            return functools.partial(FaultyFiles._call, self, name)
        return super().__getattribute__(name)

    def _call(self, verb: str, *args: Any) -> Any:
        at = len(self.calls)
        self.calls.append(verb)
        failing = self.fail_at is not None and (at == self.fail_at or (self.for_ever and at > self.fail_at))
        if verb == "fsync":
            assert args[0] not in self._bad, "a file whose fsync failed is synced again"
            if failing:
                self._bad.add(args[0])
        if failing and not self.applied and verb != "close":
            raise OSError(self.number, os.strerror(self.number), "a file")
        result = getattr(self.inner, verb)(*args)  # a close that fails has closed all the same
        self._count(verb, args, result)
        if failing:
            if verb in ("create", "open_read"):  # nobody will close what nobody was given
                self.inner.close(result)
                self._count("close", (result,), None)
            raise OSError(self.number, os.strerror(self.number), "a file")
        return result

    def _count(self, verb: str, args: Any, result: Any) -> None:
        if verb in ("create", "open_read"):
            self._open.add(result)
        if verb == "close":
            self._open.discard(args[0])
            self._bad.discard(args[0])

    def is_folder(self, path: str) -> bool:
        return self.inner.is_folder(path)

    def absolute(self, path: str) -> str:
        return self.inner.absolute(path)

    def set_direct(self, fd: int, on: bool) -> bool:
        return self.inner.set_direct(fd, on)

    def begin_sync(self, fd: int, start: int, nbytes: int) -> None:
        self.inner.begin_sync(fd, start, nbytes)

    @property
    def left_open(self) -> int:
        return len(self._open)


def each_call(
    make: Callable[[int], Files], number: int, *, for_ever: bool, applied: bool, place: str = "/runs"
) -> Iterator[str]:
    """Drives one program per call that can fail; yields the verbs that failed."""
    at, fired = 0, True
    while fired:
        inner = make(at)
        files = FaultyFiles(inner, at, number, for_ever=for_ever, applied=applied)
        seam = QuickSeam(files)

        def repository(seam: Seam, place: str = place) -> Repository:
            return everystep.open(place, seam=seam)

        def clear(files: FaultyFiles = files) -> None:
            files.fail_at = None

        program = Program(functools.partial(repository, seam))
        drive(program, clear, functools.partial(repository, QuickSeam(inner)), for_ever)
        assert files.left_open == 0
        fired = len(files.calls) > at
        if fired:
            yield files.calls[at]
        at += 1


CASES = [
    (name, applied, for_ever) for name in ("EIO", "ENOSPC") for applied in (False, True) for for_ever in (False, True)
]
CASES += [("EDQUOT", False, True), ("EROFS", False, True), ("EROFS", True, False), ("EACCES", False, True)]
CASES += [("EINTR", False, False), ("ESTALE", True, False)]


@pytest.mark.parametrize(
    ("name", "applied", "for_ever"),
    CASES,
    ids=[f"{n}-{'after' if a else 'before'}-{'for ever' if f else 'once'}" for n, a, f in CASES],
)
def test_every_file_operation_fails(name: str, applied: bool, for_ever: bool) -> None:
    failed = set(each_call(lambda at: Disk(), getattr(errno, name), for_ever=for_ever, applied=applied))
    assert failed >= {
        "create",
        "write",
        "fsync",
        "close",
        "rename",
        "link",
        "mkdir",
        "fsync_folder",
        "open_read",
        "size",
    }


@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_every_operation_of_the_real_file_system_fails(applied: bool, tmp_path: Path) -> None:
    """The same with real files; `sync` is left to the tests above, it takes long."""

    class Unsynced(Files):
        def fsync(self, fd: int) -> None:
            os.fstat(fd)

        def fsync_folder(self, path: str) -> None:
            os.stat(path)

    at, fired = 0, True
    while fired:
        folder = tmp_path / str(at)
        folder.mkdir()
        files = FaultyFiles(Unsynced(), at, errno.EIO, for_ever=False, applied=applied)
        program = Program(functools.partial(everystep.open, str(folder / "runs"), seam=QuickSeam(files)))

        def clear(files: FaultyFiles = files) -> None:
            files.fail_at = None

        drive(program, clear, functools.partial(everystep.open, str(folder / "runs"), seam=QuickSeam()), False)
        fired = len(files.calls) > at
        at += 1
    assert at > 100


def test_a_fault_that_passes_needs_no_repetition() -> None:
    """One failed call of those that are tried again: the program hears nothing of it."""
    quiet = 0
    at, fired = 0, True
    while fired:
        files = FaultyFiles(Disk(), at, errno.EIO, for_ever=False, applied=False)
        program = Program(functools.partial(everystep.open, "/runs", seam=QuickSeam(files)))
        program.pass_once()
        fired = len(files.calls) > at
        if fired and files.calls[at] in ("create", "write", "fsync", "rename", "link", "mkdir"):
            assert program.errors == [], (at, files.calls[at])
            quiet += 1
        program.close() if program.durable else None
        at += 1
    assert quiet > 30


class Short(Files):
    """Writes at most `most` bytes at a time; with `stuck`, none from call number `stuck` on."""

    def __init__(self, inner: Disk, most: int, stuck: int | None = None) -> None:
        self.inner, self.most, self.stuck, self.calls = inner, most, stuck, 0

    def __getattribute__(self, name: str) -> Any:
        if name in FaultyFiles.VERBS and name != "write":
            return getattr(self.inner, name)
        return super().__getattribute__(name)

    def absolute(self, path: str) -> str:
        return self.inner.absolute(path)

    def is_folder(self, path: str) -> bool:
        return self.inner.is_folder(path)

    def set_direct(self, fd: int, on: bool) -> bool:
        return self.inner.set_direct(fd, on)

    def write(self, fd: int, data: memoryview) -> int:
        self.calls += 1
        if self.stuck is not None and self.calls > self.stuck:
            return 0
        return self.inner.write(fd, data[: self.most])


@pytest.mark.parametrize("most", [1, 7, 100])
def test_short_writes(most: int) -> None:
    disk = Disk()
    program = Program(functools.partial(everystep.open, "/runs", seam=QuickSeam(Short(disk, most))))
    program.pass_once()
    program.close()
    assert program.errors == []
    verify(everystep.open("/runs", seam=QuickSeam(disk)), program, done=True)


@pytest.mark.parametrize("stuck", range(0, 30))
def test_a_file_that_takes_no_more_bytes(stuck: int) -> None:
    disk = Disk()
    files = Short(disk, 1 << 20, stuck)
    program = Program(functools.partial(everystep.open, "/runs", seam=QuickSeam(files)))

    def clear() -> None:
        files.stuck = None

    drive(program, clear, functools.partial(everystep.open, "/runs", seam=QuickSeam(disk)), for_ever=True)


def test_a_file_system_that_cannot_sync_folders() -> None:
    class NoFolderSync(Disk):
        def fsync_folder(self, path: str) -> None:
            raise OSError(errno.EINVAL, "Invalid argument", path)

    program = Program(functools.partial(everystep.open, "/runs", seam=QuickSeam(NoFolderSync())))
    program.pass_once()
    assert program.errors == [] and len(program.durable) == 3
    program.close()


# reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StorageError, ObjectMissing, UnknownOutcome], ids=lambda e: e.__name__)
def test_every_operation_of_a_load_fails(error: type[everystep.Error]) -> None:
    """A read that fails is an error and never less than what is there; it is no damage unless a file is gone."""
    inner = MemoryStorage()
    program = Program(lambda: Repository(Place(inner, QuickSeam(), DEFAULT)))
    program.pass_once()
    program.close()
    number, fired = 0, True
    while fired:
        faulty = FaultyStorage(inner, number, lambda: error("it failed", where="here"), verbs=("get", "list", "stat"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", everystep.DamageWarning)
            try:
                past = Repository(Place(faulty, QuickSeam(), DEFAULT))["a"]
                assert same(past.at(2).load(), 2) and same(past.tagged(TAG).load(), 2)
                latest = past.latest
                assert latest is not None and same(latest.load(), 3)
            except everystep.Error as raised:
                assert raised.kind in ("storage", "missing", "unknown-outcome", "damaged")
        fired = len(faulty.calls) > number
        number += 1
    assert number > 10


def test_put_new_says_exists_only_of_what_is_durable() -> None:
    """A link that is there already may be our own, of an attempt that failed before the folder was synced."""
    disk = Disk()
    storage = LocalStorage("/runs", QuickSeam(disk))
    storage.put_new("a/log/0", b"one")
    before = disk.ops.count(("fsync_folder", disk._find("/runs/a/log")))
    with pytest.raises(AlreadyExists):
        storage.put_new("a/log/0", b"two")
    assert disk.ops.count(("fsync_folder", disk._find("/runs/a/log"))) == before + 1
    assert bytes(storage.get("a/log/0")) == b"one"


class Away(MemoryStorage):
    """No pack gets there; each request says so when it has been repeated for as long as an outage is waited out."""

    def __init__(self, seam: QuickSeam) -> None:
        super().__init__()
        self.seam, self.asked = seam, 0

    def put(self, key: str, data: Any) -> None:
        if "/packs/" not in key:
            super().put(key, data)
            return
        self.asked += 1
        self.seam.sleep(DEFAULT.outage_seconds)
        raise Unreachable("no connection")


def test_an_outage_is_waited_out_once() -> None:
    seam = QuickSeam()
    storage = Away(seam)
    with Repository(Place(storage, seam, DEFAULT)).run("a").track(rng=False) as run, pytest.raises(Unreachable):
        run.save(1, state={"w": np.arange(10)}).wait()
    assert storage.asked == 1 and seam.slept < 1.5 * DEFAULT.outage_seconds
