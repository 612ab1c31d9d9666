"""gluon.Trainer: its optimizer's states by the names of parameters, counts, schedule and loss scale; no pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mxnet as mx
import numpy as np

from everystep.adapters.mxnet_arrays import NDArray, same_bits
from everystep.adapters.mxnet_arrays import make as make_array
from everystep.errors import Mismatch, Unsupported
from everystep.schema import LoadReport, Roled
from everystep.schema.plain import is_plain
from everystep.schema.tree import join

# Of an optimizer: what the program makes again, and what is kept in another form.
_APART = (
    "param_dict", "idx2name", "sym_info", "allow_np_array", "aggregate_num", "lr_scheduler",
    "_index_update_count", "_all_index_update_counts",
)  # fmt: skip


def _names(trainer: Any, tracked: Mapping[str, Any]) -> list[list[str]]:
    """Every name of each parameter, in the trainer's order, best first; the position is the last."""
    known: dict[int, list[str]] = {}
    for title, block in tracked.items():
        if isinstance(block, mx.gluon.Block):
            for name, param in block._collect_params_with_prefix().items():
                known.setdefault(id(param), []).append(f"{title}.{name}")
    return [[*known.get(id(param), ()), f"param{index}"] for index, param in enumerate(trainer._params)]


def _updaters(trainer: Any, path: str) -> list[Any]:
    """What holds the optimizer's states: one for each device, or the store's own."""
    if trainer._kvstore is None or not trainer._update_on_kvstore:
        return list(trainer._updaters)
    if trainer._distributed:
        raise Unsupported(
            "the optimizer's state lies on the servers of a distributed kvstore, which give it to nobody",
            where=path,
            do="gluon.Trainer(…, update_on_kvstore=False)",
        )
    return [trainer._kvstore._updater]


def renew(trainer: Any) -> None:
    """A store that updates the weights has copies of them: a new one takes the weights as they are now. What the old
    one knew of the optimizer goes along."""
    if not trainer._kv_initialized:
        if len(trainer._contexts) > 1 and all(param._data is not None for param in trainer._params):
            make_ready(trainer)  # at the first step it would give each device what the first one holds
        return
    if trainer._kvstore is not None and trainer._update_on_kvstore and not trainer._distributed:
        before = trainer._kvstore._updater
        trainer._reset_kvstore()
        make_ready(trainer)
        after = trainer._kvstore._updater
        after.states, after.states_synced = before.states, dict.fromkeys(before.states, False)


def make_ready(trainer: Any) -> None:
    """As the first step does."""
    if not trainer._kv_initialized:
        trainer._init_kvstore()
    if trainer._params_to_init:
        trainer._init_params()


def _check_built(trainer: Any, names: list[list[str]], path: str) -> None:
    for param, found in zip(trainer._params, names):
        if param._data is None:
            raise Unsupported(
                "a deferred parameter has no values yet",
                where=join(path, found[0]),
                do="run one forward pass before saving or loading",
            )


def capture(trainer: Any, path: str, tracked: Mapping[str, Any]) -> Roled:
    """{"state": {parameter: …}, "options": …, "by_parameter": …, "counts": …, "scheduler": …, "scale": …, "shapes": …};
    with several devices "copies" where they differ, with loss scaling "amp"."""
    every = _names(trainer, tracked)
    _check_built(trainer, every, path)
    names = [found[0] for found in every]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Unsupported(
            f"two parameters have the name {twice!r}", where=path, do="track the blocks under names without dots"
        )
    optimizer = trainer._optimizer
    options, by_parameter, _ = _attributes(optimizer, names)
    first, *others = [_named(updater.states, names) for updater in _updaters(trainer, path)]
    out: dict[str, Any] = {
        "state": first,
        "options": options,
        "by_parameter": by_parameter,
        "counts": {device: _named(counts, names) for device, counts in optimizer._all_index_update_counts.items()},
        "scheduler": _scheduler(optimizer.lr_scheduler)[0],
        "scale": trainer._scale,
        "shapes": _named({index: list(param.shape) for index, param in enumerate(trainer._params)}, names),
    }
    copies = {
        number: {name: state for name, state in other.items() if not same_bits(state, first.get(name))}
        for number, other in enumerate(others, 1)
    }
    if any(copies.values()):
        out["copies"] = copies
    scaler = getattr(trainer, "_amp_loss_scaler", None)
    if scaler is not None:
        out["amp"] = {"original_scale": trainer._amp_original_scale, "scaler": _plain_of(vars(scaler))}
    return Roled("optimizer", out)


