"""Packs: immutable files of chunks, collected in memory and put whole, or stored while they are filled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from everystep import codecs
from everystep.errors import ReadOnly, StorageError, StorageFull, Unreachable
from everystep.seam import Seam, Task
from everystep.settings import Settings
from everystep.vault.manifest import HERE
from everystep.vault.names import PackName, pack_key
from everystep.vault.record import Where

MAGIC = b"EVERYSTEP-PACK-1"
ROUNDS = 4
"""How often each of several uploads beside each other should come to its turn: then all end at about the same time."""
PACK_BYTES_MIN = 8 << 20
"""Below that a request of its own costs more than another one beside it gains."""


@dataclass
class _Open:
    """A pack that is being filled; its name is known once it is stored."""

    pieces: list[Any] = field(default_factory=lambda: [MAGIC])
    nbytes: int = len(MAGIC)
    name: PackName | None = None

    def body(self) -> Iterable[Any]:
        """All of it, for each attempt anew."""
        return self.pieces

    @property
    def broken(self) -> bool:
        """Whether no further attempt can bring all of it."""
        return False


@dataclass(frozen=True)
class Slot:
    """Where bytes went: resolved to a pack's name after `flush`."""

    pack: _Open
    offset: int
    length: int

    @property
    def name(self) -> PackName:
        if self.pack.name is None:
            raise StorageError("a pack was asked for its name before it was stored")
        return self.pack.name


class Load(Protocol):
    """A chunk on its way into a pack that is stored while it is filled."""

    slot: Slot | None
    """Set when it is written."""

    @property
    def nbytes(self) -> int:
        """Of its stored form."""

    def pieces(self) -> list[Any]:
        """Its stored form. Each further attempt asks for it again, so that nothing is held until the pack is safe."""


class _Coming:
    """Loads as they come. What breaks them off is no end of them."""

    def __init__(self, loads: Iterable[Load], clock: Callable[[], float]) -> None:
        self._loads, self._clock = iter(loads), clock
        self._next: list[Load | None] = []
        self.broken: BaseException | None = None
        self.seconds = 0.0
        """Waited for."""

    def peek(self) -> Load | None:
        """The next one, once it is there; None behind the last."""
        if self.broken is not None:
            raise self.broken
        if not self._next:
            begun = self._clock()
            try:
                self._next.append(next(self._loads, None))
            except BaseException as error:
                self.broken = error
                raise
            finally:
                self.seconds += self._clock() - begun
        return self._next[0]

    def drop(self) -> None:
        """The next one has been taken."""
        self._next.clear()


@dataclass
class _Filled(_Open):
    """A pack that is stored while it is filled, up to its limit."""

    coming: _Coming | None = None
    nbytes_max: int = 0
    loads: list[Load] = field(default_factory=list)
    whole: bool = False

    def body(self) -> Iterator[Any]:
        self.nbytes, self.whole = len(MAGIC), False
        yield MAGIC
        for load in tuple(self.loads):  # what an attempt before this one has taken
            yield from self._add(load)
        assert self.coming is not None
        while (new := self.coming.peek()) is not None and self._takes(new):
            self.coming.drop()
            self.loads.append(new)
            yield from self._add(new)
        self.whole = True

    @property
    def broken(self) -> bool:
        return self.coming is not None and self.coming.broken is not None

    def _takes(self, load: Load) -> bool:
        return not self.loads or self.nbytes + load.nbytes <= self.nbytes_max

    def _add(self, load: Load) -> list[Any]:
        pieces = load.pieces()
        load.slot = Slot(self, self.nbytes, sum(len(piece) for piece in pieces))
        self.nbytes += load.slot.length
        return pieces


