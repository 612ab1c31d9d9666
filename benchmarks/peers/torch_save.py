"""torch.save into one file that is written anew each time, as is and with fsync of the file and its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from benchmarks import peers
from benchmarks.work import Training


class TorchSave:
    name = "torch.save"

    def __init__(self, training: Training, folder: str) -> None:
        self._training, self._folder = training, folder
        self._path = os.path.join(folder, "state.pt")

    def save(self, step: int) -> None:
        torch.save(self._training.state(), self._path)

    def finish(self) -> None:
        peers.sync(self._folder)

    def load(self) -> Mapping[str, torch.Tensor]:
        return torch.load(self._path, weights_only=True)["model"]

    def clear(self) -> None:
        peers.remove(self._path)

    def close(self) -> None:
        self.clear()


class TorchSaveSynced(TorchSave):
    name = "torch.save + fsync"

    def save(self, step: int) -> None:
        super().save(step)
        peers.sync(self._folder)

    def finish(self) -> None:
        """`save` has synced."""
