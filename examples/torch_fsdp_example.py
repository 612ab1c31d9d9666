"""FSDP2 on any number of processes. Kill it whenever you like, and start it again, on as many or as others.

torchrun --nproc-per-node 4 examples/torch_fsdp_example.py --repo runs
torchrun --nproc-per-node 2 examples/torch_fsdp_example.py --repo runs
"""

from __future__ import annotations

import argparse
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import everystep

STEPS, SAVE_EVERY, BATCH = 24, 4, 12


def batch_of(step: int) -> torch.Tensor:
    """This process's share of the step's batch: the same batch on any number of processes."""
    whole = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--name", default="fsdp")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="(?s).*this continuation is not exact: saved by")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    with everystep.open(args.repo).run(args.name) as run:
        run.track(model=model, optimizer=optimizer)
        for step in run.steps(STEPS, save_every=SAVE_EVERY):
            x = batch_of(step)
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            run.record(loss=mean)
            if dist.get_rank() == 0:
                print(f"step {step} loss {mean.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
