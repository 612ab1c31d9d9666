"""Object stores: the six verbs, what is asked again and what is not, and saves and loads that use many requests."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
from _fake_s3 import FakeS3, Fault, fake_s3

import everystep
from everystep.errors import (
    AlreadyExists,
    Damaged,
    ObjectMissing,
    StorageError,
    UnknownOutcome,
    Unreachable,
    UsageError,
)
from everystep.seam import Seam
from everystep.settings import DEFAULT, Settings
from everystep.storage import cloud, open_storage
from everystep.storage.cloud import CloudStorage
from everystep.storage.retrying import FIRST_SECONDS_MAX, PAUSE_SECONDS_MAX, RetryingStorage
from everystep.vault.once import put_once

QUICK = Settings(retry_seconds=0.001, outage_seconds=5, request_seconds=5)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    with fake_s3() as server:
        environment = {
            "AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret", "STORAGE_EMULATOR_HOST": server.endpoint,
        }  # fmt: skip
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield server


def opened(url: str = "s3://bucket/a prefix", settings: Settings = QUICK, seam: Seam | None = None) -> Any:
    return open_storage(url, seam or Seam(), settings)


def bare(url: str = "bucket/a prefix", settings: Settings = QUICK) -> CloudStorage:
    """Without the repeating."""
    return CloudStorage.open("s3", url, Seam(), settings)


def read(storage: Any, *span: Any) -> bytes:
    return bytes(storage.get(*span))


# the verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://bucket/a prefix", "s3://bucket", "gs://bucket/runs", "gs://bucket"])
def test_what_is_put_is_there(fake: FakeS3, url: str) -> None:
    storage = opened(url)
    body = np.arange(1000, dtype=np.int16)
    storage.put("runs/a%20b/x", [b"head", body, memoryview(b"tail")])
    whole = b"head" + body.tobytes() + b"tail"
    assert read(storage, "runs/a%20b/x") == whole
    assert read(storage, "runs/a%20b/x", 2, 9) == whole[2:9] and read(storage, "runs/a%20b/x", 1990) == whole[1990:]
    found = storage.stat("runs/a%20b/x")
    assert found.nbytes == len(whole) and abs(found.time - time.time()) < 60
    assert fake.keys() == [f"{url.partition('://')[2]}/runs/a%20b/x"]
    storage.delete("runs/a%20b/x")
    storage.delete("runs/a%20b/x")
    with pytest.raises(ObjectMissing, match="no such object"):
        storage.get("runs/a%20b/x")
    with pytest.raises(ObjectMissing):
        storage.stat("runs/a%20b/x")


@pytest.mark.parametrize("url", ["s3://bucket/p", "gs://bucket/p"])
def test_a_key_is_created_once(fake: FakeS3, url: str) -> None:
    storage = opened(url)
    storage.put_new("log/0", b"first")
    with pytest.raises(AlreadyExists):
        storage.put_new("log/0", b"second")
    assert read(storage, "log/0") == b"first"


def test_an_end_behind_the_object_is_damage(fake: FakeS3) -> None:
    storage = opened()
    storage.put("x", [b"0123456789"])
    storage.put("empty", [])
    for span in [(0, 11), (5, 20), (10, 11), (12, 20), (20, 20)]:
        with pytest.raises(Damaged, match="ends") as caught:
            storage.get("x", *span)
        assert caught.value.where == "s3://bucket/a prefix/x"
    assert read(storage, "x", 10) == read(storage, "x", 10, 10) == read(storage, "x", 3, 3) == b""
    assert read(storage, "x", 0, 10) == b"0123456789"
    assert read(storage, "empty") == read(storage, "empty", 0, 0) == b"" and storage.stat("empty").nbytes == 0
    with pytest.raises(ObjectMissing):
        storage.get("missing", 3, 3)


def test_a_range_is_one_request(fake: FakeS3) -> None:
    storage = opened()
    storage.put("x", [b"0123456789"])
    fake.requests.clear()
    storage.get("x", 2, 5)
    storage.get("x")
    assert [method for method, _ in fake.requests] == ["GET", "GET"]


@pytest.mark.parametrize("url", ["s3://bucket/a prefix", "s3://bucket", "gs://bucket/p"])
def test_listings(fake: FakeS3, url: str) -> None:
    storage = opened(url)
    other = opened(f"{url}-beside")
    other.put("runs/other", [b""])
    logs = [f"runs/r/log/{slot:020d}" for slot in range(25)]
    packs = [f"runs/r/packs/w{writer}-1/{number}" for writer in range(3) for number in range(5)]
    for key in [*logs, *packs, "format.json", "runs/r-2/log/0"]:
        storage.put(key, [b"."])
    assert list(storage.list("")) == sorted([*logs, *packs, "format.json", "runs/r-2/log/0"])
    assert list(storage.list("", deep=False)) == ["format.json", "runs/"]
    assert list(storage.list("runs/", deep=False)) == ["runs/r-2/", "runs/r/"]
    assert list(storage.list("runs/r/packs/", deep=False)) == [f"runs/r/packs/w{writer}-1/" for writer in range(3)]
    assert list(storage.list("runs/r/log/", deep=False)) == logs
    assert list(storage.list("nothing/")) == list(storage.list("nothing/", deep=False)) == []
    fake.requests.clear()
    assert list(storage.list("runs/r/log/", deep=False, after=logs[21])) == logs[22:]
    assert len(fake.requests) == 1, "a listing that begins behind a key reads no page before it"
    assert list(storage.list("runs/r/packs/", after=packs[7])) == packs[8:]
    assert list(storage.list("runs/r/packs/", deep=False, after="runs/r/packs/w1-1/")) == [
        "runs/r/packs/w1-1/", "runs/r/packs/w2-1/",
    ]  # fmt: skip


@pytest.mark.parametrize("url", ["memory://listed after", "{folder}"])
def test_other_places_list_from_a_key_on_too(tmp_path: Any, url: str) -> None:
    storage = opened(url.format(folder=tmp_path))
    logs = [f"runs/r/log/{slot:020d}" for slot in range(5)]
    for key in [*logs, "runs/r/packs/w/0"]:
        storage.put_new(key, b".")
    assert list(storage.list("runs/r/log/", deep=False, after=logs[2])) == logs[3:]
    assert list(storage.list("", after=logs[3])) == [logs[4], "runs/r/packs/w/0"]
    assert storage.fan_out == 1


@pytest.mark.parametrize("key", ["../x", "a//b", "/a", ".", "a/", "a\nb"])
def test_what_is_no_key(fake: FakeS3, key: str) -> None:
    with pytest.raises(StorageError, match="not a key"):
        opened().put(key, [b""])
    assert fake.keys() == []


# long uploads --------------------------------------------------------------------------------------------------------


def test_what_is_too_long_for_one_request_goes_in_parts(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "PUT_BYTES_MAX", 100_000)
    monkeypatch.setattr(cloud, "PART_BYTES", 5 << 20)
    body = np.random.default_rng(0).bytes(12 << 20)
    fake.faults.append(Fault("PUT", 500, part="partNumber=2"))
    bare().put("long", (body[at : at + 70_001] for at in range(0, len(body), 70_001)))
    assert read(opened(), "long") == body and not fake.uploads
    assert sum("partNumber" in path for _, path in fake.requests) == 4, "three parts, and one of them twice"


def test_an_upload_whose_pieces_fail_leaves_nothing(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "PUT_BYTES_MAX", 100_000)

    def pieces() -> Iterator[bytes]:
        for _ in range(400):
            yield bytes(70_001)
        raise KeyError("the encoder failed")

    with pytest.raises(KeyError, match="the encoder failed"):
        opened().put("long", pieces())
    assert fake.keys() == [] and not fake.uploads


# asked again ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 503, "code": "SlowDown"}, {"status": 500}, {"status": 429}, {}])
def test_what_a_store_loses_is_asked_for_again(fake: FakeS3, fault: dict[str, Any]) -> None:
    storage = opened()
    storage.put("x", [b"old"])
    for method in ("GET", "PUT", "HEAD", "DELETE"):
        fake.faults += [Fault(method, **fault), Fault(method, **fault)]
    storage.put("y", [b"new"])
    assert read(storage, "x") == b"old" and storage.stat("x").nbytes == 3
    storage.delete("x")
    assert fake.keys() == ["bucket/a prefix/y"] and not fake.faults


def test_a_listing_goes_on_where_it_was_broken_off(fake: FakeS3) -> None:
    storage = opened()
    keys = [f"log/{number:03d}" for number in range(35)]
    for key in keys:
        storage.put(key, [b"."])
    for token in ("009", "019", "019"):
        fake.faults.append(Fault("GET", 503, "SlowDown", part=f"continuation-token=a%20prefix%2Flog%2F{token}"))
    assert list(storage.list("log/")) == keys


def test_it_is_not_asked_for_ever(fake: FakeS3) -> None:
    storage = opened(settings=Settings(retry_seconds=0.001, outage_seconds=0.2))
    fake.faults += [Fault("GET", 503, "SlowDown") for _ in range(10_000)]
    with pytest.raises(Unreachable, match=r"too busy: 503 SlowDown \(asked \d+ times, for 0 s\)"):
        storage.get("x")


def test_pauses_are_random_grow_and_end() -> None:
    class Slow(Seam):
        def __init__(self) -> None:
            super().__init__()
            self.pauses: list[float] = []

        def monotonic(self) -> float:
            return sum(self.pauses)

        def sleep(self, seconds: float) -> None:
            self.pauses.append(seconds)

    class Down:
        url, fan_out = "down://", 1

        def stat(self, key: str) -> Any:
            raise Unreachable("down", where=key)

        def put_new(self, key: str, data: bytes) -> None:
            raise AlreadyExists("taken", where=key)

    many = []
    for _ in range(20):
        seam = Slow()
        storage = RetryingStorage(Down(), seam, DEFAULT)
        with pytest.raises(Unreachable, match=r"down \(asked \d+ times, for 15 s\)"):  # it never answered
            storage.stat("x")
        assert abs(sum(seam.pauses) - FIRST_SECONDS_MAX) < 1e-6
        seam.pauses.clear()
        with pytest.raises(AlreadyExists):
            storage.put_new("x", b"")
        with pytest.raises(Unreachable, match=r"down \(asked \d+ times, for 120 s\)"):
            storage.stat("x")
        assert abs(sum(seam.pauses) - DEFAULT.outage_seconds) < 1e-6
        assert all(pause <= min(DEFAULT.retry_seconds * 2**n, PAUSE_SECONDS_MAX) for n, pause in enumerate(seam.pauses))
        many.append(seam.pauses)
    assert len({tuple(pauses) for pauses in many}) == 20
    assert max(map(max, many)) > PAUSE_SECONDS_MAX / 2


def test_a_stalled_answer_is_given_up(fake: FakeS3) -> None:
    storage = opened(settings=Settings(retry_seconds=0.001, outage_seconds=5, request_seconds=0.2))
    storage.put("x", [b"body"])
    fake.faults.append(Fault("GET", 500, stall=2))
    assert read(storage, "x") == b"body" and fake.count("GET") == 2


def test_nobody_is_there(fake: FakeS3) -> None:
    storage = CloudStorage.open("s3", "bucket?endpoint=http://127.0.0.1:1", Seam(), QUICK)
    for call in (lambda: storage.get("x"), lambda: storage.put_new("x", b""), lambda: list(storage.list(""))):
        with pytest.raises(Unreachable, match=r"no connection to http://127\.0\.0\.1:1"):
            call()


# create-only puts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("status", [0, 500, 502, 504])
def test_a_lost_reply_to_a_create_is_an_unknown_outcome(fake: FakeS3, applied: bool, status: int) -> None:
    storage = opened()
    fake.faults.append(Fault("PUT", status, applied=applied))
    with pytest.raises(UnknownOutcome):
        storage.put_new("log/0", b"mine")
    assert fake.count("PUT") == 1, "who asked finds out, not the storage"
    assert (fake.keys() == ["bucket/a prefix/log/0"]) is applied
    assert put_once(storage, "log/0", b"mine", Seam(), QUICK)
    assert not put_once(storage, "log/0", b"another", Seam(), QUICK)
    assert read(storage, "log/0") == b"mine"


def test_a_conflict_is_not_a_key_that_is_taken(fake: FakeS3) -> None:
    storage = opened()
    fake.faults.append(Fault("PUT", 409, "ConditionalRequestConflict"))
    with pytest.raises(UnknownOutcome, match="under way"):
        storage.put_new("log/0", b"mine")
    fake.faults.append(Fault("PUT", 409, "ConditionalRequestConflict"))
    assert put_once(storage, "log/0", b"mine", Seam(), QUICK)


def test_a_create_that_was_surely_refused_is_asked_again(fake: FakeS3) -> None:
    fake.faults += [Fault("PUT", 503, "SlowDown"), Fault("PUT", 429)]
    opened().put_new("log/0", b"mine")
    assert fake.keys() == ["bucket/a prefix/log/0"] and fake.count("PUT") == 3


def test_what_is_long_is_created_over_a_slow_line_too(fake: FakeS3) -> None:
    """While a body goes out the store says nothing: that is not the silence of `request_seconds`."""
    storage = opened(settings=Settings(retry_seconds=0.001, outage_seconds=5, request_seconds=0.2))
    fake.faults += [Fault("PUT", stall=0.6, status=200, applied=True, headers={"ETag": '"1"'})]
    storage.put_new("volume", bytes(2 << 20))
    assert fake.count("PUT") == 1 and storage.stat("volume").nbytes == 2 << 20


def test_of_sixteen_one_wins(fake: FakeS3) -> None:
    storage = opened()
    won: list[int] = []
    gate = threading.Barrier(16)

    def race(number: int) -> None:
        gate.wait()
        if put_once(storage, "log/0", b"%d" % number, Seam(), QUICK):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [read(storage, "log/0")]


# saves and loads -----------------------------------------------------------------------------------------------------


def state_of(step: int, leaves: int = 6, nbytes: int = 300_000) -> dict[str, Any]:
    random = np.random.default_rng(step)
    return {f"leaf{number}": np.frombuffer(random.bytes(nbytes), np.uint8) for number in range(leaves)} | {"step": step}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_in_an_object_store(fake: FakeS3) -> None:
    repo = everystep.open("s3://bucket/runs here", settings=QUICK)
    assert repo.url == "s3://bucket/runs here" and not repo.exists
    with repo.run("a run") as run:
        run.save(1, state=state_of(1), metrics={"loss": 1.0}).wait()
        fake.faults += [Fault("PUT", 500), Fault("PUT", 0, applied=True), Fault("PUT", 503, "SlowDown")]
        run.save(2, state=state_of(2)).wait()
    again = everystep.open("s3://bucket/runs here", settings=QUICK)
    assert again.runs() == ["a run"] and [one.step for one in again["a run"].checkpoints()] == [1, 2]
    fake.faults += [Fault("GET", 500, part="packs"), Fault("GET", 0, part="packs")]
    assert same(again["a run"].at(1).load(), state_of(1)) and same(again["a run"].at(2).load(), state_of(2))
    assert again.check().ok and not fake.faults


def test_packs_go_out_side_by_side(fake: FakeS3) -> None:
    """A store that answers an upload only when three are there."""
    gate, packs = threading.Barrier(3), count()

    def wait(method: str, path: str) -> None:
        if method == "PUT" and "/packs/" in path and next(packs) < 6:
            gate.wait(30)

    settings = Settings(pack_bytes_max=500_000, chunk_bytes_max=250_000, small_leaf_bytes=4096, uploads=3, workers=2)
    with everystep.open("s3://bucket", settings=settings).run("r").track(rng=False) as run:
        run.resume()
        fake.before = wait
        run.save(1, state=state_of(1, 6, 400_000)).wait()
    assert next(packs) == 7 and not gate.broken, "six packs, and the manifest's"
    assert same(everystep.open("s3://bucket")["r"].at(1).load(), state_of(1, 6, 400_000))


def test_a_load_has_many_requests_on_their_way(fake: FakeS3) -> None:
    state = state_of(1, 16, 1_000_000)
    settings = Settings(pack_bytes_max=1 << 20, chunk_bytes_max=1 << 20)
    with everystep.open("s3://bucket", settings=settings).run("r") as run:
        run.save(1, state=state).wait()
    gate = threading.Barrier(16)
    checkpoint = everystep.open("s3://bucket")["r"].at(1)
    checkpoint.leaves()

    def wait(method: str, path: str) -> None:
        if "/packs/" in path:
            gate.wait(30)

    fake.before = wait
    assert same(checkpoint.load(), state) and not gate.broken


def test_a_failed_upload_ends_the_save_and_nothing_else(fake: FakeS3) -> None:
    settings = Settings(retry_seconds=0.001, outage_seconds=0.05, put_attempts=2, pack_bytes_max=1 << 20)
    with everystep.open("s3://bucket", settings=settings).run("r") as run:
        run.save(1, state=state_of(1)).wait()

        def fail(method: str, path: str) -> None:
            if "/packs/" in path:
                fake.faults.append(Fault(method, 500))

        fake.before = fail
        with pytest.raises(Unreachable, match="the store failed: 500"):
            run.save(2, state=state_of(2)).wait()
        fake.before = lambda method, path: None
        fake.faults.clear()
        run.save(3, state=state_of(3)).wait()
    assert [one.step for one in everystep.open("s3://bucket")["r"].checkpoints()] == [1, 3]


@pytest.mark.parametrize("part", ["/log/", "/save/"])
def test_a_gateway_that_fails_for_a_while_costs_no_save(fake: FakeS3, part: str) -> None:
    """Whether a record or a receipt has landed is asked for as long as anything else."""
    settings = Settings(retry_seconds=0.05, outage_seconds=30, poll_seconds=0.05)
    repos = [everystep.open("s3://bucket", settings=settings) for _ in range(2)]
    runs = [repo.run("r", rank=rank, ranks=2, launch="job").track(rng=False) for rank, repo in enumerate(repos)]

    def save(step: int) -> None:
        saves = [run.save(step, state={"a": np.full(3, step)}) for run in runs]
        assert len({saved.wait(60).id for saved in saves}) == 1

    save(1)
    fake.faults += [Fault("PUT", (0, 500, 502, 504)[number % 4], part=part) for number in range(6)]
    save(2)
    assert not fake.faults
    for run in runs:
        run.close()
    assert [one.step for one in everystep.open("s3://bucket")["r"].checkpoints()] == [1, 2]


def test_an_outage_is_waited_for_once(fake: FakeS3) -> None:
    settings = Settings(retry_seconds=0.02, outage_seconds=0.2, put_attempts=3)
    storage = opened(settings=settings)
    fake.before = lambda method, path: fake.faults.append(Fault("PUT", 503, "SlowDown"))
    with pytest.raises(Unreachable, match="too busy") as caught:
        put_once(storage, "log/0", b"mine", Seam(), settings)
    times = re.search(r"asked (\d+) times", str(caught.value))
    assert times is not None and int(times[1]) == fake.count("PUT")


# processes -----------------------------------------------------------------------------------------------------------

LEAVES = """
import numpy as np, everystep
repo = everystep.open("s3://bucket/runs")
run = repo.run("r").track(rng=False)
first = run.resume()
for step in range(first + 1, first + 3):
    run.save(step, state={"w": np.full(400_000, step)})
