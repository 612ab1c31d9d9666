"""Where Keras 3 keeps each variable of a model in its file, told from the model's configuration; nothing of it runs.

A file has numbers (`layers/dense_1/vars/0`), a checkpoint has names (`dense_1/kernel`). Both follow the order of the
layers, and within a layer the order in which its variables were made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everystep.errors import Unsupported
from everystep.schema import join

Tree = dict[str, Any]
VARS, LAYERS, OPTIMIZER = "vars", "layers", "optimizer"
CONFIG = "keras/config.json"
"""The attachment with what `model.to_json()` gives."""
ARRAYS = (np.ndarray, np.generic)
_OLD_LAYERS = "_layer_checkpoint_dependencies"  # before Keras 2.14
_OPERATIONS = ("keras.src.ops", "keras.ops")
_AFFINE = (("kernel", ""), ("bias", "use_bias"))
_CELL = (("kernel", ""), ("recurrent_kernel", ""), ("bias", "use_bias"))
_NORM = (("gamma", "scale"), ("beta", "center"))
_DEPTHWISE = (("depthwise_kernel", ""), ("pointwise_kernel", ""), ("bias", "use_bias"))
_VARIABLES: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("Dense", "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"), _AFFINE),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _AFFINE),
    **dict.fromkeys(("LSTMCell", "GRUCell", "SimpleRNNCell"), _CELL),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _DEPTHWISE),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization"), _NORM),
    "BatchNormalization": (*_NORM, ("moving_mean", ""), ("moving_variance", "")),
    "Embedding": (("embeddings", ""),),
    "EinsumDense": (("kernel", ""), ("bias", "bias_axes")),
    "PReLU": (("alpha", ""),),
    "RMSNormalization": (("scale", ""),),
}
"""What the variables of a layer are called, each with the option that it depends on."""


@dataclass(frozen=True)
class Layer:
    """A layer of a model: what its group in a file is called, and what a checkpoint calls it."""

    group: str
    name: str
    config: Tree


def parsed(text: str | bytes, where: str) -> Tree:
    """
    Raises:
        Unsupported: for what is no configuration of a model.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        do = f"attach what model.to_json() gives: run.attach({CONFIG!r}, model.to_json().encode())"
        raise Unsupported("the configuration of the model is not valid JSON", where=where, do=do) from error
    return config if isinstance(config, dict) else {}


