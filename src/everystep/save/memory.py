"""How much memory saving may take, and what that leaves room for: a base, one copy of the state, or a window of it."""

from __future__ import annotations

from collections.abc import Callable

from everystep.errors import UsageError
from everystep.save.arena import Arena, Array
from everystep.seam import Seam
from everystep.settings import Settings

AHEAD_BYTES = 32 << 20
"""Encoded chunks that wait for the storage: what two threads encode during an fsync of 16 ms."""
SCRATCH_CHUNKS = 6
"""What a thread takes to encode, in chunks."""
SENT_SHARE = 4
"""What is on its way to a store takes at most one of so many parts of what saving may take."""
SHARE = 2
"""Where no limit is set, saving takes at most one of so many parts of the machine's memory."""


class Memory:
    """Two arenas that take turns, one with the base and one for the next snapshot, as far as there is room.

    Args:
        sends: packs are held until a store has them, several at once.
    """

    def __init__(self, seam: Seam, settings: Settings, *, sends: bool = False) -> None:
        self._chunk, self._workers = settings.chunk_bytes_max, settings.workers
        self._arenas = (Arena(seam), Arena(seam))
        self._window = max(self._workers + 1, min(4 * self._workers, AHEAD_BYTES // self._chunk))
        self._nbytes = self._kept = self._sent = 0
        least = self._flight(1)
        self._limit = settings.memory_bytes_max or max(_share(seam), least)
        if self._limit < least:
            raise UsageError(
                f"memory_bytes_max={self._limit} is less than it takes to encode one chunk",
                do=f"give at least {least}, or make chunk_bytes_max smaller",
            )
        self.uploads = 1
        """Packs that may be under way at once. One more is filled meanwhile."""
        if sends:
            packs = self._limit / SENT_SHARE / settings.pack_bytes_max
            self.uploads = int(max(1, min(settings.uploads, packs - 1)))
            self._sent = (self.uploads + 1) * settings.pack_bytes_max if self.uploads > 1 else 0

    @property
    def limit(self) -> float:
        """Bytes."""
        return self._limit

    def choose(self, nbytes: int, kept: int, held: Array | None) -> tuple[Arena | None, bool]:
        """Where a snapshot of `nbytes` bytes goes, None where there is no room for it; and whether the base stays.

        Args:
            kept: bytes that are copied elsewhere, and stay: those of frozen leaves.
            held: the buffer that holds the base.
        """
        self._nbytes, self._kept = nbytes, kept
        if held is not None:
            base, spare = self._turned(held)
            if not self._fits(base.nbytes + max(spare.nbytes, nbytes)):
                spare.release()
            if self._fits(base.nbytes + max(spare.nbytes, nbytes)):
                return spare, True
        mine, other = sorted(self._arenas, key=lambda arena: arena.nbytes, reverse=True)
        if held is not None or not self._fits(max(mine.nbytes, nbytes) + other.nbytes):
            other.release()
        if not self._fits(max(mine.nbytes, nbytes), 1):
            mine.release()
        if self._fits(max(mine.nbytes, nbytes), 1):
            return mine, False
        other.release()
        return None, False

    def has_room_for_base(self) -> bool:
        """Whether the last snapshot can stay while the next one is taken."""
        return self._fits(2 * self._nbytes)

    def window(self) -> int:
        """How many chunks may be under way at once."""
        held = sum(arena.nbytes for arena in self._arenas)
        return next((count for count in range(self._window, 1, -1) if self._fits(held, count)), 1)

    def prepare(self, held: Array | None, stop: Callable[[], bool]) -> None:
        """Makes the pages for the next snapshot, beside the base: else the second save would block for that."""
        if held is not None:
            self._turned(held)[1].prepare(self._nbytes, stop)

    def _turned(self, held: Array) -> tuple[Arena, Arena]:
        """The arena that holds a buffer, and the other."""
        first, second = self._arenas
        return (first, second) if first.holds(held) else (second, first)

    def _fits(self, copies: int, window: int | None = None) -> bool:
        return copies + self._kept + self._sent + self._flight(window or self._window) <= self._limit

    def _flight(self, window: int) -> int:
        return self._chunk * (window + SCRATCH_CHUNKS * min(window, self._workers))


def _share(seam: Seam) -> float:
    """This process's part of the machine; of several that a launcher has started on it, each takes its own."""
    memory = seam.memory()
    return float("inf") if memory is None else memory // SHARE // seam.ranks_here()
