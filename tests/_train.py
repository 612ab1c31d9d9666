"""A small training in which every random number and every batch counts, and ways to leave it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import everystep
from everystep import Repository, Settings, adapters
from everystep.schema import flatten
from everystep.seam import Seam
from everystep.storage import MemoryStorage
from everystep.vault import Place

SAMPLES = 21


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other at every small operation; tests beside this one use their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class WithoutGit(Seam):
    """Asks no other program: hundreds of runs are opened here."""

    def ask(self, *command: str, seconds: float = 3.0) -> str | None:
        return None


def new_repository(seam: Seam | None = None, storage: Any = None, **settings: Any) -> Repository:
    """A repository in a memory of its own."""
    seam = seam or WithoutGit()
    return Repository(Place(storage or MemoryStorage(), seam, Settings(**settings)))


def scramble(seed: int) -> None:
    """Every global generator somewhere else, as in a new process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def picture(state: Any) -> Any:
    """All of a nested state in comparable form, bit for bit."""
    tree = flatten(state, adapters.describe)
    rows = []
    for leaf, payload in zip(tree.leaves, tree.payloads):
        data = np.empty(leaf.nbytes, np.uint8)
        adapters.copy(payload, data)
        rows.append((leaf.path, leaf.dtype, leaf.shape, leaf.role, data.tobytes()))
    return tree.nodes, tree.values, rows


@dataclass(frozen=True)
class Done:
    """What a training came to: (step, batch, loss) of every step, and a picture of its end."""

    seen: list[tuple[int, bytes, bytes]]
    picture: Any

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.picture).encode()).hexdigest()


class Job:
    """A model with dropout and batch statistics, AdamW, a schedule, an average of the weights, noise of three kinds."""

    def __init__(self, seed: int = 1) -> None:
        scramble(seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.1, total_steps=100)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.seen: list[tuple[int, bytes, bytes]] = []
        """(step, the batch, the loss) of every step that was trained."""

    @property
    def tracked(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
        }

    def train(self, step: int, batch: Any = None) -> torch.Tensor:
        """One update."""
        x = torch.randn(5, 3) if batch is None else torch.as_tensor(batch, dtype=torch.float32).reshape(-1, 3)
        noise = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
        self.optimizer.zero_grad()
        loss = (self.model(torch.cat([x, noise[None]])) - 1).square().mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.average.update_parameters(self.model)
        self.seen.append((step, x.numpy().tobytes(), loss.detach().numpy().tobytes()))
        return loss

    def picture(self) -> Any:
        """Everything that makes the run, and every global generator, as they are now."""
        captured = {name: adapters.capture(target, name, self.tracked) for name, target in self.tracked.items()}
        return picture({**captured, "random": adapters.random_state()})

    def done(self) -> Done:
        return Done(self.seen, self.picture())


class Numbers(Dataset[Any]):
    """Three numbers a sample, with what `augment` adds."""

    def __init__(self, augment: Callable[[], float] | None = None, size: int = SAMPLES) -> None:
        self.augment, self.size = augment, size
        self.read = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read += 1
        extra = self.augment() if self.augment is not None else 0.0
        return torch.tensor([float(index), index / 7 + extra, 1.0])


def mixed_noise() -> float:
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


class Interrupted(Exception):
    """The program fails on purpose."""


Leave = Callable[[everystep.Run, int], bool]


def leave_by_break(run: everystep.Run, step: int) -> bool:
    return True


def leave_by_error(run: everystep.Run, step: int) -> bool:
    raise Interrupted


def leave_by_stop(run: everystep.Run, step: int) -> bool:
    run.stop()
    return False


LEAVES: dict[str, Leave] = {"break": leave_by_break, "error": leave_by_error, "stop": leave_by_stop}


def go(
    run: everystep.Run, job: Job, loop: Iterable[Any], until: int | None = None, leave: Leave = leave_by_break
) -> None:
    """Trains what a loop gives; at the end of step `until` leaves it."""
    given: Iterator[Any] = iter(loop)
    try:
        for value in given:
            step = run.step
            assert step is not None
            run.record(loss=job.train(step, None if isinstance(value, int) else value))
            if step == until and leave(run, step):
                break
    except Interrupted:
        pass
