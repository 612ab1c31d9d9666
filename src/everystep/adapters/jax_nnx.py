"""Flax NNX: modules, optimizers and generators as objects whose variables are filled in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from everystep.schema import LoadReport, Roled, join

Rebuild = Callable[[Any, Any, LoadReport, str], Any]


def _nnx() -> Any:
    """Flax NNX, where the program itself has imported it; None for one of before 0.12, whose objects are refused."""
    nnx = sys.modules.get("flax.nnx")
    return nnx if hasattr(nnx, "Pytree") else None


def owns(target: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(target, nnx.Pytree)


def is_variable(value: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(value, nnx.Variable)


def describe(variable: Any) -> Any:
    """What a variable holds, with the role that its class tells."""
    return Roled(role, variable.get_raw_value()) if (role := _role(variable)) else _held(variable)


def _held(variable: Any) -> Any:
    value = variable.get_raw_value()
    return value if value is not None else Roled("other", None)


def _role(variable: Any) -> str | None:
    nnx = _nnx()
    roles = {nnx.Param: "weights", nnx.BatchStat: "buffer", nnx.RngState: "rng", nnx.OptState: "optimizer"}
    return next((role for kind, role in roles.items() if isinstance(variable, kind)), None)


def _flat(target: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """(path, variable or array) of an object; what is shared is there once, under its first path."""
    nnx = _nnx()
    return list(nnx.to_flat_state(nnx.state(target)))


def capture(target: Any) -> dict[Any, Any]:
    """Nested dicts by the names of attributes and the numbers of lists."""
    whole: dict[Any, Any] = {}
    for path, leaf in _flat(target):
        inner = whole
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return whole


def apply(target: Any, state: Any, path: str, report: LoadReport, rebuild: Rebuild) -> Callable[[], None]:
    """Matches what was saved with the variables, each by `rebuild`; the answer fills them."""
    nnx = _nnx()
    placed, known = [], set()
    for keys, where, leaf, given in _matched(target, state, path):
        known.add(where)
        if given is _NOWHERE:
            report.missing.append(where)
        else:
            placed.append((keys, rebuild(leaf, given, report, where)))
    report.unexpected += _leaves(state, path, known)
    return lambda: nnx.update(target, nnx.from_flat_state(placed))


def pairs(target: Any, state: Any) -> Iterator[tuple[Any, Any]]:
    """(variable or array, what was saved of it) of those that `apply` finds."""
    return ((leaf, given) for _, _, leaf, given in _matched(target, state, "") if given is not _NOWHERE)


_NOWHERE: Any = object()


def _matched(target: Any, state: Any, path: str) -> Iterator[tuple[tuple[Any, ...], str, Any, Any]]:
    """(keys, path, variable or array, what was saved there) of an object."""
    for keys, leaf in _flat(target):
        where, given = path, state
        for key in keys:
            where, given = join(where, key), _entry(given, key)
        yield keys, where, leaf, given


def _entry(given: Any, key: Any) -> Any:
    if isinstance(given, Mapping):
        return given.get(key, given.get(str(key), _NOWHERE))
    if isinstance(given, (list, tuple)) and type(key) is int and key < len(given):
        return given[key]
    return _NOWHERE


def _leaves(given: Any, path: str, known: set[str]) -> list[str]:
    """Paths of what is not known, below which nothing is known either."""
    if path in known:
        return []
    if isinstance(given, Mapping):
        return [found for key, value in given.items() for found in _leaves(value, join(path, key), known)]
    return [path] if given is not None else []
