"""Places where no repository can live, names of runs, second comers, misfits: always an answer, and never any harm."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _disk import Disk
from _seams import QuickSeam

import everystep
from everystep.repository import Repository
from everystep.seam import Files, Process
from everystep.settings import DEFAULT, FORMAT
from everystep.storage import LocalStorage
from everystep.vault import Place
from everystep.vault.lines import pack_lines


def state_of(step: int, size: int = 20) -> dict[str, Any]:
    return {"weights": np.arange(size, dtype=np.float32) * step, "count": step}


def same(state: Any, step: int, size: int = 20) -> bool:
    good = state_of(step, size)
    return state["count"] == step and state["weights"].tobytes() == good["weights"].tobytes()


def save_some(place: Any, name: str = "a", steps: range = range(1, 3), seam: Any = None) -> None:
    with everystep.open(place, seam=seam).run(name) as run:
        if seam is not None or name in everystep.open(place).runs():
            run.resume()
        for step in steps:
            run.save(step, state=state_of(step)).wait()


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder, and what is in it."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def open_and_save(place: Any, seam: Any = None) -> None:
    everystep.open(place, seam=seam).run("a").save(1, state=state_of(1)).wait()


# formats and foreign things ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"version": FORMAT + 1}, {"version": 10**6}, {"features": ["encryption"]}, {"features": ["a", "b"]}],
    ids=str,
)
def test_a_newer_format_is_refused_and_named(fields: dict[str, Any], tmp_path: Path) -> None:
    save_some(str(tmp_path / "runs"))
    body = {"format": "everystep", "version": FORMAT, "features": [], "id": "0" * 32, **fields}
    (tmp_path / "runs/format.json").write_bytes(pack_lines(body))
    before = everything(tmp_path)
    with pytest.raises(everystep.NewerFormat, match="update everystep") as raised:
        everystep.open(str(tmp_path / "runs"))
    assert str(fields.get("version", fields.get("features", [""])[0])) in str(raised.value)
    assert raised.value.kind == "newer-format"
    assert everything(tmp_path) == before


def test_a_repository_that_lost_its_format_file(tmp_path: Path) -> None:
    save_some(str(tmp_path / "runs"))
    (tmp_path / "runs/format.json").unlink()
    before = everything(tmp_path)
    with pytest.raises(everystep.Damaged, match=r"bring format\.json back"):
        everystep.open(str(tmp_path / "runs"))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("other", ["notes.txt", "log/0001", "checkpoint.pt", "mlruns/0/meta.yaml"])
def test_a_folder_of_somebody_else_is_left_alone(other: str, tmp_path: Path) -> None:
    (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / other).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(everystep.ForeignRepository, match=other.partition("/")[0]):
        everystep.open(str(tmp_path))
    assert everything(tmp_path) == before


def test_format_file_of_another_program(tmp_path: Path) -> None:
    body = {"format": "restic", "version": 1, "features": [], "id": "0"}
    (tmp_path / "format.json").write_bytes(pack_lines(body))
    with pytest.raises(everystep.ForeignRepository):
        everystep.open(str(tmp_path))
    (tmp_path / "format.json").write_text('{"version": 3}')
    with pytest.raises(everystep.Error):
        everystep.open(str(tmp_path))


def test_opening_and_asking_writes_nothing(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "runs"))
    assert not repo.exists and repo.runs() == [] and repo.check().ok
    with pytest.raises(everystep.NotFound):
        repo["a"]
    run = repo.run("a")
    assert run.latest is None and run.checkpoints() == []
    assert everything(tmp_path) == {}


def test_a_reader_that_was_there_first_sees_what_comes(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "runs"))
    assert not repo.exists
    save_some(str(tmp_path / "runs"))
    assert repo.exists and repo.runs() == ["a"] and repo["a"].latest.step == 2


# where the folder is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/runs", "/deep/er/runs"])
def test_a_file_where_the_folder_should_be(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(everystep.StorageError, match="a file lies where a folder should be"):
        open_and_save(f"{tmp_path}/file{below}")
    assert everything(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("part", ["runs", "runs/a", "runs/a/log", "runs/a/packs"])
def test_a_file_where_a_folder_of_ours_should_be(part: str, tmp_path: Path) -> None:
    save_some(str(tmp_path / "repo"), "other")
    (tmp_path / "repo" / part).parent.mkdir(parents=True, exist_ok=True)
    if part == "runs":
        shutil.rmtree(tmp_path / "repo/runs")
    (tmp_path / "repo" / part).write_text("mine")
    with pytest.raises(everystep.Error) as raised:
        open_and_save(str(tmp_path / "repo"))
    assert raised.value.kind in ("storage", "damaged", "not-found")
    assert (tmp_path / "repo" / part).read_text() == "mine"
    if part != "runs":
        assert same(everystep.open(str(tmp_path / "repo"))["other"].latest.load(), 2)


def test_paths_with_odd_characters(tmp_path: Path) -> None:
    for name in (
        "with space",
        "späß",
        "läng" * 40,
        "a'b\"c",
        "%41",
        "new\nline",
        "runs.",
        " ",
        "~tilde",
        "-r",
        "\udcff",
    ):
        save_some(str(tmp_path / name))
        assert same(everystep.open(str(tmp_path / name))["a"].at(1).load(), 1)
        save_some(tmp_path / name, "b")
        assert everystep.open(tmp_path / name).runs() == ["a", "b"]


@pytest.mark.parametrize("place", ["a\0b", "\ud800", "\0"], ids=ascii)
def test_paths_that_cannot_be(place: str) -> None:
    with pytest.raises(everystep.UsageError, match="cannot be a path"):
        everystep.open(place)


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    for place in (tmp_path / ("x" * 300), f"{tmp_path}/{'long/' * 1000}"):
        with pytest.raises(everystep.StorageError):
            open_and_save(str(place))


def test_a_linked_repository(tmp_path: Path) -> None:
    """A link to a folder, to nothing, to itself; and the folder moved away behind the link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_some(str(tmp_path / "link"))
    assert same(everystep.open(str(tmp_path / "real"))["a"].latest.load(), 2)
    (tmp_path / "real").rename(tmp_path / "elsewhere")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("elsewhere")
    save_some(str(tmp_path / "link"), steps=range(3, 4))
    assert same(everystep.open(str(tmp_path / "elsewhere"))["a"].latest.load(), 3)
    for target in ("nowhere", "broken"):
        (tmp_path / "broken").unlink(missing_ok=True)
        (tmp_path / "broken").symlink_to(target)
        with pytest.raises(everystep.StorageError):
            open_and_save(str(tmp_path / "broken"))


