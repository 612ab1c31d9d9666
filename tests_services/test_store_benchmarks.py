"""The benchmarks that need a store run against a real one: a gateway of their own, or the one that is given."""

import json
import os
from typing import Any

import pytest
from _server import Place
from benchmarks import cloud, leaf
from benchmarks.timing import Samples


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])["result"]


def test_to_and_from_a_store(on_ceph: Place, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.main([on_ceph.new("p"), "--mb", "16", "--rounds", "1", "--json", "--no-record"])
    result = said(capsys)
    assert result["nbytes"] == 16_000_000
    samples = Samples.from_dict(result["samples"])
    for name in (cloud.SAVE, cloud.PUT, cloud.LOAD, cloud.GET):
        assert len(samples.of(name, "seconds")) == 1 and samples.of(name, "seconds")[0] > 0


def test_one_leaf(on_ceph: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is stored of it, and of what it leans on, comes; and less than a MiB beside that."""
    leaf.main([on_ceph.new("p"), "--mb", "60", "--leaf-mb", "4", "--saves", "3", "--json", "--no-record"])
    loads = said(capsys)["loads"]
    first, *others = [one["depth"] for one in loads]
    assert first == 0 and all(1 <= depth <= 2 for depth in others), "one behind a link that was slow"
    for one in loads:
        assert one["raw"] == 4_000_000 and one["links"] <= one["got"] <= one["links"] + leaf.ALLOWED_BYTES


def test_a_gateway_of_its_own_with_cores_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ), os.sched_getaffinity(0)
    cloud.main(["--apart", "--mb", "8", "--rounds", "1", "--json", "--no-record"])
    assert said(capsys)["apart"] is True
    assert (dict(os.environ), os.sched_getaffinity(0)) == before
