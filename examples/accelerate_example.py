"""An Accelerate loop that saves into a run. Kill it whenever you like and start it again: it ends with the same bits.

python examples/accelerate_example.py --repo runs
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep.integrations.accelerate import EverystepState

EPOCHS, BATCHES, SAVE_EVERY = 3, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--run", default="accelerate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))
    optim = torch.optim.AdamW(net.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 0.05, total_steps=EPOCHS * BATCHES // 2)
    x = torch.randn(BATCHES * 4, 8, generator=torch.Generator().manual_seed(7))
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(net, optim, schedule, data)

    with everystep.open(args.repo).run(args.run) as run:
        batches = everystep.ResumableLoader(loader)  # it knows its place in the shuffled data
        state = EverystepState(accelerator, run, model=model, optimizer=optimizer, scheduler=scheduler, batches=batches)
        step = state.load_state()
        print(f"goes on from step {step}", flush=True)
        while batches.epochs_done < EPOCHS:
            for inputs, targets in batches:
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(inputs), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                step += 1
                print(f"step {step} loss {loss.item():.6f}", flush=True)
                if step % SAVE_EVERY == 0:  # a whole number of accumulations: gradients are not part of a state
                    state.save_state(step, metrics={"loss": loss})


if __name__ == "__main__":
    main()
