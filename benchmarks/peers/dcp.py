"""torch.distributed.checkpoint: save, and async_save in a thread (its stager made anew or kept) and in a process.

Its stagers with pinned memory or a copy in the background need an accelerator, and are no contestants without one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.peers import Peer, State

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be


class Dcp(Peer):
    name = "torch DCP"
    syncs = False
    where = frozenset({"blocking", "whole"})
    plain = True

    def save(self, step: int) -> None:
        self.step = step
        dcp.save(self._state(), checkpoint_id=self.path(step), no_dist=True)

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        """Into memory that its caller provides, as its interface wants it."""
        state = {
            part: {name: torch.empty_like(value) for name, value in values.items()}
            for part, values in self.state.items()
        }
        dcp.load(state, checkpoint_id=self.path(step), no_dist=True)
        return state

    def _state(self) -> dict[str, Any]:
        return {part: dict(values) for part, values in self.state.items()}


class DcpAsync(Dcp):
    name = "torch DCP async"
    most = 2.5
    where = frozenset({"blocking", "training"})
    options: ClassVar[dict[str, Any]] = {"no_dist": True}
    stager: DefaultStager | None = None
    under_way: Any = None

    def save(self, step: int) -> None:
        self.step = step
        self.under_way = dcp.async_save(
            self._state(), checkpoint_id=self.path(step), async_stager=self.stager, **self.options
        )

    def finish(self) -> None:
        getattr(self.under_way, "upload_completion", self.under_way).result()
        super().finish()

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class DcpKeptStager(DcpAsync):
    name = "torch DCP async, kept stager"
    kept = 1.0
    where = frozenset({"blocking", "training", "link"})

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))


class DcpProcess(DcpAsync):
    """In a process of its own; the stager is kept, in memory that both share."""

    name = "torch DCP async, process"
    kept = 2.0
    options: ClassVar[dict[str, Any]] = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        self.stager = DefaultStager(StagingOptions(False, True, False, False))
        if not dist.is_initialized():
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


PEERS = (Dcp, DcpAsync, DcpKeptStager, DcpProcess)
