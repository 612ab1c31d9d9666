"""safetensors: save_file of the flat state; it blocks until the file is written, as is and with fsync."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peers import Peer, flat_names, nested, sync


class Safetensors(Peer):
    name = "safetensors"
    syncs = False
    needs = ("safetensors",)
    where = frozenset({"blocking", "training", "restore", "whole"})
    plain = True

    def save(self, step: int) -> None:
        from safetensors.torch import save_file

        self.step = step
        save_file(flat_names(self.state), self.path(step))

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        """The file is mapped, not read: a copy of each tensor is what loads it."""
        from safetensors.torch import load_file

        return nested({name: value.clone() for name, value in load_file(self.path(step)).items()})


class SafetensorsSynced(Safetensors):
    name = "safetensors + fsync"
    syncs = True
    where = frozenset({"blocking", "link"})

    def save(self, step: int) -> None:
        super().save(step)
        sync(self.folder)

    def finish(self) -> None:
        """`save` has synced."""


PEERS = (Safetensors, SafetensorsSynced)
