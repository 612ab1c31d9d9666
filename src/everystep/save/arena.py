"""Buffers that snapshots are copied into: used again for each, their pages made before they are needed."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from everystep.seam import Pool, Seam

Array = np.ndarray[Any, Any]
# Huge pages fault in at 20 GB/s and not at 1.5. A fork, as for a loader's workers, leaves them alone: neither are they
# copied when the next snapshot is taken, nor does the child hold them.
ADVICE = (14, 18)  # MADV_HUGEPAGE, MADV_WIPEONFORK
HUGE_PAGE = 2 << 20
ROUNDED_BYTES_MIN = 64 << 20
PIECE_BYTES = 1 << 20
PREPARED_BYTES = 16 << 20
"""What is made, or read from a device, at a time."""


class Arena:
    """A buffer that is used again for every snapshot; grows, and shrinks only when it is released."""

    def __init__(self, seam: Seam) -> None:
        self._lock = seam.lock()
        self._buffer: Array = np.empty(0, np.uint8)
        self._present = 0

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def reserve(self, nbytes: int) -> Array | None:
        """A buffer of at least `nbytes` bytes, about to be written: pages that are not there yet come with that. None
        where the system has not so many."""
        with self._lock:
            if not self._grow(nbytes):
                return None
            self._present = self._buffer.nbytes
            return self._buffer

    def prepare(self, nbytes: int, stop: Callable[[], bool]) -> None:
        """Makes the pages of a buffer of `nbytes` bytes, for a snapshot to come, unless told to stop."""
        while not stop():
            with self._lock:
                if not self._grow(nbytes):
                    return
                at, self._present = self._present, min(self._present + PREPARED_BYTES, self._buffer.nbytes)
                if at == self._present:
                    return
                self._buffer[at : self._present : mmap.PAGESIZE] = 0

    def release(self) -> None:
        """Gives the memory back, once nobody looks at what is in it any more."""
        with self._lock:
            self._buffer, self._present = np.empty(0, np.uint8), 0

    def holds(self, data: Array) -> bool:
        """Whether a buffer that `reserve` gave is still this one."""
        return data is self._buffer

    def _grow(self, nbytes: int) -> bool:
        if self._buffer.nbytes < nbytes:
            self._buffer, self._present = np.empty(0, np.uint8), 0  # first, so that there are never both
            try:
                self._buffer = new_pages(nbytes)
            except (OSError, MemoryError):
                return False
        return True


def new_pages(nbytes: int) -> Array:
    """Memory of its own, which is not there before it is written to and goes when the last view of it does."""
    kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    # Of whole huge pages it begins with one; but small memory would be rounded up to them.
    size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE if nbytes >= ROUNDED_BYTES_MIN else max(nbytes, 1)
    pages = mmap.mmap(-1, size, **kind)
    for advice in ADVICE:
        try:
            pages.madvise(advice)
        except (OSError, ValueError, AttributeError):
            pass  # a system without it: more page faults, or copies after a fork
    return np.frombuffer(pages, np.uint8)[:nbytes]


class Copier:
    """Copies and compares in pieces that the calling thread and those of a pool take in turn.

    Who is free takes the next: on cores that others use, nobody waits for a thread that does not run.
    """

    def __init__(self, pool: Pool | None = None) -> None:
        self._pool = pool

    def copy(self, pairs: Sequence[tuple[Array, Array]]) -> None:
        """Each (target, source)."""
        self._share(pairs, np.copyto)

    def differs(self, one: Array, other: Array) -> bool:
        found: list[bool] = []

        def compare(first: Array, second: Array) -> None:
            if not found and not np.array_equal(first, second):
                found.append(True)

        self._share([(one, other)], compare)
        return bool(found)

    def _share(self, pairs: Sequence[tuple[Array, Array]], work: Callable[[Array, Array], None]) -> None:
        pieces = deque(
            (one[at : at + PIECE_BYTES], other[at : at + PIECE_BYTES])
            for one, other in pairs
            for at in range(0, one.nbytes, PIECE_BYTES)
        )

        def take(_: int) -> None:
            while True:
                try:
                    one, other = pieces.popleft()
                except IndexError:
                    return
                work(one, other)

        helpers = range(min(self._pool.workers, len(pieces) - 1) if self._pool else 0)
        tasks = [self._pool.start(take, i) for i in helpers] if self._pool else []
        try:
            take(0)
        finally:
            for task in tasks:
                task.settle()
        for task in tasks:
            task.result()
