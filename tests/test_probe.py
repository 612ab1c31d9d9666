"""What a store does with several writers is found out before the first save, kept in place.json, and acted on."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _bad_stores import FORGETS, GOOD, IGNORES, LATE, RACY, REFUSES, Store, serving
from _disk import Disk
from _seams import QuickSeam

import everystep
from everystep.errors import EverystepWarning, ReadOnly, StorageError, UnknownOutcome, UnsafeStore
from everystep.repository import Repository
from everystep.seam import REAL, Process
from everystep.settings import DEFAULT, Settings
from everystep.storage import LocalStorage, MemoryStorage, open_storage
from everystep.storage.faulty import FaultyStorage
from everystep.storage.probe import IGNORED, REFUSED, YES, Finding, is_probe, probe
from everystep.vault import Place

GOLDEN = Path(__file__).parent / "golden" / "format-1"
STATE = {"w": np.arange(12.0)}


def repository(storage: Any, seam: Any = None, settings: Settings = DEFAULT) -> Repository:
    return Repository(Place(storage, seam or QuickSeam(), settings))


def save(repo: Repository, step: int, **how: Any) -> None:
    with repo.run("a", **how).track(rng=False) as run:
        run.resume()
        run.save(step, state=STATE).wait()


def known(text: bytes) -> dict[str, Any]:
    first, second, rest = text.split(b"\n")
    assert second.startswith(b"blake3 ") and rest == b""
    found = json.loads(first)
    assert isinstance(found, dict)
    return found


# what is written -----------------------------------------------------------------------------------------------------


def test_the_first_save_finds_out_and_keeps_it() -> None:
    storage = MemoryStorage("here")
    save(repository(storage), 1)
    found = known(storage.objects["place.json"])
    assert found["format"] == "everystep place" and found["place"] == "memory://here"
    assert found["finding"] == {"create_only": "yes", "reads_own": True, "lists_own": True, "said": ""}
    assert not any(map(is_probe, storage.objects)), "the objects it tried with are gone"


def test_reading_finds_out_nothing() -> None:
    storage = MemoryStorage()
    assert not repository(storage).exists
    with pytest.raises(everystep.NotFound):
        repository(storage)["a"]
    assert storage.objects == {}


def test_a_place_that_is_known_costs_one_request_more() -> None:
    storage = MemoryStorage()
    save(repository(storage), 1)
    faulty = FaultyStorage(storage)
    opened = repository(faulty)
    assert faulty.calls == [("get", "format.json"), ("get", "place.json")]
    save(opened, 2)
    later = {key for _, key in faulty.calls[2:]}
    assert not later & {"format.json", "place.json"} and not any(map(is_probe, later))


def test_a_new_place_costs_few_requests() -> None:
    faulty = FaultyStorage(MemoryStorage())
    place = Place(faulty, QuickSeam(), DEFAULT)
    before = len(faulty.calls)
    place.prepare()
    assert len(faulty.calls) - before <= 12


def test_a_copy_elsewhere_is_another_place(tmp_path: Path) -> None:
    save(everystep.open(str(tmp_path / "first")), 1)
    before = (tmp_path / "first" / "place.json").read_bytes()
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    copy = everystep.open(str(tmp_path / "second"))
    assert (tmp_path / "second" / "place.json").read_bytes() == before, "who only reads changes nothing"
    assert copy["a"].latest is not None
    save(copy, 2)
    assert known((tmp_path / "second" / "place.json").read_bytes())["place"] == str(tmp_path / "second")
    assert (tmp_path / "first" / "place.json").read_bytes() == before


def test_the_same_name_at_another_endpoint_is_another_place() -> None:
    storage = MemoryStorage("bucket")
    storage.identity = "here memory://bucket"  # type: ignore[attr-defined]
    save(repository(storage), 1)
    assert known(storage.objects["place.json"])["place"] == "here memory://bucket"
    storage.identity = "there memory://bucket"  # type: ignore[attr-defined]
    save(repository(storage), 2)
    assert known(storage.objects["place.json"])["place"] == "there memory://bucket"


def test_repositories_from_before_are_read_and_written(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "old")
    (tmp_path / "old" / "place.json").unlink(missing_ok=True)
    repo = everystep.open(str(tmp_path / "old"))
    name = repo.runs()[0]
    assert repo[name].checkpoints() and not (tmp_path / "old" / "place.json").exists()
    with pytest.warns(EverystepWarning, match="not exact"), repo.run(name).track(rng=False) as run:
        run.resume()
        run.save(10_000, state=STATE).wait()
    assert known((tmp_path / "old" / "place.json").read_bytes())["finding"]["create_only"] == "yes"


@pytest.mark.parametrize("bad", [b"", b"{}", b"\x00" * 40], ids=["empty", "other", "zeros"])
def test_a_damaged_place_is_found_out_again(bad: bytes) -> None:
    storage = MemoryStorage()
    save(repository(storage), 1)
    storage.objects["place.json"] = bad
    assert repository(storage)["a"].at(1).load()["w"].tobytes() == STATE["w"].tobytes()
    save(repository(storage), 2)
    assert known(storage.objects["place.json"])["finding"]["create_only"] == "yes"


class Killed(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("number", range(13))
def test_a_kill_in_the_middle_leaves_nothing_that_matters(number: int) -> None:
    storage = MemoryStorage()

    def kill() -> Any:
        raise Killed

    dying = FaultyStorage(storage, number, kill, for_ever=True, verbs=("get", "put", "put_new", "list", "delete"))
    with pytest.raises(Killed):
        Place(dying, QuickSeam(), DEFAULT).prepare()
    repo = repository(storage)
    save(repo, 1)
    repo["a"].prune()
    assert not any(map(is_probe, storage.objects)), "prune removes what the dead one left"
    assert known(storage.objects["place.json"])["finding"]["create_only"] == "yes"


def test_who_may_not_delete_can_save_all_the_same() -> None:
    class Creating(MemoryStorage):
        def delete(self, key: str) -> None:
            raise ReadOnly("you may not delete", where=key)

    storage = Creating("here")
    save(repository(storage), 1)
    save(repository(storage), 2)
    assert sum(map(is_probe, storage.objects)) == 1
    storage.identity = "elsewhere"  # type: ignore[attr-defined]
    save(repository(storage), 3)
    assert known(storage.objects["place.json"])["place"] == "memory://here", "that needs a delete"
    inner = MemoryStorage("here")
    inner.objects = storage.objects
    repository(inner)["a"].prune()
    assert not any(map(is_probe, storage.objects))


def test_a_passing_fault_is_no_finding() -> None:
    for applied in (False, True):
        for number in range(12):
            for error in (lambda: StorageError("it failed"), lambda: UnknownOutcome("timeout")):
                faulty = FaultyStorage(MemoryStorage(), number, error, applied=applied)
                assert probe(faulty, QuickSeam(), DEFAULT).safe


# stores that are wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def wrong(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with serving(request.param) as (store, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield store


each_wrong = pytest.mark.parametrize("wrong", [IGNORES, REFUSES], indirect=True)
URL = "s3://bucket/runs"


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (GOOD, Finding(YES)), (IGNORES, Finding(IGNORED)), (RACY, Finding(IGNORED)),
        (FORGETS, Finding(YES, reads_own=False)), (LATE, Finding(YES, lists_own=False)),
    ],
    indirect=["wrong"],
)  # fmt: skip
def test_what_a_store_does_is_found_out(wrong: Store, expected: Finding) -> None:
    found = probe(open_storage(URL, REAL), REAL, DEFAULT)
    assert found == expected and found.safe == (not found.why)
    assert wrong.objects == {}
    assert len(wrong.requests) <= 60


@pytest.mark.parametrize("wrong", [REFUSES], indirect=True)
def test_a_store_that_answers_with_an_error_is_quoted(wrong: Store) -> None:
    found = probe(open_storage(URL, REAL), REAL, DEFAULT)
    assert found.create_only == REFUSED and found.said and found.said in found.why
    assert wrong.objects == {}


@pytest.mark.parametrize("wrong", [GOOD], indirect=True)
def test_a_good_store_costs_few_requests_once(wrong: Store) -> None:
    opened = everystep.open(URL)
    wrong.requests.clear()
    opened._place.prepare()
    assert len(wrong.requests) <= 40
    wrong.requests.clear()
    everystep.open(URL)._place.prepare()
    assert {verb for verb, _ in wrong.requests} == {"GET"} and len(wrong.requests) <= 3, "what is known is only read"


@each_wrong
def test_one_process_may_save_there_and_is_warned(wrong: Store) -> None:
    for step in (1, 2):
        with pytest.warns(EverystepWarning, match="does not keep several writers apart"):
            save(everystep.open(URL), step)
    past = everystep.open(URL)["a"]
    assert [checkpoint.step for checkpoint in past.checkpoints()] == [1, 2]
    assert past.at(2).load()["w"].tobytes() == STATE["w"].tobytes()
    past.at(1).tag("first")  # nobody writes now
    assert everystep.open(URL)["a"].tagged("first").step == 1
    assert everystep.open(URL).check().ok
    assert json.loads(wrong.objects["runs/place.json"][0].split(b"\n")[0])["finding"]["create_only"] != "yes"


@each_wrong
def test_several_ranks_are_refused(wrong: Store) -> None:
    for rank in (0, 1):
        run = everystep.open(URL).run("a", rank=rank, ranks=2, launch="one")
        with pytest.raises(UnsafeStore, match="ranks would write this run") as caught:
            run.save(1, state=STATE)
        assert "storage check" in caught.value.do and caught.value.where == URL
        assert ("error" in caught.value.what) == (wrong.how == REFUSES)
    assert not any("/log/" in key for key in wrong.objects)


class Elsewhere(QuickSeam):
    """A machine that cannot know whether the others live."""

    def process(self) -> Process:
        return Process(f"host-{self._pid}", f"machine-{self._pid}", f"boot-{self._pid}", self._pid, str(self._pid))

    def is_gone(self, other: Process) -> bool:
        return False


@each_wrong
def test_nobody_may_take_a_run_over_or_write_beside_its_owner(wrong: Store) -> None:
    with pytest.warns(EverystepWarning, match="several writers"):
        owner = everystep.open(URL, seam=Elsewhere(pid=1)).run("a").track(rng=False)
        owner.save(1, state=STATE).wait()
    other = everystep.open(URL, seam=Elsewhere(pid=2))
    with pytest.raises(UnsafeStore, match="process 1 on host-1 may still be writing"):
        other.run("a", takeover=True).save(2, state=STATE)
    with pytest.raises(UnsafeStore, match="process 1 on host-1"):
        other["a"].at(1).tag("mine")
    owner.save(2, state={"w": STATE["w"] + 1}).wait()
    owner.at(1).tag("mine")
    owner.close()
    with pytest.warns(EverystepWarning, match="several writers"):
        save(other, 3)
    assert [checkpoint.step for checkpoint in other["a"].checkpoints()] == [1, 2, 3]


@pytest.mark.parametrize("wrong", [IGNORES], indirect=True)
def test_a_store_that_was_mended_is_found_out(wrong: Store) -> None:
    with pytest.warns(EverystepWarning, match="several writers"):
        save(everystep.open(URL), 1)
    wrong.how = GOOD
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(everystep.open(URL), 2)
    assert json.loads(wrong.objects["runs/place.json"][0].split(b"\n")[0])["finding"]["create_only"] == "yes"


# disks ---------------------------------------------------------------------------------------------------------------


class NoLinks(Disk):
    """exFAT, SMB, many a FUSE."""

    def link(self, source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", target)


def test_a_file_system_without_hard_links_takes_one_writer() -> None:
    disk = NoLinks()
    with pytest.warns(EverystepWarning, match="no hard links"):
        save(everystep.open("/runs", seam=QuickSeam(disk)), 1)
    with pytest.warns(EverystepWarning, match="no hard links"):
        save(everystep.open("/runs", seam=QuickSeam(disk)), 2)
    past = everystep.open("/runs", seam=QuickSeam(disk))["a"]
    assert [checkpoint.step for checkpoint in past.checkpoints()] == [1, 2]
    with pytest.raises(UnsafeStore, match="no hard links"):
        everystep.open("/runs", seam=QuickSeam(disk)).run("b", rank=0, ranks=2, launch="x").save(1, state=STATE)


def test_a_disk_is_known_by_its_folder(tmp_path: Path) -> None:
    assert probe(LocalStorage(str(tmp_path), REAL), REAL, DEFAULT) == Finding(YES)
    assert list(tmp_path.iterdir()) == []
