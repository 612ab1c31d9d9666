"""Keys: where each kind of object lies. Names are never reused."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

from everystep.errors import UsageError

FORMAT_KEY = "format.json"
PLACE_KEY = "place.json"
MIRROR_KEY = "mirror.json"
_PLAIN = re.compile(r"[A-Za-z0-9_-]")
_SLOT = re.compile(r"[0-9]{20}")
_SPAN = re.compile(r"([0-9]{20})-([1-9][0-9]{0,6})")
_NAME_BYTES_MAX = 180
SLOTS_MAX = 10**15
"""More records than any run will have; a file with a higher number is not one."""


NO_TERM = 0
"""Instead of a term, in the names of packs that no save wrote. Terms begin at 1."""


class PackName(NamedTuple):
    """`writer` is '<128 random bits>-<term>', or -0 for what belongs to no term; `number` counts its attempts."""

    writer: str
    number: int


class Span(NamedTuple):
    """Records `first` … `first + length - 1` of a log."""

    first: int
    length: int

    @property
    def end(self) -> int:
        """The slot behind the last."""
        return self.first + self.length

    @property
    def slots(self) -> range:
        return range(self.first, self.end)


def run_folder(name: str) -> str:
    """The folder of a run, 'runs/<escaped name>/'.

    Raises:
        UsageError: for an empty or overlong name.
    """
    if not isinstance(name, str) or not name:
        raise UsageError(f"a run needs a name, not {name!r}", do='for example repo.run("resnet")')
    raw = name.encode("utf-8", "surrogatepass")
    escaped = "".join(
        chr(byte) if _PLAIN.match(chr(byte)) or (byte == 0x2E and at > 0) else f"%{byte:02X}"
        for at, byte in enumerate(raw)
    )
    if len(escaped) > _NAME_BYTES_MAX:
        raise UsageError(
            f"a run name of {len(escaped)} bytes is too long for a folder",
            where=f"{name[:40]}…",
            do=f"use at most {_NAME_BYTES_MAX} bytes; put the rest into run.config",
        )
    return f"runs/{escaped}/"


def run_name(folder: str) -> str:
    """The run whose folder this is: the inverse of `run_folder`."""
    return unquote(folder.rstrip("/").rpartition("/")[2], errors="surrogatepass")


def is_run_folder(key: str) -> bool:
    """Whether a key below 'runs/' is a folder that `run_folder` makes."""
    try:
        return run_folder(run_name(key)) == key
    except (UnicodeError, UsageError):
        return False


def record_key(folder: str, slot: int) -> str:
    return f"{folder}log/{slot:020d}"


def record_slot(name: str) -> int | None:
    """The slot of a record's file name; None for whatever else lies in a log."""
    return int(name) if _SLOT.fullmatch(name) and int(name) < SLOTS_MAX else None


def pack_key(folder: str, pack: PackName) -> str:
    return f"{folder}packs/{pack.writer}/{pack.number}"


def volumes_folder(folder: str) -> str:
    return f"{folder}volumes/"


def volume_key(folder: str, span: Span) -> str:
    return f"{volumes_folder(folder)}{span.first:020d}-{span.length}"


def volume_span(name: str) -> Span | None:
    """The records that a volume's file name speaks of; None for whatever else lies there."""
    found = _SPAN.fullmatch(name)
    return Span(int(found[1]), int(found[2])) if found and int(found[1]) < SLOTS_MAX else None


def receipts_folder(folder: str, term: int, ordinal: int) -> str:
    """Where the ranks' receipts of one save lie."""
    return f"{folder}save/{term}/{ordinal}/"


def receipt_key(folder: str, term: int, ordinal: int, rank: int) -> str:
    return f"{receipts_folder(folder, term, ordinal)}{rank}"
