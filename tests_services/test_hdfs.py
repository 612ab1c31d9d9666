"""Checkpoints in a real HDFS: the conformance suite, kills, a DataNode that dies, racers, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hdfs_native
import numpy as np
import pytest
from _hdfs import Hdfs

import everystep
from everystep.errors import AlreadyExists, ObjectMissing, ReadOnly, StorageFull, Unreachable, UsageError
from everystep.seam import REAL
from everystep.storage import open_storage
from everystep.storage.hdfs import TEMPORARY, HdfsStorage

STEPS = 12
# Every step is computed from the one before; so the end shows whether each resume was exact.
TRAINER = f"""
import sys, numpy, everystep
state = {{"w": numpy.arange(200_000, dtype=numpy.float32), "frozen": numpy.ones(300_000, numpy.float32)}}
run = everystep.open(sys.argv[1]).run("a", keep=everystep.last(3)).track(model=(lambda: dict(state), state.update))
run.on_saved(lambda checkpoint: print(checkpoint.step, flush=True))
for step in run.steps({STEPS}, save_every=1):
    state["w"] = numpy.sqrt(state["w"] * state["w"] + step).astype(numpy.float32)
run.close()
"""


@pytest.fixture(scope="module")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hdfs]:
    server = Hdfs(tmp_path_factory.mktemp("hdfs"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADOOP_USER_NAME", "root")
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)


def state_of(step: int) -> dict[str, Any]:
    noise = np.random.default_rng(step).integers(0, 1 << 32, 12_000_000, np.uint32)
    return {"w": noise.view(np.float32), "count": step}


def await_upload(hdfs: Hdfs, folder: str) -> None:
    """Until a file is being written there that is not whole yet."""
    client = hdfs_native.Client(hdfs.url)
    until = time.monotonic() + 30
    while not any(TEMPORARY in status.path for status in client.list_status(folder, True)):
        assert time.monotonic() < until, "nothing is being written"


def test_it_does_all_that_is_needed(hdfs: Hdfs) -> None:
    report = everystep.check_storage(f"{hdfs.url}/conformance")
    assert report.failed == [] and report.left == ""
    assert list(hdfs_native.Client(hdfs.url).list_status("/conformance")) == []


def test_eight_racers_and_one_winner(hdfs: Hdfs) -> None:
    """Each with a client of its own, as so many machines would have."""
    storages = [HdfsStorage.open(f"127.0.0.1:{hdfs.port}/race", REAL, everystep.Settings()) for _ in range(8)]
    for number in range(5):
        outcomes: list[str] = []
        start = threading.Barrier(8)

        def race(at: int, key: str = f"log/{number}", start: Any = start, outcomes: list[str] = outcomes) -> None:
            start.wait()
            try:
                storages[at].put_new(key, b"racer %d" % at)
                outcomes.append("won")
            except AlreadyExists:
                outcomes.append("lost")

        threads = [threading.Thread(target=race, args=(at,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["lost"] * 7 + ["won"]
        assert bytes(storages[0].get(f"log/{number}")).startswith(b"racer ")


def train(url: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", TRAINER, url], stdout=subprocess.PIPE, text=True, env=os.environ)


def finished(url: str) -> bool:
    process = train(url)
    process.communicate(timeout=120)
    return process.returncode == 0


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(hdfs: Hdfs) -> None:
    assert finished(f"{hdfs.url}/alone")
    url, durable = f"{hdfs.url}/killed", 0
    kills = 0
    while durable < STEPS:
        process = train(url)
        assert process.stdout is not None
        for _ in range(2 + kills % 2):
            line = process.stdout.readline()
            durable = max(durable, int(line or 0))
        time.sleep(0.007 * (kills % 5))  # somewhere in the next save
        process.kill()
        rest, _ = process.communicate()
        durable = max([durable, *map(int, rest.split())])
        past = everystep.open(url)["a"]
        assert past.latest is not None and past.latest.step >= durable
        durable = past.latest.step
        kills += 1
    assert kills >= 3
    assert finished(url)
    ends = [everystep.open(f"{hdfs.url}/{name}")["a"].at(STEPS).load()["model"] for name in ("alone", "killed")]
    assert all(ends[0][name].tobytes() == ends[1][name].tobytes() for name in ("w", "frozen"))
    assert everystep.open(url).check().ok
    everystep.open(url)["a"].prune()


def test_a_pack_that_a_killed_writer_began_is_pruned(hdfs: Hdfs) -> None:
    url, client = f"{hdfs.url}/begun", hdfs_native.Client(hdfs.url)
    script = (
        "import sys, everystep; sys.path.insert(0, sys.argv[2]); from test_hdfs import state_of\n"
        "run = everystep.open(sys.argv[1]).run('a').track(rng=False)\n"
        "run.resume()\n"
        "for step in range(1, 1000): run.save(step, state=state_of(step)).wait()"
    )
    with everystep.open(url).run("a").track(rng=False) as run:
        run.save(0, state=state_of(0)).wait()
    process = subprocess.Popen([sys.executable, "-c", script, url, str(Path(__file__).parent)])
    try:
        await_upload(hdfs, "/begun/runs/a/packs")
    finally:
        process.kill()
        process.wait()

    def begun() -> list[str]:
        found = client.list_status("/begun/runs/a/packs", True)
        return [status.path for status in found if TEMPORARY in status.path]

    assert begun()
    past = everystep.open(url)["a"]
    past.prune()
    assert begun(), "for all that its log says it may still be written"
    with everystep.open(url).run("a").track(rng=False) as run:
        run.resume()
        run.save(10_000, state=state_of(1)).wait()
    past.prune()
    assert not begun() and past.latest is not None and past.latest.step == 10_000 and everystep.open(url).check().ok


def test_a_datanode_that_dies_in_a_save_and_comes_back(hdfs: Hdfs) -> None:
    repo = everystep.open(f"{hdfs.url}/outage")
    with repo.run("a") as run:
        run.save(1, state=state_of(1)).wait()
        saved = run.save(2, state=state_of(2))
        await_upload(hdfs, "/outage")
        hdfs.kill_datanode()
        time.sleep(1)
        assert not saved.done, "there is no DataNode"
        hdfs.datanodes[0] = hdfs.start_datanode()
        saved.wait(60)
        run.save(3, state=state_of(3)).wait(60)
    past = everystep.open(f"{hdfs.url}/outage")["a"]
    assert [checkpoint.step for checkpoint in past.checkpoints()] == [1, 2, 3]
    assert all(past.at(step).load()["w"].tobytes() == state_of(step)["w"].tobytes() for step in (1, 2, 3))
    assert repo.check().ok


def test_a_store_that_stays_away_is_said(hdfs: Hdfs) -> None:
    settings = everystep.Settings(outage_seconds=0.5, request_seconds=2)
    nobody = open_storage("hdfs://127.0.0.1:9/x", REAL, settings)
    with pytest.raises(Unreachable) as caught:
        nobody.get("key")
    assert "NameNode" in caught.value.do


def test_a_namenode_that_is_silent_is_given_up(hdfs: Hdfs) -> None:
    """It takes the call and never answers: the library itself would wait for ever."""
    settings = everystep.Settings(outage_seconds=0.2, request_seconds=1)
    storage = open_storage(f"{hdfs.url}/silent", REAL, settings)
    storage.put_new("a", b"a")
    pid = hdfs.namenode._process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unreachable, match="not answered"):
            storage.stat("a")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert storage.stat("a").nbytes == 1


def test_a_name_service_of_the_configuration(hdfs: Hdfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "dfs.nameservices": "ours", "dfs.ha.namenodes.ours": "one",
        "dfs.namenode.rpc-address.ours.one": f"127.0.0.1:{hdfs.port}",
    }  # fmt: skip
    rows = "".join(f"<property><name>{name}</name><value>{value}</value></property>" for name, value in values.items())
    (tmp_path / "hdfs-site.xml").write_text(f"<configuration>{rows}</configuration>")
    (tmp_path / "core-site.xml").write_text("<configuration></configuration>")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    with everystep.open("hdfs://ours/by-name").run("a") as run:
        run.save(1, state={"count": 1}).wait()
    monkeypatch.delenv("HADOOP_CONF_DIR")
    assert everystep.open(f"{hdfs.url}/by-name")["a"].at(1).load()["count"] == 1


def test_who_may_not_write_is_told(hdfs: Hdfs, monkeypatch: pytest.MonkeyPatch) -> None:
    open_storage(f"{hdfs.url}/theirs", REAL).put_new("a", b"a")
    monkeypatch.setenv("HADOOP_USER_NAME", "eve")
    as_eve = open_storage(f"{hdfs.url}/theirs", REAL)
    assert bytes(as_eve.get("a")) == b"a"
    with pytest.raises(ReadOnly) as caught:
        as_eve.put_new("b", b"b")
    assert "eve" in caught.value.what and "HADOOP_USER_NAME" in caught.value.do
    with pytest.raises(ReadOnly):
        as_eve.delete("a")


def test_a_refused_write_ends_with_its_own_exit_code(hdfs: Hdfs) -> None:
    """A call that nobody waits for, such as the removal of a temporary file, may not abort the process at its end."""
    with everystep.open(f"{hdfs.url}/ends").run("a").track(rng=False) as run:
        run.save(1, state={"w": np.ones(10)})
    command = [sys.executable, "-m", "everystep", "-r", f"{hdfs.url}/ends", "tag", "a@1", "mine"]
    as_eve = {**os.environ, "HADOOP_USER_NAME": "eve"}
    for _ in range(8):  # of those without the wait about two in five were aborted
        done = subprocess.run(command, env=as_eve, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr[:24]) == (ReadOnly.exit_code, "error: cannot write here"), done.stderr


def test_a_quota_is_a_full_place(hdfs: Hdfs) -> None:
    storage = open_storage(f"{hdfs.url}/small", REAL)
    storage.put_new("a", b"a")
    hdfs.admin("-setSpaceQuota", "1m", "/small")
    with pytest.raises(StorageFull) as caught:
        storage.put("b", [bytes(2 << 20)])
    assert "quota" in caught.value.what
    hdfs.admin("-clrSpaceQuota", "/small")
    storage.put("b", [bytes(2 << 20)])
    hdfs.admin("-setQuota", "3", "/small")
    with pytest.raises(StorageFull):
        storage.put_new("c", b"c")


def test_safe_mode_is_waited_for(hdfs: Hdfs) -> None:
    storage = open_storage(f"{hdfs.url}/safe", REAL, everystep.Settings(outage_seconds=0.5))
    storage.put_new("a", b"a")
    hdfs.admin("-safemode", "enter")
    try:
        assert bytes(storage.get("a")) == b"a"
        with pytest.raises(Unreachable, match="safe mode"):
            storage.put_new("b", b"b")
        waiting = open_storage(f"{hdfs.url}/safe", REAL, everystep.Settings(outage_seconds=60))
        thread = threading.Thread(target=waiting.put_new, args=("c", b"c"))
        thread.start()
    finally:
        hdfs.admin("-safemode", "leave")
    thread.join(30)
    assert bytes(storage.get("c")) == b"c"
    with pytest.raises(ObjectMissing):
        storage.get("b")


def test_nothing_is_left_beside_the_objects(hdfs: Hdfs) -> None:
    """Temporary files of what was refused go as well; nobody waits for that."""
    storage = open_storage(f"{hdfs.url}/tidy", REAL)
    storage.put_new("log/0", b"first")
    with pytest.raises(AlreadyExists):
        storage.put_new("log/0", b"second")
    storage.put("packs/0", [bytes(10)])
    storage.put("packs/0", [bytes(10)])  # an attempt whose answer was lost, made again
    client = hdfs_native.Client(hdfs.url)
    until = time.monotonic() + 10
    while True:
        names = [status.path for status in client.list_status("/tidy", True) if not status.isdir]
        if not any(TEMPORARY in name for name in names) or time.monotonic() > until:
            break
        time.sleep(0.05)
    assert sorted(names) == ["/tidy/log/0", "/tidy/packs/0"]


@pytest.mark.parametrize("url", ["hdfs://eve:pw-of-eve@host/x", "hdfs://host", "hdfs://ho st/x", "hdfs://host/a/../b"])
def test_what_is_no_place(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        everystep.open(url)
    assert "pw-of-eve" not in str(caught.value)


def test_a_forked_process_is_refused(hdfs: Hdfs) -> None:
    """The library's threads did not come along: a call would wait for ever."""
    storage = open_storage(f"{hdfs.url}/forked", REAL)
    storage.put_new("a", b"a")
    child = os.fork()
    if child == 0:
        try:
            storage.get("a")
        except UsageError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
