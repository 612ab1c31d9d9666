"""Real object stores: Ceph's gateway, moto, Azurite. The verbs, saves and loads, kills, outages, lost replies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _ceph import Ceph
from _proxy import proxy
from _server import Place

import everystep
from everystep.errors import AlreadyExists, Damaged, Error, ObjectMissing, ReadOnly, RunTakenOver, StorageError
from everystep.seam import REAL, Process, Seam
from everystep.settings import DEFAULT, Settings
from everystep.storage import open_storage
from everystep.storage.cloud import CloudStorage
from everystep.storage.conformance import check
from everystep.vault.once import put_once

TRAINER = Path(__file__).parent / "_trainer.py"
NAMES = ["plain", "a%20b%2Fc", "with space", "é-日本", "a+b&c=d", "dots..inside", "~tilde'quote(1)", "x" * 200]


# the verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "some prefix/ü"])
def test_the_verbs(cloud: Place, prefix: str) -> None:
    storage = open_storage(cloud.new(prefix), REAL)
    body = np.random.default_rng(0).bytes(3_000_000)
    storage.put("x", [body[:100], memoryview(body)[100:2_000_000], np.frombuffer(body, np.uint8)[2_000_000:]])
    storage.put("empty", [])
    assert bytes(storage.get("x")) == body and bytes(storage.get("x", 5, 1_999_999)) == body[5:1_999_999]
    assert bytes(storage.get("x", 2_999_990)) == body[-10:] and bytes(storage.get("empty")) == b""
    assert bytes(storage.get("x", 3_000_000)) == bytes(storage.get("x", 7, 7)) == b""
    for start, stop in [(0, 3_000_001), (2_999_999, 3_000_001), (3_000_000, 3_000_001), (4_000_000, 5_000_000)]:
        with pytest.raises(Damaged, match="ends"):
            storage.get("x", start, stop)
    found = storage.stat("x")
    assert found.nbytes == 3_000_000 and abs(found.time - time.time()) < 300
    assert storage.stat("empty").nbytes == 0
    storage.put_new("new", b"first")
    with pytest.raises(AlreadyExists):
        storage.put_new("new", b"second")
    with pytest.raises(AlreadyExists):
        storage.put_new("new", b"first")
    assert bytes(storage.get("new")) == b"first"
    for verb in (storage.get, storage.stat):
        with pytest.raises(ObjectMissing):
            verb("missing")
    storage.delete("x")
    storage.delete("x")
    assert list(storage.list("")) == ["empty", "new"]


def test_names(cloud: Place) -> None:
    storage = open_storage(cloud.new("pre fix"), REAL)
    for name in NAMES:
        storage.put_new(f"runs/{name}/log/{name}", name.encode())
    assert list(storage.list("runs/", deep=False)) == sorted(f"runs/{name}/" for name in NAMES)
    assert list(storage.list("")) == sorted(f"runs/{name}/log/{name}" for name in NAMES)
    for name in NAMES:
        assert bytes(storage.get(f"runs/{name}/log/{name}")) == name.encode()
        assert list(storage.list(f"runs/{name}/")) == [f"runs/{name}/log/{name}"]
        storage.delete(f"runs/{name}/log/{name}")
    assert list(storage.list("")) == []


def test_long_listings(cloud: Place) -> None:
    """More than the thousand that one answer holds."""
    storage = open_storage(cloud.new("p"), REAL)
    keys = [f"runs/r/log/{slot:020d}" for slot in range(1100)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: storage.put(key, [b"."]), keys))
    assert list(storage.list("runs/")) == list(storage.list("runs/r/log/", deep=False)) == keys
    assert list(storage.list("runs/r/log/", deep=False, after=keys[1050])) == keys[1051:]
    assert list(storage.list("runs/r/log/", after=keys[-1])) == []


def test_a_large_object_goes_in_one_request_or_in_parts(cloud: Place) -> None:
    storage = open_storage(cloud.new(), REAL)
    for mib in (64, 70):
        pieces = [np.full(1 << 20, number, np.uint8) for number in range(mib)]
        storage.put(f"large{mib}", pieces)
        assert storage.stat(f"large{mib}").nbytes == mib << 20
        for number in (0, 31, mib - 1):
            found = np.asarray(storage.get(f"large{mib}", number << 20, number + 1 << 20))
            assert found.nbytes == 1 << 20 and (found == number).all()


def test_of_sixteen_one_wins(cloud: Place) -> None:
    storage = open_storage(cloud.new(), REAL)
    with ThreadPoolExecutor(16) as threads:
        for round in range(5):
            gate = threading.Barrier(16)

            def race(number: int, key: str = f"log/{round}", gate: threading.Barrier = gate) -> bool:
                gate.wait()
                return put_once(storage, key, b"%d" % number, REAL, DEFAULT)

            won = [number for number, first in enumerate(threads.map(race, range(16))) if first]
            assert [b"%d" % number for number in won] == [bytes(storage.get(f"log/{round}"))]


def test_everything_that_is_needed_of_a_store(cloud: Place) -> None:
    storage = open_storage(cloud.new("check"), REAL)
    report = check(storage)
    assert [(one.name, one.found) for one in report.failed] == [] and report.left == ""
    assert list(storage.list("")) == []


# what is wrong -------------------------------------------------------------------------------------------------------


def words(error: BaseException, place: Place) -> str:
    text = f"{error!s} {error!r}"
    assert all(secret not in text for secret in place.secrets)
    return text


def test_there_is_no_bucket(cloud: Place) -> None:
    url = f"{cloud.scheme}://never-made-{os.getpid()}/p"
    storage = CloudStorage.open(cloud.scheme, url.partition("://")[2], REAL, DEFAULT)
    for call in (
        lambda: storage.get("x"), lambda: storage.put("x", [b"."]), lambda: storage.put_new("x", b"."),
        lambda: list(storage.list("")), lambda: list(storage.list("", deep=False)), lambda: everystep.open(url).exists,
    ):  # fmt: skip
        with pytest.raises(StorageError) as caught:
            call()
        assert "there is no bucket" in words(caught.value, cloud)


def test_credentials_that_nobody_knows(on_ceph: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = on_ceph.new()
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "planted-nonsense")
            with pytest.raises(StorageError, match="does not accept the credentials") as caught:
                everystep.open(url).exists  # noqa: B018
            assert "planted-nonsense" not in words(caught.value, on_ceph)
            assert "AWS_ACCESS_KEY_ID" in caught.value.do


def test_another_users_bucket(ceph: Ceph, on_ceph: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = on_ceph.new()
    key, secret = ceph.new_user(f"stranger-{os.getpid()}")
    for name, value in ceph.environment(key, secret).items():
        monkeypatch.setenv(name, value)
    storage = open_storage(url, REAL)
    with pytest.raises(ReadOnly, match="does not let this process write"):
        storage.put("x", [b"."])
    with pytest.raises(StorageError, match="does not let this process read") as caught:
        storage.get("x")
    assert secret not in str(caught.value)


def test_a_quota_that_is_used_up(ceph: Ceph, on_ceph: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"small-{os.getpid()}"
    key, secret = ceph.new_user(name)
    for variable, value in ceph.environment(key, secret).items():
        monkeypatch.setenv(variable, value)
    bucket = f"quota-{os.getpid()}"
    ceph.client(key, secret).create_bucket(Bucket=bucket)
    ceph.admin("quota", "set", "--quota-scope=bucket", f"--uid={name}", "--max-objects=3")
    ceph.admin("quota", "enable", "--quota-scope=bucket", f"--uid={name}")
    storage = open_storage(f"s3://{bucket}", REAL)
    with pytest.raises(everystep.StorageFull, match="QuotaExceeded"):
        for number in range(10):
            storage.put(f"x{number}", [bytes(1000)])
            storage.put_new(f"y{number}", bytes(1000))


# saves and loads -----------------------------------------------------------------------------------------------------


def state_of(step: int) -> dict[str, Any]:
    chance = np.random.default_rng(step)
    return {
        "weights": chance.normal(size=700_000).astype(np.float32),
        "slow": np.arange(500_000, dtype=np.int32) + step // 2,
        "optimizer": {"momentum": chance.normal(size=700_000).astype(np.float32), "step": step},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_a_run(cloud: Place) -> None:
    url = cloud.new("runs")
    settings = Settings(pack_bytes_max=1 << 20, chunk_bytes_max=512 << 10)
    with everystep.open(url, settings=settings).run("a run", keep=everystep.last(3)) as run:
        run.track(rng=False)
        for step in range(1, 6):
            run.save(step, state=state_of(step), metrics={"loss": 1 / step}).wait()
    repo = everystep.open(url)
    past = repo["a run"]
    past.best("loss").tag("best")
    assert [one.step for one in past.checkpoints()] == [3, 4, 5]
    for step in (3, 4, 5):
        assert same(past.at(step).load(), state_of(step))
    assert past.at(4).load(only="slow").tobytes() == state_of(4)["slow"].tobytes()
    assert repo.check().ok
    with repo.run("a run") as run:
        assert run.track(rng=False).resume() == 5
        run.save(6, state=state_of(6)).wait()
    assert past.latest is not None and past.latest.step == 6


def train(url: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(TRAINER), url, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith("end ")
    return out.splitlines()[-1]


def packs(url: str) -> set[str]:
    return {key for key in open_storage(url, REAL).list("runs/") if "/packs/" in key}


def test_killed_in_mid_save_it_ends_with_the_same_bits(on_ceph: Place, tmp_path: Path) -> None:
    """SIGKILL at random moments, and once a pack of a save is there that no record names yet."""
    straight = end_of(train(str(tmp_path / "straight"), "r", 90, 3, 4))
    url, chance, kills = on_ceph.new("killed"), random.Random(0), 0
    while kills < 6:
        process, before = train(url, "r", 90, 3, 4), packs(url)
        assert process.stdout is not None
        if kills % 2:
            for line in process.stdout:
                if int(line.split()[1]) % 3 == 0:
                    break
            while process.poll() is None and packs(url) == before:
                pass
        else:
            process.stdout.readline()
            time.sleep(chance.random() * 0.25)
        process.kill()
        process.communicate()
        kills += 1
        checkpoint = everystep.open(url)["r"].latest if everystep.open(url).runs() else None
        assert checkpoint is None or checkpoint.load()["model"]["leaf0"].size
    assert end_of(train(url, "r", 90, 3, 4)) == straight
    repo = everystep.open(url)
    assert repo.check().ok and [one.step for one in repo["r"].checkpoints()] == list(range(3, 91, 3))


@pytest.mark.parametrize("moment", ["packs", "record"])
def test_the_gateway_dies_in_mid_save(ceph: Ceph, on_ceph: Place, moment: str) -> None:
    """SIGKILL of the gateway: training goes on, and the save ends well once it is back. Nothing is there twice."""
    url = on_ceph.new("runs")
    settings = Settings(pack_bytes_max=1 << 20, chunk_bytes_max=256 << 10, outage_seconds=120)
    with everystep.open(url, settings=settings).run("r").track(rng=False) as run:
        run.save(1, state=state_of(1)).wait()
        inner = run._vault.storage.inner
        assert isinstance(inner, CloudStorage)
        killed = threading.Event()
        verb = "put" if moment == "packs" else "put_new"
        real = getattr(inner, verb)

        def once(key: str, data: Any) -> None:
            if not killed.is_set() and ("/packs/" in key or "/log/" in key):
                killed.set()
                ceph.kill_gateway()
            real(key, data)

        setattr(inner, verb, once)
        saved = run.save(2, state=state_of(2))
        assert killed.wait(60)
        time.sleep(0.3)
        assert not saved.done
        ceph.start_gateway()
        assert saved.wait(120).step == 2
        run.save(3, state=state_of(3)).wait()
    repo = everystep.open(url)
    assert [one.step for one in repo["r"].checkpoints()] == [1, 2, 3] and repo.check().ok
    assert all(same(repo["r"].at(step).load(), state_of(step)) for step in (1, 2, 3))


def test_processes_that_just_end(on_ceph: Place) -> None:
    """Without close: all is durable, no thread of the library's brings the interpreter down."""
    url = on_ceph.new("runs")
    script = (
        "import sys, numpy as np, everystep\n"
        "run = everystep.open(sys.argv[1]).run('r').track(rng=False)\n"
        "first = run.resume()\n"
        "for step in range(first + 1, first + 3): run.save(step, state={'w': np.full(500_000, step)})\n"
    )
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    assert [one.step for one in everystep.open(url)["r"].checkpoints()] == list(range(1, 11))


