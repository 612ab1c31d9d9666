"""Train a small network in NumPy alone. Kill it whenever you like and start it again: it ends with the same bits.

python examples/numpy_example.py --runs runs --run numpy
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

import everystep

SAMPLES, BATCH, FEATURES, WIDTH, CLASSES = 800, 32, 20, 64, 5
BATCHES = SAMPLES // BATCH


class Net:
    """Two layers with dropout between them, trained with momentum and a cosine schedule; its state lives in it."""

    def __init__(self, updates: int) -> None:
        self.updates, self.done = updates, 0
        self.weights = {
            "hidden": np.random.normal(0, 0.2, (FEATURES, WIDTH)).astype(np.float32),
            "out": np.random.normal(0, 0.2, (WIDTH, CLASSES)).astype(np.float32),
        }
        self.momentum = {name: np.zeros_like(value) for name, value in self.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "momentum": self.momentum, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.momentum, self.done = state["weights"], state["momentum"], state["done"]

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        hidden = np.maximum(x @ self.weights["hidden"], 0)
        kept = (np.random.random(hidden.shape) < 0.8).astype(np.float32) / np.float32(0.8)
        scores = (hidden * kept) @ self.weights["out"]
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        loss = -np.log(shares[np.arange(len(y)), y]).mean()
        shares[np.arange(len(y)), y] -= 1
        back = (shares @ self.weights["out"].T) * kept * (hidden > 0)
        rate = np.float32(0.05 * (1 + math.cos(math.pi * self.done / self.updates)))
        for name, gradient in (("out", (hidden * kept).T @ shares), ("hidden", x.T @ back)):
            self.momentum[name] = np.float32(0.9) * self.momentum[name] + gradient / np.float32(len(y))
            self.weights[name] = self.weights[name] - rate * self.momentum[name]
        self.done += 1
        return float(loss)


class Batches:
    """In another order each epoch, by NumPy's own generator."""

    def __init__(self) -> None:
        data = np.random.default_rng(7)
        self.x = data.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
        self.y = (self.x @ data.normal(size=(FEATURES, CLASSES))).argmax(1)

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.random.permutation(SAMPLES)
        for start in range(0, SAMPLES, BATCH):
            chosen = order[start : start + BATCH]
            yield self.x[chosen], self.y[chosen]


def train(args: argparse.Namespace) -> None:
    random.seed(0)
    np.random.seed(0)
    epochs = math.ceil(args.steps / BATCHES)
    net = Net(epochs * BATCHES)
    with everystep.open(args.runs).run(args.run) as run:
        run.track(net=net)
        for x, y in run.batches(Batches(), epochs=epochs, save_on=everystep.every(args.save_every)):
            loss = net.step(x, y)
            run.record(loss=loss)
            print(f"step {run.step} loss {loss:.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", help="the repository")
    parser.add_argument("--run", default="numpy")
    parser.add_argument("--steps", type=int, default=250, help=f"rounded up to whole epochs of {BATCHES} steps")
    parser.add_argument("--save-every", type=int, default=8, help="steps between two checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
