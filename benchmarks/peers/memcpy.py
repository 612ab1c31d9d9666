"""The floor: the same bytes copied tensor by tensor into one buffer whose pages are there already."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.peers import Array, Peer, State, bytes_of, flat_names


class Memcpy(Peer):
    """One thread: NumPy's copy."""

    name = "memcpy, one thread"
    where = frozenset({"blocking"})
    floor = True

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        self._sources = [bytes_of(value) for value in flat_names(state).values()]
        self._pairs: list[tuple[Array, Array]] = []

    def wake(self) -> None:
        if not self._pairs:
            ends = np.cumsum([source.nbytes for source in self._sources])
            buffer = np.ones(ends[-1], np.uint8)  # zeros are not backed by memory yet
            self._pairs = [(buffer[end - source.nbytes : end], source) for end, source in zip(ends, self._sources)]

    def rest(self) -> None:
        self._pairs = []

    def save(self, step: int) -> None:
        for target, source in self._pairs:
            np.copyto(target, source)

    def finish(self) -> None:
        """It keeps nothing."""


class MemcpyThreads(Memcpy):
    """All of torch's threads: its own copy_."""

    name = "memcpy, all threads"

    def wake(self) -> None:
        super().wake()
        self._tensors = [(torch.from_numpy(target), torch.from_numpy(source)) for target, source in self._pairs]

    def rest(self) -> None:
        super().rest()
        self._tensors = []

    def save(self, step: int) -> None:
        for target, source in self._tensors:
            target.copy_(source)


PEERS = (Memcpy, MemcpyThreads)
