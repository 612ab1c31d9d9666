"""What the guests have in common: an explicit state out of a checkpoint, and leaving checkpoints behind."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import everystep


def load_state(checkpoint: everystep.Checkpoint, path: str = "", like: str = "saved") -> Any:
    """The explicit state of a checkpoint, or what lies under a path of it, whether or not objects were tracked too."""
    try:
        return checkpoint.load(only=f"state/{path}".rstrip("/"), like=like)
    except everystep.NotFound:
        return checkpoint.load(only=path or None, like=like)


def go_on_from(run: everystep.Run, checkpoint: everystep.Checkpoint) -> None:
    """Takes the run: what is saved next continues from this checkpoint."""
    if run.latest == checkpoint:
        run.resume()
    else:
        run.rewind(checkpoint)


def drop(run: everystep.Run, ids: Collection[str]) -> None:
    """Drops checkpoints and frees what nothing needs any more; the newest and tagged ones stay."""
    if ids:
        run.forget(everystep.when(lambda kept: kept.id not in ids), force=True, undo_seconds=0.0)
        run.prune()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of what a framework reports, that which is one number."""
    found = {}
    for name, value in metrics.items():
        single = callable(getattr(value, "item", None)) and math.prod(getattr(value, "shape", ())) == 1
        item = value.item() if single else value
        if type(item) in (int, float):
            found[str(name)] = item
    return found
