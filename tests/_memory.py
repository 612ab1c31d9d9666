"""A program that saves 200 times what an optimizer changes, and says what it holds after each save."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from everystep import Repository, Settings
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.vault import Place


class Measuring(MemoryStorage):
    """Keeps the log, and of packs their length alone."""

    def __init__(self) -> None:
        super().__init__()
        self.packs: dict[str, int] = {}

    def put(self, key: str, data: Iterable[Any]) -> None:
        self.packs[key] = sum(len(piece) for piece in data)

    def size(self, key: str) -> int:
        return self.packs[key] if key in self.packs else super().size(key)


def main(saves: int, state_mib: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    count = (state_mib << 20) // 8 // 8  # parameters and momentum of 4 bytes, in 8 tensors
    params = [torch.nn.Parameter(torch.randn(count)) for _ in range(8)]
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    model = torch.nn.ParameterList(params)
    gradients = [torch.randn(count) for _ in params]
    storage = Measuring()
    run = Repository(Place(storage, Seam(), Settings())).run("r").track(model=model, optimizer=optimizer)
    process = psutil.Process()
    rows = []
    for step in range(1, saves + 1):
        # Three quarters stand still at each step: what is new costs most of the time.
        for number, (param, gradient) in enumerate(zip(params, gradients)):
            param.grad = gradient if number % 4 == step % 4 else None
        optimizer.step()
        run.record(loss=float(step))
        run.save(step)
        rows.append((process.memory_info().rss, threading.active_count(), process.num_fds()))
    run.close()
    return {
        "rss": [row[0] for row in rows],
        "threads": [row[1] for row in rows],
        "files": [row[2] for row in rows],
        "checkpoints": len(run.checkpoints()),
        "stored": sum(storage.packs.values()),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
