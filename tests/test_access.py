"""What each role may do: the policies that are printed, and that each role can do its work with no more than that."""

from __future__ import annotations

import json
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from _cli import call, json_of
from _policies import Guarded, allows

import everystep
from everystep import AccessPolicy, EverystepWarning, Repository, Settings, Unsupported, UsageError, access_policy
from everystep.access import ROLES
from everystep.errors import ReadOnly, StorageError
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.vault import Place

URL = "s3://bucket/runs"
SETTINGS = Settings(poll_seconds=0.01, volume_records=4, takeover_seconds=0.05)
KEYS = {
    "format": "format.json", "place": "place.json", "record": "runs/r/log/00000000000000000000",
    "receipt": "runs/r/save/1/1/1", "volume": "runs/r/volumes/00000000000000000000-100", "pack": "runs/r/packs/ab-1/0",
    "other": "elsewhere", "probe": f"probe-{'0' * 32}",
}  # fmt: skip
CREATES = {
    "writer": {"format", "place", "record", "receipt", "volume", "pack", "probe"},
    "reader": set(),
    "collector": {"record", "volume"},
    "administrator": set(KEYS),
}
DELETES = {"writer": {"probe"}, "reader": set(), "collector": {"pack", "receipt", "probe"}, "administrator": set(KEYS)}


class WithoutGit(Seam):
    """Asks no other program."""

    def ask(self, *command: str, seconds: float = 3.0) -> str | None:
        return None


def document(role: str, **options: Any) -> dict[str, Any]:
    return access_policy(URL, role, **options).document


def as_role(storage: MemoryStorage, role: str) -> tuple[Guarded, Repository]:
    guarded = Guarded(storage, document(role))
    return guarded, Repository(Place(guarded, WithoutGit(), SETTINGS))


def state(step: int) -> dict[str, Any]:
    return {"w": np.full(1000, step, np.float32)}


# the policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["s3", "ceph"])
@pytest.mark.parametrize("role", ROLES)
def test_what_a_role_may_do(role: str, store: str) -> None:
    found = document(role, store=store, to=["arn:aws:iam:::user/somebody"])
    for name, key in KEYS.items():
        resource = f"arn:aws:s3:::bucket/runs/{key}"
        assert allows(found, "s3:PutObject", resource, if_none_match="*") == (name in CREATES[role]), name
        overwrites = name in CREATES[role] and (store == "ceph" or name in ("pack", "probe") or role == "administrator")
        assert allows(found, "s3:PutObject", resource) == overwrites, name
        assert allows(found, "s3:DeleteObject", resource) == (name in DELETES[role]), name
        assert allows(found, "s3:GetObject", resource)
        assert allows(found, "s3:DeleteObjectVersion", resource) == (role == "administrator")
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        for outside in ("arn:aws:s3:::bucket/other/format.json", "arn:aws:s3:::other/runs/format.json"):
            assert not allows(found, action, outside, if_none_match="*")
    whole = role == "administrator"
    assert allows(found, "s3:ListBucket", "arn:aws:s3:::bucket", prefix="runs/runs/r/log/")
    assert allows(found, "s3:ListBucket", "arn:aws:s3:::bucket", prefix="other/") == whole
    assert allows(found, "s3:PutBucketPolicy", "arn:aws:s3:::bucket") == whole


def test_a_policy_names_who_gets_it_or_nobody() -> None:
    assert all("Principal" not in one for one in document("writer")["Statement"])
    named = document("writer", store="ceph", to=["train", "arn:aws:iam::tenant:user/x"])
    assert all(
        one["Principal"] == {"AWS": ["arn:aws:iam:::user/train", "arn:aws:iam::tenant:user/x"]}
        for one in named["Statement"]
    )
    names = [one["Sid"] for role in ROLES for one in document(role)["Statement"]]
    assert len(set(names)) == len(names), "the statements of all roles fit into one document"


def test_a_whole_bucket() -> None:
    found = access_policy("s3://bucket", "reader").document
    assert allows(found, "s3:GetObject", "arn:aws:s3:::bucket/format.json")
    assert allows(found, "s3:ListBucket", "arn:aws:s3:::bucket", prefix="anything/")


