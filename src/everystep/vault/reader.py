"""Chunks read back: what lies together in one piece, links decoded over each other in place, the last one verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from everystep import codecs
from everystep.errors import Damaged
from everystep.seam import Pool
from everystep.vault.manifest import PartView, Spot
from everystep.vault.names import PackName, pack_key
from everystep.vault.share import HostShare

Array = np.ndarray[Any, Any]
Bytes = tuple[PackName, int, int]
Get = Callable[[str, int, int], memoryview]
READ_BYTES_MAX = 16 << 20
GAP_BYTES_MAX = 64 << 10
# What one thread takes at a time, in stored bytes: more than that leaves the caches before it is decoded.
_GROUP_BYTES_MAX = 8 << 20
# Below that a request of its own costs more than another thread gains.
_GROUP_BYTES_MIN = 1 << 20
_PLAIN_BYTES_MAX = 64 << 20
_PLAIN_BYTES_MIN = 2 << 20


class Sink(Protocol):
    """Where the plain bytes of chunks go. Asked on the pool's threads, for several chunks at once."""

    def room(self, index: int) -> Array | None:
        """Writable flat uint8 of the chunk's length; None where its bytes do not go to one place."""

    def take(self, index: int, data: Array) -> None:
        """The verified bytes of a chunk that has no room. They are gone when this returns."""


class Wanted(NamedTuple):
    """A chunk that is to be read, by its number, its place and its plain length."""

    number: int
    spot: Spot
    nbytes: int
    stored: int
    """Bytes to read for it, with all that it leans on."""


class Fetched(NamedTuple):
    """Chunks that one thread decodes one after the other, and the stored bytes of all their links."""

    chunks: list[Wanted]
    stored: dict[Bytes, memoryview]


@dataclass
class _Scratch:
    """Memory for chunks without a room, as much as threads use at once: fresh memory costs as much as decoding."""

    nbytes: int
    _free: list[Array] = field(default_factory=list)

    @contextmanager
    def lend(self, nbytes: int) -> Iterator[Array]:
        try:
            held = self._free.pop()
        except IndexError:
            held = np.empty(self.nbytes, np.uint8)
        yield held[:nbytes]
        self._free.append(held)


