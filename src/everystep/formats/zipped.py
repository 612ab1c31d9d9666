"""Zip archives with bounds: nothing costs more than the file has bytes, and every entry is checked against its CRC."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from everystep.errors import Damaged, Unsupported
from everystep.formats.file import Array, Source, Target

MAGIC = b"PK\x03\x04"
ALIGN = 64
GROW_MIN, GROW_TIMES = 1 << 30, 64
"""Compressed entries may grow to 1 GiB, or to 64 times the file: zeros of real states stay below, bombs reach 1032."""
_HEADER = struct.Struct("<4s22xHH")
_END, _END_64 = struct.Struct("<4s6xH10x"), struct.Struct("<4s28xQ36x")  # the latter with its locator
_UTF8 = 0x800  # the flag of names that are not of the code page of 1981
_PIECE = 8 << 20
_CRC = "its bytes are not those that were written (CRC)"
_PADDING = 0x4246  # the id that torch gives to the extra field that aligns its entries
_FAILURES = (
    zipfile.BadZipFile, struct.error, zlib.error, NotImplementedError, RuntimeError, ValueError, OverflowError,
    EOFError, IndexError,
)  # fmt: skip


class Archive:
    """The entries of a zip file, by name.

    Raises:
        Damaged: for what is no whole zip archive, or claims more than the file can hold.
    """

    def __init__(self, source: Source, grow_min: int = GROW_MIN, grow_times: int = GROW_TIMES) -> None:
        self._source = source
        try:
            with zipfile.ZipFile(source) as archive:  # type: ignore[call-overload,unused-ignore]
                entries, end = archive.infolist(), source.size - len(archive.comment) - _END.size
        except _FAILURES as error:
            raise source.damaged(f"not a whole zip archive: {str(error)[:200]}") from error
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise source.damaged("two entries of the archive have one name")
        if len(entries) != _count(source, end):  # zipfile takes what it finds
            raise source.damaged("entries of the archive are missing")
        if sum(entry.compress_size for entry in entries) > source.size:
            raise source.damaged("the entries of the archive are larger than the file: they overlap")
        grown = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
        if grown > max(grow_min, grow_times * source.size):
            do = "unpack it and pack it again without compression, if you trust it"
            raise Unsupported(f"a compressed archive that grows to {grown} bytes", where=source.name, do=do)
        # Written with torch.serialization.set_crc32_options(False): no entry has a CRC, and nothing can be checked.
        self._checked = any(entry.CRC for entry in entries)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str) -> Array:
        """The bytes of an entry, as a fresh flat uint8 array.

        Raises:
            Damaged: if it is not there, cut off, or not what its CRC says.
            Unsupported: if it is encrypted or packed by another method than deflate.
        """
        entry, begin = self._place(name)
        stored = self._source.bytes_at(begin, entry.compress_size)
        data = stored if entry.compress_type == zipfile.ZIP_STORED else self._grow(name, stored, entry.file_size)
        if len(data) != entry.file_size:
            raise self._damaged(name, f"it has {len(data)} bytes, not {entry.file_size}")
        if self._checked and zlib.crc32(memoryview(data)) != entry.CRC:
            raise self._damaged(name, _CRC)
        return data

    def source(self, name: str) -> Source:
        """An entry as a file of its own, checked; one that is not compressed stays where it is.

        Raises:
            Damaged, Unsupported: as `read` does.
        """
        entry, begin = self._place(name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            data = memoryview(self.read(name))

            def read(into: memoryview, start: int) -> int:
                into[:] = data[start : start + len(into)]
                return len(into)
        else:
            crc = 0
            for at in range(0, entry.file_size, _PIECE):
                crc = zlib.crc32(self._source.bytes_at(begin + at, min(_PIECE, entry.file_size - at)).data, crc)
            if self._checked and crc != entry.CRC:
                raise self._damaged(name, _CRC)

            def read(into: memoryview, start: int) -> int:
                into[:] = self._source.bytes_at(begin + start, len(into)).data
                return len(into)

        return Source(self._where(name), entry.file_size, read)

    def _place(self, name: str) -> tuple[zipfile.ZipInfo, int]:
        """An entry, and where its bytes begin."""
        entry = self._entries.get(name)
        if entry is None:
            raise self._source.damaged(f"the archive has no entry {name[:200]!r}")
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            do = "unpack it and pack it again without compression"
            raise Unsupported("an encrypted or unusually packed archive", where=self._where(name), do=do)
        signature, name_bytes, extra_bytes = _HEADER.unpack(self._source.bytes_at(entry.header_offset, _HEADER.size))
        begin = entry.header_offset + _HEADER.size
        wanted = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
        if signature != MAGIC or self._source.bytes_at(begin, name_bytes).tobytes() != wanted:
            raise self._damaged(name, "its header is missing, or of another name")
        return entry, begin + name_bytes + extra_bytes

    def _grow(self, name: str, stored: Array, size: int) -> Array:
        try:
            # One byte more than it says, so that a false claim shows.
            return np.frombuffer(bytearray(zlib.decompressobj(-15).decompress(memoryview(stored), size + 1)), np.uint8)
        except (zlib.error, MemoryError, OverflowError) as error:
            raise self._damaged(name, f"it does not unpack: {error}") from error

    def _where(self, name: str) -> str:
        return f"{self._source.name}:{name[:200]}"

    def _damaged(self, name: str, what: str) -> Damaged:
        return Damaged(f"an entry of the archive is damaged: {what}", where=self._where(name), do="get the file again")


def _count(source: Source, end: int) -> int:
    """How many entries the record at the end of an archive says there are."""
    _, count = _END.unpack(source.bytes_at(end, _END.size))
    if count == 0xFFFF:
        _, count = _END_64.unpack(source.bytes_at(end - _END_64.size, _END_64.size))
    return int(count)


class Writer:
    """A zip archive of stored entries, each beginning at a multiple of 64 bytes where `align` is asked for."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._zip = zipfile.ZipFile(target, "w")  # type: ignore[call-overload]

    def entry(self, name: str, size: int, align: bool = False) -> Any:
        """A context manager with `write`, for an entry of about `size` bytes."""
        info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        info.external_attr = 0o644 << 16
        info.file_size = size
        big = size > 1 << 30
        if align:
            begin = self._target.nbytes + 30 + len(name.encode()) + 4 + (20 if big else 0)
            padding = -begin % ALIGN
            info.extra = struct.pack("<HH", _PADDING, padding) + b"Z" * padding
        return self._zip.open(info, "w", force_zip64=big)

    def close(self) -> None:
        self._zip.close()
