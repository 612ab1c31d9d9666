"""A repository to look back on: a run that was rewound, tagged and noted, and one that began with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import everystep


def state_at(step: int) -> dict[str, Any]:
    """Names as PyTorch's modules have them; `frozen` never changes, `head.bias` holds one NaN from step 5 on."""
    bias = np.full(3, 0.5, "f4")
    bias[1] = np.nan if step >= 5 else 0.5
    model = {
        "layer.0.weight": np.full((4, 5), step, "f4"),
        "layer.0.bias": np.zeros(4, "f4"),
        "layer.1.weight": np.full((4, 5), -step, "f4"),
        "head.bias": bias,
        "frozen": np.arange(6.0),
    }
    return {"model": model, "optimizer": {"m": np.full((4, 5), step / 2, "f8"), "lr": 0.1 / step}, "step": step}


def save(run: Any, step: int, val_loss: float, why: str = "every step") -> everystep.Checkpoint:
    metrics = {"val_loss": val_loss, "width": 10 * step}
    found: everystep.Checkpoint = run.save(step, state=state_at(step), metrics=metrics, reason=why).wait()
    return found


def fork(place: Path) -> Path:
    """Run a: steps 1 to 6, back to 3, then 4 and 5 again. Run b, steps 1 and 2, began with the weights of run seed.

    val_loss of a: 0.9 0.8 0.7 (0.6 0.5 0.4) 0.3 0.2, of b: 0.25 0.1.
    """
    repo = everystep.open(str(place))
    with repo.run("a", config={"lr": 0.1}) as run:
        for step in range(1, 7):
            save(run, step, round(1 - step / 10, 1))
        run.rewind(3)
        save(run, 4, 0.3, "again")
        save(run, 5, 0.2, "again")
    past = repo["a"]
    past.best("val_loss").tag_version("model")
    past.at(2).tag("before")
    past.note("a note of the run")
    past.at(2).note("a note of step 2")
    with repo.run("seed").track(rng=False, model=Held(state_at(5)["model"])) as run:
        run.save(9).wait()
    model = Held(state_at(5)["model"])
    with repo.run("b", config={"lr": 0.01}).track(rng=False, model=model) as run:
        run.start_from("seed@9", only="model")
        for step, val_loss in ((1, 0.25), (2, 0.1)):
            model.state["layer.0.bias"] += 1
            run.save(step, metrics={"val_loss": val_loss}).wait()
    return place


class Held:
    """Something with a state that can be filled."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state
