"""A JSON document as a line, and its BLAKE3 as a second: so that one damaged bit is seen without any other file."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from blake3 import blake3

from everystep.errors import Damaged

T = TypeVar("T")


def pack_lines(body: Any) -> bytes:
    line = msgspec.json.encode(body)
    return line + b"\nblake3 " + blake3(line).hexdigest().encode() + b"\n"


def digest(data: bytes | memoryview) -> str:
    """BLAKE3 of a document's first line: what the next record chains to."""
    return blake3(bytes(data).partition(b"\n")[0]).hexdigest()


def unpack_lines(data: bytes | memoryview, kind: type[T], where: str) -> T:
    """The document, if its second line vouches for its first.

    Raises:
        Damaged: otherwise.
    """
    parts = bytes(data).split(b"\n")
    if len(parts) != 3 or parts[2] or parts[1] != b"blake3 " + blake3(parts[0]).hexdigest().encode():
        raise Damaged("the bytes do not match their checksum", where=where, do="run fsck, and bring the file back")
    return parse_json(parts[0], kind, where)


def parse_json(data: bytes | memoryview, kind: type[T], where: str) -> T:
    """Typed, validated JSON.

    Raises:
        Damaged: for anything that is not the wanted kind of document.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise Damaged(f"not the document that belongs here: {error}", where=where, do="run fsck") from error