def test_a_moved_and_a_copied_repository_is_the_same(tmp_path: Path) -> None:
    save_some(str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "one").rename(tmp_path / "two")
    for place in ("copy", "two"):
        save_some(str(tmp_path / place), steps=range(3, 4))
        assert [c.step for c in everystep.open(str(tmp_path / place))["a"].checkpoints()] == [1, 2, 3]
        assert everystep.open(str(tmp_path / place)).check().ok


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_honour_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_some(str(tmp_path / "deep/runs"))
    finally:
        os.umask(before)
    for path in (tmp_path / "deep").rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_nothing_temporary_is_left(tmp_path: Path) -> None:
    save_some(str(tmp_path / "runs"))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp")]


# read-only places --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A small file system of its own, or the test of real mounts is not for this machine; the seam's always is."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting takes rights that this user has not; the same is tested without it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Refusing(Files):
    """Real files in a place that takes no changes."""

    number = errno.EROFS

    def _refuse(self, path: str) -> Any:
        raise OSError(self.number, os.strerror(self.number), path)

    def create(self, path: str) -> int:
        return self._refuse(path)

    def mkdir(self, path: str) -> None:
        if not os.path.exists(path):
            self._refuse(path)
        raise FileExistsError(errno.EEXIST, "File exists", path)

    def rename(self, source: str, target: str) -> None:
        self._refuse(target)

    def link(self, source: str, target: str) -> None:
        self._refuse(target)

    def unlink(self, path: str) -> None:
        self._refuse(path)


