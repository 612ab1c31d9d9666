"""Whatever a power cut leaves of what was not synced: all that was reported durable is there, bit for bit."""

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _disk import Disk, Op, Tree, acked, key_of, trees_after_cut
from _seams import QuickSeam

import everystep
from everystep.seam import Files

HOME = "/home/someone"
PLACE = f"{HOME}/out/runs"
STEPS = 3
SHARDS = 4


def state_of(step: int) -> dict[str, Any]:
    """A frozen leaf, which later checkpoints refer to, and one that moves."""
    return {"frozen": np.arange(9.0), "weights": np.arange(20, dtype=np.float32) * step, "count": step}


def same(state: Any, step: int) -> bool:
    good = state_of(step)
    return (
        list(state) == list(good)
        and state["count"] == step
        and all(state[name].tobytes() == good[name].tobytes() for name in ("frozen", "weights"))
    )


def open_run(disk: Files, place: str = PLACE, pid: int = 1) -> everystep.Run:
    return everystep.open(place, seam=QuickSeam(disk, pid)).run("a run").track(rng=False)


def train(disk: Files, ack: Callable[[Any], None], place: str = PLACE, pid: int = 1) -> None:
    """What the program does: opens, saves, tags; everything that it is told is durable goes to `ack`."""
    run = open_run(disk, place, pid)
    for step in range(1, STEPS + 1):
        saved = run.save(step, state=state_of(step), metrics={"loss": 1 / step}).wait()
        ack(("step", step, saved.id))
        if step == 2:
            ack(("tag", "second", saved.tag("second").id))
    run.close()


def recorded(disk: Disk) -> list[Op]:
    """The operations of a whole training, in a folder that somebody has just made and nobody has synced."""
    for folder in ("/home", HOME, f"{HOME}/out"):
        disk.mkdir(folder)
    train(disk, disk.ack)
    return disk.ops


def problem(tree: Tree, labels: Sequence[Any]) -> str | None:
    """What is wrong with what was left: None if everything reported is there, the rest is whole, and life goes on."""
    try:
        return _problem(Disk(tree=tree), labels)
    except (everystep.Error, everystep.EverystepWarning) as error:
        return f"{type(error).__name__}: {error}"


def _problem(disk: Disk, labels: Sequence[Any]) -> str | None:
    repo = everystep.open(PLACE, seam=QuickSeam(disk))
    if "a run" not in repo:
        return "the run was reported and is gone" if labels else _go_on(disk, 0)
    past = repo["a run"]
    found = {checkpoint.id: checkpoint for checkpoint in past.checkpoints(all=True)}
    for kind, name, id in labels:
        if id not in found:
            return f"{kind} {name} was reported and is gone"
        if kind == "tag" and past.tagged(name).id != id:
            return f"the tag {name} is elsewhere"
    for checkpoint in found.values():
        if not same(checkpoint.load(), checkpoint.step):
            return f"step {checkpoint.step} has other bits"
    if not repo.check().ok:
        return str(repo.check().findings)
    return _go_on(disk, max((checkpoint.step for checkpoint in found.values()), default=0))


def _go_on(disk: Disk, newest: int) -> str | None:
    run = open_run(disk, pid=2)
    if run.resume() != newest:
        return f"resume goes on from another step than {newest}"
    run.save(newest + 1, state=state_of(newest + 1)).wait()
    run.close()
    past = everystep.open(PLACE, seam=QuickSeam(disk))["a run"]
    return None if same(past.latest.load(), newest + 1) else "the next save has other bits"


def states(ops: Sequence[Op], cuts: Iterable[int]) -> Iterator[tuple[int, Tree, list[Any]]]:
    """(cut, what is left, what had been reported) of every state after a power cut that is new."""
    seen = set()
    for cut in cuts:
        labels = acked(ops[:cut])
        for tree in trees_after_cut(ops[:cut]):
            key = key_of(tree), len(labels)
            if key not in seen:
                seen.add(key)
                yield cut, tree, labels


def problems(ops: Sequence[Op], cuts: Iterable[int]) -> Iterator[tuple[int, str]]:
    for cut, tree, labels in states(ops, cuts):
        found = problem(tree, labels)
        if found is not None:
            yield cut, found


@functools.cache
def operations() -> list[Op]:
    return recorded(Disk())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_reported_is_lost_at_any_cut(shard: int) -> None:
    ops = operations()
    assert list(problems(ops, range(shard, len(ops) + 1, SHARDS))) == []


