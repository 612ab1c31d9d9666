"""Ranks of one host that load the same from a store: one of them fetches each thing, whatever becomes of the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from _between import Counting
from _fake_s3 import FakeS3, Fault, fake_s3

import everystep
from everystep.repository import Repository
from everystep.schema import Box
from everystep.seam import Files, Seam
from everystep.settings import Settings
from everystep.storage import MemoryStorage
from everystep.vault import Place
from everystep.vault.share import STALE_SECONDS, HostShare, host_share

RANKS = 4
SMALL = Settings(chunk_bytes_max=1 << 14, pack_bytes_max=1 << 17, base_depth_max=0, base_depth_small=0)


class Host(Seam):
    """A rank of a host whose folder for sharing lies in a folder of the test's."""

    def __init__(self, folder: Path, rank: int, files: Files | None = None) -> None:
        super().__init__(files)
        self._folder, self._rank = folder, rank

    def host_folder(self) -> str:
        return str(self._folder)

    def environ(self, name: str) -> str | None:
        said = {"LOCAL_RANK": str(self._rank), "LOCAL_WORLD_SIZE": str(RANKS)}
        return said.get(name, super().environ(name))


def state_of(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {f"w{n}": random.normal(size=(64, 1000)).astype(np.float32) for n in range(12)}


class Ranks:
    """A checkpoint in a store that is far away, and ranks that load it; each counts what it asked the store for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inner, self.state = folder, MemoryStorage(), state_of(0)
        self.inner.fan_out = 8  # type: ignore[misc]
        with Repository(Place(self.inner, Seam(), SMALL)).run("a").track(rng=False) as run:
            run.save(1, state=self.state).wait()
        alone = self.rank(0, Seam())
        alone[1].load()
        self.once = alone[0].read
        self.ranks = [self.rank(rank, Host(folder, rank)) for rank in range(RANKS)]

    def rank(self, rank: int, seam: Seam) -> tuple[Counting, Any]:
        storage = Counting(self.inner)
        checkpoint = Repository(Place(storage, seam, SMALL))["a"].latest
        assert checkpoint is not None
        return storage, checkpoint

    def load(self) -> None:
        """All at once; what they hand each other stays until the last has begun, as in a load that takes its time."""
        found: dict[int, Any] = {}
        with ExitStack() as stack:
            stack.enter_context(host_share(self.inner, "runs/a/", Host(self.folder, 0), RANKS))
            threads = [
                Thread(target=lambda rank=rank: found.update({rank: self.ranks[rank][1].load()}))
                for rank in range(RANKS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == RANKS
        for state in found.values():
            assert state.keys() == self.state.keys()
            assert all(np.array_equal(state[name], leaf) for name, leaf in self.state.items())

    @property
    def read(self) -> int:
        return sum(storage.read for storage, _ in self.ranks)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "host"


@pytest.fixture
def ranks(folder: Path) -> Ranks:
    return Ranks(folder)


def test_what_all_ranks_of_a_host_need_is_fetched_once(ranks: Ranks) -> None:
    ranks.load()
    manifest = ranks.once - sum(leaf.nbytes for leaf in ranks.state.values()) * 8 // 10
    assert ranks.once <= ranks.read < ranks.once + RANKS * manifest < 2 * ranks.once
    shares = [storage.read / ranks.once for storage, _ in ranks.ranks]
    assert max(shares) < 0.9, "each has fetched some of it"
    assert os.listdir(ranks.folder) == []


def test_without_a_launcher_nobody_shares(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "ranks_here", lambda self: 1)
    ranks.load()
    assert ranks.read == RANKS * ranks.once


def test_the_setting_comes_before_the_launcher(folder: Path) -> None:
    seam = Host(folder, 0)
    assert seam.ranks_here() == RANKS
    for number, shares in ((1, False), (2, True)):
        vault = Repository(Place(Ranks(folder).inner, seam, Settings(host_ranks=number)))["a"]._vault
        with vault.host_share() as share:
            assert (share is not None) is shares


@pytest.mark.parametrize("said, count", [("8", 8), ("8(x2),4", 8), ("0", 1), ("", 1), ("many", 1)])
def test_how_many_ranks_the_launcher_says(said: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", said)
    assert Seam().ranks_here() == count


# what goes wrong -----------------------------------------------------------------------------------------------------


class Full(Files):
    """A disk that takes some bytes, then none."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes

    def write(self, fd: int, data: memoryview) -> int:
        taken = super().write(fd, data[: self.left])
        self.left -= taken
        if not taken:
            raise OSError(28, "No space left on device")
        return taken


@pytest.mark.parametrize("nbytes", [0, 100_001, 1_000_000])
def test_a_full_disk_only_ends_the_sharing(ranks: Ranks, nbytes: int) -> None:
    ranks.ranks = [ranks.rank(rank, Host(ranks.folder, rank, Full(nbytes))) for rank in range(RANKS)]
    ranks.load()
    assert ranks.read > ranks.once


def test_a_disk_with_little_room_is_left_alone(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "free", lambda self, path: 1000)
    ranks.load()
    assert ranks.read == RANKS * ranks.once


def test_what_another_process_left_is_not_believed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range is there already, and wrong."""
    get = HostShare.get

    def spoiled(self: HostShare, storage: Any, key: str, start: int, stop: int) -> memoryview:
        good = get(self, storage, key, start, stop)
        return memoryview(bytes(len(good)))

    monkeypatch.setattr(HostShare, "get", spoiled)
    ranks.load()


def test_half_a_range_is_written_again(ranks: Ranks, folder: Path) -> None:
    """As by a process that was killed in the middle of it."""
    with host_share(ranks.inner, "runs/a/", Host(folder, 0), RANKS) as share:
        assert share is not None
        ranks.load()
        (inside,) = folder.iterdir()
        halves = [file for file in inside.iterdir() if file.name != "users"]
        assert halves
        for file in halves:
            os.truncate(file, file.stat().st_size // 2)
        ranks.load()
    assert ranks.read > 2 * ranks.once and not any(folder.iterdir())


def test_a_folder_of_somebody_else_is_not_used(ranks: Ranks, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    ranks.load()
    assert ranks.read == RANKS * ranks.once and not any(folder.iterdir())


def test_what_killed_processes_left_is_removed_in_time(folder: Path) -> None:
    inner = Ranks(folder).inner
    folder.mkdir(mode=0o700, exist_ok=True)
    now = time.time()
    for name, age in (("old", 2 * STALE_SECONDS), ("new", 0.5 * STALE_SECONDS), ("used", 2 * STALE_SECONDS)):
        (folder / name).mkdir()
        (folder / name / "users").touch()
        os.utime(folder / name, (now - age, now - age))
    files = Files()
    fd = files.open_shared(f"{folder}/used/users")
    files.lock(fd, alone=False)
    try:
        with host_share(inner, "runs/a/", Host(folder, 0), RANKS) as share:
            assert share is not None
    finally:
        files.close(fd)
    assert sorted(os.listdir(folder)) == ["new", "used"]


def test_ranks_come_and_go_at_any_time(folder: Path) -> None:
    """The last one out removes the folder while others come in: nobody works in one that is gone."""
    inner = Ranks(folder).inner
    wrong: list[str] = []

    def come_and_go(rank: int) -> None:
        for number in range(60):
            with host_share(inner, "runs/a/", Host(folder, rank), RANKS) as share:
                if share is None or not os.path.exists(f"{share._folder}/users"):
                    wrong.append(f"{rank} at {number}")

    threads = [Thread(target=come_and_go, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and os.listdir(folder) == []


# which leaves --------------------------------------------------------------------------------------------------------


def test_boxes_are_read_by_whom_they_belong_to(ranks: Ranks) -> None:
    """Each rank takes some rows of one leaf, and all of another."""
    storage, checkpoint = ranks.ranks[0]
    shared: list[int] = []
    get = HostShare.get
    leaf = ranks.state["w0"].nbytes

    def noted(self: HostShare, storage: Any, key: str, start: int, stop: int) -> memoryview:
        shared.append(stop - start)
        return get(self, storage, key, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostShare, "get", noted)
        opened = checkpoint._open()
        before = storage.read
        boxes = {"state/w0": {"state/w0": [Box((16, 0), (16, 1000))]}}
        built = opened.build_all(["state/w0", "state/w1"], like="numpy", boxes=boxes)
    assert np.array_equal(built["state/w1"], ranks.state["w1"])
    assert 0.7 * leaf < sum(shared) < 1.2 * leaf, "of the leaf that all want whole"
    assert storage.read - before < 1.6 * leaf


# processes -----------------------------------------------------------------------------------------------------------

RANK = """
import sys, everystep
sys.stdin.readline()
state = everystep.open("s3://bucket/p")["a"].latest.load()
print(float(sum(leaf.sum(dtype="float64") for leaf in state.values())))
"""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    with fake_s3() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield server


@pytest.mark.parametrize("killed", [False, True])
def test_processes_of_a_host(store: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    """Four of them, of which one may be killed while the store keeps it waiting: the others get along without it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    state = state_of(1)
    with everystep.open("s3://bucket/p", settings=SMALL).run("a").track(rng=False) as run:
        run.save(1, state=state).wait()
    packs = sorted((len(body), key) for key, (body, _) in store.objects.items() if "/packs/" in key)
    _, manifest = packs[0]
    store.requests.clear()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "LOCAL_WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    if killed:
        store.faults.append(Fault("GET", part="/packs/", stall=1.5, status=503))
    storage = everystep.open("s3://bucket/p")["a"]._vault.storage
    seam = Seam()
    monkeypatch.setattr(seam, "host_folder", lambda: f"{tmp_path}/everystep-{os.getuid()}")
    with host_share(storage, "runs/a/", seam, RANKS) as share:
        assert share is not None
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.close()
        if killed:
            while not any("/packs/" in path for method, path in store.requests if method == "GET"):
                time.sleep(0.01)
            processes[0].kill()
        said = [process.stdout.read() for process in processes if process.stdout is not None]
        codes = [process.wait() for process in processes]
    assert codes[1:] == [0] * (RANKS - 1)
    wanted = float(sum(leaf.sum(dtype="float64") for leaf in state.values()))
    assert all(float(one) == wanted for one in said[1:])
    asked = [path for method, path in store.requests if method == "GET" and "/packs/" in path]
    chunks = [path for path in asked if manifest.rpartition("/")[2] not in path.rpartition("/")[2]]
    once = len(packs) - 1
    if not killed:
        assert codes[0] == 0 and float(said[0]) == wanted
        assert once <= len(chunks) < 2 * once, "one look at each thing, in pieces of packs"
    assert not any((tmp_path / f"everystep-{os.getuid()}").iterdir())