class Uploads:
    """Packs on their way to a place that is far away, several at once; each is held until it has arrived.

    Args:
        count: how many. One more waits while the next is filled.
        nbytes: about as much as there is to send, if that is known.
    """

    def __init__(self, seam: Seam, settings: Settings, count: int, nbytes: int | None = None) -> None:
        all_bytes = settings.pack_bytes_max * ROUNDS * count if nbytes is None else nbytes
        self.pack_bytes = max(all_bytes // (ROUNDS * count), PACK_BYTES_MIN)
        """A sensible length of packs: with few large ones, some of those that could be under way would be none."""

        def begin() -> None:
            seam.step_back(settings.background_nice)

        self._pool, self._count, self._clock = seam.pool(count, "everystep-upload", begin), count, seam.monotonic
        self._pending: deque[Task[None]] = deque()
        self._lock, self._under_way, self._since = seam.lock(), 0, 0.0
        self.seconds = 0.0
        """While any was under way."""

    def start(self, send: Callable[[_Open], None], pack: _Open) -> None:
        """Sends a pack, as soon as there is room for it.

        Raises:
            StorageError: what became of one that was started before.
        """
        self._pending.append(self._pool.start(lambda one: self._timed(send, one), pack))
        while len(self._pending) > self._count:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Until all have arrived.

        Raises:
            StorageError: what became of the first that has not.
        """
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Ends the threads, once what is under way is over, however it ends."""
        for task in self._pending:
            task.settle()
        self._pool.close()

    def _timed(self, send: Callable[[_Open], None], pack: _Open) -> None:
        with self._lock:
            self._since = self._since if self._under_way else self._clock()
            self._under_way += 1
        try:
            send(pack)
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self.seconds += self._clock() - self._since


class PackWriter:
    """Fills packs of one class and stores each under a new number, whatever became of the attempt before.

    Args:
        number: draws the next pack number of this writer; on several threads, where it is given uploads.
        nbytes_max: a pack is stored when the next chunk would make it larger than this.
    """

    def __init__(
        self,
        storage: Any,
        folder: str,
        writer: str,
        number: Callable[[], int],
        seam: Seam,
        settings: Settings,
        nbytes_max: int,
    ) -> None:
        self._storage, self._folder, self._writer, self._number = storage, folder, writer, number
        self._seam, self._settings, self._nbytes_max = seam, settings, nbytes_max
        self._open = _Open()
        self.stored: list[tuple[PackName, int]] = []
        """(name, length) of every pack that was stored."""
        self.seconds = 0.0
        """Spent in the storage."""

    def store(self, loads: Iterable[Load], uploads: Uploads | None = None) -> None:
        """Stores chunks as they come, pack after pack, durably: each goes out while those behind it are made. Given
        `uploads`, several do, and they are durable once these are finished.

        Raises:
            StorageError: as `flush`. What `loads` raises.
        """
        coming = _Coming(loads, self._seam.monotonic)
        if uploads is not None:
            while coming.peek() is not None:
                uploads.start(self._send, self._gather(coming, min(self._nbytes_max, uploads.pack_bytes)))
            return
        while coming.peek() is not None:
            pack = _Filled(coming=coming, nbytes_max=self._nbytes_max)
            begun, waited = self._seam.monotonic(), coming.seconds
            try:
                pack.name = self._put(pack)
            finally:
                self.seconds += self._seam.monotonic() - begun - (coming.seconds - waited)
            if not pack.whole:
                raise StorageError("the place took a part of a pack for all of it", where=self._storage.url)
            self.stored.append((pack.name, pack.nbytes))

    def _gather(self, coming: _Coming, nbytes_max: int) -> _Open:
        """The next pack, up to its limit."""
        pack = _Open()
        while (load := coming.peek()) is not None:
            if pack.nbytes > len(MAGIC) and pack.nbytes + load.nbytes > nbytes_max:
                break
            coming.drop()
            pieces = load.pieces()
            load.slot = Slot(pack, pack.nbytes, sum(len(piece) for piece in pieces))
            pack.pieces += pieces
            pack.nbytes += load.slot.length
        return pack

    def _send(self, pack: _Open) -> None:
        pack.name = self._put(pack)
        pack.pieces = []
        self.stored.append((pack.name, pack.nbytes))

    def take(self, nbytes_max: int) -> bytes | None:
        """What the next pack would hold, in place of storing it; None if that is more."""
        pack = self._open
        if self.stored or pack.nbytes > nbytes_max:
            return None
        self._open = _Open()
        return b"".join(pack.pieces)

    def add(self, pieces: list[Any]) -> Slot:
        length = sum(len(piece) for piece in pieces)
        if self._open.nbytes + length > self._nbytes_max and self._open.nbytes > len(MAGIC):
            self.flush()
        slot = Slot(self._open, self._open.nbytes, length)
        self._open.pieces += pieces
        self._open.nbytes += length
        return slot

    def add_page(self, body: bytes | memoryview, hash: str) -> tuple[Where, Slot]:
        """Adds a page of a manifest; its place does not name the pack, which has no name before `flush`.

        Args:
            hash: BLAKE3 of the body.
        """
        data, s = np.frombuffer(body, np.uint8), self._settings
        codec, pieces = codecs.encode(data, "|u1", s.zstd_level, s.sample_bytes, s.worth_ratio)
        slot = self.add(pieces)
        return Where(HERE, 0, slot.offset, slot.length, data.nbytes, codec, hash), slot

    def flush(self) -> None:
        """Stores the pack that is being filled, durably.

        Raises:
            StorageError: after all attempts failed; a full or read-only place is not tried again.
        """
        pack, self._open = self._open, _Open()
        if pack.nbytes == len(MAGIC):
            return
        begun = self._seam.monotonic()
        try:
            pack.name = self._put(pack)
        finally:
            self.seconds += self._seam.monotonic() - begun
        self.stored.append((pack.name, pack.nbytes))
        pack.pieces = []

    def _put(self, pack: _Open) -> PackName:
        begun, pause = self._seam.monotonic(), self._settings.retry_seconds
        attempt = 0
        while True:
            attempt += 1
            name = PackName(self._writer, self._number())
            try:
                self._storage.put(pack_key(self._folder, name), pack.body())
                return name
            except (StorageFull, ReadOnly):
                raise
            except StorageError as error:
                waited = self._seam.monotonic() - begun  # by a storage that repeats its requests
                is_over = isinstance(error, Unreachable) and waited >= self._settings.outage_seconds > 0
                if attempt >= self._settings.put_attempts or pack.broken or is_over:
                    raise
            self._seam.sleep(pause)
            pause *= 2
