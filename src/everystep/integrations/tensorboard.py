"""TensorBoard sees each save: its bytes, its seconds, its metrics; with whatever writer the program has."""

from __future__ import annotations

from typing import Any

import everystep

_SHOWN = ("stall_seconds", "queue_seconds", "encode_seconds", "write_seconds", "raw_bytes", "stored_bytes")


def show_saves(run: everystep.Run, writer: Any, *, prefix: str = "everystep") -> None:
    """Adds scalars for each save of this process, once it is durable, at its step.

    Args:
        writer: a `SummaryWriter` of torch.utils.tensorboard or tensorboardX, or anything with
            `add_scalar(tag, value, step)`.
        prefix: of the tags: `everystep/stall_seconds`, `everystep/metrics/val_loss` …
    """

    def tell(checkpoint: everystep.Checkpoint) -> None:
        cost = checkpoint.cost
        for name in _SHOWN:
            if name in cost:
                writer.add_scalar(f"{prefix}/{name}", cost[name], checkpoint.step)
        for name, value in checkpoint.metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                writer.add_scalar(f"{prefix}/metrics/{name}", value, checkpoint.step)

    run.on_saved(tell)