# two jobs, and replies that get lost ---------------------------------------------------------------------------------


class Job(Seam):
    """One of two jobs, each a process of its own to all that asks."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def process(self) -> Process:
        return replace(super().process(), started=f"{super().process().started}-{self._number}")

    def is_gone(self, other: Process) -> bool:
        return False


def test_two_jobs_and_lost_replies(ceph: Ceph, on_ceph: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job is fenced at its next save, its tags and its retirements too; no checkpoint holds parts of both."""
    url, chance = on_ceph.new("runs"), random.Random(1)
    tries = int(os.environ.get("EVERYSTEP_TRIES", "20"))

    def loses(head: bytes) -> bool:
        return head.startswith(b"PUT ") and chance.random() < 0.25

    settings = Settings(retry_seconds=0.002, put_attempts=20)
    mixed = fenced = 0
    with proxy(ceph.port, loses) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{between.port}")
        for number in range(tries):
            first, second = (
                everystep.open(url, settings=settings, seam=Job(job))
                .run(f"r{number}", takeover=True, keep=everystep.last(5))
                .track(rng=False)
                for job in range(2)
            )
            one = first.save(1, state={"who": np.full(1000, 1)}).wait()
            assert second.resume() == 1
            saves = [job.save(2, state={"who": np.full(1000, n)}) for n, job in ((1, first), (2, second))]
            with pytest.raises(RunTakenOver):
                saves[0].wait()
            saves[1].wait()
            with pytest.raises(RunTakenOver):  # what it would retire by its rule goes the same way
                first.save(3, state={"who": np.full(1000, 1)}).wait()
            for change in (lambda: one.tag("mine"), lambda: first.forget(everystep.last(1), force=True)):  # noqa: B023
                with pytest.raises(RunTakenOver):
                    change()
            fenced += 1
            second.close()
            with pytest.raises(Error):
                first.close()
            left = everystep.open(url)[f"r{number}"]
            found = [(each.step, set(each.load()["who"])) for each in left.checkpoints()]
            mixed += found != [(1, {1}), (2, {2})] or bool(left.tags)
        assert between.lost >= tries
    assert (mixed, fenced) == (0, tries)
