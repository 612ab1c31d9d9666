"""SIGKILL at any moment: what a training was told is durable is there, bit for bit, and the next start goes on at once.

EVERYSTEP_KILLS says how often (20), EVERYSTEP_SEED repeats a run of the test.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kill_trainer import digest

import everystep
from everystep import seam
from everystep.seam import REAL, Process

KILLS = int(os.environ.get("EVERYSTEP_KILLS", "20"))
SEED = int(os.environ.get("EVERYSTEP_SEED", str(random.SystemRandom().randrange(1 << 32))))
TRAINER = Path(__file__).with_name("kill_trainer.py")
PATIENCE = 120.0


@dataclass
class Life:
    """One process of the training, from its start to its death."""

    process: "subprocess.Popen[str]"
    marks: Path
    lines: list[list[str]] = field(default_factory=list)

    def read_line(self) -> list[str]:
        """The next thing it says; empty at its end. What has no end of line was not said."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        words = line.split() if line.endswith("\n") else []
        if words:
            self.lines.append(words)
        return words

    def wait_for(self, word: str) -> list[str]:
        while words := self.read_line():
            if words[0] == word:
                return words
        raise AssertionError(f"the trainer ended by itself: {self.lines[-3:]}")

    def wait_for_mark(self, mark: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not any(line.startswith(mark) for line in self.marked()):
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {mark!r} in {self.marked()[-3:]}"
            time.sleep(0.002)

    def marked(self) -> list[str]:
        return self.marks.read_text().splitlines() if self.marks.exists() else []

    def kill(self) -> None:
        """SIGKILL, and all that it had said before. It is not waited for: it stays a zombie."""
        self.process.kill()
        while self.read_line():
            pass

    @property
    def durable(self) -> dict[int, str]:
        return {int(words[1]): words[2] for words in self.lines if words[0] == "durable"}

    @property
    def commits(self) -> int:
        return sum(line.startswith("commit") for line in self.marked())

    @property
    def died_in_a_save(self) -> bool:
        """After the first byte of a pack, before the record that commits it."""
        words = [line.split() for line in self.marked()]
        begun = [save for mark, save, *_ in words if mark == "byte"]
        return bool(begun) and begun[-1] not in [save for mark, save, *_ in words if mark == "commit"]

    @property
    def operations(self) -> list[int]:
        """How many operations each save took from its first pack byte to its commit."""
        return [int(line.split()[2]) for line in self.marked() if line.startswith("commit")]


class Family:
    """All lives of one run; none is left behind."""

    def __init__(self, folder: Path, kind: str = "numpy") -> None:
        self.folder, self.kind = folder / "runs", kind
        self.lives: list[Life] = []

    def start(self, *pause: Any) -> Life:
        """With `pause` (save, "byte" or "commit", operation) it stands still there."""
        marks = self.folder.with_name(f"marks-{len(self.lives)}")
        command = [sys.executable, str(TRAINER), str(self.folder), str(marks), self.kind, *map(str, pause)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=self.folder.parent)
        self.lives.append(Life(process, marks))
        return self.lives[-1]

    def end(self) -> None:
        for life in self.lives:
            life.process.kill()
            life.process.wait()
            assert life.process.stdout is not None
            life.process.stdout.close()


@contextlib.contextmanager
def family(folder: Path, kind: str = "numpy") -> Iterator[Family]:
    made = Family(folder, kind)
    try:
        yield made
    finally:
        made.end()


def plan(rng: random.Random, count: int) -> list[str]:
    """Half of the kills in the middle of a save, the others anywhere, and some right behind a commit."""
    kinds = ["in a save", "in a save", "any time", "behind a commit", "in a save", "at the start"]
    planned = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(planned)
    return planned


def live_and_die(made: Family, kind: str, rng: random.Random, operations: int) -> Life:
    if kind == "at the start":
        life = made.start()
        time.sleep(rng.uniform(0, 0.5))
    elif kind == "any time":
        life = made.start()
        life.wait_for("durable")
        time.sleep(rng.uniform(0, 0.1))
    elif kind == "in a save":
        life = made.start(rng.randrange(4), "byte", rng.randrange(operations))
        life.wait_for_mark("paused")
    else:
        life = made.start(rng.randrange(4), "commit", rng.randrange(2))
        life.wait_for_mark("paused")
    life.kill()
    return life


def count_operations(folder: Path, kind: str = "numpy") -> int:
    """How many operations every save takes at least, from its first pack byte to its commit."""
    folder.mkdir()
    with family(folder, kind) as made:
        life = made.start()
        while len(life.durable) < 5:
            assert life.read_line()
        life.kill()
        return min(life.operations)


def check(made: Family, life: Life, said: dict[int, str], paused: bool, before: int) -> int:
    """What a reader sees after a kill; answers the newest step."""
    repo = everystep.open(str(made.folder))
    if "a run" not in repo:
        assert not said
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past = repo["a run"]
        steps = [checkpoint.step for checkpoint in past.checkpoints()]
    newest = steps[-1] if steps else 0
    assert steps == list(range(1, newest + 1)) and newest >= max(said, default=0)
    new = newest - before
    assert new == life.commits if paused else life.commits <= new <= life.commits + 1
    for step, expected in life.durable.items():
        assert digest(past.at(step).load(**_part(made.kind))) == expected
    for words in (words for words in life.lines if words[0] == "tagged"):
        assert past.tagged(words[2]).step == int(words[1])
    report = repo.check()
    assert report.ok and report.checkpoints == len(steps), report.findings
    return newest


def _part(kind: str) -> dict[str, Any]:
    return {"only": "model"} if kind == "torch" else {}


def run_family(made: Family, kinds: list[str], rng: random.Random, operations: int) -> dict[int, str]:
    """Kills one life after the other; answers all that was ever reported."""
    said: dict[int, str] = {}
    newest, before = 0, None
    for number, kind in enumerate(kinds):
        if before is not None and rng.random() < 0.5:
            before.process.wait()  # the others stay zombies, and nobody may take them for the living
        life = live_and_die(made, kind, rng, operations)
        print(f"kill {number}: {kind}, died in a save: {life.died_in_a_save}, said {len(life.durable)}")
        assert "waited" not in [words[0] for words in life.lines], life.lines
        resumed = [int(words[1]) for words in life.lines if words[0] == "resumed"]
        assert resumed in ([], [newest]), f"resumed from {resumed}, and step {newest} was there"
        said.update(life.durable)
        newest = check(made, life, said, kind in ("in a save", "behind a commit"), newest)
        before = life
    return said


@pytest.mark.parametrize("shard", range(2))
def test_kill_at_any_moment(shard: int, tmp_path: Path) -> None:
    print(f"EVERYSTEP_SEED={SEED}")
    rng = random.Random(SEED + shard)
    kinds = plan(rng, max(6, KILLS // 2))
    with family(tmp_path) as made:
        said = run_family(made, kinds, rng, count_operations(tmp_path / "count"))
        past = everystep.open(str(made.folder))["a run"]
        for step, expected in said.items():
            assert digest(past.at(step).load()) == expected
        losses = [step for step, value in past.series("loss") if value != 1 / step]
        assert not losses and len(past.series("loss")) == past.latest.step
        mid = [life for life in made.lives if life.died_in_a_save]
        assert 3 * len(mid) >= len(kinds), f"only {len(mid)} of {len(kinds)} kills came in the middle of a save"


def test_kill_before_each_kind_of_operation(tmp_path: Path) -> None:
    """One after the other, so that none of them is left to chance; the trainer says where it stood."""
    last = count_operations(tmp_path / "count")
    with family(tmp_path) as made:
        newest, verbs = 0, set()
        for operation in range(last - 1, -1, -1):
            if {"create", "write", "fsync", "close", "rename", "fsync_folder", "link"} <= verbs:
                break
            life = made.start(1, "byte", operation)
            life.wait_for_mark("paused")
            life.kill()
            assert life.died_in_a_save
            verbs.add(life.marked()[-1].split()[1])
            newest = check(made, life, life.durable, True, newest)
        assert {"create", "write", "fsync", "close", "rename", "fsync_folder", "link"} <= verbs
        begun = set(made.folder.glob("runs/*/packs/*/.tmp-*"))
        assert begun, "a pack that was being written"
        past = everystep.open(str(made.folder))["a run"]
        term = past._history().term
        past.prune()
        left = set(made.folder.glob("runs/*/packs/*/.tmp-*"))
        assert left == {path for path in begun if path.parent.name.endswith(f"-{term}")}, "it may still be written to"
        with everystep.open(str(made.folder)).run("a run", takeover=True) as run:
            run.resume()
        past.prune()
        assert not list(made.folder.glob("runs/*/packs/*/.tmp-*")) and past.at(newest).load()


def test_torch_killed_and_never_killed_come_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rng = random.Random(SEED)
    (tmp_path / "whole").mkdir()
    with family(tmp_path, "torch") as made, family(tmp_path / "whole", "torch") as whole:
        undisturbed = whole.start()
        said = run_family(made, ["in a save", "any time", "in a save"], rng, 10)
        survivor = made.start()  # however early the kills came, some steps more are behind them
        while len(survivor.durable) < 3:
            assert survivor.read_line()
        survivor.kill()
        said.update(survivor.durable)
        while len(undisturbed.durable) < max(said):
            assert undisturbed.read_line()
        undisturbed.kill()
        assert len(said) > 2 and said == {step: undisturbed.durable[step] for step in said}


# who is gone -------------------------------------------------------------------------------------------------------


def process_of(child: "subprocess.Popen[bytes]") -> Process:
    here = REAL.process()
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return Process(here.host, here.machine, here.boot, child.pid, started)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="a start time is known only where there is /proc")
def test_a_zombie_is_gone_and_a_living_process_is_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        known = process_of(child)
        assert not REAL.is_gone(known)
        assert REAL.is_gone(Process(known.host, known.machine, known.boot, known.pid, "1")), "the number was reused"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
        assert Path(f"/proc/{child.pid}").exists() and REAL.is_gone(known)
    finally:
        child.kill()
        child.wait()
    assert REAL.is_gone(known)


def test_a_process_that_may_not_be_looked_at_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc hides the processes of others, nothing is known of them but that they are there."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        here, read = REAL.process(), seam._text
        known = Process(here.host, here.machine, here.boot, child.pid, "12345")
        hidden = f"/proc/{child.pid}/stat"
        monkeypatch.setattr(seam, "_text", lambda path: "" if path == hidden else read(path))
        assert not REAL.is_gone(known)
    finally:
        child.kill()
        child.wait()
    assert REAL.is_gone(known)