def check_read_only(place: str, seam: Any, new_place: str) -> None:
    """All that reads works; all that writes says what is wrong, and where."""
    repo = everystep.open(place, seam=seam)
    past = repo["a"]
    assert past.latest.step == 2 and same(past.at(1).load(), 1) and repo.check().ok
    for attempt in (
        lambda: repo.run("a").save(3, state=state_of(3)).wait(),
        lambda: repo.run("a").resume(),
        lambda: repo.run("b").save(1, state=state_of(1)).wait(),
        lambda: past.latest.tag("good"),
        lambda: past.note("good"),
        lambda: open_and_save(new_place, seam),
    ):
        with pytest.raises(everystep.ReadOnly, match="cannot write here") as raised:
            attempt()
        assert new_place in raised.value.where or place in raised.value.where
    assert [checkpoint.step for checkpoint in past.checkpoints()] == [1, 2]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_a_read_only_place(number: int, tmp_path: Path) -> None:
    save_some(str(tmp_path / "runs"))
    before = everything(tmp_path)
    files = Refusing()
    files.number = number
    check_read_only(str(tmp_path / "runs"), QuickSeam(files), str(tmp_path / "new"))
    assert everything(tmp_path) == before


def test_a_place_mounted_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        save_some(str(disk / "runs"))
        before = everything(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        check_read_only(str(disk / "runs"), QuickSeam(), str(disk / "new"))
        assert everything(disk) == before


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    """Said as what it is, and neither as damage nor as a place that cannot be written."""

    class Locked(Files):
        def open_read(self, path: str) -> int:
            if "/packs/" in path:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return super().open_read(path)

    save_some(str(tmp_path / "runs"))
    past = everystep.open(str(tmp_path / "runs"), seam=QuickSeam(Locked()))["a"]
    with pytest.raises(everystep.StorageError, match="cannot read this: Permission denied") as raised:
        past.latest.load()
    assert raised.value.kind == "storage" and "/packs/" in raised.value.where


# full places -------------------------------------------------------------------------------------------------------


class Small(Disk):
    """A disk in memory that holds so many bytes and no more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def write(self, fd: int, data: memoryview) -> int:
        linked = {inode for entries in self.tree.folders.values() for inode in entries.values()}
        free = self.limit - sum(len(body) for inode, body in self.tree.data.items() if inode in linked)
        if free <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data[:free])


def fill(place: str, seam: Any, size: int) -> tuple[everystep.Run, int]:
    """Saves random bytes until nothing more fits; answers the run, and the newest step that was durable."""
    run = everystep.open(place, seam=seam).run("a").track(rng=False)
    for step in range(1, 1000):
        try:
            run.save(step, state=noise(step, size)).wait()
        except everystep.StorageFull as error:
            assert "no space left" in error.what and "every earlier checkpoint is whole" in error.do
            return run, step - 1
    raise AssertionError("it never fills")


def noise(step: int, size: int) -> dict[str, Any]:
    return {
        "noise": np.random.default_rng(step).bytes(size),
        "array": np.random.default_rng(step).normal(size=size // 8),
    }


def check_full(place: str, seam: Any, size: int, enlarge: Callable[[], None]) -> None:
    run, newest = fill(place, seam, size)
    assert newest >= 2
    past = everystep.open(place, seam=seam)["a"]
    assert [checkpoint.step for checkpoint in past.checkpoints()] == list(range(1, newest + 1))
    for step in range(1, newest + 1):
        found, good = past.at(step).load(), noise(step, size)
        assert found["noise"] == good["noise"] and found["array"].tobytes() == good["array"].tobytes()
    assert everystep.open(place, seam=seam).check().ok
    enlarge()
    run.save(newest + 1, state=noise(newest + 1, size)).wait()
    run.close()
    assert everystep.open(place, seam=seam)["a"].latest.load()["noise"] == noise(newest + 1, size)["noise"]


@pytest.mark.parametrize("limit", [20_000, 31_111, 47_777])
def test_a_full_disk(limit: int) -> None:
    disk = Small(limit)

    def enlarge() -> None:
        disk.limit *= 2

    check_full("/runs", QuickSeam(disk), 4_000, enlarge)


def test_a_full_disk_that_is_mounted(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:

        def enlarge() -> None:
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True, capture_output=True)

        check_full(str(disk / "runs"), QuickSeam(), 40_000, enlarge)
        assert not [path for path in disk.rglob("*") if path.name.startswith(".tmp")]


# names of runs -----------------------------------------------------------------------------------------------------

NAMES = [
    "resnet", "with space", "a/b", "a/b/c", "/", "..", ".", ".hidden", "a..b", "../../etc", "späß", "实验", "😀",
    "%", "%41", "A", "a", "%61", "100%", "a\\b", "a:b", "a*b?", "CON", "nul", "a.", "-", "~", "$HOME", "`x`", "a\nb",
    "a\tb", "a\0b", "\0", "\udcff", "\ud800", " ", "a ", "x" * 180, "é" * 30, "format.json", "log", "packs", ".tmp-x",
    unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"),
]  # fmt: skip


def test_every_name_is_a_run_of_its_own(tmp_path: Path) -> None:
    place = str(tmp_path / "runs")
    for number, name in enumerate(NAMES):
        with everystep.open(place, seam=QuickSeam()).run(name) as run:
            run.save(1, state=state_of(number + 1)).wait()
    repo = everystep.open(place, seam=QuickSeam())
    assert repo.runs() == sorted(NAMES) and len(set(NAMES)) == len(NAMES)
    for number, name in enumerate(NAMES):
        assert name in repo and same(repo[name].latest.load(), number + 1)
    assert repo.check().ok and repo.check().runs == len(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "something was written outside"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"format.json", "place.json", "runs"}
    for path in (tmp_path / "runs/runs").iterdir():
        assert path.name.isascii() and path.name.isprintable() and not path.name.startswith(".")


@pytest.mark.parametrize("name", ["", "x" * 181, "é" * 31, "\0" * 61, None, 7, b"a", ["a"]], ids=ascii)
def test_names_that_no_run_has(name: Any, tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "runs"))
    for ask in (repo.run, repo.__getitem__):
        with pytest.raises(everystep.UsageError):
            ask(name)
    assert everything(tmp_path) == {}


class CaseBlind(Disk):
    """A file system to which names that differ in case only are the same."""

    def _find(self, path: str) -> int:
        return super()._find(path.lower())

    def _split(self, path: str) -> tuple[int, str]:
        return super()._split(path.lower())


def test_names_that_are_one_folder_to_the_file_system_are_not_mixed() -> None:
    disk = CaseBlind()
    save_some("/runs", "resnet", seam=QuickSeam(disk))
    before = disk.tree.paths()
    for attempt in (
        lambda: save_some("/runs", "ResNet", seam=QuickSeam(disk)),
        lambda: everystep.open("/runs", seam=QuickSeam(disk)).run("ResNet").latest,
        lambda: everystep.open("/runs", seam=QuickSeam(disk)).run("ResNet").note("hello"),
    ):
        with pytest.raises(everystep.Damaged, match="another run"):
            attempt()
    assert disk.tree.paths() == before
    save_some("/runs", "resnet", range(3, 5), QuickSeam(disk))
    assert everystep.open("/runs", seam=QuickSeam(disk))["resnet"].latest.step == 4


# second comers -----------------------------------------------------------------------------------------------------


def test_a_process_that_was_overtaken_changes_nothing(tmp_path: Path) -> None:
    first = everystep.open(str(tmp_path / "runs")).run("a")
    first.save(1, state=state_of(1)).wait()
    second = everystep.open(str(tmp_path / "runs")).run("a", takeover=True)
    assert second.resume() == 1
    log = tmp_path / "runs/runs/a/log"
    for attempt in (
        lambda: first.save(2, state=state_of(7)).wait(),
        lambda: first.save(3, state=state_of(7)).wait(),
    ):
        before = everything(log)
        with pytest.raises(everystep.RunTakenOver, match="has taken this run over") as raised:
            attempt()
        assert raised.value.kind == "taken-over" and "end this process" in raised.value.do
        assert everything(log) == before
    second.save(2, state=state_of(2)).wait()
    with pytest.raises(everystep.RunTakenOver):
        first.close()
    second.save(3, state=state_of(3)).wait()
    second.close()
    past = everystep.open(str(tmp_path / "runs"))["a"]
    assert [checkpoint.step for checkpoint in past.checkpoints(all=True)] == [1, 2, 3]
    assert all(same(past.at(step).load(), step) for step in (1, 2, 3))
    assert everystep.open(str(tmp_path / "runs")).check().ok


def test_overtaken_between_the_packs_and_the_record(tmp_path: Path) -> None:
    """The other opens while the first one's packs are on their way: the record finds its slot taken."""
    second: list[everystep.Run] = []

    class Overtaking(Files):
        armed = False

        def link(self, source: str, target: str) -> None:
            if self.armed and "/log/" in target:
                self.armed = False
                second.append(everystep.open(str(tmp_path / "runs")).run("a", takeover=True))
                assert second[0].resume() == 1
            super().link(source, target)

    files = Overtaking()
    first = everystep.open(str(tmp_path / "runs"), seam=QuickSeam(files)).run("a")
    first.save(1, state=state_of(1)).wait()
    files.armed = True
    with pytest.raises(everystep.RunTakenOver):
        first.save(2, state=state_of(7)).wait()
    second[0].save(2, state=state_of(2)).wait()
    second[0].close()
    past = everystep.open(str(tmp_path / "runs"))["a"]
    assert [checkpoint.step for checkpoint in past.checkpoints(all=True)] == [1, 2] and same(past.latest.load(), 2)


def test_an_owner_that_lives_is_waited_for_and_not_disturbed() -> None:
    """It lives and goes on writing: RunInUse, which says who and what to do."""
    disk = Disk()

    class Neighbour(QuickSeam):
        def is_gone(self, other: Process) -> bool:
            return False

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            owner.save(2, state=state_of(2)).wait()

    owner = everystep.open("/runs", seam=QuickSeam(disk, pid=1)).run("a")
    owner.save(1, state=state_of(1)).wait()
    other = Neighbour(disk, pid=2)
    with pytest.raises(everystep.RunInUse, match="process 1 on host is writing this run") as raised:
        everystep.open("/runs", seam=other).run("a").resume()
    assert "takeover=True" in raised.value.do and "waiting" in other.told[0]
    owner.save(3, state=state_of(3)).wait()
    owner.close()
    assert everystep.open("/runs", seam=QuickSeam(disk))["a"].latest.step == 3


# the same step again -----------------------------------------------------------------------------------------------


def steady_run(place: str) -> everystep.Run:
    """Without random states, so that equal arrays make an equal state."""
    return everystep.open(place, seam=QuickSeam()).run("a").track(rng=False)


def test_the_same_step_with_the_same_content_is_the_same_checkpoint(tmp_path: Path) -> None:
    run = steady_run(str(tmp_path / "runs"))
    first = run.save(1, state=state_of(1)).wait()
    second = run.save(2, state=state_of(2)).wait()
    log = everything(tmp_path / "runs/runs/a/log")
    assert run.save(2, state=state_of(2)).wait().id == second.id
    assert run.save(1, state=state_of(1)).wait().id == first.id
    assert everything(tmp_path / "runs/runs/a/log") == log
    third = run.save(3, state=state_of(3)).wait()
    assert third.parent == second.id, "saying an old step again is not going back"
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 2, 3]
    run.close()


