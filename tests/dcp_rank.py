"""One rank of several that save and load through torch.distributed.checkpoint; see test_dcp.py."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import everystep
from everystep.integrations.dcp import EverystepReader, EverystepWriter


def state_of(step: int) -> dict[str, dict[str, DTensor]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.arange(7 * 4.0).reshape(7, 4) + step
    return {
        "model": {
            "rows": distribute_tensor(rows, mesh, [Shard(0)]),
            "all": distribute_tensor(torch.full((5,), float(step)), mesh, [Replicate()]),
            "low": distribute_tensor(torch.arange(8).bfloat16() / 3, mesh, [Shard(0)]),
        }
    }


def main(folder: str, verb: str) -> None:
    dist.init_process_group("gloo")
    try:
        repo = everystep.open(f"{folder}/runs")
        if verb == "save":
            run = repo.run("r", launch=f"port-{os.environ['MASTER_PORT']}")
            for step in (1, 2):
                dcp.save({**state_of(step), "step": step}, storage_writer=EverystepWriter(run, step))
            run.close()
            print("saved")
        else:
            wanted, target = state_of(2), {**state_of(0), "step": 0}
            dcp.load(target, storage_reader=EverystepReader(repo["r"]))
            assert target["step"] == 2
            for name, value in wanted["model"].items():
                assert torch.equal(target["model"][name].to_local(), value.to_local()), name
            print("loaded")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