def _named(numbered: Mapping[int, Any], names: list[str]) -> dict[str, Any]:
    """In the order of the names: MXNet's own follows names with counters, which other programs count otherwise."""
    return {names[index]: numbered[index] for index in sorted(numbered, key=lambda index: names[index])}


def _attributes(optimizer: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """An optimizer's own values; those that it keeps by the number of a parameter; the names of what has no form."""
    options: dict[str, Any] = {}
    by_parameter: dict[str, Any] = {}
    left: list[str] = []
    for key, value in vars(optimizer).items():
        if key in _APART:
            continue
        if not _has_form(value):
            left.append(key)
        elif type(value) is dict and value and all(type(k) is int and 0 <= k < len(names) for k in value):
            by_parameter[key] = _named(value, names)
        else:
            options[key] = value
    return options, by_parameter, left


def _has_form(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_has_form, value))
    if isinstance(value, Mapping):
        return type(value) is dict and all(is_plain(key) for key in value) and all(map(_has_form, value.values()))
    return is_plain(value) or isinstance(value, (NDArray, np.ndarray, np.generic))


def _plain_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if _has_form(value)}


def _scheduler(scheduler: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """A schedule's kind and values, and the names of those that have no form. A function has none."""
    if scheduler is None or not hasattr(scheduler, "__dict__") or not vars(scheduler):
        return None, []
    values = _plain_of(vars(scheduler))
    return {"kind": type(scheduler).__name__, "values": values}, [key for key in vars(scheduler) if key not in values]


def not_captured(trainer: Any, path: str) -> list[str]:
    """Attributes that only a program can make again, and what MXNet gives to nobody."""
    optimizer = trainer._optimizer
    left = [f"optimizer.{key}" for key in _attributes(optimizer, [""] * len(trainer._params))[2]]
    left += [f"lr_scheduler.{key}" for key in _scheduler(optimizer.lr_scheduler)[1]]
    found = [f"{path}: {key}" for key in left]
    if trainer._compression_params:
        found.append(f"{path}: what gradient compression has left over")
    return found


@dataclass
class _Plan:
    """What goes where, by the number of a parameter."""

    states: list[dict[int, Any]] = field(default_factory=list)
    """For each device of the checkpoint."""
    by_parameter: dict[str, dict[int, Any]] = field(default_factory=dict)
    counts: dict[int, dict[int, int]] = field(default_factory=dict)


def apply(trainer: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport) -> Callable[[], None]:
    if not isinstance(state, Mapping) or not {"state", "options", "counts", "shapes"} <= set(state):
        raise Mismatch("the checkpoint has no trainer here", where=path, do="load it into what was saved by this name")
    names = _names(trainer, tracked)
    _check_built(trainer, names, path)
    try:
        plan = _match(trainer, state, path, names, report)
        _match_rest(trainer, state, path, report)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Mismatch(f"not the state of a trainer: {error!r}", where=path, do="was it saved by this name?") from error
    return lambda: _place(trainer, state, plan, path)


def _match(trainer: Any, state: Mapping[str, Any], path: str, names: list[list[str]], report: LoadReport) -> _Plan:
    where, shapes = join(path, "state"), state["shapes"]
    numbers: dict[str, int] = {}
    for index, (param, found) in enumerate(zip(trainer._params, names)):
        name = next((name for name in found if name in shapes and name not in numbers), None)
        if name is None:
            report.missing.append(join(where, found[0]))
        elif list(shapes[name]) != list(param.shape):
            report.reshaped.append(join(where, name))
        else:
            numbers[name] = index
            report.loaded.append(join(where, name))
    reshaped = set(report.reshaped)
    report.unexpected += [
        join(where, name) for name in shapes if name not in numbers and join(where, name) not in reshaped
    ]

    def numbered(named: Mapping[str, Any]) -> dict[int, Any]:
        return {numbers[name]: value for name, value in named.items() if name in numbers}

    copies = state.get("copies", {})
    plan = _Plan([numbered({**state["state"], **copies.get(at, {})}) for at in range(1 + max(copies, default=0))])
    plan.by_parameter = {key: numbered(value) for key, value in state.get("by_parameter", {}).items()}
    plan.counts = {device: numbered(counts) for device, counts in state["counts"].items()}
    if len(plan.states) > len(trainer._contexts):
        report.inexact.append(f"{where} was kept by {len(plan.states)} devices, {len(trainer._contexts)} are here")
    return plan


def _match_rest(trainer: Any, state: Mapping[str, Any], path: str, report: LoadReport) -> None:
    """Options, schedule, loss scale: whether there is the same here."""
    own = vars(trainer._optimizer)
    for key in (*state["options"], *state.get("by_parameter", {})):
        (report.loaded if key in own else report.unexpected).append(join(join(path, "options"), key))
    kinds = [found["kind"] if found else None for found in (state["scheduler"], _scheduler(own["lr_scheduler"])[0])]
    _note(kinds[0], kinds[1], join(path, "scheduler"), report)
    amp = getattr(trainer, "_amp_loss_scaler", None)
    _note("amp" if "amp" in state else None, "amp" if amp is not None else None, join(path, "amp"), report)


def _note(saved: str | None, here: str | None, path: str, report: LoadReport) -> None:
    if saved is None and here is None:
        return
    listed = (
        report.missing if saved is None else report.unexpected if here is None
        else report.loaded if saved == here else report.reshaped
    )  # fmt: skip
    listed.append(path)


def _place(trainer: Any, state: Mapping[str, Any], plan: _Plan, path: str) -> None:
    optimizer = trainer._optimizer
    for key, value in {**state["options"], **plan.by_parameter}.items():
        if key in vars(optimizer):
            setattr(optimizer, key, value if isinstance(value, np.ndarray) else _own(value))
    optimizer._all_index_update_counts = {0: {}, **{device: dict(one) for device, one in plan.counts.items()}}
    optimizer._index_update_count = optimizer._all_index_update_counts[0]
    if state["scheduler"] and optimizer.lr_scheduler is not None:
        vars(optimizer.lr_scheduler).update(_own(state["scheduler"]["values"]))
    trainer._scale = state["scale"]
    scaler = getattr(trainer, "_amp_loss_scaler", None)
    if scaler is not None and "amp" in state:
        trainer._amp_original_scale = state["amp"]["original_scale"]
        vars(scaler).update(state["amp"]["scaler"])
    make_ready(trainer)
    for number, updater in enumerate(_updaters(trainer, path)):
        states = plan.states[min(number, len(plan.states) - 1)]
        updater.states = {index: _own(one) for index, one in states.items()}
        updater.states_synced = dict.fromkeys(states, False)  # MXNet brings each to its weight's device


def _own(value: Any) -> Any:
    """A copy that nothing else holds: each device has arrays of its own, and updates them in place."""
    if isinstance(value, NDArray):
        return value.copy()
    if isinstance(value, np.ndarray):
        return make_array(value, False, "")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_own, value))
    return {key: _own(one) for key, one in value.items()} if isinstance(value, Mapping) else value
