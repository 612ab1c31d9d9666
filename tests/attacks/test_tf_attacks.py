"""Hostile TensorFlow checkpoints: tables, entries and tensors that lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _attacks import every_damage_is_an_error, imported, nothing_happens, refused
from _formats import check
from _golden import FILES

from everystep import formats
from everystep.formats import wire
from everystep.formats.file import opened
from everystep.formats.tf_bundle_crc import crc32c, mask
from everystep.formats.tf_bundle_proto import GRAPH, Entry, entry, header, slice_key
from everystep.formats.tf_bundle_table import entries, table
from everystep.seam import REAL

pytestmark = pytest.mark.timeout(120)
DATA = np.arange(8, dtype="<f4").tobytes()
Pairs = dict[bytes, bytes]


def place(
    dtype: int = 1, shape: tuple[int, ...] = (8,), shard: int = 0, at: int = 0, size: int = 32, crc: int | None = None
) -> bytes:
    right = mask(crc32c(DATA[at : at + size])) if crc is None else crc
    return entry(Entry(dtype, shape, 0, at, size, right)) + (wire.number(3, shard) if shard else b"")


def bundle(folder: Path, pairs: Pairs, index: bytes | None = None, data: bytes = DATA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ckpt-1.data-00000-of-00001").write_bytes(data)
    whole = {b"": header(1), **pairs}
    (folder / "ckpt-1.index").write_bytes(table(sorted(whole.items())) if index is None else index)
    return folder / "ckpt-1.index"


def slices(*parts: tuple[int, int]) -> bytes:
    return b"".join(wire.message(7, wire.message(1, wire.number(1, a), wire.number(2, n))) for a, n in parts)


ENTRIES: dict[str, tuple[Pairs, str]] = {
    "no header": ({b"": b""}, "damaged"),
    "a thousand million files": ({b"": wire.number(1, 10**9)}, "damaged"),
    "no files": ({b"": wire.number(1, 0)}, "damaged"),
    "a newer version": ({b"": header(1) + wire.message(3, wire.number(2, 9))}, "damaged"),
    "an order of bytes": ({b"": wire.number(1, 1) + wire.number(2, 7)}, "damaged"),
    "garbage": ({b"a": b"\xff\xff"}, "damaged"),
    "beyond the file": ({b"a": place(at=16)}, "damaged"),
    "far beyond the file": ({b"a": place(at=2**61, size=32, crc=0)}, "damaged"),
    "a shape too large": ({b"a": place(shape=(9,))}, "damaged"),
    "a huge shape": ({b"a": place(shape=(2**61,), size=0)}, "damaged"),
    "shapes that overflow": ({b"a": place(shape=(2**32, 2**32), size=0)}, "damaged"),
    "empty and huge": ({b"a": place(shape=(0, 2**61, 2**61), size=0)}, "damaged"),
    "a negative shape": ({b"a": place(shape=(-8,))}, "damaged"),
    "many axes": ({b"a": place(shape=(1,) * 300 + (8,))}, "damaged"),
    "axes beyond NumPy": ({b"a": place(shape=(1,) * 100 + (8,))}, "damaged"),
    "another file": ({b"a": place(shard=5)}, "damaged"),
    "a wrong checksum": ({b"a": place(crc=1)}, "damaged"),
    "the same bytes again": ({b"a": place(), b"b": place(shape=(4,), size=16)}, "damaged"),
    "truth values": ({b"a": place(dtype=10, shape=(32,))}, "damaged"),
    "a type of no known size": ({b"a": place(dtype=21)}, "unsupported"),
    "a type that is none": ({b"a": place(dtype=777)}, "unsupported"),
    "slices of nothing": ({b"a": place(size=0) + slices((0, 8))}, "damaged"),
    "slices of other axes": ({b"a": place(size=0) + slices((0, 4)) + wire.message(7, b"")}, "damaged"),
    "texts without lengths": ({b"a": place(dtype=7, shape=(8,))}, "damaged"),
    "a thousand million texts": ({b"a": place(dtype=7, shape=(10**9,))}, "damaged"),
    "a name that is no text": ({b"\xff\xfe": place()}, "damaged"),
    "a graph that is none": ({GRAPH.encode(): b"x"}, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("pairs, kind", ENTRIES.values(), ids=ENTRIES)
def test_entries_that_lie_are_refused(pairs: Pairs, kind: str, tmp_path: Path) -> None:
    refused(bundle(tmp_path / "old", pairs), kind)


def test_the_bundle_above_is_whole_but_for_one_thing(tmp_path: Path) -> None:
    path = bundle(tmp_path, {b"a": place(), b"deep/b": place()})
    got = formats.read(path, strict=True).state
    check({"a": np.arange(8, dtype="f4"), "deep": {"b": np.arange(8, dtype="f4")}}, got)
    assert got["a"] is got["deep"]["b"]  # one place, one array


def test_slices_that_overlap_or_leave_a_hole(tmp_path: Path) -> None:
    whole = place(shape=(8,), size=0)
    for first, second in (((0, 4), (2, 4)), ((0, 4), (5, 3)), ((0, 4), (4, 5)), ((0, 4), (0, 4))):
        pairs = {b"a": whole + slices(first, second)}
        for at, (start, count) in ((0, first), (16, second)):
            pairs[slice_key(b"a", ((start, count),))] = place(shape=(count,), at=at, size=4 * count)
        refused(bundle(tmp_path / "old", pairs), "damaged")
    pairs = {b"a": whole + slices((0, 4), (4, 4))}
    for at, start in ((0, 0), (16, 4)):
        pairs[slice_key(b"a", ((start, 4),))] = place(shape=(4,), at=at, size=16)
    check({"a": np.arange(8, dtype="f4")}, formats.read(bundle(tmp_path / "good", pairs)).state)


def block(*parts: bytes, kind: int = 0, restarts: tuple[int, ...] = (0,)) -> bytes:
    body = b"".join(parts) + b"".join(n.to_bytes(4, "little") for n in (*restarts, len(restarts)))
    return packed(body, kind)


def packed(body: bytes, kind: int) -> bytes:
    return body + bytes([kind]) + mask(crc32c(body + bytes([kind]))).to_bytes(4, "little")


def index_of(data_block: bytes, handles: int = 1, size: int | None = None, start: int = 0) -> bytes:
    """A table of one block, to which its index may point many times."""
    size = len(data_block) - 5 if size is None else size
    where = wire.varint(start) + wire.varint(size)
    rows = [wire.varint(0) + wire.varint(8) + wire.varint(len(where)) + b"%08d" % n + where for n in range(handles)]
    index = block(*rows)
    handle = wire.varint(len(data_block)) + wire.varint(len(index) - 5)
    return data_block + index + (b"\0\0" + handle).ljust(40, b"\0") + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def row(shared: int, key: bytes, value: bytes = b"") -> bytes:
    return wire.varint(shared) + wire.varint(len(key)) + wire.varint(len(value)) + key + value


HEAD = row(0, b"", header(1))
LONG = row(0, b"k" * 200_000) + b"".join(row(200_000 + n, b"k") for n in range(60_000))
TABLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged"),
    "its end alone": (bytes(40) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "damaged"),
    "blocks that overlap": (index_of(block(HEAD, *(row(0, b"%05d" % n) for n in range(50))), handles=500), "damaged"),
    "a block beyond the file": (index_of(block(HEAD), size=2**40), "damaged"),
    "a block far away": (index_of(block(HEAD), start=2**62), "damaged"),
    "keys that share too much": (index_of(block(HEAD, LONG)), "unsupported"),
    "a key that shares more than there is": (index_of(block(HEAD, row(9, b"a"))), "damaged"),
    "a value that is cut off": (index_of(block(HEAD, b"\0\1\x63a")), "damaged"),
    "keys out of order": (index_of(block(HEAD, row(0, b"b"), row(0, b"a"))), "damaged"),
    "a key twice": (index_of(block(HEAD, row(0, b"a"), row(0, b"a"))), "damaged"),
    "too many restarts": (index_of(packed(b"\xff" * 4, 0)), "damaged"),
    "an unknown packing": (index_of(block(HEAD, kind=9)), "unsupported"),
    "packed garbage": (index_of(packed(b"\xff" * 50, 1)), "damaged"),
    "packed and huge": (index_of(packed(wire.varint(2**40) + b"\0a", 1)), "damaged"),
    "packed from before its beginning": (index_of(packed(b"\x08\x0d\x01", 1)), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("data, kind", TABLES.values(), ids=TABLES)
def test_tables_that_lie_are_refused(data: bytes, kind: str, tmp_path: Path) -> None:
    refused(bundle(tmp_path / "old", {}, data), kind)


def test_names_that_go_on_for_ever_stay_flat(tmp_path: Path) -> None:
    path = bundle(tmp_path, {b"/" * 100_000: place(), b"a": place()})
    with nothing_happens():
        got = formats.read(path).state
    assert set(got) == {"/" * 100_000, "a"}


def test_nothing_leads_out_of_the_folder(tmp_path: Path) -> None:
    """Names of data files are made from the name of the index alone."""
    secret = tmp_path / "secret.data-00000-of-00001"
    secret.write_bytes(DATA)
    path = bundle(tmp_path / "old", {b"../secret": place(), b"a/../../b": place()})
    with nothing_happens():
        got = formats.read(path, strict=True).state
    assert set(got) == {"..", "a"}


# -------------------------------------------------------------------------------------------- cuts and flipped bits


def reader(folder: Path, changed: str) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        (folder / changed).write_bytes(data)
        return formats.read(folder / "ckpt-2.index", strict=True).state

    return read


@pytest.mark.parametrize("changed", ["ckpt-2.index", "ckpt-2.data-00000-of-00001"])
def test_every_damage_is_seen(changed: str, tmp_path: Path) -> None:
    shutil.copytree(FILES / "tf_checkpoint", tmp_path / "c")
    want = formats.read(tmp_path / "c" / "ckpt-2.index").state

    def same(got: Any) -> bool:
        check(want, got)
        return True

    data = (tmp_path / "c" / changed).read_bytes()
    every_damage_is_an_error(data, reader(tmp_path / "c", changed), same)


def test_a_saved_model_with_a_hostile_program_is_not_looked_at(tmp_path: Path) -> None:
    shutil.copytree(FILES / "tf_saved_model", tmp_path / "m")
    (tmp_path / "m" / "saved_model.pb").write_bytes(b"\xff" * 1000)
    with nothing_happens():
        assert list(formats.read(tmp_path / "m").state) == ["v"]


def test_an_import_goes_on_past_what_is_damaged(tmp_path: Path) -> None:
    bundle(tmp_path, {b"a": place(crc=1)})
    shutil.copy(FILES / "tf_slices" / "model.index", tmp_path / "ckpt-2.index")
    shutil.copy(FILES / "tf_slices" / "model.data-00000-of-00001", tmp_path / "ckpt-2.data-00000-of-00001")
    imported(tmp_path)


def test_the_entries_of_a_golden_file_are_those_that_were_written() -> None:
    with opened(FILES / "tf_slices" / "model.index", REAL) as source:
        found = dict(entries(source))
    assert sum(1 for key in found if key[:1] == b"\0") == 3
