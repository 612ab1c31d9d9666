"""The parts of a TensorFlow object that have state, each under its name: taken from it, matched with a saved state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import tensorflow as tf

from everystep.adapters import tensorflow_loader, tensorflow_values
from everystep.adapters.tensorflow_values import NOTHING, PER_WORKER, World
from everystep.errors import Mismatch, Unsupported
from everystep.schema import LoadReport, Roled
from everystep.schema.tree import join

Names = tuple[str, ...]
Place = Callable[[], None]


def path_of(path: str, names: Iterable[str]) -> str:
    for name in names:
        path = join(path, name)
    return path


@dataclass(frozen=True)
class Slot:
    """One part of an object: a variable, unless a kind of its own says otherwise."""

    names: Names
    role: str
    thing: Any
    others: tuple[Names, ...] = ()
    """Where else it may be found in a saved state."""
    frozen: bool = False
    """Whether nothing trains it."""

    def read(self, path: str, here: World) -> Any:
        """Its state as this rank keeps it; NOTHING where another rank does."""
        return tensorflow_values.read(self.thing, self.role, path, here)

    def fit(self, value: Any, path: str, here: World, report: LoadReport) -> Place | None:
        """What puts a saved value in its place; None if the value does not fit."""
        return tensorflow_values.fit(self.thing, self.role, value, path, here, report)


class PerWorkerSlot(Slot):
    """What each worker has for itself."""

    def read(self, path: str, here: World) -> Any:
        rank, ranks = here
        own = self.read_own(path)
        return {PER_WORKER: {str(rank): own}} if ranks > 1 else own

    def fit(self, value: Any, path: str, here: World, report: LoadReport) -> Place | None:
        if isinstance(value, Mapping) and PER_WORKER in value:
            value = tensorflow_values.of_worker(value[PER_WORKER], here[0], path, report)
        return self.fit_own(value, path, report)

    def read_own(self, path: str) -> Any:
        raise NotImplementedError

    def fit_own(self, value: Any, path: str, report: LoadReport) -> Place | None:
        raise NotImplementedError


class IteratorSlot(PerWorkerSlot):
    """The position of an iterator."""

    def read_own(self, path: str) -> Any:
        return tensorflow_loader.iterator_state(self.thing, path)

    def fit_own(self, value: Any, path: str, report: LoadReport) -> Place | None:
        if not tensorflow_loader.is_state(value):
            return None
        if tensorflow_loader.forgets(self.thing, list(value)):
            report.inexact.append(
                f"{path} was saved where a shuffle() had been read to its end: TensorFlow does not keep the order of "
                "its next epoch then (run.batches(dataset, epochs=…) does)"
            )
        return partial(tensorflow_loader.set_iterator, self.thing, value, path)


class TensorsSlot(PerWorkerSlot):
    """An object that says itself which tensors it is (a mutable table, a Python state)."""

    def read_own(self, path: str) -> Any:
        tensors = self.thing._serialize_to_tensors()
        if not all(isinstance(tensor, tf.Tensor) for tensor in tensors.values()):
            kind = type(self.thing).__name__
            raise Unsupported(f"the state of a {kind} is more than tensors", where=path, do="leave it out")
        return dict(tensors)

    def fit_own(self, value: Any, path: str, report: LoadReport) -> Place | None:
        now = self.thing._serialize_to_tensors()
        if not isinstance(value, Mapping) or value.keys() != now.keys():
            return None
        if any(not isinstance(value[key], tf.Tensor) or value[key].dtype != now[key].dtype for key in now):
            return None
        return partial(_restore, self.thing, dict(value), path)


def _restore(thing: Any, tensors: dict[str, Any], path: str) -> None:
    if isinstance(thing, tf.train.experimental.PythonState):
        (text,) = tensors.values()
        thing.deserialize(text.numpy())
        return
    try:
        thing._restore_from_tensors(tensors)
    except (tf.errors.OpError, ValueError) as error:
        do = "make the object as the saving program did"
        raise Mismatch(f"a {type(thing).__name__} does not take its state: {error}", where=path, do=do) from error


class NamesSlot(Slot):
    """The names of what an optimizer updates."""

    def read(self, path: str, here: World) -> Any:
        return list(self.thing)

    def fit(self, value: Any, path: str, here: World, report: LoadReport) -> Place | None:
        return _nothing if isinstance(value, (list, tuple)) else None


class FinishSlot(Slot):
    """A layer that computes something from its variables once they are in place: it has no state of its own."""

    def read(self, path: str, here: World) -> Any:
        return NOTHING


def _nothing() -> None:
    """For what is right already."""


def nested(slots: Iterable[Slot], path: str) -> Any:
    """The state of an object, each part below its names with its role."""
    out: dict[str, Any] = {}
    here = tensorflow_values.world() or (0, 1)
    for slot in slots:
        value = slot.read(path_of(path, slot.names), here)
        if not slot.names:
            return Roled(slot.role, None if value is NOTHING else value)
        if value is not NOTHING:
            below = out
            for name in slot.names[:-1]:
                below = below.setdefault(name, {})
            below[slot.names[-1]] = Roled(slot.role, value)
    return out


def look_up(state: Any, names: Iterable[str]) -> Any:
    """What a nested state has below some names; NOTHING if it has not."""
    for name in names:
        if not isinstance(state, Mapping) or name not in state:
            return NOTHING
        state = state[name]
    return state


def match(
    slots: Iterable[Slot], state: Any, path: str, report: LoadReport, spare: Iterable[Names], absent: Iterable[Names]
) -> list[Place]:
    """Notes what fits in the report; the answers put it in place, positions in the data first.

    Args:
        spare: names below which the state may have what is not wanted: the optimizer of a model that is not compiled.
        absent: names of what is here and not in the state, and may stay as it is.
    """
    first: list[Place] = []
    places: list[Place] = []
    last: list[Place] = []
    used: set[Names] = set()
    here = tensorflow_values.world() or (0, 1)
    for slot in slots:
        if isinstance(slot, FinishSlot):
            last.append(slot.thing)
            continue
        names = next((n for n in (slot.names, *slot.others) if look_up(state, n) is not NOTHING), None)
        where = path_of(path, names if names is not None else slot.names)
        if names is None:
            report.missing.append(where)
            continue
        used.add(names)
        place = slot.fit(look_up(state, names), where, here, report)
        (report.reshaped if place is None else report.loaded).append(where)
        if place is not None:
            (first if isinstance(slot, IteratorSlot) else places).append(place)
    report.inexact += [f"{path_of(path, names)} is not in the checkpoint: it stays as it is" for names in absent]
    left = list(_rest(state, used, ()))
    unused = [top for top in spare if any(names[: len(top)] == top for names in left)]
    report.inexact += [
        f"{path_of(path, top)} is in the checkpoint, and the model here is not compiled with one" for top in unused
    ]
    report.unexpected += [path_of(path, names) for names in left if not any(names[: len(top)] == top for top in unused)]
    return [*first, *places, *last]


def _rest(state: Any, used: set[Names], names: Names) -> Iterator[Names]:
    """What of a state nothing has asked for."""
    if names in used:
        return
    if isinstance(state, Mapping) and not (PER_WORKER in state or tensorflow_values.PER_REPLICA in state):
        for key, value in state.items():
            yield from _rest(value, used, (*names, str(key)))
    else:
        yield names
