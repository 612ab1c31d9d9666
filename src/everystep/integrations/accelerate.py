"""Accelerate: save_state and load_state of what an Accelerator prepared, in a run instead of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import everystep

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    do = 'pip install "everystep[accelerate]"'
    raise everystep.Unsupported("Accelerate is not installed here", do=do) from error


class EverystepState:
    """What `accelerator.save_state` would write to a folder:

        state = EverystepState(accelerator, run, model=model, optimizer=optimizer, scheduler=scheduler)
        step = state.load_state()                       # 0 in an empty run
        state.save_state(step, metrics={"loss": loss})  # does not wait for the store

    For the place in the data iterate `run.batches(loader, epochs=…)`, which loads by itself, with the prepared loader.

    Args:
        objects: what `accelerator.prepare` gave, and what else has state; by name, as `run.track` takes them.
    """

    def __init__(self, accelerator: Accelerator, run: everystep.Run, **objects: Any) -> None:
        self.accelerator, self.run = accelerator, run
        run.track(**{name: self._bare(one) for name, one in objects.items()})
        run.track(accelerator=(self._counters, self._set_counters))
        if accelerator.scaler is not None:
            run.track(scaler=accelerator.scaler)

    def save_state(self, step: int, *, metrics: Mapping[str, Any] | None = None) -> everystep.Saved:
        """Saves after `step` optimizer steps; every process calls it. `wait()` gives the durable Checkpoint."""
        return self.run.save(step, metrics=metrics, reason="save_state")

    def load_state(self, checkpoint: str = "latest") -> int:
        """Puts a checkpoint into the objects, random states included; every process calls it.

        Args:
            checkpoint: a step, "latest", "best:val_loss", a tag.

        Returns:
            Its step; 0 in an empty run.
        """
        return self.run.resume() if checkpoint == "latest" else self.run.rewind(checkpoint)

    def _bare(self, one: Any) -> Any:
        """Without what the Accelerator wrapped around it: names are then the same with and without it."""
        if isinstance(one, AcceleratedOptimizer):
            return one.optimizer
        return self.accelerator.unwrap_model(one) if callable(getattr(one, "named_parameters", None)) else one

    def _counters(self) -> dict[str, int]:
        """Where it is in accumulating gradients."""
        return {"step": int(self.accelerator.step)}

    def _set_counters(self, state: Mapping[str, int]) -> None:
        self.accelerator.step = state["step"]
