"""The object graph of TensorFlow and Keras: every part that has state, by names that no other program changes.

Names are those of attributes and the order of layers, as TensorFlow's and Keras' own checkpoints have it. Counters of
the process (dense_17) are left out, so that a second model, or another order of imports, changes no name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import tensorflow as tf
from tensorflow.python.trackable.base import Trackable

from everystep.adapters import tensorflow_loader, tensorflow_optim
from everystep.adapters.tensorflow_slots import (
    FinishSlot,
    IteratorSlot,
    Names,
    NamesSlot,
    Slot,
    TensorsSlot,
    look_up,
    path_of,
)
from everystep.adapters.tensorflow_values import NOTHING, is_variable, keras, unbuilt, unwrap
from everystep.errors import Unsupported

_DEPTH_MAX = 6
# Attributes of layers and models in which the same parts are found again, or what belongs to compile().
_INTERNAL = {
    "_layers", "_metrics", "_trainable_variables", "_non_trainable_variables", "_variables", "_seed_generators",
    "_tracker", "_tracked", "_functional", "_operations", "_operations_by_depth", "_nodes", "_nodes_by_depth",
    "_inbound_nodes", "_outbound_nodes", "_loss_tracker", "_compile_metrics", "_compile_loss", "optimizer",
    "_optimizer",
}  # fmt: skip


class Walk:
    """Goes through an object and collects its parts.

    Args:
        path: of the object, for errors.
        tracked: what else is tracked: an optimizer that is, is left out where a model holds it, too.
        state: a saved state to be put into the object: optimizers that are not built yet are built for it.
        optimizers: whether to look into them.
        built: whether what is not built yet is an error.
    """

    def __init__(
        self,
        path: str,
        tracked: Mapping[str, Any],
        *,
        state: Any = NOTHING,
        optimizers: bool = True,
        built: bool = True,
    ) -> None:
        self.path, self.tracked, self.state, self._optimizers, self._built = path, tracked, state, optimizers, built
        self.slots: list[Slot] = []
        self.spare: list[Names] = []
        """Where a saved state may have an optimizer that is not wanted here: of a model that is not compiled."""
        self.absent: list[Names] = []
        """Where an optimizer is that the saved state does not have: it stays as it is."""
        self._seen: set[int] = set()
        self._elsewhere = {id(target) for target in tracked.values()}
        self._keras = keras()

    def visit(self, value: Any, names: Names = ()) -> None:
        """Collects what lies below some names; each object once, under the first."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        module = self._keras
        generators: Any = (tf.random.Generator, *([] if module is None else [module.random.SeedGenerator]))
        if is_variable(value):
            trains = _trains(value)
            self._variable(value, names, "weights" if trains else "buffer", frozen=not value.trainable)
        elif module is not None and isinstance(value, module.optimizers.Optimizer):
            self._optimizer(value, names)
        elif module is not None and isinstance(value, module.Layer):
            self._layer(value, names)
        elif module is not None and isinstance(value, module.Metric):
            self._metric(value, names)
        elif isinstance(value, generators):
            self._variable(value.state, names, "rng")
        elif tensorflow_loader.is_iterator(value):
            self.slots.append(IteratorSlot(names, "rng", value))
        elif isinstance(value, (list, tuple, dict)):
            for name, part in _parts(value):
                self.visit(part, (*names, name))
        elif isinstance(value, Trackable):
            self._trackable(value, names)

    def _variable(self, value: Any, names: Names, role: str, *, frozen: bool = False) -> None:
        plain = unwrap(value, path_of(self.path, names))
        if id(plain) not in self._seen or plain is value:
            self._seen |= {id(value), id(plain)}
            self.slots.append(Slot(names, role, value, frozen=frozen))

    def _trackable(self, value: Any, names: Names) -> None:
        where = path_of(self.path, names)
        if hasattr(value, "get_slot_names") or type(value).__name__ == "ShardedVariable":
            raise Unsupported(
                f"a {type(value).__module__}.{type(value).__name__} keeps state that cannot be reached by its names",
                where=where,
                do="use an optimizer of Keras 3, and variables of MirroredStrategy or MultiWorkerMirroredStrategy",
            )
        if isinstance(value, tf.train.Checkpoint):
            root = value._saver._graph_view.root
            if root is not value:
                self.visit(root, names)
        elif type(value)._serialize_to_tensors is not Trackable._serialize_to_tensors:
            self.slots.append(TensorsSlot(names, "other", value))
        for name, child in value._trackable_children().items():
            if not (isinstance(value, tf.train.Checkpoint) and name == "save_counter"):  # TensorFlow's count of saves
                self.visit(child, (*names, str(name)))

    # Keras

    def _layer(self, layer: Any, names: Names) -> None:
        if not layer.built and self._built and not hasattr(layer, "save_assets"):  # a vocabulary needs no variables
            how = "call it once on an example, or its build(input_shape)"
            raise unbuilt(f"the layer {layer.name!r}", path_of(self.path, names), how)
        taken, found = _Taken(), _attributes(layer)
        weights = {id(variable) for variable in layer._trainable_variables}
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        for variable in own:
            name = _name_of(variable, found, "variable")
            role = "weights" if id(variable) in weights else "buffer"
            frozen = role == "weights" and not variable.trainable
            self._seen.add(id(variable))
            self._variable(variable, (*names, *taken.new(name)), role, frozen=frozen)
        for generator in layer._seed_generators:
            self.visit(generator, (*names, *taken.new(found.get(id(generator), ("seed_generator",)))))
        if _is_stack(layer):
            for inner in layer.layers:
                self.visit(inner, (*names, *taken.new(_name_of(inner, {}, _snake(inner)))))
            self._seen.add(id(getattr(layer, "_functional", None)))
        for inner in (*layer._layers, *layer._metrics):
            if id(inner) not in self._seen:
                self.visit(inner, (*names, *taken.new(_name_of(inner, found, _snake(inner)))))
        for where, child in _hanging(layer):
            if _is_foreign(child) and id(child) not in self._seen:
                self.visit(child, (*names, *taken.new(where)))
        self._compiled(layer, names)
        if own and callable(getattr(layer, "finalize_state", None)):
            self.slots.append(FinishSlot(names, "other", layer.finalize_state))

    def _compiled(self, layer: Any, names: Names) -> None:
        """The optimizer that a model was compiled with, unless it is tracked by itself."""
        module = self._keras
        if not self._optimizers or module is None or not isinstance(layer, module.Model):
            return
        below, optimizer = (*names, "optimizer"), getattr(layer, "optimizer", None)
        if not isinstance(optimizer, module.optimizers.Optimizer) or id(optimizer) in self._elsewhere:
            self.spare.append(below)
        elif self.state is not NOTHING and look_up(self.state, below) is NOTHING:
            self.absent.append(below)
        else:
            self.visit(optimizer, below)

    def _metric(self, metric: Any, names: Names) -> None:
        taken, found = _Taken(), _attributes(metric)
        for variable in metric._variables:
            self._seen.add(id(variable))
            self._variable(variable, (*names, *taken.new(_name_of(variable, found, "variable"))), "other")
        for inner in getattr(metric, "_metrics", ()):
            self.visit(inner, (*names, *taken.new(_name_of(inner, found, _snake(inner)))))

    def _optimizer(self, optimizer: Any, names: Names) -> None:
        if not self._optimizers or (names and id(optimizer) in self._elsewhere):
            return
        known = self.aliases()
        if not optimizer.built:
            self._build(optimizer, names, known)
        parts, trained = tensorflow_optim.parts(optimizer, known)
        for part in parts:
            others = tuple((*names, *other) for other in part.others)
            self.slots.append(Slot((*names, *part.names), "optimizer", part.variable, others))
        self.slots.append(NamesSlot((*names, "variables"), "optimizer", trained))
        inner = getattr(optimizer, "inner_optimizer", None)
        if inner is not None:
            self._seen.add(id(inner))
            self._optimizer(inner, (*names, "inner_optimizer"))

    def _build(self, optimizer: Any, names: Names, known: dict[int, tuple[Any, list[str]]]) -> None:
        """Makes the variables of an optimizer that the saved state is of, for just the variables named there."""
        where = path_of(self.path, names)
        wanted = look_up(self.state, (*names, "variables")) if self.state is not NOTHING else NOTHING
        by_name = {name: variable for variable, aliases in known.values() for name in aliases}
        if not isinstance(wanted, (list, tuple)) or not wanted or not all(name in by_name for name in wanted):
            raise unbuilt(f"the optimizer {optimizer.name!r}", where, "optimizer.build(model.trainable_variables)")
        strategy = optimizer._distribution_strategy
        with nullcontext() if strategy is tf.distribute.get_strategy() else strategy.scope():
            optimizer.build([by_name[name] for name in wanted])

    def aliases(self) -> dict[int, tuple[Any, list[str]]]:
        """Every name of every variable of what is tracked: by the id of TensorFlow's variable."""
        found: dict[int, tuple[Any, list[str]]] = {}
        for title, target in self.tracked.items():
            if owns(target) and not is_optimizer(target):
                walk = Walk(title, {}, optimizers=False)
                walk.visit(target)
                for slot in walk.slots:
                    if type(slot) is Slot:
                        name = ".".join((title, *slot.names))
                        found.setdefault(id(unwrap(slot.thing)), (slot.thing, []))[1].append(name)
        return found


