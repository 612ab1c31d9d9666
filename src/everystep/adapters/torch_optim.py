"""PyTorch optimizers as nested state keyed by the names of parameters, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from everystep.adapters import Boxed, torch_sharded
from everystep.errors import Mismatch, Unsupported
from everystep.schema import Box, Leaf, LoadReport, Roled
from everystep.schema.tree import join

Tensor = torch.Tensor
Optimizer = torch.optim.Optimizer
# Parts of a name that wrappers put in: torch.compile and activation checkpointing.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
# A group's options that belong to the program, or are kept in a form of their own.
_OWN_OPTIONS = ("params", "param_names")
_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def wrapper_keys(module: torch.nn.Module) -> set[str]:
    """The full names under which wrappers in the module tree hold what they wrap."""
    return {
        f"{name}.module" if name else "module"
        for name, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, (DataParallel, DistributedDataParallel))
    }


def canonical(keys: Iterable[str], wrappers: Collection[str] = ()) -> dict[str, str]:
    """Each key with the prefixes of wrappers dropped; the keys themselves if two would fall together."""
    names = {key: ".".join(_kept(key, wrappers)) for key in keys}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {key: name[len("module.") :] for key, name in names.items()}
    return names if len(set(names.values())) == len(names) else {key: key for key in names}


def _kept(key: str, wrappers: Collection[str]) -> Iterator[str]:
    end = -1
    for part in key.split("."):
        end += 1 + len(part)
        if part not in _WRAPPED and key[:end] not in wrappers:
            yield part


def aliases(tracked: Mapping[str, Any]) -> dict[int, list[str]]:
    """Every name of every parameter of the tracked modules, by the parameter's id."""
    found: dict[int, list[str]] = {}
    for title, module in tracked.items():
        if isinstance(module, torch.nn.Module):
            torch_sharded.settle(module)
            named = dict(module.named_parameters(remove_duplicate=False))
            for key, name in canonical(named, wrapper_keys(module)).items():
                found.setdefault(id(named[key]), []).append(f"{title}.{name}")
    return found


def _names(optimizer: Optimizer, tracked: Mapping[str, Any]) -> dict[int, list[str]]:
    """Every name of the optimizer's parameters by id, best first; the position is the last."""
    known = aliases(tracked)
    return {
        id(param): [*known.get(id(param), ()), f"group{g}.param{p}"]
        for g, group in enumerate(optimizer.param_groups)
        for p, param in enumerate(group["params"])
    }


def _is_foreign(optimizer: Optimizer) -> bool:
    """Whether the optimizer has a format of its own, which only its own methods understand."""
    kind = type(optimizer)
    return (
        kind.load_state_dict is not Optimizer.load_state_dict
        or kind.state_dict is not Optimizer.state_dict
        or any(getattr(optimizer, hooks, None) for hooks in _HOOKS)
    )


