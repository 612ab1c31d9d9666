"""torch.distributed.checkpoint with a run as its storage: one process, and four over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import everystep
from everystep.integrations.dcp import EverystepReader, EverystepWriter

EXAMPLE = Path(__file__).parent.parent / "examples" / "dcp_example.py"
RANK = Path(__file__).with_name("dcp_rank.py")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, 3)).square().mean().backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def test_a_state_dict_goes_out_and_in(tmp_path: Path) -> None:
    model, optimizer = make(1)
    repo = everystep.open(str(tmp_path))
    with repo.run("r") as run:
        for step in (1, 2):
            train(model, optimizer)
            saved = dcp.save(
                state_of(model, optimizer), storage_writer=EverystepWriter(run, step, metrics={"loss": 1 / step})
            )
            assert saved.state_dict_metadata
        wanted = state_of(model, optimizer)
        assert run.latest is not None and run.latest.step == 2, "durable when dcp.save is back"
    other, its = make(2)
    target = state_of(other, its)
    dcp.load(target, storage_reader=EverystepReader(repo["r"]))
    set_state_dict(other, its, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    assert same(state_of(other, its), wanted)
    dcp.load(target, storage_reader=EverystepReader(repo["r"], 1))
    assert not same(target["model"], wanted["model"])
    assert repo["r"].best("loss", mode="min").step == 2


def test_it_lies_there_as_anything_reads_it(tmp_path: Path) -> None:
    model, optimizer = make(1)
    train(model, optimizer)
    with everystep.open(str(tmp_path)).run("r") as run:
        dcp.save(state_of(model, optimizer), storage_writer=EverystepWriter(run, 1))
        checkpoint = run.latest
    assert checkpoint is not None
    state = checkpoint.load()
    assert np.array_equal(state["model"]["0.weight"], model.state_dict()["0.weight"].numpy())
    roles = {leaf.path: leaf.role for leaf in checkpoint.leaves()}
    assert roles["model/0.weight"] == "weights" and roles["optimizer/state/0.weight/exp_avg"] == "optimizer"
    checkpoint.export(str(tmp_path / "model.safetensors"), only="model")
    assert checkpoint.verify() > 0


def test_values_of_every_kind(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    state = {
        "tensors": {
            "bf16": torch.randn(3, 3).bfloat16(), "bool": torch.tensor([True, False]), "scalar": torch.tensor(3),
            "empty": torch.empty(0, 4), "strided": torch.arange(12.0).reshape(3, 4).t(), "a/b%": torch.ones(2),
        },
        "tied": {"one": tied, "two": tied},
        "list": [torch.ones(2), {"deep": torch.zeros(1)}, 7],
        "plain": {"epoch": 3, "name": "x" * 10_000, "betas": (0.9, 0.95)},
    }  # fmt: skip
    with everystep.open(str(tmp_path)).run("r").track(rng=False) as run:
        dcp.save(state, storage_writer=EverystepWriter(run, 1))
    target = {
        "tensors": {name: torch.zeros_like(value) for name, value in state["tensors"].items()},
        "tied": {"one": torch.zeros(2, 3), "two": torch.zeros(2, 3)},
        "list": [torch.zeros(2), {"deep": torch.ones(1)}, 0],
        "plain": {"epoch": 0, "name": "", "betas": ()},
    }
    dcp.load(target, storage_reader=EverystepReader(everystep.open(str(tmp_path))["r"].at(1)))
    assert same(target, state)
    dcp.load(part := {"plain": {"epoch": 0}}, storage_reader=EverystepReader(everystep.open(str(tmp_path))["r"]))
    assert part == {"plain": {"epoch": 3}}


def test_beside_what_the_run_tracks(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path))
    with repo.run("r") as run:
        run.track(counter=(lambda: {"n": 5}, lambda state: None))
        dcp.save({"w": torch.ones(3)}, storage_writer=EverystepWriter(run, 1))
    dcp.load(target := {"w": torch.zeros(3)}, storage_reader=EverystepReader(repo["r"]))
    assert torch.equal(target["w"], torch.ones(3)) and repo["r"].at(1).load(only="counter") == {"n": 5}


def test_a_writer_goes_on_with_the_next_step(tmp_path: Path) -> None:
    """`checkpoint_id` is a step, for those who keep one writer."""
    repo = everystep.open(str(tmp_path))
    with repo.run("r") as run:
        writer = EverystepWriter(run, 0)
        for step in (5, 6):
            dcp.save({"w": torch.full((3,), float(step))}, checkpoint_id=str(step), storage_writer=writer)
    reader = EverystepReader(repo["r"])
    for step in ("5", "latest"):
        dcp.load(target := {"w": torch.zeros(3)}, checkpoint_id=step, storage_reader=reader)
        assert target["w"][0] == (5 if step == "5" else 6)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path))
    with repo.run("r") as run:
        with pytest.raises(CheckpointException, match="is taken by everystep"):
            dcp.save({"dcp": torch.ones(1)}, storage_writer=EverystepWriter(run, 1))
        dcp.save({"w": torch.ones(3)}, storage_writer=EverystepWriter(run, 1))
    with pytest.raises(CheckpointException, match=r"[Ss]ize mismatch"):
        dcp.load({"w": torch.ones(4)}, storage_reader=EverystepReader(repo["r"]))
    with pytest.raises(CheckpointException, match=r"[Mm]issing key"):
        dcp.load({"v": torch.ones(3)}, storage_reader=EverystepReader(repo["r"]))


def test_damage_is_no_tensor(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path)).run("r") as run:
        dcp.save({"w": torch.randn(100_000)}, storage_writer=EverystepWriter(run, 1))
    pack = max((tmp_path / "runs" / "r" / "packs").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(pack.read_bytes())
    data[len(data) // 3] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    with pytest.raises(CheckpointException, match=r"damaged|not what was"):
        dcp.load({"w": torch.zeros(100_000)}, storage_reader=EverystepReader(everystep.open(str(tmp_path))["r"]))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_ranks(folder: Path, world: int, verb: str) -> list[str]:
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(folder), verb], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        ends = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(error[-2000:] for _, error in ends)
    return [out for out, _ in ends]


def test_four_ranks_save_and_two_load(tmp_path: Path) -> None:
    """Sharded tensors lie at global coordinates: other ranks read them, and a program of one process does."""
    said = run_ranks(tmp_path, 4, "save")
    past = everystep.open(str(tmp_path / "runs"))["r"]
    assert [one.step for one in past.checkpoints()] == [1, 2] and past.at(2).ranks == 4
    whole = torch.arange(7 * 4.0).reshape(7, 4) + 2
    assert torch.equal(past.at(2).load(only="model/rows", like="torch"), whole)
    target = {"model": {"rows": torch.zeros(7, 4), "all": torch.zeros(5), "low": torch.zeros(8, dtype=torch.bfloat16)}}
    dcp.load(target, storage_reader=EverystepReader(past))
    assert torch.equal(target["model"]["rows"], whole) and target["model"]["all"][0] == 2
    assert torch.equal(target["model"]["low"], torch.arange(8).bfloat16() / 3)
    assert all("saved" in line for line in said)
    assert all("loaded" in line for line in run_ranks(tmp_path, 2, "load"))


def test_the_example_goes_on_exactly_when_it_was_killed(tmp_path: Path) -> None:
    def run(name: str, until: str | None) -> list[str]:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), "--repo", str(tmp_path / name)], stdout=subprocess.PIPE, text=True
        )
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if until is not None and line.startswith(until):
                process.kill()
                break
        process.stdout.close()
        assert process.wait() == (0 if until is None else -9)
        return lines

    whole = run("whole", None)
    run("killed", "step 14")
    begun = everystep.open(str(tmp_path / "killed"))["dcp"].latest
    assert begun is not None and begun.step in (9, 12)
    rest = run("killed", None)
    assert rest == [f"goes on from step {begun.step}\n", *whole[begun.step :]]
    ends = [everystep.open(str(tmp_path / name))["dcp"].at(24) for name in ("whole", "killed")]
    change = ends[0].diff(ends[1])
    unseeded = ("rng/python/", "rng/numpy/")
    assert [leaf.path for leaf in change.changed if not leaf.path.startswith(unseeded)] == [] and not change.values
