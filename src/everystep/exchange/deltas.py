"""Files that hold differences of weights: which follows which, and their sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from everystep.errors import Mismatch, Unsupported
from everystep.exchange.found import DELTA, Found
from everystep.exchange.meanings import DELTA_KEYS
from everystep.schema import join

Array = np.ndarray[Any, Any]
_WEIGHTS = ("model_state_dict", "state_dict", "model", "weights", "params", "model_state", "net")


def chain(found: Sequence[Found], by_epoch: bool, doubled: Collection[int]) -> list[Found]:
    """Each delta with the file that it is added to: the one before it, if they follow each other at one distance.

    A delta holds what changed since the one before. Where one is missing, no sum behind it would be right.

    Args:
        doubled: steps of which there are weights and a delta: whether the one leads to the other can be told only if
            the sum goes on before them.
    """
    gaps = [later.step - earlier.step for earlier, later in pairwise(found) if later.role == DELTA]
    stride = min(gaps, default=0)
    alone = len(gaps) == 1 and stride > 1 and by_epoch
    made: list[Found] = []
    for at, one in enumerate(found):
        if one.role == DELTA:
            before = made[at - 1] if at else None
            if before is None:
                one = replace(one, missing=f"a file of weights before step {one.step} (weights_epoch_0, initial, base)")
            elif before.missing:
                one = replace(one, missing=before.missing)
            elif one.step - before.step != stride or alone:
                one = replace(one, missing=f"the file of step {one.step - (1 if alone else stride)}")
            elif before.step in doubled and not (at > 1 and made[at - 2].step == before.step - stride):
                what = f"whether the delta of step {before.step} is in the weights of that step, which must be called"
                one = replace(one, missing=f"{what} initial if it is not,")
            else:
                one = replace(one, base=before.path)
        made.append(one)
    return made


def add(base: Any, delta: Any, where: str) -> Any:
    """The state that a delta leads to: the base's weights plus the delta's, each in the dtype of the base, and what
    else the delta's file holds. Arrays of the delta are let go as they are added.

    Raises:
        Mismatch: for names, shapes and dtypes that the base does not have.
        Unsupported: if either holds no weights, or several tables of them.
    """
    key, table = _weights(base, where)
    name, changes = _weights(delta, where)
    rest = {} if name is None else {k: v for k, v in delta.items() if k != name and k not in DELTA_KEYS}
    unknown = [entry for entry in changes if entry not in table]
    if unknown:
        what = f"a delta for what the state before it does not have: {', '.join(map(str, unknown[:3]))}"
        raise Mismatch(what, where=where, do="is it of another run? put it into a folder of its own")
    made = type(table)()
    ids = Counter(id(value) for value in table.values())
    tied: dict[tuple[int, int], tuple[Array, Array]] = {}
    for entry, value in table.items():
        if entry not in changes:
            made[entry] = value
            continue
        change = changes.pop(entry)
        known = tied.get((id(value), id(change)))
        made[entry] = known[0] if known else _sum(value, change, join(key or "", entry), where)
        if ids[id(value)] > 1:
            tied[id(value), id(change)] = made[entry], change  # the latter, so that its id is nobody else's
    return made if key is None else {**rest, key: made}


def _sum(value: Array, change: Array, path: str, where: str) -> Array:
    if value.shape != change.shape or not _fits(value.dtype, change.dtype):
        what = f"{path} is {value.dtype}{list(value.shape)}, and its delta is {change.dtype}{list(change.shape)}"
        raise Mismatch(what, where=where, do="is it of another run? put it into a folder of its own")
    with np.errstate(all="ignore"):  # an infinity in the weights is theirs, and no reason to stop
        total = np.empty(value.shape, value.dtype)
        np.add(value, change.astype(value.dtype, copy=False), out=total)
    return total


def _fits(dtype: np.dtype[Any], change: np.dtype[Any]) -> bool:
    if dtype == change:
        return dtype.kind in "iufc" or _is_float(dtype)
    return _is_float(dtype) and _is_float(change) and np.can_cast(change, dtype, "safe")


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8"))


def _weights(state: Any, where: str) -> tuple[Any, dict[Any, Array]]:
    """(key, table) of a state's weights; the key is None where the state is that table."""
    if is_table(state):
        return None, state
    entries = state.items() if isinstance(state, dict) else ()
    tables = {key: value for key, value in entries if is_table(value)}
    named = [key for key in (*DELTA_KEYS, *_WEIGHTS) if key in tables]
    keys = list(tables) if len(tables) == 1 else named[:1]
    if not keys:
        what = "a delta, or what it is added to, has no table of arrays by name, or several and none is called weights"
        raise Unsupported(what, where=where, do="save the differences as one dict of arrays, as state_dict() has them")
    return keys[0], tables[keys[0]]


def is_table(value: Any) -> bool:
    """Whether a value is a dict of arrays, as a state_dict is."""
    return isinstance(value, dict) and bool(value) and all(isinstance(item, np.ndarray) for item in value.values())
