"""Hostile .params files of MXNet."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _attacks import every_damage_is_an_error, refused
from _formats import check

from everystep import formats
from everystep.formats.params import V1, V2, V3

pytestmark = pytest.mark.timeout(60)

CPU = struct.pack("<ii", 1, 0)


def i4(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def u4(value: int) -> bytes:
    return struct.pack("<I", value)


def q(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def counted(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def name(text: bytes) -> bytes:
    return counted(len(text)) + text


def array(
    shape: bytes = i4(1) + q(2), dtype: int = 0, data: bytes = b"\0" * 8, version: int = V2, storage: int = 0
) -> bytes:
    return u4(version) + i4(storage) + shape + CPU + i4(dtype) + data


def file(*arrays: bytes, names: Any = (b"w",), count: int | None = None, named: int | None = None) -> bytes:
    head = counted(0x112, 0, len(arrays) if count is None else count) + b"".join(arrays)
    return head + counted(len(names) if named is None else named) + b"".join(map(name, names))


def sparse(held: bytes, shape: bytes, beside: bytes, data: bytes, storage: int = 1) -> bytes:
    return u4(V2) + i4(storage) + held + shape + CPU + i4(0) + beside + data


def table(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return file(array(), array(i4(1) + q(len(data)), 3, data), names=(b"w", b"__everystep__"))


def tree(**more: Any) -> dict[str, Any]:
    return {"format": 1, "nodes": [["leaf", 0]], "values": [], "leaves": [["w", "<f4", "array"]], **more}


ATTACKS: dict[str, bytes] = {
    "2**63 arrays": file(array(), count=2**63),
    "a million arrays in few bytes": file(array(), count=1_000_000),
    "2**63 names": file(array(), named=2**63),
    "more names than arrays": file(array(), names=(b"w", b"v")),
    "fewer names than arrays": file(array(), array()),
    "two arrays of one name": file(array(), array(), names=(b"w", b"w")),
    "a name of 2**62 bytes": file(array(), names=())[:-8] + counted(1, 2**62) + b"w",
    "a name that is no text": file(array(), names=(b"\xff\xfe",)),
    "something behind the end": file(array()) + b"\0",
    "-2 dimensions": file(array(i4(-2))),
    "2**31 dimensions": file(array(i4(2**31 - 1))),
    "33 dimensions": file(array(i4(33) + q(*[1] * 33), data=b"\0" * 4)),
    "2**32 dimensions of the oldest kind": file(u4(2**32 - 1) + b"\0" * 64),
    "a version that there is not": file(u4(0xF993FACB) + b"\0" * 64),
    "a negative size": file(array(i4(2) + q(-2, -1))),
    "sizes that overflow": file(array(i4(3) + q(2**32, 2**31, 2))),
    "4 EiB": file(array(i4(1) + q(2**60))),
    "4 EiB of the first version": file(u4(V1) + i4(1) + q(2**60) + CPU + i4(0)),
    "16 GiB of the oldest kind": file(u4(1) + u4(2**32 - 1) + CPU + i4(0)),
    "no bytes, of an impossible shape": file(array(i4(3) + q(2**62, 2**62, 0), data=b"", version=V3)),
    "an unknown dtype": file(array(dtype=13)),
    "a negative dtype": file(array(dtype=-1)),
    "an unknown storage": file(array(storage=3)),
    "a negative storage": file(array(storage=-1)),
    "truth of 2": file(array(dtype=7, data=b"\2\0")),
    "sparse, of no size": file(sparse(i4(-1), i4(1) + q(9), i4(6) + i4(1) + q(1), b"\0" * 12)),
    "sparse, of 4 EiB": file(sparse(i4(1) + q(2**60), i4(1) + q(9), i4(6) + i4(1) + q(1), b"\0" * 12)),
    "sparse, with 4 EiB of indices": file(sparse(i4(1) + q(1), i4(1) + q(9), i4(6) + i4(1) + q(2**59), b"\0" * 12)),
    "sparse, with indices of no size": file(sparse(i4(1) + q(1), i4(1) + q(9), i4(6) + i4(-1), b"\0" * 12)),
    "cut in the middle": file(array())[:40],
    "a table that is no JSON": table(b"{"),
    "a table of lists in lists": table(b"[" * 50_000),
    "a table of nothing": table({}),
    "a table for another array": table(tree(leaves=[["v", "<f4", "array"]])),
    "a table with another dtype": table(tree(leaves=[["w", "<f8", "array"]])),
    "a table with a dtype of objects": table(tree(leaves=[["w", "|O", "array"]])),
    "a table that points outside": table(tree(nodes=[["leaf", 7]])),
    "a table of 2**60 items": table(tree(nodes=[["list", 2**60]])),
    "a newer table": table(tree(format=2)),
}
KINDS = {"a newer table": "unsupported"}
"""Of those that are not called damaged."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack: str, tmp_path: Path) -> None:
    data, kind = ATTACKS[attack], KINDS.get(attack, "damaged")
    refused(data, kind, tmp_path / "old", "net-0003.params")


def test_the_files_above_are_whole_but_for_one_thing() -> None:
    zeros = np.zeros(2, "f4")
    check({"w": zeros}, formats.read(file(array())).state)
    check(zeros, formats.read(table(tree())).state)
    got = formats.read(file(sparse(i4(1) + q(1), i4(1) + q(9), i4(6) + i4(1) + q(1), b"\0" * 12))).state["w"]
    check(zeros[:1], got["data"])


def test_damage_ends_in_an_error_of_ours(tmp_path: Path) -> None:
    state = {"w": np.arange(40.0), "n": {"lr": 0.1, "t": (1, "x", None)}, "l": [np.float32(1), "y" * 5000]}
    data = Path(formats.write(tmp_path / "x.params", state).path).read_bytes()
    every_damage_is_an_error(data, formats.read, lambda content: True, checked=False)