def test_new_metrics_of_a_step_that_is_saved_are_kept(tmp_path: Path) -> None:
    run = steady_run(str(tmp_path / "runs"))
    first = run.save(1, state=state_of(1), metrics={"loss": 1.0}).wait()
    assert run.save(1, state=state_of(1), metrics={"accuracy": 0.5}).wait().id == first.id
    assert run.at(1).metrics == {"loss": 1.0, "accuracy": 0.5}
    run.close()


def test_the_same_step_with_other_content_is_a_conflict(tmp_path: Path) -> None:
    run = steady_run(str(tmp_path / "runs"))
    id = run.save(1, state=state_of(1)).wait().id
    log = everything(tmp_path / "runs/runs/a/log")
    with pytest.raises(everystep.Conflict, match="step 1 is saved already") as raised:
        run.save(1, state=state_of(5)).wait()
    assert "resume()" in raised.value.do and raised.value.kind == "conflict"
    assert everything(tmp_path / "runs/runs/a/log") == log and run.latest.id == id
    assert run.resume() == 1
    again = run.save(1, state=state_of(5)).wait()
    assert again.id != id and same(run.at(1).load(), 5)
    run.close()
    other = steady_run(str(tmp_path / "runs"))
    assert other.resume() == 1
    other.save(1, state=state_of(6)).wait()
    other.close()
    assert same(everystep.open(str(tmp_path / "runs"))["a"].latest.load(), 6)
    assert len(everystep.open(str(tmp_path / "runs"))["a"].checkpoints(all=True)) == 3


