"""What each role may do, asked of a real gateway of Ceph: the policies that are printed, set on a bucket, and tried."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _ceph import Ceph
from botocore.exceptions import ClientError

import everystep
from everystep import EverystepWarning, StorageError, access_policy
from everystep.access import ROLES

BUCKET, PREFIX = "policies", "team/runs"
URL = f"s3://{BUCKET}/{PREFIX}"
PACK, RECORD = "runs/r/packs/00000000000000000000000000000000-1/0", "runs/r/log/00000000000000000099"
KEYS = {
    "format.json": "format.json",
    "record": RECORD,
    "receipt": "runs/r/save/1/1/1",
    "volume": "runs/r/volumes/00000000000000000000-100",
    "pack": PACK,
    "probe": "probe-" + "0" * 32,
    "elsewhere in it": "other",
}
WRITTEN = {"format.json", "record", "receipt", "volume", "pack", "probe"}
ALL = set(KEYS)
GRANTED: dict[str, dict[str, set[str]]] = {
    "writer": {"read": ALL, "create": WRITTEN, "overwrite": WRITTEN, "delete": {"probe"}},
    "reader": {"read": ALL, "create": set(), "overwrite": set(), "delete": set()},
    "collector": {
        "read": ALL, "create": {"record", "volume"}, "overwrite": {"record", "volume"},
        "delete": {"pack", "receipt", "probe"},
    },
    "administrator": {"read": ALL, "create": ALL, "overwrite": ALL, "delete": ALL},
}  # fmt: skip
"""Of the keys of a repository; what a role may overwrite it may not on AWS, but for packs."""


class Bucket:
    """A bucket with the four policies, a user for each role, and one with none."""

    def __init__(self, ceph: Ceph) -> None:
        self.ceph, self.owner = ceph, ceph.client()
        self.owner.create_bucket(Bucket=BUCKET)
        self.users = {role: ceph.new_user(f"the-{role}") for role in (*ROLES, "stranger")}
        statements = [
            statement
            for role in ROLES
            for statement in access_policy(URL, role, store="ceph", to=[f"the-{role}"]).document["Statement"]
        ]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        self.owner.put_bucket_policy(Bucket=BUCKET, Policy=policy)
        self.policy = policy

    def client(self, role: str) -> Any:
        return self.ceph.client(*self.users[role])

    def environment(self, role: str) -> dict[str, str]:
        return self.ceph.environment(*self.users[role])


@pytest.fixture(scope="module")
def bucket(ceph: Ceph) -> Bucket:
    return Bucket(ceph)


def answer(call: Any, **arguments: Any) -> str:
    """ "ok", or the status and code of the refusal."""
    try:
        call(Bucket=BUCKET, **arguments)
        return "ok"
    except ClientError as error:
        return f"{error.response['ResponseMetadata']['HTTPStatusCode']} {error.response['Error']['Code']}"


def tried(bucket: Bucket, role: str) -> dict[str, dict[str, str]]:
    """verb -> key -> answer, each tried on a key that is there, or not, as the verb needs it."""
    client, owner = bucket.client(role), bucket.owner
    found: dict[str, dict[str, str]] = {"read": {}, "create": {}, "overwrite": {}, "delete": {}}
    for name, key in KEYS.items():
        place = {"Key": f"{PREFIX}/{key}"}
        owner.delete_object(Bucket=BUCKET, **place)
        found["create"][name] = answer(client.put_object, Body=b"new", **place)
        owner.put_object(Bucket=BUCKET, Body=b"old", **place)
        found["read"][name] = answer(client.get_object, **place)
        found["overwrite"][name] = answer(client.put_object, Body=b"other", **place)
        found["delete"][name] = answer(client.delete_object, **place)
        there = owner.list_objects_v2(Bucket=BUCKET, Prefix=place["Key"]).get("KeyCount", 0)
        assert (there == 0) == (found["delete"][name] == "ok"), "what was refused did not happen"
        owner.delete_object(Bucket=BUCKET, **place)
    return found


@pytest.fixture(scope="module")
def answers(bucket: Bucket) -> dict[str, dict[str, dict[str, str]]]:
    """Of the gateway, by role."""
    return {role: tried(bucket, role) for role in ROLES}


@pytest.mark.parametrize("role", ROLES)
def test_the_gateway_allows_what_a_role_needs_and_refuses_the_rest(answers: Any, role: str) -> None:
    for verb, found in answers[role].items():
        for name, said in found.items():
            expected = "ok" if name in GRANTED[role][verb] else "403 AccessDenied"
            assert said == expected, f"{role}, {verb} {name}"


def test_the_table_in_the_documentation_is_what_the_gateway_answers(answers: Any) -> None:
    lines = [f"| | {' | '.join(ROLES)} |", f"|---|{'---|' * len(ROLES)}"]
    for verb in ("read", "create", "overwrite", "delete"):
        for name in KEYS:
            cells = ("yes" if answers[role][verb][name] == "ok" else "refused" for role in ROLES)
            lines.append(f"| {verb} {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(f"\n{table}")
    assert table in (Path(__file__).parent.parent / "docs" / "access.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("role", [*ROLES, "stranger"])
def test_the_bucket_itself(bucket: Bucket, role: str) -> None:
    client, owner = bucket.client(role), bucket.owner
    owner.put_object(Bucket=BUCKET, Key="another/secret", Body=b"1")
    everything, stranger = role == "administrator", role == "stranger"
    found = {
        "list the repository": answer(client.list_objects_v2, Prefix=f"{PREFIX}/"),
        "list another prefix": answer(client.list_objects_v2, Prefix="another/"),
        "list versions": answer(client.list_object_versions, Prefix=f"{PREFIX}/"),
        "read elsewhere": answer(client.get_object, Key="another/secret"),
        "write elsewhere": answer(client.put_object, Key="another/new", Body=b"1"),
        "delete elsewhere": answer(client.delete_object, Key="another/secret"),
        "read the policy": answer(client.get_bucket_policy),
        "set the policy": answer(client.put_bucket_policy, Policy=bucket.policy),
    }
    allowed = {
        "list the repository": not stranger, "list another prefix": everything, "list versions": everything,
        "read the policy": everything, "set the policy": everything,
    }  # fmt: skip
    said = {verb: "ok" if allowed.get(verb, False) else "403 AccessDenied" for verb in found}
    assert found == said


@pytest.mark.parametrize(
    "role, status", [*((role, "404 NoSuchKey") for role in ROLES), ("stranger", "403 AccessDenied")]
)
def test_what_is_missing_is_missing_for_who_may_list(bucket: Bucket, role: str, status: str) -> None:
    """The end of a log is a record that is not there: a 403 would be an error, and end every look at it."""
    assert answer(bucket.client(role).get_object, Key=f"{PREFIX}/runs/r/log/{7:020d}") == status


def test_why_a_listing_without_a_prefix_is_let_pass(bucket: Bucket) -> None:
    """With a condition that needs a prefix, what is missing is a 403: nobody could find the end of a log."""
    strict = "narrow-bucket"
    bucket.owner.create_bucket(Bucket=strict)
    text = json.dumps(access_policy(f"s3://{strict}/{PREFIX}", "reader", store="ceph", to=["the-reader"]).document)
    missing, reader = {"Bucket": strict, "Key": f"{PREFIX}/runs/r/log/{7:020d}"}, bucket.client("reader")
    for operator, status in (("StringLikeIfExists", 404), ("StringLike", 403)):
        bucket.owner.put_bucket_policy(Bucket=strict, Policy=text.replace("StringLikeIfExists", operator))
        with pytest.raises(ClientError) as caught:
            reader.get_object(**missing)
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status, operator


# each does its work --------------------------------------------------------------------------------------------------


@pytest.fixture
def as_role(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def opened(role: str, name: str) -> everystep.Repository:
        for variable, value in bucket.environment(role).items():
            monkeypatch.setenv(variable, value)
        settings = everystep.Settings(takeover_seconds=0.1, volume_records=4)
        return everystep.open(f"{URL}/{name}" if name else URL, settings=settings)

    yield opened


def state(step: int) -> dict[str, Any]:
    return {"w": np.full(1000, step, np.float32)}


def test_a_writer_trains_a_reader_loads_and_a_collector_frees(as_role: Any) -> None:
    with (
        pytest.warns(EverystepWarning, match="may not delete") as warned,
        as_role("writer", "").run("r", keep=everystep.last(3)) as run,
    ):
        run.track(rng=False)
        for step in range(1, 13):
            run.save(step, state=state(step), metrics={"loss": 1 / step}).wait()
    assert len([one for one in warned if "may not delete" in str(one.message)]) == 1
    with as_role("writer", "").run("r", takeover=True) as run:
        assert run.resume() == 12
        run.save(13, state=state(13)).wait()
    reader = as_role("reader", "")
    assert reader["r"].latest.load()["w"][0] == 13 and [one.step for one in reader["r"].checkpoints()] == [
        10,
        11,
        12,
        13,
    ]
    assert reader.check().ok
    with pytest.raises(StorageError):
        reader["r"].latest.tag("mine")
    collector = as_role("collector", "")
    freed = collector["r"].prune()
    assert freed.packs > 10 and collector.check().ok
    with pytest.raises(StorageError), collector.run("s") as run:
        run.save(1, state=state(1)).wait()
    assert as_role("reader", "")["r"].latest.load()["w"][0] == 13
    with pytest.raises(StorageError):
        as_role("stranger", "")


def test_ranks_that_are_writers_save_together(as_role: Any) -> None:
    """Through the gateway, each with rights of its own: receipts are listed, and manifests travel in them."""
    ids: list[str] = []

    def rank(number: int, repo: everystep.Repository) -> None:
        with repo.run("many", rank=number, ranks=4, launch="job") as run:
            run.track(rng=False)
            ids.extend(run.save(step, state={f"w{number}": np.full(500, step)}).wait().id for step in (1, 2))

    threads = [threading.Thread(target=rank, args=(number, as_role("writer", ""))) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(ids) == 8 and len(set(ids)) == 2
    loaded = as_role("reader", "")["many"].at(2).load()
    assert {name: int(value.sum()) for name, value in loaded.items()} == {f"w{rank}": 1000 for rank in range(4)}


def test_versions_keep_what_a_writer_overwrites(bucket: Bucket, ceph: Ceph) -> None:
    """Ceph cannot refuse an overwrite; with versions on, the old bytes stay, and the writer cannot reach them."""
    owner, writer = bucket.owner, bucket.client("writer")
    owner.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    try:
        place = {"Key": f"{PREFIX}/runs/v/log/{0:020d}"}
        first = owner.put_object(Bucket=BUCKET, Body=b"first", **place)["VersionId"]
        assert answer(writer.put_object, Body=b"second", **place) == "ok"
        assert answer(writer.delete_object, VersionId=first, **place) == "403 AccessDenied"
        assert owner.get_object(Bucket=BUCKET, VersionId=first, **place)["Body"].read() == b"first"
    finally:
        owner.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Suspended"})
