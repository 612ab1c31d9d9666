"""Train a small GPT on Python's own sources. Kill it whenever you like and start it again: it ends with the same bits.

python examples/gpt.py --repo runs --run gpt
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import everystep

CONTEXT, WIDTH, HEADS, LAYERS = 96, 160, 4, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape
        q, k, v = (
            part.view(batch, time, HEADS, -1).transpose(1, 2) for part in self.mix(self.norm1(x)).chunk(3, dim=-1)
        )
        dropout = 0.1 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.feed(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, the next byte out; the embedding and the head share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Sources(Dataset):
    """Windows of the standard library's source code, each moved a little at random: in a worker process, too."""

    def __init__(self, windows: int) -> None:
        text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.windows, self.stride = windows, (len(text) - 2 * CONTEXT) // windows

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.stride + int(torch.randint(CONTEXT, ()))
        return self.text[start : start + CONTEXT + 1].long()


def loss_of(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(args: argparse.Namespace) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.epochs * args.batches)
    loader = DataLoader(Sources(16 * args.batches), batch_size=16, shuffle=True, num_workers=2)

    repo = everystep.open(args.repo)
    with repo.run(args.run, config={"epochs": args.epochs, "batches": args.batches}) as run:
        run.track(model=model, optimizer=optimizer, scheduler=scheduler)
        for tokens in run.batches(loader, epochs=args.epochs, save_on=everystep.every(args.save_every)):
            loss = loss_of(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.record(loss=loss)
            print(f"step {run.step} loss {loss.item():.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--run", default="gpt")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batches", type=int, default=120, help="batches of 16 windows in an epoch")
    parser.add_argument("--save-every", type=int, default=8, help="steps between two checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="with another number, sums round differently")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
