"""A position in the data: iterate an epoch from any batch on, in the order that the epoch had."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from everystep.errors import UsageError


class IterableSource:
    """Any iterable that can be iterated again. Going to the middle of an epoch reads and drops what comes before."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if iter(batches) is batches:
            raise UsageError(
                "a generator or iterator can be gone through only once, so an epoch could not be resumed",
                do="pass what makes it: a DataLoader, a list, or an object whose __iter__ starts over",
            )
        self._batches = batches
        try:
            self.length: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:
            self.length = None

    def start(self, epoch: int, skip: int) -> Iterator[Any]:
        if callable(getattr(self._batches, "set_epoch", None)):
            self._batches.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = iter(self._batches)
        for _ in range(skip):
            next(batches, None)
        return batches

    def state(self, epoch: int) -> dict[str, Any]:
        """What must be put back before an epoch can be started again."""
        return {"length": self.length}

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts it back."""

    def compare(self, state: dict[str, Any]) -> list[str]:
        """What differs from the loader that began the epoch, as sentences."""
        if state.get("length") != self.length:
            return [f"the loader had {state.get('length')} batches an epoch, has {self.length}"]
        return []


def source(loader: Iterable[Any]) -> Any:
    """The source for a loader: the framework's own where it is one of a framework."""
    if "torch" in sys.modules:
        found = importlib.import_module("everystep.adapters.torch_loader").source(loader)
        if found is not None:
            return found
    return IterableSource(loader)