def layers_of(config: Tree) -> list[Layer]:
    """The layers of a Sequential or functional model; none for what is neither."""
    inner = config.get("config")
    found = inner.get(LAYERS) if isinstance(inner, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return []
    made: list[Layer] = []
    groups: dict[str, int] = {}
    names: dict[str, int] = {}
    for one in found:
        class_name, own = one.get("class_name"), one.get("config")
        if not isinstance(class_name, str) or str(one.get("module")).startswith(_OPERATIONS):
            continue
        if class_name == "InputLayer" and config.get("class_name") == "Sequential":
            continue
        kind = snake(class_name)
        given = str(own.get("name")) if isinstance(own, dict) else kind
        number = given.removeprefix(f"{kind}_")
        automatic = given == kind or (number != given and number.isdecimal())
        made.append(Layer(_new(kind, groups), _new(kind if automatic else given, names), one))
    return made


def _new(name: str, taken: dict[str, int]) -> str:
    """A name that is not taken: with the next number."""
    if name not in taken:
        taken[name] = 0
        return name
    number = taken[name] + 1
    while f"{name}_{number}" in taken:
        number += 1
    taken[name] = number
    taken[f"{name}_{number}"] = 0
    return f"{name}_{number}"


def snake(class_name: str) -> str:
    """What Keras calls the objects of a class."""
    name = re.sub(r"\W+", "", class_name.rpartition(">")[2])
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def options_of(config: Any) -> Tree:
    found = config.get("config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def class_of(config: Any) -> str:
    return str(config.get("class_name", "")) if isinstance(config, dict) else ""


def _items(config: Tree, name: str) -> list[Any]:
    """The configurations of what a layer keeps in a list."""
    found = options_of(config).get(name)
    return found if isinstance(found, list) else []


# from a file ---------------------------------------------------------------------------------------------------------


def model_of(tree: Tree, config: Tree) -> Tree:
    """The variables by names, of what a file has by numbers; without those of the optimizer."""
    return _named({name: value for name, value in tree.items() if name != OPTIMIZER}, config)


def _named(node: Tree, config: Tree) -> Tree:
    values = numbered(node.get(VARS))
    made: Tree = dict(zip(_variables(config, len(values)), values.values()))
    stack = layers_of(config)
    for key, child in node.items():
        if not isinstance(child, dict):
            _put(made, key, child)
        elif key == VARS:
            continue
        elif stack and key in (LAYERS, _OLD_LAYERS):
            left = dict(child)
            for layer in stack:
                if isinstance(left.get(layer.group), dict):
                    _put(made, layer.name, _named(left.pop(layer.group), layer.config))
            _put(made, key, _named(left, {}))
        else:
            _put(made, key.lstrip("_"), _list(child, config, key) or _named(child, _sub(config, key)))
    return made


def _put(made: Tree, name: str, value: Any) -> None:
    """An entry more, under a name of its own; what is empty is no entry."""
    number, wanted = 0, name
    while wanted in made:
        number += 1
        wanted = f"{name}_{number}"
    if not isinstance(value, dict) or value:
        made[wanted] = value


def _list(child: Tree, config: Tree, key: str) -> Tree:
    """What a layer keeps in a list, by number; empty if it is no list that the configuration knows."""
    groups: dict[str, int] = {}
    items = [(_new(snake(class_of(item)), groups), item) for item in _items(config, key)]
    if VARS in child or not items or not child.keys() <= groups.keys():
        return {}
    return {str(at): _named(child[group], item) for at, (group, item) in enumerate(items) if group in child}


def _sub(config: Tree, key: str) -> Tree:
    key = key.lstrip("_")
    if key in ("forward_layer", "backward_layer"):
        key = "layer"
    found = options_of(config).get(key)
    if key.endswith("_dense") and class_of(config) in ("MultiHeadAttention", "GroupedQueryAttention"):
        return {"class_name": "EinsumDense", "config": {"bias_axes": options_of(config).get("use_bias", True)}}
    if key == "cell" and class_of(config) in ("LSTM", "GRU", "SimpleRNN"):
        return {"class_name": f"{class_of(config)}Cell", "config": options_of(config)}
    return found if isinstance(found, dict) else {}


def numbered(values: Any) -> Tree:
    """Variables in the order of their numbers."""
    if not isinstance(values, dict):
        return {}
    return dict(
        sorted(values.items(), key=lambda item: (len(item[0]), item[0]) if item[0].isdecimal() else (99, item[0]))
    )


def _variables(config: Tree, count: int) -> list[str]:
    options = options_of(config)
    names = [name for name, option in _VARIABLES.get(class_of(config), ()) if not option or options.get(option, True)]
    return names if len(names) == count else [str(at) for at in range(count)]


# into a file ---------------------------------------------------------------------------------------------------------


@dataclass
class Placed:
    """Paths in the state by paths in the file; `links` are second paths of groups; `left` is what has no place."""

    arrays: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def is_raw(state: Any) -> bool:
    """Whether a state has Keras's own numbers."""
    if not isinstance(state, dict):
        return False
    own = state.get(VARS)
    if isinstance(own, dict) and own and all(key.isdecimal() for key in own):
        return True
    return any(is_raw(part) for part in state.values())


def raw(state: Tree, here: str = "", there: str = "") -> Iterator[tuple[str, str]]:
    """Of such a state, every array's path, in the file and in the state."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from raw(value, join(here, key), f"{there}{key}/")
        elif isinstance(value, ARRAYS):
            yield f"{there}{key}", join(here, key)


def places(model: Tree, config: Tree, above: str) -> Placed:
    """Where each variable of a model belongs, whose own path in the state is `above`."""
    placed = Placed()
    _place(placed, model, config, above, "")
    return placed


def _place(placed: Placed, state: Tree, config: Tree, here: str, there: str) -> None:
    # The states of random generators are no part of Keras's files.
    own = [key for key, value in state.items() if isinstance(value, ARRAYS) and "seed_generator" not in key]
    placed.arrays.update({f"{there}{VARS}/{at}": join(here, key) for at, key in enumerate(own)})
    stack = {layer.name: layer for layer in layers_of(config)}
    for key, value in state.items():
        path = join(here, key)
        if key in stack and isinstance(value, dict):
            layer = stack[key]
            _place(placed, value, layer.config, path, f"{there}{LAYERS}/{layer.group}/")
        elif isinstance(value, dict) and value:
            _place_part(placed, value, config, key, path, there)
        elif not isinstance(value, ARRAYS):
            placed.left.append(path)


def _place_part(placed: Placed, value: Tree, config: Tree, key: str, path: str, there: str) -> None:
    """What hangs at an attribute of a layer: Keras looks under its name, which may begin with a line."""
    if not all(name.isdecimal() for name in value):
        _place(placed, value, _sub(config, key), path, f"{there}{key}/")
    else:
        groups: dict[str, int] = {}
        items = [(_new(snake(class_of(item)), groups), item) for item in _items(config, key)]
        for name, part in value.items():
            if int(name) >= len(items) or not isinstance(part, dict):
                placed.left.append(join(path, name))
                continue
            group, item = items[int(name)]
            _place(placed, part, item, join(path, name), f"{there}{key}/{group}/")
    if any(name.startswith(f"{there}{key}/") for name in placed.arrays):
        placed.links[f"{there}_{key}"] = f"{there}{key}"
