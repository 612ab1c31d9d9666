"""From a folder to real object stores and back: push, pull, mirror, and a folder in front of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _hdfs import Hdfs
from _server import Place

import everystep
from everystep import ReadOnly

FROZEN = np.random.default_rng(1).standard_normal(300_000)
START, WAY = np.random.default_rng(2).standard_normal((2, 500_000)).astype(np.float32)


def state_of(step: int) -> dict[str, Any]:
    """4.4 MB: what never changes, and what changes so little that it is stored as deltas."""
    weights = START + np.float32(1e-5 * step) * WAY
    return {"params": {"w": weights, "head": np.full(1000, step)}, "frozen": FROZEN, "number": step}


def train(repo: everystep.Repository, *steps: int, **how: Any) -> None:
    with repo.run("a", **how).track(rng=False) as run:
        run.resume()
        for step in steps:
            run.save(step, state=state_of(step), metrics={"loss": 1 / step}).wait()


def check(repo: everystep.Repository, steps: list[int]) -> None:
    found = repo["a"].checkpoints(all=True)
    assert [checkpoint.step for checkpoint in found] == steps
    for checkpoint in found:
        state, good = checkpoint.load(), state_of(checkpoint.step)
        assert state["params"]["w"].tobytes() == good["params"]["w"].tobytes() and state["number"] == checkpoint.step
        assert state["frozen"].tobytes() == FROZEN.tobytes()
    assert repo.check().ok


def test_hdfs_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADOOP_USER_NAME", "root")
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    hdfs = Hdfs(tmp_path / "hdfs")
    try:
        here = everystep.open(str(tmp_path / "here"), behind=f"{hdfs.url}/behind")
        train(here, 1, 2, 3)
        check(everystep.open(f"{hdfs.url}/behind"), [1, 2, 3])
        here.mirror(f"{hdfs.url}/mirror")
        check(everystep.open(f"{hdfs.url}/mirror"), [1, 2, 3])
        laptop = everystep.open(str(tmp_path / "laptop"))
        assert laptop.pull(f"{hdfs.url}/behind", "a@2")[0].sent == [2]
        check(laptop, [2])
    finally:
        hdfs.stop()


def test_push_and_pull(cloud: Place, tmp_path: Path) -> None:
    here, there = everystep.open(str(tmp_path / "here")), everystep.open(cloud.new("push"))
    train(here, 1, 2, 3)
    (done,) = here.push(there)
    assert done.sent == [1, 2, 3]
    check(there, [1, 2, 3])
    train(here, 4)
    (more,) = here.push(there)
    assert more.sent == [4] and more.sent_bytes < 0.5 * done.sent_bytes
    laptop = everystep.open(str(tmp_path / "laptop"))
    (one,) = laptop.pull(there, "a@best:loss")
    assert one.sent == [4]
    check(laptop, [4])
    laptop.pull(there, "a@latest", only="params/head")
    head = laptop["a.params.head"].at(4).load()
    assert (head["params"]["head"] == 4).all() and list(head) == ["params"]


def test_a_mirror(cloud: Place, tmp_path: Path) -> None:
    here, url = everystep.open(str(tmp_path / "here")), cloud.new("mirror")
    train(here, 1, 2)
    assert here.mirror(url).runs == 1
    train(here, 3)
    assert here.mirror(url).packs > 0 and here.mirror(url).packs == 0
    copy = everystep.open(url)
    check(copy, [1, 2, 3])
    with pytest.raises(ReadOnly, match="mirror"):
        copy["a"].at(1).tag("x")
    back = everystep.open(str(tmp_path / "back"))
    copy.mirror(back.url)
    check(everystep.open(back.url), [1, 2, 3])


def test_a_folder_in_front(cloud: Place, tmp_path: Path) -> None:
    url = cloud.new("front")
    front = everystep.open(str(tmp_path / "front"), behind=url)
    with front.run("a", keep=everystep.last(1)).track(rng=False) as run:
        for step in (1, 2, 3):
            saved = run.save(step, state=state_of(step), metrics={"loss": 1 / step})
        saved.wait(60, where="remote")
    check(everystep.open(url), [1, 2, 3])
    assert [c.step for c in everystep.open(str(tmp_path / "front"))["a"].checkpoints()] == [3]
    assert (front["a"].at(1).load()["params"]["head"] == 1).all(), "read from behind"
    other = everystep.open(str(tmp_path / "other"), behind=url)
    with other.run("a").track(rng=False) as run:
        assert run.resume() == 3
        run.save(4, state=state_of(4)).wait()
    check(everystep.open(url), [1, 2, 3, 4])