def is_optimizer(value: Any) -> bool:
    module = keras()
    return module is not None and isinstance(value, module.optimizers.Optimizer)


def owns(value: Any) -> bool:
    """Whether it is an object with state, of TensorFlow or of Keras on it."""
    module = keras()
    if module is not None and isinstance(value, (module.Layer, module.Metric, module.random.SeedGenerator)):
        return True
    if isinstance(value, tf.data.Dataset):
        return False  # it has no position; its iterators have
    return is_variable(value) or is_optimizer(value) or isinstance(value, Trackable) or (
        not isinstance(value, (tuple, list, dict)) and tensorflow_loader.is_iterator(value)
    )  # fmt: skip


def _trains(variable: Any) -> bool:
    plain = unwrap(variable)
    return bool(variable.trainable) and (plain.dtype.is_floating or plain.dtype.is_complex)


def _is_stack(layer: Any) -> bool:
    """Whether the order of its layers is what a model is made of."""
    return getattr(layer, "_obj_type", str)() in ("Sequential", "Functional")


def _is_foreign(value: Any) -> bool:
    """State of TensorFlow's own that Keras does not count as a layer's."""
    kinds = (tf.Variable, tf.Module, tf.random.Generator, tf.data.Iterator, tf.lookup.experimental.MutableHashTable)
    module = keras()
    ours = (module.Layer, module.Metric, module.optimizers.Optimizer, module.Variable) if module is not None else ()
    return isinstance(value, kinds) and not isinstance(value, ours)


