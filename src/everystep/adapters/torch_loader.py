"""torch's DataLoader with a position: the sampler skips, so that no data is read for batches already consumed."""

from __future__ import annotations

import copy
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from everystep import adapters
from everystep.adapters.loader import IterableSource, Stream, generators, seed_all, set_generators

# Samplers that take nothing from the global generators once they have begun.
_EAGER = (
    BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler,
)  # fmt: skip
_END = object()
_GOLDEN = 0x9E3779B97F4A7C15


class _Seeded:
    """Indices on their way to a worker process, which seeds its generators when they arrive: so the random numbers
    behind a batch depend on the epoch's seed and the batch's number alone, whichever worker makes it, and however
    many it made before."""

    def __init__(self, indices: Any, seed: int) -> None:
        self._indices, self._seed = indices, seed

    def __reduce__(self) -> Any:
        return _arrive, (self._indices, self._seed)


def _arrive(indices: Any, seed: int) -> Any:
    # Python's generator and NumPy's are of one kind, and would draw the same numbers from the same seed.
    seed_all({"python": seed, "numpy": _mixed(seed, 1), "torch": _mixed(seed, 2)})
    worker = get_worker_info()
    for number, generator in enumerate(generators(worker.dataset).values() if worker is not None else (), 3):
        _reseed(generator, _mixed(seed, number))
    return indices


def _mixed(seed: int, number: int) -> int:
    return (seed ^ _GOLDEN * number) % (1 << 62)


def _reseed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed & 0xFFFFFFFF)
    elif isinstance(generator, random.Random):
        generator.seed(seed)


class _Order:
    """A batch sampler that starts at any batch; what it draws comes from a stream of its own."""

    def __init__(self, inner: Any, seeded: bool, window: int) -> None:
        self._inner, self._seeded = inner, seeded
        parts = (inner, getattr(inner, "sampler", None))
        self._eager = all(type(part) in _EAGER for part in parts if part is not None)
        self._marks: deque[tuple[int, int | None]] = deque(maxlen=window + 2)
        self.seeds: Mapping[str, int] = {}
        self.skip = 0
        self.rewind: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        """What is skipped is drawn here and now, in the surroundings in which the epoch began; torch asks twice."""
        self.rewind()
        self._marks.clear()
        batches = self._draw()
        for _ in range(self.skip):
            next(batches, None)
        return batches

    def _draw(self) -> Iterator[Any]:
        run: Callable[[Callable[[], Any]], Any] = Stream(self.seeds).run
        batches = run(lambda: iter(self._inner))
        number, mark = 0, 0
        while (indices := run(lambda: next(batches, _END))) is not _END:
            number += 1
            mark = _mark(indices, mark)
            self._marks.append((number, mark))
            seed = _mixed(self.seeds["torch"], number << 8)
            yield _Seeded(indices, seed) if self._seeded else indices
            if self._eager:
                run = _at_once

    def mark(self, number: int) -> int | None:
        """A checksum over the indices of the first `number` batches, as far as it is still known."""
        return next((mark for at, mark in self._marks if at == number), None)


def _at_once(function: Callable[[], Any]) -> Any:
    return function()


def _mark(indices: Any, mark: int) -> int:
    try:
        array = np.asarray(indices)
    except (ValueError, TypeError, RuntimeError):
        return mark  # indices of a kind that has no checksum
    return zlib.crc32(array.astype("<i8").tobytes(), mark) if array.dtype.kind in "iu" else mark


class LoaderSource(IterableSource):
    """A map-style DataLoader; the copy that is iterated differs only in its sampler and its workers' seeds."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._loader = loader
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        ahead = loader.num_workers * (loader.prefetch_factor or 0)
        self._order = _Order(getattr(loader, name), loader.num_workers > 0, ahead)
        # Not the user's generator: with workers that stay, it would be drawn from in the first epoch alone.
        self._seeder = torch.Generator()
        self._copy = copy.copy(loader)
        self._copy.__dict__.update({name: self._order, "_iterator": None, "generator": self._seeder})

    def start(self, begun: Mapping[str, Any], epoch: int, skip: int) -> Iterator[Any]:
        self._set_epoch(epoch)
        self._order.rewind = partial(set_generators, self._loader, begun["generators"])
        self._order.seeds, self._order.skip = begun["seeds"], skip
        self._seeder.manual_seed(begun["seeds"]["torch"])
        return iter(self._copy)

    def state(self, consumed: int) -> dict[str, Any]:
        return {
            **super().state(consumed),
            "workers": self._loader.num_workers,
            "batch_size": self._loader.batch_size,
        }

    def compare(self, state: Mapping[str, Any]) -> list[str]:
        found = super().compare(state)
        if state.get("batch_size") != self._loader.batch_size:
            found.append(f"the batch size was {state.get('batch_size')}, is {self._loader.batch_size}")
        if (state.get("workers", 0) == 0) != (self._loader.num_workers == 0):
            found.append(f"the loader had {state.get('workers')} workers, has {self._loader.num_workers}")
        if not getattr(self._loader, "in_order", True):
            found.append("the loader gives batches in the order in which its workers finish (in_order=False)")
        return found

    def close(self) -> None:
        self._copy._iterator = None

    def _mark(self, consumed: int) -> int | None:
        return self._order.mark(consumed)


class StreamSource(IterableSource):
    """Another DataLoader: of an IterableDataset, or of a class that iterates in its own way."""

    def compare(self, state: Mapping[str, Any]) -> list[str]:
        found, loader = super().compare(state), self._batches
        if state.get("workers") != getattr(loader, "num_workers", None):
            found.append(f"the loader had {state.get('workers')} workers, has {getattr(loader, 'num_workers', None)}")
        if getattr(loader, "persistent_workers", False):
            found.append("workers that stay (persistent_workers=True) keep random numbers and positions of their own")
        if not getattr(loader, "in_order", True):
            found.append("the loader gives batches in the order in which its workers finish (in_order=False)")
        return found

    def state(self, consumed: int) -> dict[str, Any]:
        return {**super().state(consumed), "workers": getattr(self._batches, "num_workers", None)}


def source(loader: Iterable[Any]) -> Any:
    """A source for a DataLoader; None for anything else."""
    if not isinstance(loader, DataLoader):
        return None
    kind = type(loader)
    # A wrapper may only pass for a DataLoader, as Accelerate's does.
    ordinary = issubclass(kind, DataLoader) and kind.__iter__ is DataLoader.__iter__
    ordinary = ordinary and kind._get_iterator is DataLoader._get_iterator
    if isinstance(loader.dataset, IterableDataset) or not ordinary or adapters.has_state(loader):
        return StreamSource(loader)
    return LoaderSource(loader)
