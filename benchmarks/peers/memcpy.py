"""The floor: the same bytes copied tensor by tensor into one buffer whose pages are there already."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.work import Training


class Memcpy:
    """One thread: NumPy's copy."""

    name = "memcpy, one thread"

    def __init__(self, training: Training) -> None:
        self._training = training
        self._buffer = np.zeros(training.nbytes, np.uint8)
        self._buffer += 1  # zeros alone are not backed by memory yet

    def prepare(self) -> None:
        """Pairs of source and target; not part of the time."""
        self._pairs, at = [], 0
        for value in self._training.tensors().values():
            source = value.view(-1).numpy().view(np.uint8)
            self._pairs.append((self._buffer[at : at + value.nbytes], source))
            at += value.nbytes

    def copy(self) -> None:
        for target, source in self._pairs:
            np.copyto(target, source)


class MemcpyThreads(Memcpy):
    """All of torch's threads: its own copy_."""

    name = "memcpy, all threads"

    def prepare(self) -> None:
        super().prepare()
        self._tensors = [(torch.from_numpy(target), torch.from_numpy(source)) for target, source in self._pairs]

    def copy(self) -> None:
        for target, source in self._tensors:
            target.copy_(source)
