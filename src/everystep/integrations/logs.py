"""A line in a plain log for each save."""

from __future__ import annotations

import logging
from typing import Any

import everystep


def log_saves(run: everystep.Run, logger: Any = None, *, level: int = logging.INFO) -> None:
    """Logs each save of this process, once it is durable.

    Args:
        logger: a `logging.Logger`; "everystep" by default.
    """
    target = logging.getLogger("everystep") if logger is None else logger

    def tell(checkpoint: everystep.Checkpoint) -> None:
        cost = checkpoint.cost
        metrics = ", ".join(
            f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in checkpoint.metrics.items()
        )
        target.log(
            level,
            "saved %s@%d (%s): %.3f MB of %.3f MB written, stall %.4f s%s",
            checkpoint.run, checkpoint.step, checkpoint.reason, cost["stored_bytes"] / 1e6, cost["raw_bytes"] / 1e6,
            cost["stall_seconds"], f"; {metrics}" if metrics else "",
        )  # fmt: skip

    run.on_saved(tell)