def _parts(container: Any) -> Iterator[tuple[str, Any]]:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return ((str(key), part) for key, part in items)


def _hanging(owner: Any) -> Iterator[tuple[Names, Any]]:
    """What hangs in the attributes of an object, lists and dicts included, and where."""

    def look(value: Any, names: Names) -> Iterator[tuple[Names, Any]]:
        if isinstance(value, (list, tuple, dict)) and len(names) <= _DEPTH_MAX:
            for name, part in _parts(value):
                yield from look(part, (*names, name))
        else:
            yield names, value

    # Public names first: many layers have the same part under another name as well.
    for name, value in sorted(vars(owner).items(), key=lambda pair: pair[0].startswith("_")):
        if name not in _INTERNAL and not name.startswith("_self_"):
            yield from look(value, (name.lstrip("_") or name,))


def _attributes(owner: Any) -> dict[int, Names]:
    """Where each part of an object hangs: by its id."""
    found: dict[int, Names] = {}
    for names, value in _hanging(owner):
        found.setdefault(id(value), names)
    return found


def _snake(value: Any) -> str:
    """What Keras calls an object that was given no name, before the number."""
    name = re.sub(r"\W+", "", type(value).__name__)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _name_of(value: Any, found: dict[int, Names], automatic: str) -> Names:
    """The name that a program gave; else where the part hangs; else what it is."""
    given = str(value.name)
    numbered = re.fullmatch(rf"{re.escape(automatic)}(_\d+)?", given) is not None
    if is_variable(value):
        return found.get(id(value), (automatic,)) if numbered else (given.partition(":")[0],)
    return found.get(id(value)) or ((automatic,) if numbered else (given,))


class _Taken:
    """The names below one object: none twice, none within another."""

    def __init__(self) -> None:
        self._below: dict[str, set[Names]] = {}

    def new(self, names: Names) -> Names:
        number, wanted = 0, names
        while self._clashes(wanted):
            number += 1
            wanted = (*names[:-1], f"{names[-1]}_{number}")
        self._below.setdefault(wanted[0], set()).add(wanted)
        return wanted

    def _clashes(self, names: Names) -> bool:
        others = self._below.get(names[0], ())
        return any(names[: len(other)] == other or other[: len(names)] == names for other in others)
