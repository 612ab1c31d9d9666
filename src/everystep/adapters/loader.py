"""A position in the data: iterate an epoch from any batch on, in the order that the epoch had."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from everystep import adapters
from everystep.errors import UsageError
from everystep.schema import LoadReport, Roled

T = TypeVar("T")
_INSIDE = ("sampler", "batch_sampler", "dataset", "datasets", "transform", "transforms")
_DEPTH_MAX = 6
_WITHOUT_CHANCE = (list, tuple, range, np.ndarray)
_LOADERS = {"torch": "everystep.adapters.torch_loader", "tensorflow": "everystep.adapters.tensorflow_loader"}


class Stream:
    """Random numbers for the data alone: however many are drawn inside `run`, the training's own stand still, and
    however many the training draws, the data's come out the same."""

    def __init__(self, seeds: Mapping[str, int]) -> None:
        self._seeds = seeds
        self._states: tuple[Any, ...] | None = None

    def run(self, function: Callable[[], T]) -> T:
        outside = _states()
        if self._states is None:
            seed_all(self._seeds)
        else:
            _set_states(self._states)
        try:
            return function()
        finally:
            self._states = _states()
            _set_states(outside)


def draw_seeds() -> dict[str, int]:
    """One number from each global generator: whoever seeds one of them, seeds the data that draws from it."""
    seeds = {"python": random.getrandbits(62), "numpy": int(np.random.randint(1 << 62, dtype=np.int64))}
    torch = sys.modules.get("torch")
    if torch is not None:
        seeds["torch"] = int(torch.randint(1 << 62, (), device="cpu"))
    return seeds


def seed_all(seeds: Mapping[str, int]) -> None:
    """Seeds the global generators that run on the host."""
    random.seed(seeds["python"])
    np.random.seed([seeds["numpy"] & 0xFFFFFFFF, seeds["numpy"] >> 32])
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(seeds.get("torch", seeds["python"]))


def _states() -> tuple[Any, ...]:
    torch = sys.modules.get("torch")
    return random.getstate(), np.random.get_state(), torch.get_rng_state() if torch is not None else None


def _set_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    if states[2] is not None:
        sys.modules["torch"].set_rng_state(states[2])


def generators(root: Any) -> dict[str, Any]:
    """name -> every random generator that a loader keeps for itself, or its samplers and data sets do."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def look(part: Any, path: str, depth: int) -> None:
        if id(part) in seen or depth > _DEPTH_MAX:
            return
        seen.add(id(part))
        if _is_generator(part):
            found[path] = part
        elif isinstance(part, (list, tuple)) and depth:
            for index, item in enumerate(part[:64]):
                look(item, f"{path}[{index}]", depth + 1)
        else:
            for name, value in list(getattr(part, "__dict__", {}).items()):
                if name in _INSIDE or _is_generator(value):
                    look(value, f"{path}.{name}" if path else name, depth + 1)

    look(root, "", 0)
    return found


def set_generators(root: Any, states: Mapping[str, Any]) -> None:
    """Puts the generators that `generators` finds back to their states."""
    for name, generator in generators(root).items():
        if name in states:
            adapters.apply(generator, states[name], f"loader.{name}", {}, LoadReport())()


def _is_generator(value: Any) -> bool:
    torch = sys.modules.get("torch")
    kinds: list[type] = [np.random.Generator, np.random.RandomState, random.Random]
    kinds += [torch.Generator] if torch is not None else []
    return isinstance(value, tuple(kinds)) and type(value) is not random.SystemRandom  # which has no state


class IterableSource:
    """Any iterable that can be iterated again. Going to the middle of an epoch reads and drops what comes before."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator):
            raise UsageError(
                "a generator or iterator can be gone through only once, so an epoch could not be resumed",
                do="pass what makes it: a DataLoader, a list, or an object whose __iter__ starts over",
            )
        if not any(hasattr(batches, name) for name in ("__iter__", "__getitem__")):
            raise UsageError(f"a {type(batches).__name__} has no batches to go through", do="pass a DataLoader")
        self._batches = batches
        try:
            self.length: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:
            self.length = None

    def begin(self) -> dict[str, Any]:
        """Begins an epoch: what is needed to begin the very same epoch again."""
        return {"seeds": draw_seeds(), "generators": self._generator_states()}

    def start(self, begun: Mapping[str, Any], epoch: int, skip: int) -> Iterator[Any]:
        """The batches of an epoch, from number `skip` on."""
        self._set_epoch(epoch)
        self.set_generators(begun["generators"])
        if isinstance(self._batches, _WITHOUT_CHANCE):
            batches = iter(self._batches)
            for _ in range(skip):
                next(batches, None)
            return batches
        apart = Apart(self._batches, Stream(begun["seeds"]))
        for _ in range(skip):
            next(apart, None)
        return apart

    def state(self, consumed: int) -> dict[str, Any]:
        """What a checkpoint keeps of the loader, `consumed` batches into an epoch."""
        return {"length": self.length, "generators": self._generator_states(), "mark": self._mark(consumed)}

    def compare(self, state: Mapping[str, Any]) -> list[str]:
        """What differs from the loader that a checkpoint was saved with, as sentences."""
        if state.get("length") != self.length:
            return [f"the loader had {state.get('length')} batches an epoch, has {self.length}"]
        return []

    def check(self, state: Mapping[str, Any], consumed: int) -> list[str]:
        """Whether the batches that were skipped are those that were consumed; a sentence if not."""
        before, now = state.get("mark"), self._mark(consumed)
        if before is None or now is None or before == now:
            return []
        return [
            f"the sampler does not give the {consumed} batches again that it gave before: what decides their order?"
        ]

    def set_generators(self, states: Mapping[str, Any]) -> None:
        """Puts the generators back that the loader keeps for itself."""
        set_generators(self._batches, states)

    def close(self) -> None:
        """Ends processes that wait for another epoch."""

    def _generator_states(self) -> dict[str, Any]:
        found = {
            name: adapters.capture(generator, f"loader.{name}", {})
            for name, generator in generators(self._batches).items()
        }
        return {name: state.value if isinstance(state, Roled) else state for name, state in found.items()}

    def _set_epoch(self, epoch: int) -> None:
        batches = self._batches
        inner = getattr(batches, "batch_sampler", None)
        parts = (batches, getattr(batches, "sampler", None), inner, getattr(inner, "sampler", None))
        for part in {id(part): part for part in (*parts, getattr(batches, "dataset", None))}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]

    def _mark(self, consumed: int) -> int | None:
        """A checksum of which batches were consumed; None where that is not known."""
        return None


class Apart:
    """An iterator whose random numbers come from a stream of their own."""

    def __init__(self, batches: Iterable[Any], stream: Stream) -> None:
        self._stream = stream
        self._batches = stream.run(lambda: iter(batches))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._stream.run(lambda: next(self._batches))


def source(loader: Iterable[Any]) -> Any:
    """The source for a loader: the framework's own where it is one of a framework."""
    for framework, module in _LOADERS.items():
        if framework in sys.modules:
            found = importlib.import_module(module).source(loader)
            if found is not None:
                return found
    return IterableSource(loader)