"""
FORKS = """
import os, sys, everystep
repo = everystep.open("s3://bucket/runs")
print(repo.exists)
sys.stdout.flush()
child = os.fork()
if child == 0:
    try:
        repo.runs()
        everystep.open("s3://bucket/runs").runs()
    except everystep.UsageError as error:
        print(error.do)
        sys.stdout.flush()
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(repo.exists)
"""


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_a_process_that_just_ends_has_saved_all(fake: FakeS3) -> None:
    for _ in range(3):
        done = python(LEAVES)
        assert (done.returncode, done.stderr) == (0, "")
    assert [one.step for one in everystep.open("s3://bucket/runs")["r"].checkpoints()] == [1, 2, 3, 4, 5, 6]


def test_a_forked_process_is_told(fake: FakeS3) -> None:
    done = python(FORKS)
    assert done.returncode == 0, done.stderr
    first, said, code, last = done.stdout.splitlines()
    assert (first, code, last) == ("False", "7", "False") and "spawn" in said


def test_the_library_is_loaded_when_it_is_needed() -> None:
    look = "print('obstore' in sys.modules)"
    done = python(f"import sys, everystep; {look}; everystep.open('memory://x').exists; {look}")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_missing_library_is_named() -> None:
    for scheme, extra in (("s3", "s3"), ("gs", "gcs"), ("az", "azure")):
        done = python(
            f"import sys; sys.modules['obstore'] = None\nimport everystep\neverystep.open('{scheme}://bucket')"
        )
        assert done.returncode != 0 and f'pip install "everystep[{extra}]"' in done.stderr


def test_settings_reach_the_store() -> None:
    with pytest.raises(UsageError, match="request_seconds"):
        everystep.open("s3://bucket", settings=Settings(request_seconds=0))
