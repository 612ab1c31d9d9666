"""torch.distributed.checkpoint with a run as its storage. Kill it whenever you like and start it again: the same bits.

python examples/dcp_example.py --repo runs
"""

from __future__ import annotations

import argparse
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import everystep
from everystep.integrations.dcp import EverystepReader, EverystepWriter

STEPS, SAVE_EVERY = 24, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--name", default="dcp")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is")  # one process
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    with everystep.open(args.repo).run(args.name) as run:
        done = run.resume()  # takes the run, and puts the random states back
        if done:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments}
            dcp.load(state, storage_reader=EverystepReader(run, done))
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            print(f"goes on from step {done}", flush=True)
        for step in range(done + 1, STEPS + 1):
            x = torch.randn(4, 8)
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step} loss {loss.item():.6f}", flush=True)
            if step % SAVE_EVERY == 0:
                weights, moments = get_state_dict(model, optimizer)
                writer = EverystepWriter(run, step, metrics={"loss": loss})
                dcp.save({"model": weights, "optimizer": moments}, storage_writer=writer)


if __name__ == "__main__":
    main()