@pytest.mark.parametrize(
    "place, options, error",
    [
        ("runs", {}, Unsupported), ("gs://bucket/runs", {}, Unsupported), ("s3://B!/runs", {}, UsageError),
        ("s3://bucket/a*", {}, UsageError), (URL, {"role": "owner"}, UsageError), (URL, {"store": "minio"}, UsageError),
        (URL, {"store": "ceph"}, UsageError), (URL, {"to": ["somebody"]}, UsageError),
        (URL, {"store": "ceph", "to": ["a b"]}, UsageError),
    ],
)  # fmt: skip
def test_what_makes_no_policy(place: str, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        access_policy(place, **{"role": "writer", **options})


def test_an_address_with_its_endpoint() -> None:
    assert access_policy(f"{URL}?endpoint=https://ceph.example.org", "reader") == access_policy(URL, "reader")


@pytest.mark.parametrize("place", ["s3://key:planted@bucket/x", "https://key:planted@host/x", "gs://b/x?key=planted"])
def test_what_may_be_a_secret_is_not_repeated(place: str) -> None:
    with pytest.raises(everystep.Error) as caught:
        access_policy(place, "reader")
    assert "planted" not in str(caught.value)


def test_what_a_policy_cannot_hold_is_said() -> None:
    found = access_policy(URL, "writer", store="ceph", to=["train"])
    assert isinstance(found, AccessPolicy) and any("overwrite" in note for note in found.notes)
    assert not any("overwrite" in note for note in access_policy(URL, "reader").notes)


def test_the_command_prints_what_can_be_set() -> None:
    found = call(None, "storage", "policy", URL, "--role", "collector", "--store", "ceph", "--to", "nightly")
    assert found.exit_code == 0 and "note: set it as the bucket's policy" in found.stderr
    assert json.loads(found.stdout) == document("collector", store="ceph", to=["nightly"])
    told = json_of(None, "storage", "policy", URL, "--role", "reader")
    assert told["policy"] == document("reader") and told["role"] == "reader" and told["notes"]
    assert json_of(None, "storage", "policy", URL, "--role", "owner", code=2)["error"]["kind"] == "usage"
    assert call(None, "storage", "policy").exit_code == 2
    assert call(None, "storage", "policy", "gs://bucket/runs").exit_code == Unsupported.exit_code


# each does its work --------------------------------------------------------------------------------------------------


def test_a_writer_saves_resumes_takes_over_and_deletes_nothing() -> None:
    storage = MemoryStorage()
    guarded, repo = as_role(storage, "writer")
    with repo.run("r", config={"lr": 0.1}) as run:
        run.track(rng=False)
        run.attach("note.txt", b"text")
        for step in range(1, 12):
            run.record(step=step, loss=1 / step)
            run.save(step, state=state(step)).wait()
        repo["r"].latest.tag("good")
    abandoned = as_role(storage, "writer")[1].run("r")
    assert abandoned.resume() == 11
    abandoned.save(12, state=state(12)).wait()
    guarded, repo = as_role(storage, "writer")
    with repo.run("r", takeover=True) as run:
        assert run.resume() == 12
        run.save(13, state=state(13)).wait()
    with pytest.raises(everystep.RunTakenOver):
        abandoned.save(14, state=state(14)).wait()
    abandoned._forget_exit()
    assert [one.step for one in repo["r"].checkpoints()] == list(range(1, 14))
    assert [key for key in storage.objects if "/volumes/" in key]
    assert [action for action, _ in guarded.refused] == []


def test_ranks_that_are_writers_save_together() -> None:
    storage = MemoryStorage()
    views = [as_role(storage, "writer") for _ in range(3)]
    ids: list[str] = []

    def rank(number: int) -> None:
        with views[number][1].run("r", rank=number, ranks=3, launch="job") as run:
            run.track(rng=False)
            ids.append(run.save(1, state={f"w{number}": np.ones(9)}).wait().id)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ids) == 3 and len(set(ids)) == 1
    assert [guarded.refused for guarded, _ in views] == [[], [], []]


def test_a_writer_with_rules_trains_on_and_says_once_that_it_may_not_free() -> None:
    storage = MemoryStorage()
    guarded, repo = as_role(storage, "writer")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with repo.run("r", keep=everystep.last(2)) as run:
            run.track(rng=False)
            for step in range(1, 9):
                run.save(step, state=state(step)).wait()
    said = [str(one.message) for one in caught if issubclass(one.category, EverystepWarning)]
    assert len([text for text in said if "may not delete" in text and "everystep prune" in text]) == 1
    assert [one.step for one in repo["r"].checkpoints()] == [7, 8], "the rules hold; the bytes wait for a collector"
    assert {action for action, _ in guarded.refused} == {"DeleteObject"} and len(guarded.refused) <= 3
    collector, repo = as_role(storage, "collector")
    assert repo["r"].prune().packs > 8, "two packs for each of the six that were dropped, but for shared pages"
    assert collector.refused == [] and repo.check().ok


def test_a_reader_lists_loads_and_checks() -> None:
    storage = MemoryStorage()
    with as_role(storage, "writer")[1].run("r") as run:
        run.track(rng=False)
        for step in range(1, 10):
            run.save(step, state=state(step), metrics={"loss": 1 / step}).wait()
    guarded, repo = as_role(storage, "reader")
    past = repo["r"]
    assert past.latest is not None and past.latest.load()["w"][0] == 9 and past.best("loss").step == 9
    assert repo.check().ok and past.stats().checkpoints == 9 and guarded.refused == []
    for refused in (lambda: past.at(3).tag("mine"), lambda: past.forget(keep=everystep.last(1), force=True)):
        with pytest.raises(ReadOnly):
            refused()
    with pytest.raises(StorageError), repo.run("s") as run:
        run.save(1, state=state(1)).wait()


def test_a_collector_forgets_and_prunes_and_saves_nothing() -> None:
    storage = MemoryStorage()
    with as_role(storage, "writer")[1].run("r") as run:
        run.track(rng=False)
        for step in range(1, 10):
            run.save(step, state=state(step)).wait()
    guarded, repo = as_role(storage, "collector")
    repo["r"].forget(keep=everystep.last(2), force=True)
    assert repo["r"].prune(now=True).packs > 0 and repo.check().ok and guarded.refused == []
    assert [one.step for one in repo["r"].checkpoints()] == [8, 9]
    with pytest.raises(StorageError), repo.run("s") as run:
        run.save(10, state=state(10)).wait()
    assert not [key for key in storage.objects if key.startswith("runs/s/packs/")]
