"""What the contents of a file say: step, epoch, metrics, whether it is a delta."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from everystep.exchange.meanings import (
    COUNT_KEYS,
    DELTA_KEYS,
    EPOCH_KEYS,
    ITERATION_KEYS,
    METRIC_TABLES,
    NAMED_TABLES,
    OPTIMIZERS,
    STATE_TABLES,
    STEP_KEYS,
    is_metric,
)

METRICS_MAX = 256
_COUNT_MAX = 1 << 53


@dataclass(frozen=True)
class Facts:
    """`total`: the step counts from the beginning of training, whatever the epoch."""

    step: int | None = None
    step_key: str = ""
    total: bool = False
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    delta: bool = False
    keys: tuple[str, ...] = ()


def is_wanted(key: str) -> bool:
    """Whether a number under this key would be a fact."""
    return _is_count(key) or is_metric(key) or key in ITERATION_KEYS


def facts_of(top: Any, metadata: Mapping[str, str]) -> Facts:
    """What the light copy of a state says, and the text beside it."""
    if not isinstance(top, dict):
        return Facts()
    tables = [("", _numbers(metadata)), ("", top), *_tables(top), ("metrics/", _beside(metadata))]
    step_key, step = _first(tables, (*STEP_KEYS, *COUNT_KEYS))
    total = step_key.rpartition("/")[2] in STEP_KEYS
    if step is None:
        step_key, step = _first(_optimizers(top), ITERATION_KEYS)
        total = step is not None
    _, epoch = _first(tables, EPOCH_KEYS)
    metrics = {**_metrics(metadata, top), **_monitored(top.get("callbacks"))}
    fraction = next((t[k] for _, t in tables for k in EPOCH_KEYS if _is_number(t.get(k))), None)
    if epoch is None and fraction is not None and fraction > 0:
        metrics["epoch"] = float(fraction)
    is_delta = top.get("is_delta") is True or any(isinstance(top.get(key), dict) for key in DELTA_KEYS)
    return Facts(
        step, step_key, total, epoch,
        dict(list(metrics.items())[:METRICS_MAX]), is_delta, tuple(sorted(top)),
    )  # fmt: skip


def facts_of_trainer(text: str) -> Facts:
    """What the `trainer_state.json` beside a state says.

    Raises:
        ValueError, RecursionError: if that is no JSON.
    """
    top = json.loads(text)
    if not isinstance(top, dict):
        raise ValueError("not a table")
    found = facts_of({key: value for key, value in top.items() if key != "log_history"}, {})
    history = top.get("log_history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    at = [row for row in rows if found.step is not None and row.get("step") == found.step]
    metrics = {key: float(value) for row in at for key, value in row.items() if _is_value(value) and is_metric(key)}
    return Facts(found.step, found.step_key, True, found.epoch, {**found.metrics, **metrics})


_Table = Mapping[str, Any]


def _tables(top: _Table) -> Iterator[tuple[str, _Table]]:
    """Dicts in which programs keep their counts, with their keys, down to two levels; of a list, the last."""
    for key in (*STATE_TABLES, "optimizer_history"):
        value = top.get(key)
        value = value[-1] if isinstance(value, list) and value else value
        if isinstance(value, dict):
            yield f"{key}/", value
            yield from ((f"{key}/{k}/", value[k]) for k in STATE_TABLES if isinstance(value.get(k), dict))


def _optimizers(top: _Table) -> list[tuple[str, _Table]]:
    """Dicts in which TensorFlow and Keras count the updates that an optimizer made."""
    return [(f"{key}/", top[key]) for key in OPTIMIZERS if isinstance(top.get(key), dict)]


def _first(tables: list[tuple[str, _Table]], keys: tuple[str, ...]) -> tuple[str, int | None]:
    """The first count under one of the keys: a better key before a nearer table."""
    for key in keys:
        for path, table in tables:
            value: Any = table.get(key)
            if _is_number(value) and 0 <= value < _COUNT_MAX and value == int(value):
                return f"{path}{key}", int(value)
    return "", None


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _numbers(metadata: Mapping[str, str]) -> _Table:
    """Of the text beside a state, what is a number."""
    return {key: int(text) for key, text in metadata.items() if text.isdecimal() and len(text) < 16}


def _beside(metadata: Mapping[str, str]) -> _Table:
    """The metrics that stand as text beside a state."""
    try:
        found = json.loads(metadata.get("metrics", "{}"))
    except (ValueError, RecursionError):
        return {}  # another program's text under this name
    return found if isinstance(found, dict) else {}


def _metrics(metadata: Mapping[str, str], top: _Table) -> dict[str, float]:
    found: dict[str, float] = {}
    tables = [("", _beside(metadata), False), ("", top, True), *(("", top.get(key), False) for key in METRIC_TABLES)]
    tables += [(f"{key}/", top.get(key), True) for key in NAMED_TABLES]
    for prefix, table, by_name in tables:
        for path, key, value in _entries(table, deep=bool(prefix) or not by_name):
            if _is_value(value) and not _is_count(key) and (is_metric(key) or not by_name):
                found[prefix + path] = float(value)
    return found


def _entries(table: Any, deep: bool) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of a dict, and of the dicts in it."""
    for key, value in table.items() if isinstance(table, dict) else ():
        if deep and isinstance(value, dict):
            yield from ((f"{key}/{inner}", str(inner), item) for inner, item in value.items())
        else:
            yield str(key), str(key), value


def _is_value(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _COUNT_MAX)


def _is_count(key: str) -> bool:
    return key in STEP_KEYS or key in COUNT_KEYS or key in EPOCH_KEYS


def _monitored(callbacks: Any) -> dict[str, float]:
    """What Lightning's ModelCheckpoint watched: the value now, and the best until now."""
    found: dict[str, float] = {}
    for value in callbacks.values() if isinstance(callbacks, dict) else ():
        if not isinstance(value, dict) or "best_model_score" not in value:
            continue
        monitor = value.get("monitor")
        name = monitor if isinstance(monitor, str) else "model_score"
        if isinstance(monitor, str) and _is_value(value.get("current_score")):
            found[name] = float(value["current_score"])
        if _is_value(value["best_model_score"]):
            found[f"best_{name}"] = float(value["best_model_score"])
    return found
