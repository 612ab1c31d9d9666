"""torch.save into one file, as is and with fsync of the file and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.peers import Peer, sync


class TorchSave(Peer):
    name = "torch.save"
    syncs = False
    where = frozenset({"blocking", "restore", "whole"})
    plain = True

    def save(self, step: int) -> None:
        self.step = step
        torch.save(self.state, self.path(step))

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        return torch.load(self.path(step), mmap=False, weights_only=True)


class TorchSaveSynced(TorchSave):
    name = "torch.save + fsync"
    syncs = True
    where = frozenset({"blocking", "training", "link"})

    def save(self, step: int) -> None:
        super().save(step)
        sync(self.folder)

    def finish(self) -> None:
        """`save` has synced."""


PEERS = (TorchSave, TorchSaveSynced)
