"""Epochs over data, cut anywhere: the same batches, the same random numbers, the same bits as without a cut."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import (
    LEAVES,
    Job,
    Numbers,
    digest,
    go,
    mixed_noise,
    new_repository,
    one_thread,
    scramble,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import everystep
from everystep import EverystepWarning, Repository, Run, UsageError

__all__ = ["one_thread"]
EPOCHS = 3
Make = Callable[[], Any]


class OwnSampler(Sampler[int]):
    """Draws as it goes, from all three global generators."""

    def __init__(self, size: int = 21) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield int(random.random() * 7 + np.random.rand() * 7 + float(torch.rand(())) * 7) % self.size


class Remembering(Sampler[int]):
    """Keeps a generator of its own, which goes on from epoch to epoch."""

    def __init__(self, size: int = 21) -> None:
        self.size, self.rng = size, np.random.default_rng(3)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield int(self.rng.integers(self.size))


class ByEpoch(Sampler[int]):
    """As a DistributedSampler: the order depends on the epoch that it was told."""

    def __init__(self, size: int = 21) -> None:
        self.size, self.epoch = size, -1
        self.told: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng(self.epoch).permutation(self.size).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)


class Endless(IterableDataset[Any]):
    """A stream that shuffles through a buffer, as data too large to index is shuffled."""

    def __init__(self, sized: bool = False) -> None:
        self.sized = sized

    def __len__(self) -> int:
        if self.sized:
            return 21
        raise TypeError

    def __iter__(self) -> Iterator[Any]:
        buffer = [float(n) for n in range(5)]
        for number in range(5, 21):
            at = random.randrange(5)
            yield torch.tensor([buffer[at], float(np.random.rand()), float(torch.rand(()))])
            buffer[at] = float(number)
        yield from (torch.tensor([number, 0.0, 0.0]) for number in buffer)


class OwnNoise(Numbers):
    """Augments from a generator that the data set keeps."""

    def __init__(self) -> None:
        super().__init__(lambda: float(self.rng.random()))
        self.rng = np.random.default_rng(5)


class Walk:
    """Not torch at all: an iterable that shuffles its batches at each start and draws more as it goes."""

    def __init__(self, sized: bool) -> None:
        if sized:
            self.size = 6

    def __iter__(self) -> Iterator[Any]:
        order = list(range(6))
        random.shuffle(order)
        for number in order:
            yield np.array([[number, np.random.rand(), random.random()]], np.float32)


class SizedWalk(Walk):
    def __len__(self) -> int:
        return 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(dataset: Any = None, **options: Any) -> Make:
    return lambda: DataLoader(dataset() if dataset else Numbers(mixed_noise), **{"batch_size": 4, **options})


def sampled(sampler: Callable[[], Any], **options: Any) -> Make:
    return lambda: DataLoader(Numbers(mixed_noise), **{"batch_size": 4, "sampler": sampler(), **options})


WEIGHTS = [1.0 + n % 3 for n in range(21)]
LOADERS: dict[str, Make] = {
    "in order": loader(),
    "shuffled": loader(shuffle=True),
    "drop last": loader(shuffle=True, drop_last=True),
    "no batches": loader(lambda: Numbers(mixed_noise, 6), shuffle=True, batch_size=None),
    "loader's generator": lambda: loader(shuffle=True, generator=generator(7))(),
    "sampler's generator": sampled(lambda: RandomSampler(range(21), generator=generator(8))),
    "with replacement": sampled(lambda: RandomSampler(range(21), replacement=True, num_samples=40), batch_size=8),
    "drawn as it goes": sampled(
        lambda: RandomSampler(range(21), replacement=True, num_samples=70, generator=generator(9)), batch_size=16
    ),
    "weighted": sampled(lambda: WeightedRandomSampler(WEIGHTS, 20)),
    "weighted, generator": sampled(lambda: WeightedRandomSampler(WEIGHTS, 20, generator=generator(3))),
    "subset": sampled(lambda: SubsetRandomSampler(range(3, 20))),
    "own sampler": sampled(OwnSampler),
    "remembering sampler": sampled(Remembering),
    "batch sampler": lambda: DataLoader(Numbers(mixed_noise), batch_sampler=BatchSampler(OwnSampler(), 5, True)),
    "by epoch": sampled(ByEpoch),
    "batches by epoch": lambda: DataLoader(Numbers(mixed_noise), batch_sampler=BatchSampler(ByEpoch(), 5, False)),
    "data set's generator": loader(OwnNoise, shuffle=True),
    "stream": loader(Endless),
    "stream with a length": loader(lambda: Endless(True)),
    "list": lambda: [np.full((2, 3), n, np.float32) for n in range(5)],
    "walk": lambda: Walk(False),
    "walk with a length": lambda: SizedWalk(True),
}
IN_WORKERS: dict[str, Make] = {
    "shuffled": loader(shuffle=True, num_workers=2),
    "no batches": loader(lambda: Numbers(mixed_noise, 6), shuffle=True, batch_size=None, num_workers=2),
    "persistent": loader(shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=3),
    "own generators": lambda: loader(shuffle=True, num_workers=2, persistent_workers=True, generator=generator(7))(),
    "own sampler": sampled(OwnSampler, num_workers=2),
    "drawn as it goes": sampled(
        lambda: RandomSampler(range(21), replacement=True, num_samples=70, generator=generator(9)),
        batch_size=16, num_workers=2,
    ),
    "data set's generator": loader(OwnNoise, shuffle=True, num_workers=2),
    "stream": loader(Endless, num_workers=2),
}  # fmt: skip


def train(
    repo: Repository,
    job: Job,
    make: Make,
    until: int | None = None,
    how: str = "stop",
    epochs: int = EPOCHS,
    **save: Any,
) -> Run:
    with repo.run("r").track(**job.tracked) as run:
        go(run, job, run.batches(make(), epochs=epochs, **save), until, LEAVES[how])
    return run


@cache
def whole(name: str, workers: bool) -> Job:
    """Never interrupted, and saved only at the end."""
    job = Job()
    train(new_repository(), job, (IN_WORKERS if workers else LOADERS)[name])
    return job


def check_cut(name: str, workers: bool, cut: int, **save: Any) -> None:
    make, reference = (IN_WORKERS if workers else LOADERS)[name], whole(name, workers)
    repo, first = new_repository(), Job()
    train(repo, first, make, cut, **save)
    assert first.seen == reference.seen[:cut]
    resumed = Job(seed=70)
    run = train(repo, resumed, make, **save)
    assert run.report is not None and run.report.exact, run.report
    assert resumed.seen == reference.seen[cut:], "other batches"
    assert resumed.picture() == reference.picture()


@pytest.mark.parametrize("name", LOADERS)
def test_cut_after_every_batch_and_resumed(name: str) -> None:
    batches = len(whole(name, False).seen)
    assert batches >= 4 * EPOCHS
    for cut in range(1, batches + 1):
        check_cut(name, False, cut)


@pytest.mark.parametrize("name", IN_WORKERS)
def test_cut_in_the_middle_and_between_epochs_with_workers(name: str) -> None:
    batches = len(whole(name, True).seen)
    assert batches >= 4 * EPOCHS
    for cut in (1, batches // EPOCHS, batches // EPOCHS + 2, batches - 1):
        check_cut(name, True, cut)
