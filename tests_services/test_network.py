"""The network is cut in the middle of a save, packets dropped: training goes on, and nothing is lost or left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _ceph import Ceph
from _network import Network, network
from _proxy import proxy
from _server import Place

import everystep
from everystep.seam import REAL
from everystep.storage import open_storage
from everystep.vault import RunVault
from everystep.vault.names import pack_key
from everystep.vault.place import Place as Repository

TRAINER = Path(__file__).parent / "_trainer.py"
STEPS, SAVE_EVERY, MIB = 12, 3, 24


@pytest.fixture
def far() -> Iterator[Network]:
    with network() as made:
        yield made


class Trainer:
    """A training at the other end of that network; its steps as it prints them."""

    def __init__(self, far: Network | None, url: str, environment: dict[str, str], *options: object) -> None:
        words = [sys.executable, str(TRAINER), url, "r", *map(str, (STEPS, SAVE_EVERY, MIB, *options))]
        self.process = subprocess.Popen(
            [*(far.enter if far is not None else []), *words], env={**os.environ, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.steps: list[int] = []
        self.end = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            kind, value = line.split()
            if kind == "step":
                self.steps.append(int(value))
            else:
                self.end = value

    def finish(self) -> str:
        """What it said on its way out, if that was no good end."""
        assert self.process.stderr is not None
        words = self.process.stderr.read()
        self.process.wait(120)
        self._reader.join()
        return words if self.process.returncode else ""


def keys(url: str, part: str) -> set[str]:
    return {key for key in open_storage(url, REAL).list("runs/") if f"/{part}/" in key}


def wait_for_a_pack(url: str, trainer: Trainer) -> None:
    """Until the first save is under way, of which no record is there."""
    until = time.monotonic() + 60
    while not keys(url, "packs"):
        assert time.monotonic() < until and trainer.process.poll() is None


def committed(url: str) -> set[str]:
    """The packs that the checkpoints of the run need."""
    vault = RunVault(Repository(open_storage(url, REAL), REAL, everystep.Settings()), "r")
    history = vault.history()
    return {pack_key(vault.folder, name) for id in history.live for name in history.commits[id].needs(thin=False)}


def check_whole(url: str) -> None:
    repo = everystep.open(url)
    assert repo.check().ok
    assert [one.step for one in repo["r"].checkpoints()] == list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
    with repo.run("r").track(rng=False) as run:
        run.resume(strict=False)  # a new term: what the one before left unfinished is nobody's now
    repo["r"].prune(now=True)
    assert keys(url, "packs") == committed(url)


@pytest.fixture
def straight(tmp_path: Path) -> str:
    trainer = Trainer(None, str(tmp_path / "straight"), {})
    assert trainer.finish() == ""
    return trainer.end


def test_a_short_cut(ceph: Ceph, on_ceph: Place, far: Network, straight: str) -> None:
    url = on_ceph.new("runs")
    with proxy(ceph.port, host=far.host) as between:
        environment = {"AWS_ENDPOINT_URL": f"http://{far.host}:{between.port}"}
        trainer = Trainer(far, url, environment, 1, 60, 0.2)
        wait_for_a_pack(url, trainer)
        far.cut()
        before = len(trainer.steps)
        time.sleep(4)
        assert len(trainer.steps) > before, "training goes on"
        assert committed(url) == set()
        far.mend()
        assert trainer.finish() == ""
    assert trainer.end == straight
    check_whole(url)


def test_a_cut_that_outlasts_all_patience(ceph: Ceph, on_ceph: Place, far: Network, straight: str) -> None:
    url = on_ceph.new("runs")
    with proxy(ceph.port, host=far.host) as between:
        environment = {"AWS_ENDPOINT_URL": f"http://{far.host}:{between.port}"}
        trainer = Trainer(far, url, environment, 1, 4, 0.2)
        wait_for_a_pack(url, trainer)
        far.cut()
        words = trainer.finish()
        assert "Unreachable" in words and trainer.process.returncode != 0
        far.mend()
        assert committed(url) == set()
        again = Trainer(far, url, environment, 1, 60, 0)
        assert again.finish() == "" and again.end == straight
    check_whole(url)