def capture(optimizer: Optimizer, path: str, tracked: Mapping[str, Any]) -> Roled:
    """{"state": {parameter: …}, "groups": [{option: …, "params": […]}], "shapes": {parameter: …}} and, if the
    optimizer keeps state that belongs to no parameter, "other"."""
    if _is_foreign(optimizer):
        return Roled("optimizer", optimizer.state_dict())
    names = {key: found[0] for key, found in _names(optimizer, tracked).items()}
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise Unsupported(
            f"two parameters have the name {twice!r}", where=path, do="track the modules under names without dots"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    # Equal gradients make equal states in torch's own optimizers; another may keep what is of one rank alone.
    own = type(optimizer).__module__.startswith("torch.optim.")
    alike = torch_sharded.shared_params(tracked.values()) if own else {}
    out: dict[str, Any] = {
        "state": {
            names[id(param)]: _entry(optimizer.state[param], alike.get(id(param)))
            for param in params
            if param in optimizer.state
        },
        "groups": [
            {**_options(group), "params": [names[id(param)] for param in group["params"]]}
            for group in optimizer.param_groups
        ],
        "shapes": {names[id(param)]: list(param.shape) for param in params},
    }
    other = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    return Roled("optimizer", {**out, "other": other} if other else out)


def _entry(entries: Any, share: tuple[int, int, bool] | None) -> Any:
    if not isinstance(entries, Mapping):
        return entries
    return {key: torch_sharded.shared(value, share) for key, value in entries.items()}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def not_captured(optimizer: Optimizer, path: str) -> list[str]:
    """State of parameters that no group has any more: a step does not read it."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    stale = [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in held]
    if not stale or _is_foreign(optimizer):
        return []
    return [f"{path}: state of {len(stale)} parameters that are in no group of the optimizer"]


def wanted(optimizer: Optimizer, sketch: Callable[[], Any], tracked: Mapping[str, Any]) -> dict[str, tuple[Box, ...]]:
    """Of the saved leaves, the boxes that the state of parameters holds here that are DTensors."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if _is_foreign(optimizer) or not any(map(torch_sharded.is_sharded, params)):
        return {}
    state = sketch()
    try:
        state = _by_position(state) if "param_groups" in state else state
        found = _match_params(optimizer, state, "", _names(optimizer, tracked), LoadReport())
        saved = state["state"]
        return torch_sharded.wanted(
            pair for name, param in found.items() for pair in _pairs(optimizer.state.get(param), saved.get(name), param)
        )
    except (AttributeError, KeyError, TypeError):
        return {}  # `apply` says what is wrong


def _pairs(current: Any, saved: Any, param: Tensor) -> Iterator[tuple[Any, Any]]:
    """(the DTensor that says how it is cut, or None; the saved leaf) of the state of one parameter."""
    if isinstance(saved, Leaf):
        yield torch_sharded.template(current, param, saved), saved
    elif isinstance(saved, Mapping):
        old = current if isinstance(current, Mapping) else {}
        for key, leaf in saved.items():
            if isinstance(leaf, Leaf):
                yield torch_sharded.template(old.get(key), _shaping(param, key), leaf), leaf


def _shaping(param: Tensor, key: Any) -> Tensor | None:
    """The parameter that says how an entry of its state is cut; counters of steps are on every rank."""
    return None if key == "step" else param


def apply(
    optimizer: Optimizer, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport
) -> Callable[[], None]:
    if _is_foreign(optimizer):
        report.loaded.append(path)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        state = _cut_by_position(state, params)
        if any(param.is_floating_point() and param.dtype.itemsize < 4 for param in params):
            report.inexact.append(f"{path} has its own load_state_dict: torch's casts state to the parameters' type")
        return lambda: optimizer.load_state_dict(state)
    if isinstance(state, Mapping) and "param_groups" in state:
        state = _by_position(state)
    if not isinstance(state, Mapping) or not {"state", "groups"} <= set(state):
        raise Mismatch(
            "the checkpoint has no optimizer here", where=path, do="load it into what was saved by this name"
        )
    try:
        plan = _match(optimizer, state, path, _names(optimizer, tracked), report)
    except (AttributeError, KeyError, TypeError) as error:
        raise Mismatch(
            f"not the state of an optimizer: {error!r}", where=path, do="was it saved by this name?"
        ) from error
    return lambda: _place(optimizer, plan)


def _cut_by_position(state: Any, params: list[Tensor]) -> Any:
    """What torch's own state_dict() gave, with the state of DTensors cut as they are."""
    if not any(map(torch_sharded.is_sharded, params)) or not isinstance(state, Mapping) or "param_groups" not in state:
        return state
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, params))
    entries = {
        number: {key: torch_sharded.cut_alike(_shaping(own[number], key), one) for key, one in value.items()}
        if number in own and isinstance(value, Mapping)
        else value
        for number, value in state["state"].items()
    }
    return {**state, "state": entries}


def _by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's own state_dict() gives, in our form."""
    names = {
        number: f"group{g}.param{p}"
        for g, group in enumerate(state["param_groups"])
        for p, number in enumerate(group["params"])
    }
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {
        "state": {names[key]: value for key, value in state["state"].items() if key in names},
        "groups": groups,
        "other": {key: value for key, value in state["state"].items() if key not in names},
    }


