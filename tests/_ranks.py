"""A state that three ranks hold together: rows, columns, replicas, and what one of them has alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from everystep import Part

RANKS = 3
ROWS = 7
QUICK = {"poll_seconds": 0.01, "rank_deadline_seconds": 30.0}
GLOBAL = np.arange(ROWS * 5, dtype=np.float32).reshape(ROWS, 5)
WIDE = np.random.default_rng(1).random((ROWS, 100_000)).astype(np.float32)


def rows_of(rank: int) -> slice:
    """A rank's share: 3, 3 and 1 rows."""
    return slice(3 * rank, min(3 * rank + 3, ROWS))


def state_of(rank: int, step: int) -> dict[str, Any]:
    """Rows of a leaf, columns of another, a leaf that all have, and what only this rank has."""
    rows, start = rows_of(rank), 3 * rank
    columns = slice(2 * rank, min(2 * rank + 2, 5))
    return {
        "params": {
            "rows": Part(GLOBAL[rows] * step, (start, 0), GLOBAL.shape),
            "columns": Part(np.ascontiguousarray(GLOBAL[:, columns]), (0, columns.start), GLOBAL.shape),
            "wide": Part(WIDE[rows] + step, (start, 0), WIDE.shape),
            "all": np.full(4, step),
            f"only{rank}": np.full(2, rank),
        },
        "count": step,
    }


def whole_of(step: int) -> dict[str, Any]:
    own = {f"only{rank}": np.full(2, rank) for rank in range(RANKS)}
    return {
        "params": {
            "rows": GLOBAL * step, "columns": GLOBAL, "wide": WIDE + step, "all": np.full(4, step), **own,
        },
        "count": step,
    }  # fmt: skip
