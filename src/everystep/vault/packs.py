"""Packs: immutable files of chunks, collected in memory and put whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everystep import codecs
from everystep.errors import ReadOnly, StorageError, StorageFull
from everystep.seam import Seam
from everystep.settings import Settings
from everystep.vault.manifest import HERE
from everystep.vault.names import PackName, pack_key
from everystep.vault.record import Where

MAGIC = b"EVERYSTEP-PACK-1"


@dataclass
class _Open:
    """A pack that is being filled; its name is known once it is stored."""

    pieces: list[Any] = field(default_factory=lambda: [MAGIC])
    nbytes: int = len(MAGIC)
    name: PackName | None = None


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


class PackWriter:
    """Fills packs of one class and stores each under a new number, whatever became of the attempt before.

    Args:
        number: draws the next pack number of this writer.
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
        pause = self._settings.retry_seconds
        attempt = 0
        while True:
            attempt += 1
            name = PackName(self._writer, self._number())
            try:
                self._storage.put(pack_key(self._folder, name), pack.pieces)
                return name
            except (StorageFull, ReadOnly):
                raise
            except StorageError:
                if attempt >= self._settings.put_attempts:
                    raise
            self._seam.sleep(pause)
            pause *= 2
