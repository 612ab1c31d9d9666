"""torch.distributed.checkpoint.async_save in one process: with its default stager, and with one kept between saves.

Its stagers with pinned memory or a copy in the background need an accelerator, and are no contestants without one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions

from benchmarks import peers
from benchmarks.work import Training

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be


class Dcp:
    name = "torch DCP async"

    def __init__(self, training: Training, folder: str) -> None:
        self._training, self._folder = training, folder
        self._path = os.path.join(folder, "state")
        self._stager: AsyncStager | None = None
        self._under_way: Any = None

    def save(self, step: int) -> None:
        self._under_way = dcp.async_save(
            self._training.state(), checkpoint_id=self._path, no_dist=True, async_stager=self._stager
        )

    def finish(self) -> None:
        future = self._under_way
        getattr(future, "upload_completion", future).result()
        peers.sync(self._folder)

    def load(self) -> Mapping[str, torch.Tensor]:
        """Into memory that its caller provides, as its interface wants it."""
        state = {"model": _empty(self._training.model.state_dict()), "optimizer": _empty(self._training.optimizer)}
        dcp.load(state, checkpoint_id=self._path, no_dist=True)
        return state["model"]

    def clear(self) -> None:
        peers.remove(self._path)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
        self.clear()


class DcpKeptStager(Dcp):
    name = "torch DCP async, kept stager"

    def __init__(self, training: Training, folder: str) -> None:
        super().__init__(training, folder)
        self._stager = DefaultStager(StagingOptions(False, False, False, False))


def _empty(state: Any) -> Any:
    """The same nested state with fresh tensors."""
    if isinstance(state, torch.optim.Optimizer):
        return _empty(state.state_dict())
    if isinstance(state, torch.Tensor):
        return torch.empty_like(state)
    if isinstance(state, dict):
        return {key: _empty(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_empty(value) for value in state)
    return state
