"""torch's DataLoader with a position: the sampler skips, so that no data is read for batches already consumed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from everystep.adapters.loader import IterableSource

_COPIED = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


class _Numbered(list[Any]):
    """The indices of one batch, with the batch's number in the epoch."""

    number = 0

    def __reduce__(self) -> Any:
        return _numbered, (list(self), self.number)


def _numbered(indices: list[Any], number: int) -> _Numbered:
    made = _Numbered(indices)
    made.number = number
    return made


class _Skipping:
    """A batch sampler that starts at any batch. What draws random numbers to start does so when iteration starts."""

    def __init__(self, inner: Any, seeded: bool) -> None:
        self._inner, self._seeded = inner, seeded
        self.skip = 0

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._inner)
        for _ in range(self.skip):
            next(batches, None)
        first = next(batches, None)
        return self._rest(first, batches, self.skip)

    def _rest(self, first: Any, batches: Iterator[Any], number: int) -> Iterator[Any]:
        if first is None:
            return
        yield _numbered(first, number) if self._seeded else first
        for indices in batches:
            number += 1
            yield _numbered(indices, number) if self._seeded else indices


class _Seeded(Dataset[Any]):
    """In a worker process, random numbers depend on the epoch's seed and the batch's number alone: the same batch
    comes out whichever worker makes it, and however many batches that worker made before."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> Any:
        return self._inner[index]

    def __getitems__(self, indices: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and isinstance(indices, _Numbered):
            seed = (worker.seed - worker.id + 0x9E3779B97F4A7C15 * (indices.number + 1)) % (1 << 63)
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % (1 << 32))
        fetch = getattr(self._inner, "__getitems__", None)
        return fetch(list(indices)) if callable(fetch) else [self._inner[index] for index in indices]


class LoaderSource(IterableSource):
    """A map-style DataLoader; the copy that is iterated differs only in its sampler and its workers' seeds."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._loader = loader
        batched = loader.batch_sampler is not None
        self._sampler = _Skipping(
            loader.batch_sampler if batched else loader.sampler, batched and loader.num_workers > 0
        )
        options = {name: getattr(loader, name) for name in _COPIED if hasattr(loader, name)}
        if not options.get("pin_memory_device"):
            options.pop("pin_memory_device", None)
        if loader.num_workers == 0:
            options.pop("prefetch_factor", None)
        dataset = _Seeded(loader.dataset) if self._sampler._seeded else loader.dataset
        if batched:
            self._copy: DataLoader[Any] = DataLoader(dataset, batch_sampler=self._sampler, **options)
        else:
            self._copy = DataLoader(dataset, batch_size=None, sampler=self._sampler, **options)

    def start(self, epoch: int, skip: int) -> Iterator[Any]:
        for sampler in (self._loader.sampler, self._loader.batch_sampler):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)  # type: ignore[union-attr]
        self._sampler.skip = skip
        return iter(self._copy)

    def _generators(self) -> dict[str, torch.Generator]:
        """The user's own generators: the loader's, the sampler's."""
        found = {"loader": self._loader.generator, "sampler": getattr(self._loader.sampler, "generator", None)}
        return {name: g for name, g in found.items() if isinstance(g, torch.Generator)}

    def state(self, epoch: int) -> dict[str, Any]:
        return {
            "length": self.length,
            "workers": self._loader.num_workers,
            "batch_size": self._loader.batch_size,
            "generators": {name: g.get_state() for name, g in self._generators().items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for name, g in self._generators().items():
            if name in state.get("generators", {}):
                g.set_state(torch.as_tensor(state["generators"][name]))

    def compare(self, state: dict[str, Any]) -> list[str]:
        found = super().compare(state)
        if state.get("batch_size") != self._loader.batch_size:
            found.append(f"the batch size was {state.get('batch_size')}, is {self._loader.batch_size}")
        if (state.get("workers", 0) == 0) != (self._loader.num_workers == 0):
            found.append(f"the loader had {state.get('workers')} workers, has {self._loader.num_workers}")
        if self._loader.batch_size is None and self._loader.num_workers > 0 and self._loader.batch_sampler is None:
            found.append("random numbers drawn in workers of a loader without batches are not kept in mid-epoch")
        return found


def source(loader: Iterable[Any]) -> Any:
    """A source for a map-style DataLoader; None for anything else."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return LoaderSource(loader)
    return None
