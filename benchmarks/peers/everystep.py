"""everystep through its public door, as a user would."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import everystep
from benchmarks.work import Training


class Everystep:
    name = "everystep"
    settings = everystep.Settings()

    def __init__(self, training: Training, folder: str) -> None:
        self._repository = everystep.open(folder, settings=self.settings)
        self._run = self._repository.run("bench").track(model=training.model, optimizer=training.optimizer)

    def save(self, step: int) -> None:
        self._saved = self._run.save(step)

    def finish(self) -> None:
        self._saved.wait()

    def load(self) -> Mapping[str, torch.Tensor]:
        state = self._repository["bench"].at(self._saved.step).load(like="torch")
        return state["model"]

    def clear(self) -> None:
        """Every checkpoint is kept."""

    def close(self) -> None:
        self._run.close()


class EverystepAlone(Everystep):
    """Each checkpoint by itself, not as a difference to the one before: more bytes, less work."""

    name = "everystep, no deltas"
    settings = everystep.Settings(base_depth_max=0)
