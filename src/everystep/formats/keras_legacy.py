"""The whole models that Keras kept in .h5 files before version 3: layers and weights in their order, by attributes."""

from __future__ import annotations

from typing import Any

_Path = tuple[str, ...]
_WEIGHTS, _OPTIMIZER = "model_weights", "optimizer_weights"
_PARTS_MAX = 10_000


def state_of(tree: Any, attributes: dict[_Path, dict[str, Any]]) -> dict[str, Any] | None:
    """`model` with a dict of weights for each layer, in the model's order, and `optimizer`; None for other files.

    The attributes that list names are taken out: the state has them.
    """
    base: _Path = (_WEIGHTS,) if isinstance(tree.get(_WEIGHTS), dict) else ()
    layers = _names(attributes, base, "layer_names")
    if layers is None:
        return None
    group = tree[_WEIGHTS] if base else tree
    model: dict[str, Any] = {}
    for layer in (*layers, "top_level_model_weights"):
        weights = _listed(group.get(layer), attributes, (*base, layer))
        if weights is None and layer in layers:
            return None  # not what the attributes say: the file as it is
        if weights:
            model[layer] = weights
    state: dict[str, Any] = {"model": model}
    optimizer = _listed(tree.get(_OPTIMIZER), attributes, (_OPTIMIZER,))
    if optimizer:
        state["optimizer"] = optimizer
    for path in list(attributes):
        for name in list(attributes[path]):
            if name.rstrip("0123456789") in ("layer_names", "weight_names"):
                del attributes[path][name]
    return state


def _names(attributes: dict[_Path, dict[str, Any]], path: _Path, name: str) -> list[str] | None:
    """A list of names; long ones are split over numbered attributes."""
    found = attributes.get(path, {})
    if name in found:
        parts = [found[name]]
    else:
        parts = []
        while f"{name}{len(parts)}" in found and len(parts) < _PARTS_MAX:
            parts.append(found[f"{name}{len(parts)}"])
    names = [item for part in parts for item in (part if isinstance(part, list) else [part])]
    return names if parts and all(isinstance(item, str) for item in names) else None


def _listed(group: Any, attributes: dict[_Path, dict[str, Any]], path: _Path) -> dict[str, Any] | None:
    names = _names(attributes, path, "weight_names") if isinstance(group, dict) else None
    if names is None:
        return None
    made: dict[str, Any] = {}
    for name in names:
        value: Any = group
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None or isinstance(value, dict):
            return None
        made[name] = value
    return made