def test_the_enumeration_is_not_empty() -> None:
    ops = operations()
    found = [tree for _, tree, _ in states(ops, range(len(ops) + 1))]
    whole = Disk(ops).tree.data
    assert len(acked(ops)) == STEPS + 1 and len(found) > len(ops)
    assert any(0 < len(body) < len(whole[inode]) for tree in found for inode, body in tree.data.items()), "none torn"
    assert any(len(body) == len(whole[inode]) and body != whole[inode] for t in found for inode, body in t.data.items())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_lost_when_a_kill_comes_before_the_cut(shard: int) -> None:
    """The process is killed after some operation, the next one goes on upon what the first had not synced yet, and
    says again what the first had said; then the power goes."""
    for cut in range(4 + shard, len(operations()) + 1, SHARDS):
        disk = Disk(operations()[:cut])
        run = open_run(disk, pid=2)
        step = run.resume()
        for name, checkpoint in run.tags.items():
            disk.ack(("tag", name, checkpoint.tag(name).id))
        for old in run.checkpoints():
            disk.ack(("step", old.step, old.id))
        disk.ack(("step", step + 1, run.save(step + 1, state=state_of(step + 1)).wait().id))
        assert list(problems(disk.ops, [len(disk.ops)])) == []


def test_an_answer_that_changes_nothing_is_durable_too() -> None:
    """A tag that the log has already, put by a process that died before it could sync: to be told so is a promise."""
    ops = operations()
    links = [cut for cut, op in enumerate(ops, 1) if op[0] == "entries" and op[3] == "link"]
    told = 0
    for cut in links:
        disk = Disk(ops[:cut])
        repo = everystep.open(PLACE, seam=QuickSeam(disk))
        for name, checkpoint in (repo["a run"].tags if "a run" in repo else {}).items():
            disk.ack(("tag", name, checkpoint.tag(name).id))
            told += 1
        assert list(problems(disk.ops, [len(disk.ops)])) == []
    assert told


# the teeth ---------------------------------------------------------------------------------------------------------


class Dropping(Disk):
    """A program that leaves one kind of fsync out."""

    def __init__(self, drop: str) -> None:
        super().__init__()
        self._drop, self._last = drop, ""
        self._paths: dict[int, str] = {}

    def create(self, path: str) -> int:
        fd = super().create(path)
        self._paths[fd] = path
        return fd

    def fsync(self, fd: int) -> None:
        kind = "pack" if "/packs/" in self._paths[fd] else "record" if "/log/" in self._paths[fd] else "format"
        if kind != self._drop:
            super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._last = "rename"

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self._last = "link"

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self._last = "mkdir"

    def fsync_folder(self, path: str) -> None:
        kind = "above" if not path.startswith(PLACE) and path != f"{HOME}/out" else f"folder after {self._last}"
        if kind != self._drop:
            super().fsync_folder(path)


@pytest.mark.parametrize(
    "drop",
    ["pack", "record", "format", "folder after rename", "folder after link", "folder after mkdir", "above"],
)
def test_each_fsync_is_needed(drop: str) -> None:
    ops = recorded(Dropping(drop))
    acks = [cut for cut, op in enumerate(ops, 1) if op[0] == "ack"]
    assert next(problems(ops, acks), None) is not None


def test_the_teeth_are_those_of_the_model() -> None:
    """Leaving nothing out is no loss."""
    ops = recorded(Dropping(""))
    assert list(problems(ops, [cut for cut, op in enumerate(ops, 1) if op[0] == "ack"])) == []


# the model is like the real thing ----------------------------------------------------------------------------------


class Recorder(Files):
    """The real file system, with the list of what was done to it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.calls: list[str] = []
        self._paths: dict[int, str] = {}

    def _note(self, verb: str, *paths: str) -> None:
        self.calls.append(" ".join([verb, *(_plain(path.removeprefix(self.root)) for path in paths)]))

    def create(self, path: str) -> int:
        fd = super().create(path)
        self._paths[fd] = path
        self._note("create", path)
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        self._note("write", self._paths[fd])
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._note("fsync", self._paths[fd])
        super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._note("rename", source, target)

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self._note("link", source, target)

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self._note("unlink", path)

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self._note("mkdir", path)

    def fsync_folder(self, path: str) -> None:
        if path.startswith(self.root):
            self._note("fsync_folder", path)
        super().fsync_folder(path)


def _plain(path: str) -> str:
    """A path without what is drawn by chance."""
    return re.sub(r"[0-9a-f]{16,}", "…", path)


class RecordedDisk(Recorder, Disk):
    """The same list, of the model."""

    def __init__(self, root: str) -> None:
        Disk.__init__(self)
        Recorder.__init__(self, root)


def test_the_model_does_what_the_real_file_system_does(tmp_path: Path) -> None:
    real = Recorder(str(tmp_path))
    train(real, lambda label: None, str(tmp_path / "runs"))
    model = RecordedDisk("/top")
    model.mkdir("/top")
    model.calls.clear()
    train(model, lambda label: None, "/top/runs")
    assert model.calls == real.calls
    files = {f"/{_plain(str(path.relative_to(tmp_path)))}": path.is_dir() for path in tmp_path.rglob("*")}
    inside = {_plain(path.removeprefix("/top")): body is None for path, body in model.tree.paths().items()}
    assert {path: kind for path, kind in inside.items() if path} == files
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past = everystep.open(str(tmp_path / "runs"))["a run"]
        assert all(same(past.at(step).load(), step) for step in range(1, STEPS + 1))
