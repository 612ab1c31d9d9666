"""The order in which Keras's optimizers make their variables, which is all that a file of Keras says of them."""

from __future__ import annotations

from typing import Any

from everystep.formats.keras_layout import ARRAYS, OPTIMIZER, VARS, Tree, class_of, layers_of, numbered, options_of
from everystep.schema import join

_SLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "SGD": (("momentum",),),
    **dict.fromkeys(("Adam", "AdamW", "Lamb"), (("momentum", "velocity"), ("velocity_hat",))),
    "Nadam": (("momentum", "velocity"),),
    "Adamax": (("momentum", "norm"),),
    "Adagrad": (("accumulator",),),
    "Adadelta": (("accumulated_grad", "accumulated_delta_var"),),
    "Ftrl": (("accumulator", "linear"),),
    "Lion": (("momentum",),),
    "RMSprop": (("velocity",), ("momentum",), ("average_gradient",)),
}
"""Group by group; within a group, variable by variable of the model."""
_FIRST = (("average",), ("gradient_accumulator",))
_OWN_FIRST, _OWN_LAST = ("iteration", "learning_rate"), ("u_product",)
_OPTIONS = {
    "average": "use_ema", "gradient_accumulator": "gradient_accumulation_steps", "velocity_hat": "amsgrad",
    "average_gradient": "centered",
}  # fmt: skip
_ONLY_WITH_MOMENTUM = ("SGD", "RMSprop")
_NOT_TRAINED = ("moving_mean", "moving_variance")


def _known(config: Tree) -> Any:
    compiled = config.get("compile_config")
    return compiled.get(OPTIMIZER) if isinstance(compiled, dict) else None


def places_of(optimizer: Tree, config: Tree, above: str) -> dict[str, str] | None:
    """Where each variable of the optimizer belongs, by its place in the file; None where the order is not known here.

    Args:
        above: the path of the optimizer in the state.
    """
    if all(name.isdecimal() and isinstance(value, ARRAYS) for name, value in optimizer.items()):
        return {f"{OPTIMIZER}/{VARS}/{name}": join(above, name) for name in optimizer}
    slots = _SLOTS.get(class_of(_known(config)))
    state = optimizer.get("state", {})
    if slots is None or not isinstance(state, dict) or not all(isinstance(part, dict) for part in state.values()):
        return None
    listed = optimizer.get("variables")
    order = [name for name in listed if name in state] if isinstance(listed, (list, tuple)) else list(state)
    paths = [join(above, name) for name in _OWN_FIRST if name in optimizer]
    for group in (*_FIRST, *slots):
        below = ((join(join(above, "state"), name), state[name]) for name in order)
        paths += [join(path, slot) for path, part in below for slot in group if slot in part]
    paths += [join(above, name) for name in _OWN_LAST if name in optimizer]
    arrays = [key for key, value in optimizer.items() if isinstance(value, ARRAYS)]
    if len(paths) != len(arrays) + sum(len(part) for part in state.values()):
        return None
    return {f"{OPTIMIZER}/{VARS}/{at}": path for at, path in enumerate(paths)}


def state_of(kept: Any, model: Tree, config: Tree) -> Tree:
    """The optimizer's variables by names; by numbers where it is not certain which is which."""
    values = numbered(kept.get(VARS)) if isinstance(kept, dict) else {}
    return _named(list(values.values()), model, config) or values


def _named(values: list[Any], model: Tree, config: Tree) -> Tree | None:
    known = _known(config)
    options, trained = options_of(known), _trained(model, config, "model")
    if class_of(known) not in _SLOTS or trained is None:
        return None
    made: Tree = {"iteration": None}
    if not isinstance(options.get("learning_rate"), dict):
        made["learning_rate"] = None
    state: dict[str, Tree] = {name: {} for name, _ in trained}
    wanted: list[tuple[Tree, str, tuple[int, ...]]] = [(made, name, ()) for name in made]
    for group in (*_FIRST, *_SLOTS[class_of(known)]):
        there = [slot for slot in group if _has(known, slot)]
        wanted += [(state[name], slot, shape) for name, shape in trained for slot in there]
    wanted += [(made, name, ()) for name in _OWN_LAST if class_of(known) == "Nadam"]
    if [shape for _, _, shape in wanted] != [getattr(value, "shape", None) for value in values]:
        return None
    for (table, name, _), value in zip(wanted, values):
        table[name] = value
    return (
        {**made, "state": state, "variables": list(state)}
        if any(state.values())
        else {**made, "variables": list(state)}
    )


def _has(known: Any, slot: str) -> bool:
    option = _OPTIONS.get(slot) or ("momentum" if class_of(known) in _ONLY_WITH_MOMENTUM and slot == "momentum" else "")
    return not option or bool(options_of(known).get(option))


def _trained(model: Tree, config: Tree, path: str) -> list[tuple[str, tuple[int, ...]]] | None:
    """Name and shape of each variable that is trained, in the model's order; None where parts of a layer leave open
    which comes first."""
    if options_of(config).get("trainable") is False:
        return []
    own = [name for name, value in model.items() if isinstance(value, ARRAYS)]
    found = [(f"{path}.{name}", model[name].shape) for name in own if name not in _NOT_TRAINED]
    stack = {layer.name: layer.config for layer in layers_of(config)}
    inner = [name for name, value in model.items() if isinstance(value, dict)]
    if len(inner) > 1 and not set(inner) <= set(stack):
        return None
    for name in inner:
        part = _trained(model[name], stack.get(name, {}), f"{path}.{name}")
        if part is None:
            return None
        found += part
    return found
