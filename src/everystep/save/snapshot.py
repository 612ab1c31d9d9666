"""One copy of the state into a reused buffer: after this, training may change what it likes."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep import adapters
from everystep.schema import Layout, Tree, flatten, lay_out
from everystep.seam import Pool
from everystep.settings import Settings

Array = np.ndarray[Any, Any]
HUGE_PAGES = 14  # MADV_HUGEPAGE: fewer page faults on the first copy into a fresh buffer
PIECE_BYTES = 1 << 20


class Arena:
    """A buffer that is used again for every snapshot; grows, never shrinks.

    Fresh pages cost 1–2 GB/s to fault in, reused ones nothing: the first save of a size is slower than the others.
    """

    def __init__(self, pool: Pool | None = None) -> None:
        self._buffer: Array = np.empty(0, np.uint8)
        self._pool = pool

    def reserve(self, nbytes: int) -> Array:
        """A buffer of at least `nbytes` bytes, its pages present."""
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(0, np.uint8)
            pages = mmap.mmap(-1, max(nbytes, 1))
            try:
                pages.madvise(HUGE_PAGES)
            except (OSError, ValueError, AttributeError):
                pass  # a kernel without huge pages: the copy only faults more often
            self._buffer = np.frombuffer(pages, np.uint8)
            self._buffer[:: mmap.PAGESIZE] = 0
        return self._buffer

    def holds(self, data: Array) -> bool:
        """Whether a buffer that `reserve` gave is still this one."""
        return data is self._buffer

    def fill(self, pairs: Sequence[tuple[Array, Array]]) -> None:
        """Copies each source into its target, in pieces that this thread and those of the pool take in turn.

        Who is free takes the next: on cores that others use, nobody waits for a thread that does not run.
        """
        pieces = deque(
            (target[at : at + PIECE_BYTES], source[at : at + PIECE_BYTES])
            for target, source in pairs
            for at in range(0, source.nbytes, PIECE_BYTES)
        )

        def take(_: int) -> None:
            while True:
                try:
                    target, source = pieces.popleft()
                except IndexError:
                    return
                np.copyto(target, source)

        helpers = range(min(self._pool.workers, len(pieces) - 1) if self._pool else 0)
        tasks = [self._pool.start(take, i) for i in helpers] if self._pool else []
        try:
            take(0)
        finally:
            for task in tasks:
                task.settle()
        for task in tasks:
            task.result()


@dataclass(frozen=True)
class Snapshot:
    """A state at one moment, owned by nobody else: the tables, how the leaves lie, and their bytes."""

    tree: Tree
    layout: Layout
    data: Array

    def chunk(self, index: int) -> Array:
        chunk = self.layout.chunks[index]
        start = self.layout.streams[chunk.stream].offset + chunk.start
        return self.data[start : start + chunk.nbytes]


def snapshot(state: Any, arena: Arena, settings: Settings) -> Snapshot:
    """Finds the leaves of a nested state and copies each into the arena, in the order in which they are stored.

    Raises:
        Unsupported: naming the path of what cannot be saved; nothing is copied then.
    """
    adapters.fence()
    tree = flatten(state, adapters.describe)
    layout = lay_out(tree.leaves, settings.chunk_bytes_max, settings.small_leaf_bytes)
    data = arena.reserve(layout.nbytes)
    large: list[tuple[Array, Array]] = []
    for region in layout.regions:
        start = layout.streams[region.stream].offset + region.start
        target = data[start : start + region.nbytes]
        source = adapters.view(tree.payloads[region.leaf])
        if source is None:
            adapters.copy(tree.payloads[region.leaf], target)
        elif region.nbytes < PIECE_BYTES:
            np.copyto(target, source)
        else:
            large.append((target, source))
    arena.fill(large)
    adapters.fence()
    tree.payloads.clear()
    return Snapshot(tree, layout, data)
