"""Hostile protocol buffers."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _attacks import every_damage_is_an_error, refused
from _formats import check

from everystep import formats
from everystep.formats import wire
from everystep.formats.protobuf_read import FORMAT

pytestmark = pytest.mark.timeout(60)

HEADER = wire.message(1, wire.message(1, FORMAT.encode()), wire.number(2, 1))


def text(field: int, value: str) -> bytes:
    return wire.message(field, value.encode())


def leaf(path: str = "w", dtype: str = "<f4", shape: bytes | None = None, nbytes: int = 8, *more: bytes) -> bytes:
    sizes = wire.message(3, wire.varint(2)) if shape is None else shape
    return wire.message(3, text(1, path), text(2, dtype), sizes, wire.number(6, nbytes), *more)


def piece(data: bytes = b"\0" * 8) -> bytes:
    return wire.message(4, wire.message(1, data))


def structure(*nodes: bytes) -> bytes:
    return wire.message(2, *(wire.message(1, node) for node in nodes))


def container(kind: int, size: int, key: bytes = b"", name: str = "") -> bytes:
    return key + wire.message(2, wire.number(1, kind), wire.number(2, size), text(3, name))


def key(value: bytes) -> bytes:
    return wire.message(1, value)


def file(*records: bytes, leaves: int = 1, nbytes: int = 8, crc: int | None = None, end: bool = True) -> bytes:
    out = b"".join(wire.varint(len(record)) + record for record in records)
    if end:
        last = wire.number(1, leaves), wire.number(2, nbytes), wire.fixed32(3, zlib.crc32(out) if crc is None else crc)
        body = wire.message(5, *last)
        out += wire.varint(len(body)) + body
    return out


LEAF_NODE = wire.number(4, 0)
A, B = key(text(5, "a")), key(text(5, "b"))
DEEP = "[" * 50_000 + "]" * 50_000


def valued(value: bytes) -> bytes:
    return file(HEADER, structure(wire.message(3, value)), leaves=0, nbytes=0)


ATTACKS: dict[str, bytes] = {
    "a length without an end": file(HEADER, end=False) + b"\xff" * 11,
    "a record of 2**63 bytes": file(HEADER, end=False) + wire.varint(2**63),
    "a record longer than the file": file(HEADER, end=False) + wire.varint(1 << 20) + b"\x12",
    "an empty record": file(HEADER, b"", leaf(), piece()),
    "a group": file(HEADER, b"\x0b\x0c", leaf(), piece()),
    "a field without a number": file(HEADER, b"\x02\x00", leaf(), piece()),
    "a field longer than its message": file(HEADER, b"\x1a\x7f", leaf(), piece()),
    "a number of eleven bytes": file(HEADER, wire.message(3, b"\x30" + b"\xff" * 10 + b"\x01")),
    "two headers": file(HEADER, HEADER, leaf(), piece()),
    "no header": file(leaf(), piece()),
    "a header of another format": file(wire.message(1, text(1, "other")), leaf(), piece()),
    "a newer version": file(wire.message(1, text(1, FORMAT), wire.number(2, 2)), leaf(), piece()),
    "a header whose text is no text": file(
        wire.message(1, text(1, FORMAT), wire.number(2, 1), wire.message(5, text(1, "a"), wire.message(2, b"\xff"))),
        leaf(),
        piece(),
    ),
    "metrics of nothing": file(
        wire.message(1, text(1, FORMAT), wire.number(2, 1), wire.message(4, text(1, "a"))), leaf(), piece()
    ),
    "a leaf of 4 EiB": file(HEADER, leaf("w", "<f4", wire.message(3, wire.varint(2**60)), 2**62)),
    "a leaf of more bytes than its shape": file(HEADER, leaf(nbytes=12), piece(b"\0" * 12), nbytes=12),
    "a shape that overflows": file(
        HEADER, leaf("w", "<f4", wire.message(3, *[wire.varint(2**32)] * 2, wire.varint(2)), 0), nbytes=0
    ),
    "a negative size": file(HEADER, leaf("w", "<f4", wire.message(3, wire.varint(-2)), 8), piece()),
    "no bytes, of an impossible shape": file(
        HEADER, leaf("w", "<f4", wire.message(3, wire.varint(0), wire.varint(2**63)), 0), nbytes=0
    ),
    "a million dimensions": file(
        HEADER, leaf("w", "<f4", wire.message(3, b"\1" * 1_000_000), 4), piece(b"\0" * 4), nbytes=4
    ),
    "a million dimensions, one by one": file(
        HEADER, leaf("w", "<f4", wire.number(3, 1) * 1_000_000, 4), piece(b"\0" * 4), nbytes=4
    ),
    "an unknown dtype": file(HEADER, leaf(dtype="float"), piece()),
    "a dtype of objects": file(HEADER, leaf(dtype="|O"), piece()),
    "a dtype of fields of fields": file(HEADER, leaf(dtype='{"formats":[' * 10_000), piece()),
    "an unknown form": file(HEADER, leaf("w", "<f4", None, 8, wire.number(5, 9)), piece()),
    "text that is none": file(
        HEADER, leaf("w", "|u1", wire.message(3, wire.varint(8)), 8, wire.number(5, 2)), piece(b"\xff" * 8)
    ),
    "truth of 2": file(HEADER, leaf("w", "|b1", wire.message(3, wire.varint(8)), 8), piece(b"\2" * 8)),
    "a path that is no text": file(
        HEADER,
        wire.message(3, wire.message(1, b"\xff"), text(2, "<f4"), wire.message(3, b"\2"), wire.number(6, 8)),
        piece(),
    ),
    "a number in place of text": file(
        HEADER, wire.message(3, wire.number(1, 5), text(2, "<f4"), wire.message(3, b"\2"), wire.number(6, 8)), piece()
    ),
    "text in place of a number": file(
        HEADER, wire.message(3, text(1, "w"), text(2, "<f4"), wire.message(3, b"\2"), text(6, "8")), piece()
    ),
    "a piece without a leaf": file(HEADER, piece(), leaf(), piece(), nbytes=16),
    "a piece too much": file(HEADER, leaf(), piece(), piece(b"\0"), nbytes=9),
    "a piece too few": file(HEADER, leaf(), piece(b"\0" * 4), nbytes=4),
    "pieces of the leaf before": file(
        HEADER, leaf(), piece(b"\0" * 4), leaf("v"), piece(b"\0" * 12), leaves=2, nbytes=16
    ),
    "two leaves of one path": file(HEADER, leaf(), piece(), leaf(), piece(), leaves=2, nbytes=16),
    "a leaf too few": file(HEADER, leaf(), piece(), leaves=2),
    "no end": file(HEADER, leaf(), piece(), end=False),
    "something behind the end": file(HEADER, leaf(), piece()) + b"\x02\x12\x00",
    "a wrong checksum": file(HEADER, leaf(), piece(), crc=1),
    "a list of 2**60": file(HEADER, structure(container(4, 2**60)), leaves=0, nbytes=0),
    "a list of more than there is": file(HEADER, structure(container(4, 40)), leaves=0, nbytes=0),
    "a dict of more than there is": file(HEADER, structure(container(1, 2), A + LEAF_NODE), leaf(), piece()),
    "lists in lists": file(HEADER, structure(*[container(4, 1)] * 100_000, LEAF_NODE), leaf(), piece()),
    "a key twice": file(HEADER, structure(container(1, 2), A + LEAF_NODE, A + LEAF_NODE), leaf(), piece()),
    "a key that is missing": file(HEADER, structure(container(1, 1), LEAF_NODE), leaf(), piece()),
    "a field called by a number": file(
        HEADER, structure(container(7, 1, name="P"), key(wire.number(3, 4)) + LEAF_NODE), leaf(), piece()
    ),
    "a leaf that is not there": file(HEADER, structure(wire.number(4, 1)), leaf(), piece()),
    "a leaf of a negative number": file(HEADER, structure(wire.number(4, -1)), leaf(), piece()),
    "a leaf called by text": file(HEADER, structure(text(4, "0")), leaf(), piece()),
    "a container of an unknown kind": file(HEADER, structure(container(8, 0)), leaf(), piece()),
    "nodes behind the last": file(HEADER, structure(LEAF_NODE, LEAF_NODE), leaf(), piece()),
    "a node that is nothing": file(HEADER, structure(b""), leaf(), piece()),
    "structure behind a leaf": file(HEADER, leaf(), piece(), structure(LEAF_NODE)),
    "a value that is nothing": valued(b""),
    "a value of lists in lists": valued(text(7, DEEP)),
    "a value of tuples in tuples": valued(text(7, '{"t":[' * 5000 + "1" + "]}" * 5000)),
    "a value that is no JSON": valued(text(7, "{")),
    "a value of an unknown kind": valued(text(7, json.dumps({"pickle": "x"}))),
    "a value of a function": valued(text(7, json.dumps({"e": "os.system"}))),
}
KINDS = {"no header": "unsupported", "a header of another format": "unsupported", "a newer version": "unsupported"}
"""Of those that are not called damaged."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack: str, tmp_path: Path) -> None:
    data, kind = ATTACKS[attack], KINDS.get(attack, "damaged")
    refused(data, kind, tmp_path / "old", "epoch_3.pb")


def test_the_files_above_are_whole_but_for_one_thing() -> None:
    zeros = np.zeros(2, "f4")
    check({"w": zeros}, formats.read(file(HEADER, leaf(), piece())).state)
    nodes = structure(container(1, 2), A + LEAF_NODE, B + wire.message(3, text(7, '{"t": [1]}')))
    check({"a": zeros, "b": (1,)}, formats.read(file(HEADER, nodes, leaf(), piece())).state)
    check(1, formats.read(valued(wire.number(3, wire.zigzag(1)))).state)


def test_no_damage_is_overlooked(tmp_path: Path) -> None:
    state = {"w": np.arange(40.0), "n": {"lr": 0.1, "t": (1, "x", None)}, "l": [np.float32(1), "y" * 5000]}
    data = Path(formats.write(tmp_path / "x.pb", state, metadata={"step": "3"}).path).read_bytes()

    def same(content: Any) -> bool:
        check(state, content.state)
        return True

    every_damage_is_an_error(data, formats.read, same)
