"""What is recorded between two saves: kept as it is given, made plain numbers when a save takes it along."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from everystep.errors import UsageError
from everystep.schema.plain import check_text, encode_metric
from everystep.vault.record import Series


class Recorded:
    """Metrics by step. Those of step None belong to whatever is saved next."""

    def __init__(self, steps_max: int) -> None:
        self._rows: dict[int | None, dict[str, Any]] = {}
        self._steps_max = steps_max
        self._dropped = False

    def add(self, step: int | None, metrics: Mapping[str, Any]) -> bool:
        """Whether this is the first time since the last save that the oldest step was given up for it."""
        held = {check_text(name, "the name of a metric"): hold(name, value) for name, value in metrics.items()}
        full = step not in self._rows and len(self._rows) >= self._steps_max
        if full:
            del self._rows[next(iter(self._rows))]
        self._rows.setdefault(step, {}).update(held)
        first, self._dropped = full and not self._dropped, full or self._dropped
        return first

    def at(self, step: int) -> dict[str, Any]:
        """What was recorded at a step, and at none."""
        return {**self._rows.get(None, {}), **self._rows.get(step, {})}

    def take(self, step: int | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """Everything, as plain values: (metrics of this step, metrics of other steps)."""
        told = plain_metrics(given)  # first: a misfit in it must lose nothing of what was recorded
        own = {**plain_metrics({**self._rows.pop(None, {}), **self._rows.pop(step, {})}), **told}
        rows = {at: plain_metrics(row) for at, row in self._rows.items() if at is not None}
        self._rows, self._dropped = {}, False
        return own, rows


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as a record keeps them.

    Raises:
        UsageError: for a value that is not one number, or a name that is no text.
    """
    return {
        check_text(name, "the name of a metric"): encode_metric(number(name, value), name)
        for name, value in metrics.items()
    }


def series(rows: Mapping[int, Mapping[str, Any]]) -> Series:
    """Rows of plain values as one event."""
    steps = sorted(rows)
    names = sorted({name for row in rows.values() for name in row})
    return Series(steps, {name: [rows[step].get(name) for step in steps] for name in names})


def hold(name: str, value: Any) -> Any:
    """A metric, safe from what its owner does next; a tensor is not brought to the CPU yet.

    Raises:
        UsageError: for what is not one number.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if _reader(value) is None or math.prod(getattr(value, "shape", ())) != 1:
        raise _not_a_number(name, value)
    if callable(getattr(value, "detach", None)):
        own = value.detach()
        return own.clone() if callable(getattr(own, "clone", None)) else own.copy()
    changes = isinstance(value, (np.generic, np.ndarray)) or callable(getattr(value, "assign", None))
    return number(name, value) if changes else value


def _reader(value: Any) -> Any:
    """What frameworks call it: the method that gives a tensor's one number; None if there is none."""
    found = (getattr(value, method, None) for method in ("item", "asscalar", "numpy"))
    return next((method for method in found if callable(method)), None)


def number(name: str, value: Any) -> Any:
    """A metric as a plain number (or bool, str, None).

    Raises:
        UsageError: for what is not one number.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        plain = _reader(value)()
        plain = plain.item() if isinstance(plain, (np.generic, np.ndarray)) else plain
        return plain if type(plain) in (bool, int, float, str) else float(plain)
    except (AttributeError, ValueError, RuntimeError, TypeError) as error:
        raise _not_a_number(name, value) from error


def _not_a_number(name: str, value: Any) -> UsageError:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return UsageError(
        f"the metric {name!r} is not one number but a {type(value).__name__}{shape}",
        do="record a scalar: its mean, perhaps",
    )


def measure(name: str, value: Any) -> float | None:
    """A metric as something that can be ranked; None for text and nothing."""
    plain = number(name, value)
    return float(plain) if isinstance(plain, (int, float)) else None