@dataclass
class _Plan:
    """What goes where: (parameter, its saved entries or None), (own group, saved options), state of no parameter."""

    entries: list[tuple[Tensor, Any]] = field(default_factory=list)
    groups: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    other: dict[Any, Any] = field(default_factory=dict)


def _match(
    optimizer: Optimizer, state: Mapping[str, Any], path: str, names: dict[int, list[str]], report: LoadReport
) -> _Plan:
    plan = _Plan(other=dict(state.get("other", {})))
    found = _match_params(optimizer, state, path, names, report)
    shapes, saved = state.get("shapes", {}), state["state"]
    for name, param in found.items():
        where = join(join(path, "state"), name)
        if name in shapes and list(shapes[name]) != list(param.shape):
            report.reshaped.append(where)
            continue
        entries = saved.get(name)
        plan.entries.append((param, entries))
        report.loaded += [join(where, key) for key in (entries if isinstance(entries, Mapping) else ())]
    report.loaded += [join(join(path, "other"), key) for key in plan.other]
    _match_groups(optimizer, state["groups"], path, found, plan, report)
    return plan


def _match_params(
    optimizer: Optimizer, state: Mapping[str, Any], path: str, names: dict[int, list[str]], report: LoadReport
) -> dict[str, Tensor]:
    """The parameter here for each name in the checkpoint."""
    where = join(path, "state")
    params = {id(param): param for group in optimizer.param_groups for param in group["params"]}
    saved = {name: None for group in state["groups"] for name in group["params"]}
    found: dict[str, Tensor] = {}
    for key, param in params.items():
        name = next((name for name in names[key] if name in saved and name not in found), None)
        if name is None:
            report.missing.append(join(where, names[key][0]))
        else:
            found[name] = param
    report.unexpected += [join(where, name) for name in saved if name not in found]
    return found


def _match_groups(
    optimizer: Optimizer, saved: list[Any], path: str, found: dict[str, Tensor], plan: _Plan, report: LoadReport
) -> None:
    where = join(path, "groups")
    pairs = _pair(optimizer.param_groups, saved, found)
    report.missing += [join(where, g) for g in range(len(optimizer.param_groups)) if g not in pairs]
    report.unexpected += [join(where, g) for g in range(len(saved)) if g not in pairs.values()]
    known = {id(param) for param in found.values()}
    for g, s in pairs.items():
        own, options = optimizer.param_groups[g], saved[s]
        here = [id(param) for param in own["params"] if id(param) in known]
        there = [id(found[name]) for name in options["params"] if name in found]
        # LBFGS keeps all parameters as one vector, in the order of the group.
        if set(here) != set(there) or (isinstance(optimizer, torch.optim.LBFGS) and here != there):
            report.reshaped.append(join(join(where, g), "params"))
            continue
        plan.groups.append((own, {key: value for key, value in options.items() if key not in _OWN_OPTIONS}))
        report.loaded += [join(join(where, g), key) for key in options if key not in _OWN_OPTIONS]
        report.inexact += [
            f"{join(join(where, g), key)} is not in the checkpoint: it stays as the program set it"
            for key in own
            if key not in options and key not in _OWN_OPTIONS
        ]


def _pair(own: list[dict[str, Any]], saved: list[Any], found: dict[str, Tensor]) -> dict[int, int]:
    """Which saved group is which group here: the one with the same parameters, else the one in the same place."""
    ids = [frozenset(id(found[name]) for name in group["params"] if name in found) for group in saved]
    pairs: dict[int, int] = {}
    for g, group in enumerate(own):
        here = frozenset(id(param) for param in group["params"])
        same = [s for s, there in enumerate(ids) if here and there == here and s not in pairs.values()]
        if same:
            pairs[g] = g if g in same else same[0]
    for g in range(min(len(own), len(saved))):
        if g not in pairs and g not in pairs.values():
            pairs[g] = g
    return dict(sorted(pairs.items()))


