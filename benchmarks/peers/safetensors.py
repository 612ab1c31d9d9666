"""safetensors: save_file of the flat state; it blocks until the file is written, and syncs nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers
from benchmarks.work import Training


class Safetensors:
    name = "safetensors"

    def __init__(self, training: Training, folder: str) -> None:
        self._training, self._folder = training, folder
        self._path = os.path.join(folder, "state.safetensors")

    def save(self, step: int) -> None:
        save_file(self._training.tensors(), self._path)

    def finish(self) -> None:
        peers.sync(self._folder)

    def load(self) -> Mapping[str, torch.Tensor]:
        found = load_file(self._path)
        # The file is mapped, not read: touching each tensor is what loads it.
        held = {name: value.clone() for name, value in found.items()}
        return {name.removeprefix("model."): value for name, value in held.items() if name.startswith("model.")}

    def clear(self) -> None:
        peers.remove(self._path)

    def close(self) -> None:
        self.clear()
