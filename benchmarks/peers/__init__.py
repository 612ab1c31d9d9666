"""The contestants: one file each, the same four verbs; and the list of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Protocol

import torch

from benchmarks.work import Training


class Peer(Protocol):
    """One way to keep a checkpoint. A new `save` may delete the one before, which every peer does before it writes."""

    name: str

    def save(self, step: int) -> None:
        """Until the training may change the state again."""

    def finish(self) -> None:
        """Until that checkpoint is durable: data and folder synced, by the peer or, where it does not, by us."""

    def load(self) -> Mapping[str, torch.Tensor]:
        """The whole last checkpoint into fresh memory; answers the model's tensors by name."""

    def clear(self) -> None:
        """Deletes the last checkpoint, where the peer keeps one only."""

    def close(self) -> None:
        """Frees threads and memory."""


def sync(path: str) -> None:
    """fsync of a file, or of a folder and all in it."""
    if os.path.isdir(path):
        for entry in os.scandir(path):
            sync(entry.path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


def savers(training: Training, folder: str) -> list[Peer]:
    """Everystep and its peers, each in a folder of its own."""
    from benchmarks.peers import dcp, everystep, safetensors, torch_save

    made: list[Peer] = []
    for index, make in enumerate(
        (
            everystep.Everystep,
            everystep.EverystepAlone,
            torch_save.TorchSave,
            torch_save.TorchSaveSynced,
            safetensors.Safetensors,
            dcp.Dcp,
            dcp.DcpKeptStager,
        )
    ):
        own = os.path.join(folder, str(index))
        os.mkdir(own)
        made.append(make(training, own))
    return made
