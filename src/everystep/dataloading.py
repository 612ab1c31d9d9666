"""A loader that knows its place: for loops that a framework writes, and that only iterate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from everystep import adapters
from everystep.adapters import loader as loaders
from everystep.errors import EverystepWarning, UsageError

_END: Any = object()


class ResumableLoader:
    """An ordinary DataLoader, shuffled or not, or any iterable that can be iterated again, with `state_dict` and
    `load_state_dict`: the first iteration after a load goes on with the batch after the last one given out, in the
    order that the epoch had.

    For `run.track(loader=…)`, and for trainers that keep the state of their loader. `run.batches(loader)` needs none of
    it. An epoch begins with its first batch, not with `iter()`; what draws random numbers in it draws from a stream of
    its own.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, ResumableLoader):
            raise UsageError("this loader knows its place already", do="use it as it is")
        self._loader = loader
        self._source = loaders.source(loader)
        self._epochs = self._consumed = 0
        self._begun: dict[str, Any] | None = None
        self._kept: Mapping[str, Any] | None = None
        self._listeners: list[Callable[[], Any]] = []

    def __getattr__(self, name: str) -> Any:
        """What a framework asks of a loader: its batch size, sampler, dataset."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        if self._source.length is None:
            raise TypeError(f"a {type(self._loader).__name__} of unknown length")
        return int(self._source.length)

    def before_batch(self, listener: Callable[[], Any]) -> None:
        """Calls `listener()` before each batch is drawn: the one moment at which nothing is under way."""
        self._listeners.append(listener)

    def __iter__(self) -> Iterator[Any]:
        self._tell()
        batches = self._start()
        while (batch := next(batches, _END)) is not _END:
            self._consumed += 1
            yield batch
            self._tell()
        self._end_epoch()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _start(self) -> Iterator[Any]:
        """The batches of an epoch that are left; what this one was loaded with counts once."""
        kept, self._kept = self._kept, None
        if kept is None and self._begun is not None:
            self._end_epoch()  # the one before was left in its middle, or had all its batches given out
        if self._begun is None:
            if kept is not None:
                self._source.set_generators(kept["source"]["generators"])
            self._begun = dict(self._source.begin())
            first: Iterator[Any] = iter(self._source.start(self._begun, self._epochs, 0))
            return first
        now = adapters.random_state()
        batches: Iterator[Any] = iter(self._source.start(self._begun, self._epochs, self._consumed))
        if kept is not None:
            self._source.set_generators(kept["source"]["generators"])
            self._warn([*self._source.compare(kept["source"]), *self._source.check(kept["source"], self._consumed)])
        adapters.set_random_state(now)
        return batches

    def _end_epoch(self) -> None:
        self._epochs, self._consumed, self._begun = self._epochs + 1, 0, None

    def _warn(self, reasons: list[str]) -> None:
        if reasons:
            text = f"this continuation is not exact: {'; '.join(reasons)}"
            warnings.warn(text, EverystepWarning, stacklevel=4)

    @property
    def epochs_done(self) -> int:
        """Complete passes."""
        return self._epochs + self._is_over()

    def _is_over(self) -> bool:
        return self._begun is not None and self._source.length is not None and self._consumed >= self._source.length

    def state_dict(self) -> dict[str, Any]:
        """The place behind the batch that was given out last."""
        if self._kept is not None:
            return dict(self._kept)
        over = self._is_over()
        return {
            "epochs_done": self._epochs + over,
            "batch": 0 if over else self._consumed,
            "begun": None if over else self._begun,
            "source": self._source.state(self._consumed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Where the next iteration begins.

        Raises:
            UsageError: if it is not the state of such a loader.
        """
        if not isinstance(state, Mapping) or not {"epochs_done", "batch", "begun", "source"} <= state.keys():
            raise UsageError("this is not the state of a ResumableLoader", do="load what its state_dict() gave")
        self._kept = dict(state)
        self._epochs, self._consumed = int(state["epochs_done"]), int(state["batch"])
        self._begun = None if state["begun"] is None else dict(state["begun"])
