"""Volumes: consecutive records of a log in one object, so that a long log is read in few requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from everystep import codecs
from everystep.errors import Damaged, NewerFormat, ObjectMissing, StorageError, Unreachable
from everystep.seam import Seam
from everystep.settings import Settings
from everystep.vault.lines import digest, pack_lines, parse_json, unpack_lines
from everystep.vault.names import Span, record_key, volume_key, volume_span, volumes_folder
from everystep.vault.record import Record, unpack_record
from everystep.vault.together import together

VERSION = 1
FACTOR = 10
"""A volume of the next size takes the place of so many."""
SIZES = 3
"""100, 1,000 and 10,000 records: 100,000 are 10 volumes, and at most 9 + 9 more and 99 records behind them."""
NBYTES_MAX = 64 << 20
_DO = "remove it: the records say the same"
_LENGTH = np.dtype("<u4")


class _Head(msgspec.Struct, frozen=True):
    v: int
    first: int
    count: int
    prev: str
    head: str
    nbytes: int
    codec: int
    blake3: str


class _Link(msgspec.Struct, frozen=True):
    seq: int
    prev: str


@dataclass(frozen=True)
class Volume:
    """A volume as it was found: whole in itself, but not yet held against the log."""

    span: Span
    prev: str
    """What the record before it must hash to."""
    head: str
    """What its last record hashes to."""
    _codec: int
    _nbytes: int
    _body: memoryview

    def records(self, where: str) -> list[bytes]:
        """The bytes of its records.

        Raises:
            Damaged: if it does not hold as many.
        """
        plain = memoryview(codecs.decode(self._codec, self._body, self._nbytes))
        table = self.span.length * _LENGTH.itemsize
        lengths = np.frombuffer(plain[:table], _LENGTH).tolist() if table <= self._nbytes else []
        ends = [*accumulate(lengths, initial=table)]
        if len(lengths) != self.span.length or ends[-1] != self._nbytes:
            raise Damaged("a volume does not hold as many records as it says", where=where, do=_DO)
        return [bytes(plain[start:end]) for start, end in pairwise(ends)]

    def unpack(self, where: str) -> tuple[list[Record], bytes]:
        """Its records, which are those of a chain from `prev` to `head`; and the bytes of the last.

        Raises:
            Damaged: if they are not.
            NewerFormat: if a later everystep wrote one of them.
        """
        stored = self.records(where)
        found = [unpack_record(data, slot, where) for slot, data in enumerate(stored, self.span.first)]
        chain = [self.prev, *(record.own for record in found)]
        if [record.prev for record in found] != chain[:-1] or chain[-1] != self.head:
            raise Damaged("a volume holds records that do not continue each other", where=where, do=_DO)
        return found, stored[-1]


def pack_volume(span: Span, records: Sequence[bytes], settings: Settings) -> bytes:
    """
    Raises:
        Damaged: if the records are not a whole chain.
    """
    prev, head = _chain(span, records, "")
    plain = np.array([len(record) for record in records], _LENGTH).tobytes() + b"".join(records)
    codec, pieces = codecs.encode(
        np.frombuffer(plain, np.uint8), "|u1", settings.zstd_level, settings.sample_bytes, 1.0
    )
    body = b"".join(pieces)
    checksum = blake3(body).hexdigest()
    return pack_lines(_Head(VERSION, span.first, span.length, prev, head, len(plain), codec, checksum)) + body


def unpack_volume(data: memoryview, span: Span, where: str) -> Volume:
    """
    Raises:
        Damaged: if it is not a whole volume of these records.
        NewerFormat: if a later everystep wrote it.
    """
    at = 0
    for _ in range(2):
        at = _line_end(data, at)
    head, body = unpack_lines(data[:at], _Head, where), data[at:]
    if head.v > VERSION:
        raise NewerFormat(f"a volume of version {head.v}; this everystep reads {VERSION}", where=where)
    told = (head.v, head.first, head.count, head.blake3)
    if told != (VERSION, *span, blake3(body).hexdigest()) or not 0 <= head.nbytes <= NBYTES_MAX:
        raise Damaged("not the volume that belongs here", where=where, do=_DO)
    return Volume(span, head.prev, head.head, head.codec, head.nbytes, body)


def _line_end(data: memoryview, start: int) -> int:
    """Behind the next line feed; the end, where there is none."""
    for begin in range(start, len(data), 1 << 10):
        found = bytes(data[begin : begin + (1 << 10)]).find(b"\n")
        if found >= 0:
            return begin + found + 1
    return len(data)


def _chain(span: Span, records: Sequence[bytes], where: str) -> tuple[str, str]:
    """(what the first names as its predecessor, what the last hashes to), if each names the one before it.

    Raises:
        Damaged: otherwise.
    """
    if len(records) != span.length or not records:
        raise Damaged("not as many records as there should be", where=where)
    links = [parse_json(record.partition(b"\n")[0], _Link, where) for record in records]
    hashes = [digest(record) for record in records]
    whole = all(link.prev == before for link, before in zip(links[1:], hashes))
    if not whole or [link.seq for link in links] != list(range(span.first, span.end)):
        raise Damaged("records that do not continue each other", where=where)
    return links[0].prev, hashes[-1]


def cover(spans: Iterable[Span], start: int) -> list[Span]:
    """Volumes that are worth reading from a slot on: none overlap, and of those that begin at one place the longest."""
    longest: dict[int, int] = {}
    for span in spans:
        longest[span.first] = max(span.length, longest.get(span.first, 0))
    chosen, at = list[Span](), start
    for first in sorted(longest):
        if first >= at:
            chosen.append(Span(first, longest[first]))
            at = chosen[-1].end
    return chosen


class Shelf:
    """The volumes of one log. Nothing needs them: where one is missing or wrong, the records themselves are read."""

    def __init__(self, storage: Any, folder: str, seam: Seam, settings: Settings) -> None:
        self._storage, self._folder, self._seam, self._settings = storage, folder, seam, settings
        self._digests: dict[int, str] = {}

    def where(self, span: Span) -> str:
        return f"{self._storage.url}/{volume_key(self._folder, span)}"

    def spans(self) -> set[Span]:
        """All that lie there, whatever is in them."""
        keys = self._storage.list(volumes_folder(self._folder), deep=False)
        found = (volume_span(key.rpartition("/")[2]) for key in keys)
        return {span for span in found if span is not None}

    def read(self, span: Span) -> Volume | None:
        """A volume that is whole in itself."""
        try:
            data = self._storage.get(volume_key(self._folder, span))
            return unpack_volume(memoryview(data), span, self.where(span))
        except Unreachable:
            raise
        except (StorageError, Damaged, NewerFormat):
            return None  # the records say the same

    def believed(self, start: int) -> list[Volume]:
        """Volumes from a slot on that say what the log says, in its order. What one holds is vouched for by its last
        record, through the chain: that one is looked up in the log, or named by the volume behind it."""
        self._digests.clear()
        spans, held = self.spans(), dict[Span, Volume]()
        while chosen := cover(spans, start):
            unread = [span for span in chosen if span not in held]
            for span, volume in zip(unread, together(self._storage, self._seam, self.read, unread)):
                if volume is not None:
                    held[span] = volume
            wrong = set(chosen) - held.keys() or self._wrong([held[span] for span in chosen])
            if not wrong:
                return [held[span] for span in chosen]
            spans -= wrong
        return []

    def _wrong(self, chosen: list[Volume]) -> set[Span]:
        """Those of which the last record is not the one in the log."""
        found, behind = set[Span](), None
        for volume in reversed(chosen):
            end = volume.span.end
            meant = behind.prev if behind is not None and behind.span.first == end else self._digest(end - 1)
            behind = volume if meant == volume.head else None
            if behind is None:
                found.add(volume.span)
        return found

    def _digest(self, slot: int) -> str:
        """What a record in the log hashes to; "" if it is not there, or damaged."""
        if slot not in self._digests:
            key = record_key(self._folder, slot)
            try:
                data = self._storage.get(key)
                self._digests[slot] = unpack_record(data, slot, key).own
            except (ObjectMissing, Damaged):
                self._digests[slot] = ""
        return self._digests[slot]

    def check(self, span: Span) -> None:
        """
        Raises:
            Damaged: if a volume does not say what the log says.
            NewerFormat: if a later everystep wrote it.
        """
        where = self.where(span)
        volume = unpack_volume(memoryview(self._storage.get(volume_key(self._folder, span))), span, where)
        volume.unpack(where)
        if self._digest(span.end - 1) != volume.head:
            raise Damaged("a volume ends with another record than the log has there", where=where, do=_DO)

    # writing -------------------------------------------------------------------------------------------------------

    def bind(self, end: int, newest: Sequence[bytes]) -> None:
        """Writes the volumes whose last record is the one before this slot, if there are to be any.

        Args:
            newest: the last records; those that are missing are read.
        """
        count = self._settings.volume_records
        try:
            records: Sequence[bytes] = newest
            for size in range(SIZES):
                if not count or end % count:
                    return
                span = Span(end - count, count)
                if size or len(records) != count:
                    records = self._gather(span, count // FACTOR if size else 1)
                if sum(map(len, records)) + count * _LENGTH.itemsize > NBYTES_MAX:
                    return
                self._storage.put_new(volume_key(self._folder, span), pack_volume(span, records, self._settings))
                count *= FACTOR
        except (StorageError, Damaged):
            return  # a larger volume will be made of the records, or none; nothing is lost

    def _gather(self, span: Span, part: int) -> list[bytes]:
        """The records of a span, out of volumes of `part` records where there are such."""
        parts = [Span(first, part) for first in range(span.first, span.end, part)]
        return [record for found in together(self._storage, self._seam, self._records, parts) for record in found]

    def _records(self, span: Span) -> list[bytes]:
        volume = self.read(span) if span.length > 1 else None
        if volume is not None:
            return volume.records(self.where(span))
        return [bytes(self._storage.get(record_key(self._folder, slot))) for slot in range(span.first, span.end)]