# what does not fit -------------------------------------------------------------------------------------------------


def test_a_model_of_another_shape_is_a_mismatch_and_nothing_is_changed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    place = str(tmp_path / "runs")
    with everystep.open(place).run("a").track(model=torch.nn.Linear(3, 4), head=torch.nn.Linear(2, 2)) as run:
        run.save(1).wait()
    head, model = torch.nn.Linear(2, 2), torch.nn.Linear(3, 5)
    before = [value.clone() for value in (*head.state_dict().values(), *model.state_dict().values())]
    random = torch.get_rng_state()
    objects = {"head": head, "model": model}
    run = everystep.open(place).run("a").track(**objects)
    with pytest.raises(everystep.Mismatch, match="nothing was changed") as raised:
        run.resume()
    assert "model/weight" in str(raised.value) and raised.value.kind == "mismatch"
    with pytest.raises(everystep.Mismatch):
        run.latest.load(into=objects)
    after = (*head.state_dict().values(), *model.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    assert torch.equal(random, torch.get_rng_state())
    run.close()
    past = everystep.open(place)["a"]
    assert [checkpoint.step for checkpoint in past.checkpoints()] == [1]
    report = past.latest.load(into=objects, strict=False)
    assert not report.complete and torch.equal(head.weight, torch.from_numpy(past.latest.load(only="head/weight")))


# the storage itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["../outside", "a/../../b", "/etc/passwd", "a//b", "./a", "a/."])
def test_keys_that_lead_elsewhere_are_refused(key: str, tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "in"), QuickSeam())
    for call in (
        lambda: storage.get(key),
        lambda: storage.put(key, [b"x"]),
        lambda: storage.put_new(key, b"x"),
        lambda: storage.stat(key),
        lambda: storage.delete(key),
    ):
        with pytest.raises(everystep.StorageError, match="not a key"):
            call()
    assert everything(tmp_path) == {}


def test_a_length_that_nobody_wrote_costs_no_memory(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "in"), QuickSeam())
    storage.put("a", [b"twelve bytes"])
    with pytest.raises(everystep.Damaged, match="ends at 12"):
        storage.get("a", 4, 1 << 62)
    assert bytes(storage.get("a", 4, 12)) == b"ve bytes" and bytes(storage.get("a", 12)) == b""


def test_two_repositories_in_one_process_do_not_know_each_other(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_some(str(tmp_path / name))
    storages = [LocalStorage(str(tmp_path / name), QuickSeam()) for name in ("one", "two")]
    ids = [Place(storage, QuickSeam(), DEFAULT).identity() for storage in storages]
    assert ids[0] != ids[1] and all(Repository(Place(s, QuickSeam(), DEFAULT)).check().ok for s in storages)