def _place(optimizer: Optimizer, plan: _Plan) -> None:
    placer = _Placer()
    with torch.no_grad():
        for own, options in plan.groups:
            for key, value in options.items():
                own[key] = placer.put(own.get(key), value)
        groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
        for param, entries in plan.entries:
            if entries is None:
                optimizer.state.pop(param, None)
                continue
            current, group = optimizer.state.get(param), groups[id(param)]
            if not isinstance(entries, Mapping):
                optimizer.state[param] = placer.put(current, entries, param, param.device)
                continue
            old = current if isinstance(current, Mapping) else {}
            optimizer.state[param] = {
                key: placer.put(old.get(key), value, _shaping(param, key), _device(group, param, key))
                for key, value in entries.items()
            }
        for key, value in plan.other.items():
            optimizer.state[key] = placer.put(optimizer.state.get(key), value)
    # As torch's own load does: optimizers bring options and state of older versions up to date here.
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _device(group: Mapping[str, Any], param: Tensor, key: Any) -> torch.device:
    """Where an entry lives: with its parameter, but for step counters that no kernel reads."""
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if on_host else param.device


class _Placer:
    """Puts saved values in the place of current ones: tensors that fit are filled in place, exactly and never cast."""

    def __init__(self) -> None:
        self.placed: dict[int, Any] = {}
        self.filled: set[int] = set()

    def put(self, current: Any, value: Any, param: Tensor | None = None, device: torch.device | None = None) -> Any:
        if isinstance(value, (Tensor, Boxed)):
            if id(value) not in self.placed:
                like = torch_sharded.template(current, param, value)
                if like is not None or isinstance(value, Boxed):
                    self.placed[id(value)] = self._shard(current, value, like)
                else:
                    self.placed[id(value)] = self._tensor(current, value, param, device)
            return self.placed[id(value)]
        if type(value) is dict:
            inner = current if isinstance(current, Mapping) else {}
            return {key: self.put(inner.get(key), one, param, device) for key, one in value.items()}
        if type(value) in (list, tuple):
            parts = current if type(current) is type(value) and len(current) == len(value) else [None] * len(value)
            return type(value)(self.put(old, one, param, device) for old, one in zip(parts, value))
        return value

    def _shard(self, current: Any, value: Any, like: Any) -> Any:
        """A DTensor that is cut as `like`: the current one, if it can take the value."""
        dtype = torch_sharded.element_type(value)
        placed = None
        if current is like and like is not None and current.dtype == dtype and id(current) not in self.filled:
            self.filled.add(id(current))
            placed = current if torch_sharded.fill(current, value) else None
        elif like is not None:
            placed = torch_sharded.made(like, value, dtype)
        if placed is None:
            raise Mismatch(f"torch cannot hold {dtype or 'what was saved'} here", do='load it with like="numpy"')
        return placed

    def _tensor(self, current: Any, value: Tensor, param: Tensor | None, device: torch.device | None) -> Tensor:
        if self._fits(current, value, param):
            self.filled.add(id(current))
            current.copy_(value)
            return current  # type: ignore[no-any-return]
        device = device or (current.device if isinstance(current, Tensor) else value.device)
        strided = param is not None and value.layout is param.layout is torch.strided
        if param is not None and strided and value.shape == param.shape and value.stride() != param.stride():
            # With other strides than the parameter's, torch takes other kernels, and their last bit may differ.
            return torch.empty_like(param, dtype=value.dtype, device=device, requires_grad=False).copy_(value)
        return value.to(device)

    def _fits(self, current: Any, value: Tensor, param: Tensor | None) -> bool:
        """Whether `current` can take the value: of the same type, and nobody else's memory."""
        return (
            type(current) is Tensor
            and id(current) not in self.filled
            and value.layout is current.layout is torch.strided
            and current.shape == value.shape
            and current.dtype == value.dtype
            and (current.is_contiguous() or (param is not None and current.stride() == param.stride()))
        )