@dataclass(frozen=True)
class Reader:
    """Reads the chunks of one run."""

    storage: Any
    folder: str

    def read(
        self,
        view: PartView,
        indices: Sequence[int],
        pool: Pool,
        sink: Sink | None,
        *,
        every_link: bool = False,
        fetchers: Pool | None = None,
        share: HostShare | None = None,
    ) -> Iterator[list[int]]:
        """Reads chunks in parallel, and answers the numbers of those that are verified and in their place.

        Of a chain only the last link is held against its BLAKE3: then the bytes are right, whatever they were made
        from. Where they are not, `checked` says which link is damaged.

        Args:
            every_link: all of them are, for a base may be wrong in its hash alone.
            fetchers: threads that read ahead; without them, each thread of the pool reads what it decodes.
            share: other processes of this host read the same, and one of them each thing.
        """
        chunks = view.layout.chunks
        wanted = []
        for index in indices:
            spot = view.spot(index)
            wanted.append(Wanted(index, spot, chunks[index].nbytes, sum(link.length for link in spot.links())))
        scratch = _Scratch(max((chunk.nbytes for chunk in wanted), default=0))

        def decode(group: Fetched) -> list[int]:
            for chunk in group.chunks:
                room = sink.room(chunk.number) if sink is not None else None
                if room is not None:
                    self._decode_into(room, chunk, group.stored, every_link)
                    continue
                with scratch.lend(chunk.nbytes) as held:
                    self._decode_into(held, chunk, group.stored, every_link)
                    if sink is not None:
                        sink.take(chunk.number, held)
            return [chunk.number for chunk in group.chunks]

        readers = fetchers.workers if fetchers is not None else 0
        groups, window = list(_group(wanted, max(8 * pool.workers, readers, 8))), 2 * pool.workers
        if share is not None:
            turn = int(share.turn * len(groups))
            groups = groups[turn:] + groups[:turn]
        get = self.storage.get if share is None else partial(share.get, self.storage)
        if fetchers is None:
            yield from pool.map(lambda group: decode(self._fetch(group, get)), groups, window)
        else:
            yield from fetchers.relay(lambda group: self._fetch(group, get), pool, decode, groups, readers + window)

    def _decode_into(self, out: Array, chunk: Wanted, stored: dict[Bytes, memoryview], every_link: bool) -> None:
        base: Array | None = None
        try:
            for link in reversed(list(chunk.spot.links())):
                base = codecs.decode(link.codec, stored[_bytes(link)], chunk.nbytes, base, out)
                if (every_link or link is chunk.spot) and blake3(out).digest() != link.hash:
                    break
            else:
                return
        except Damaged:
            pass  # whether it is this link or one before it is found out next
        out[:] = self.checked([(chunk.spot, chunk.nbytes)])[0]

    def _fetch(self, chunks: list[Wanted], get: Get) -> Fetched:
        """What is stored of them and of all that they lean on; what lies together is read in one piece."""
        links = {_bytes(link): link for chunk in chunks for link in chunk.spot.links()}
        stored: dict[Bytes, memoryview] = {}
        for run in _coalesce(sorted(links.values(), key=_bytes)):
            stored.update((_bytes(spot), piece) for spot, piece in self._get(run, get))
        return Fetched(chunks, stored)

    def _get(self, run: list[Spot], get: Get) -> Iterator[tuple[Spot, memoryview]]:
        first, last = run[0], max(spot.offset + spot.length for spot in run)
        stored = get(pack_key(self.folder, first.pack), first.offset, last)
        for spot in run:
            at = spot.offset - first.offset
            yield spot, stored[at : at + spot.length]

    def links(self, wanted: Sequence[tuple[Spot, int]]) -> dict[Bytes, memoryview]:
        """What is stored of chunks, given with their plain lengths, and of all that they lean on: each is read once,
        and every link is verified.

        Raises:
            Damaged: naming the first link that is not what was saved.
        """
        chunks = [Wanted(i, spot, nbytes, spot.length) for i, (spot, nbytes) in enumerate(wanted)]
        stored = self._fetch(chunks, self.storage.get).stored
        made: dict[Bytes, Array] = {}
        for spot, nbytes in wanted:
            base: Array | None = None
            for link in reversed(list(spot.links())):
                place = _bytes(link)
                if place not in made:
                    made[place] = self._decode(stored[place], link, nbytes, base)
                base = made[place]
        return stored

    # every link verified -------------------------------------------------------------------------------------------

    def checked(self, wanted: list[tuple[Spot, int]], encoded: dict[int, memoryview] | None = None) -> list[Array]:
        """Verified plain bytes of chunks, given with their lengths; what they lean on is read and verified first.

        Args:
            encoded: gets the stored bytes of each, too, by its number among `wanted`.

        Raises:
            Damaged: naming the first link that is not what was saved.
        """
        leaning = [(spot.base, nbytes) for spot, nbytes in wanted if spot.base is not None]
        bases = iter(self.checked(leaning) if leaning else [])
        based = [(spot, nbytes, next(bases) if spot.base is not None else None) for spot, nbytes in wanted]
        order = sorted(range(len(based)), key=lambda i: _bytes(based[i][0]))
        out: dict[int, Array] = {}
        numbers = iter(order)
        for run in _coalesce([based[i][0] for i in order]):
            for _, piece in self._get(run, self.storage.get):
                i = next(numbers)
                out[i] = self._decode(piece, *based[i])
                if encoded is not None:
                    encoded[i] = piece
        return [out[i] for i in range(len(based))]

    def _decode(self, stored: memoryview, spot: Spot, nbytes: int, base: Array | None) -> Array:
        where = f"{self.storage.url}/{pack_key(self.folder, spot.pack)} at {spot.offset}"
        do = "run fsck to see which checkpoints are whole, and load one of them"
        try:
            data = codecs.decode(spot.codec, stored, nbytes, base)
        except Damaged as error:
            raise Damaged(error.what, where=where, do=error.do or do) from error
        if blake3(data).digest() != spot.hash:
            raise Damaged("a chunk is not what was saved", where=where, do=do)
        return data


def _bytes(spot: Spot) -> Bytes:
    return spot.pack, spot.offset, spot.length


def _group(wanted: list[Wanted], parts: int) -> Iterator[list[Wanted]]:
    """Chunks that lie together, as many as one thread takes at a time: several groups for each that decodes, so that
    all end together, and one for each that reads."""
    if not wanted:
        return
    wanted.sort(key=lambda chunk: _bytes(chunk.spot))
    stored_max = _share(sum(chunk.stored for chunk in wanted) // parts, _GROUP_BYTES_MIN, _GROUP_BYTES_MAX)
    plain_max = _share(sum(chunk.nbytes for chunk in wanted) // parts, _PLAIN_BYTES_MIN, _PLAIN_BYTES_MAX)
    group, stored, plain = [wanted[0]], wanted[0].stored, wanted[0].nbytes
    for chunk in wanted[1:]:
        stored, plain = stored + chunk.stored, plain + chunk.nbytes
        if not _touch(group[-1].spot, chunk.spot) or stored > stored_max or plain > plain_max:
            yield group
            group, stored, plain = [], chunk.stored, chunk.nbytes
        group.append(chunk)
    yield group


def _share(part: int, least: int, most: int) -> int:
    return min(most, max(part, least))


def _touch(one: Spot, other: Spot) -> bool:
    """Whether it pays to read what lies between them."""
    return one.pack == other.pack and other.offset - (one.offset + one.length) <= GAP_BYTES_MAX


def _coalesce(spots: Sequence[Spot]) -> Iterator[list[Spot]]:
    run: list[Spot] = []
    for spot in spots:
        if run and (not _touch(run[-1], spot) or spot.offset + spot.length - run[0].offset > READ_BYTES_MAX):
            yield run
            run = []
        run.append(spot)
    if run:
        yield run
