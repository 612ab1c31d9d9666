"""Gluon blocks: their parameters by structural name, on one device or on several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mxnet as mx

from everystep.adapters.mxnet_arrays import NDArray, form_of, put, same_bits
from everystep.adapters.mxnet_trainer import renew
from everystep.errors import Mismatch, Unsupported
from everystep.schema import LoadReport, Roled
from everystep.schema.tree import join


def _parameters(block: Any, path: str) -> dict[str, Any]:
    """Structural name ("features.0.weight") -> parameter: names that no counter of layers is part of.

    Raises:
        Unsupported: for a parameter without values.
    """
    found: dict[str, Any] = block._collect_params_with_prefix()
    for name, param in found.items():
        check_built(param, join(path, name))
    return found


def check_built(param: Any, where: str) -> None:
    if param._data is not None:
        return
    if param._deferred_init:
        do = "run one forward pass before saving or loading"
        raise Unsupported("a deferred parameter has no values yet", where=where, do=do)
    raise Unsupported("a parameter that has not been initialized", where=where, do="block.initialize() comes first")


def _role(param: Any) -> str:
    """Running statistics and constants are never trained; what a program froze for now is a weight all the same."""
    trains = param._differentiable and not isinstance(param, mx.gluon.Constant)
    return "weights" if trains else "buffer"


def _copies(param: Any) -> list[Any]:
    """One array for each device. Of sparse weights a device holds only the rows it used last; the trainer has all."""
    if param._stype != "default" and param._trainer is not None:
        return [param._reduce()]
    return list(param._data)


def capture_block(block: Any, path: str) -> dict[str, Roled]:
    """{name: array}; with several devices also {"name@1": array} where the second holds another one."""
    state: dict[str, Roled] = {}
    for name, param in _parameters(block, path).items():
        first, *others = _copies(param)
        state[name] = Roled(_role(param), first)
        for number, other in enumerate(others, 1):
            if not same_bits(first, other):
                state[f"{name}@{number}"] = Roled(_role(param), other)
    return state


def apply_block(block: Any, state: Any, path: str, report: LoadReport) -> Callable[[], None]:
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise Mismatch("the checkpoint has no block here", where=path, do="load it into what was saved under this name")
    own = _parameters(block, path)
    fills: list[tuple[Any, Any]] = []
    seen: dict[int, Any] = {}
    for name, param in own.items():
        where = join(path, name)
        if name not in state:
            report.missing.append(where)
            continue
        values = [state.get(f"{name}@{number}", state[name]) for number in range(len(param._data))]
        tied = seen.setdefault(id(param), values[0])
        fits = all(form_of(value, where) == form_of(array, where) for value, array in zip(values, param._data))
        if not fits or (tied is not values[0] and not same_bits(tied, values[0])):
            report.reshaped.append(where)
        else:
            report.loaded.append(where)
            fills += zip(param._data, values)
    for name in state:
        base, _, number = name.rpartition("@")
        if name in own:
            continue
        if base not in own or not number.isdigit():
            report.unexpected.append(join(path, name))
        elif int(number) >= len(own[base]._data):
            report.inexact.append(f"{join(path, name)} is of a device more than there are here; it is left out")
    return lambda: _place(own, fills)


def _place(own: Mapping[str, Any], fills: list[tuple[Any, Any]]) -> None:
    def fill() -> None:
        with mx.autograd.pause():
            for target, value in fills:
                put(target, value)

    fill()
    trainers = {id(param._trainer): param._trainer for param in own.values() if param._trainer is not None}
    for trainer in trainers.values():
        renew(trainer)
    if trainers:
        fill()  # a new store has given each device the values of the first


def not_captured_of_block(block: Any, path: str) -> list[str]:
    """Arrays that are no parameters, and gradients that add up over several steps."""
    found: list[str] = []

    def look(part: Any, name: str) -> None:
        own = {id(array) for param in part._reg_params.values() for array in param._data or ()}
        for key, value in vars(part).items():
            if isinstance(value, NDArray) and id(value) not in own:
                found.append(f"{name}.{key}: an array that is no parameter")
        for key, child in part._children.items():
            look(child, f"{name}.{key}")

    look(block, path)
    adding = [name for name, param in block._collect_params_with_prefix().items() if param.grad_req == "add"]
    if adding:
        found.append(f"{path}: gradients that add up (grad_req='add') of {', '.join(adding[:3])}")
    return found
