"""Damaged and false archives, headers and tables: an error or the same state, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from _formats import bounded, check, packed, saved, stream, torch_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everystep import formats
from everystep.errors import Damaged, Unsupported

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.timeout(120),
]
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


# ------------------------------------------------------------------------------------------------------ archives


def test_compressed_archives_grow_only_so_far() -> None:
    bomb = torch_file(stream(b"](" + b"N" * 40_000_000 + b"e"), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    with bounded(), pytest.raises(Unsupported, match="grows"):
        formats.read(bomb)
    claim = bytearray(packed(lambda a: a.writestr("a.npy", bytes(1 << 20)), zipfile.ZIP_DEFLATED))
    at = claim.rfind(b"PK\x01\x02")
    claim[at + 24 : at + 28] = struct.pack("<I", (1 << 30) + 1)
    with bounded(), pytest.raises(Unsupported, match="grows"):
        formats.read(bytes(claim))
    lying = bytearray(packed(lambda a: a.writestr("a.npy", bytes(100 << 20)), zipfile.ZIP_DEFLATED))
    at = lying.rfind(b"PK\x01\x02")
    lying[at + 24 : at + 28] = struct.pack("<I", 1000)  # says 1,000 bytes, holds 100 MiB
    with bounded(), pytest.raises(Damaged, match="bytes, not 1000"):
        formats.read(bytes(lying))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_packing_are_refused(method: int) -> None:
    with pytest.raises(Unsupported, match="unusually packed"):
        formats.read(torch_file(stream(b"N"), method))


def test_archives_that_overlap_repeat_or_lie() -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        double = packed(lambda a: [a.writestr("archive/data.pkl", stream(b"N")) for _ in range(2)] and None)
    with pytest.raises(Damaged, match="one name"):
        formats.read(double)
    data = bytearray(packed(lambda a: [a.writestr(f"{i}.npy", bytes(5000)) for i in range(9)] and None))
    start = int.from_bytes(data[-6:-2], "little")
    for _ in range(9):  # all entries point to the first one's bytes, and claim half of the file
        at = data.find(b"PK\x01\x02", start)
        data[at + 20 : at + 28] = struct.pack("<II", 20000, 20000)
        start = at + 4
    with pytest.raises(Damaged, match="overlap"):
        formats.read(bytes(data))
    encrypted = bytearray(torch_file(stream(b"N")))
    encrypted[encrypted.find(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(Unsupported, match="encrypted"):
        formats.read(bytes(encrypted))
    with pytest.raises(Damaged, match="byte order"):
        formats.read(
            packed(
                lambda a: (
                    [a.writestr(f"x/{n}", d) for n, d in (("data.pkl", stream(b"N")), ("byteorder", b"odd"))] and None
                )
            )
        )


def test_archives_of_more_than_65535_entries_say_so_elsewhere() -> None:
    def long(count: int) -> bytes:
        data = packed(lambda a: a.writestr("a.npy", array_file(HEADER, bytes(4))))
        entries, directory, start = struct.unpack("<HII", data[-12:-2])
        sizes = struct.pack("<IIQQQQ", 0, 0, count, entries + count - 1, directory, start)
        record = b"PK\x06\x06" + struct.pack("<QHH", 44, 45, 45) + sizes
        locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(data) - 22, 1)
        return data[:-22] + record + locator + data[-22:-14] + b"\xff" * 12 + bytes(2)

    check({"a": np.zeros(4, "u1")}, formats.read(long(1)).state)
    with pytest.raises(Damaged, match="missing"):
        formats.read(long(2))


def test_two_arrays_of_one_name_and_a_table_of_numbers(tmp_path: Path) -> None:
    array = array_file(HEADER, bytes(4))
    with pytest.raises(Damaged, match="one name"):
        formats.read(packed(lambda a: [a.writestr(n, array) for n in ("a", "a.npy")] and None), format="npz")
    np.savez(tmp_path / "x.npz", __everystep__=np.ones(3))
    with pytest.raises(Damaged, match="no array of bytes"):
        formats.read(tmp_path / "x.npz")


def test_two_entries_with_each_others_name() -> None:
    data = saved({"a": torch.ones(4), "b": torch.zeros(4)})
    swapped = bytearray(data)
    directory = data.find(b"PK\x01\x02")
    one, other = data.find(b"archive/data/0", directory), data.find(b"archive/data/1", directory)
    swapped[one + 13], swapped[other + 13] = ord("1"), ord("0")
    with pytest.raises(Damaged, match="another name"):
        formats.read(bytes(swapped))


# ---------------------------------------------------------------------------- every cut and any flipped bit


def small_state() -> dict[str, Any]:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {"w": x, "tie": x, "n": {"step": 7, "betas": (0.9, 0.999)}, "f": np.array([True, False])}


def small_files(folder: Path) -> dict[str, bytes]:
    state = small_state()
    as_torch = {"w": torch.from_numpy(state["w"]), "n": state["n"], "f": torch.from_numpy(state["f"])}
    np.savez_compressed(folder / "np.npz", a=state["w"], b=state["f"])
    files = {
        "torch": saved(as_torch),
        "legacy": saved(as_torch, _use_new_zipfile_serialization=False),
        "numpy": (folder / "np.npz").read_bytes(),
        "package": safetensors.numpy.save({"a": state["w"], "b": state["f"]}),
    }
    for name in SINGLE:
        ending = formats.FORMATS[name].EXTENSIONS[0]
        files[name] = Path(formats.write(folder / f"x{ending}", state).path).read_bytes()
    return files


SINGLE = ("pth", "npz", "safetensors", "protobuf", "params")
"""What is one file by itself; the others are cut and flipped in attack files of their own."""
FILES = ["torch", "legacy", "numpy", "package", *SINGLE]


@pytest.mark.parametrize("which", FILES)
def test_every_cut_is_an_error(which: str, tmp_path: Path) -> None:
    data = small_files(tmp_path)[which]
    formats.read(data, strict=True)
    form = formats.read(data).format
    for end in range(len(data)):
        with pytest.raises((Damaged, Unsupported)):
            formats.read(data[:end], format=form)
        with pytest.raises((Damaged, Unsupported)):
            formats.read(data[:end])


@pytest.mark.parametrize("which", FILES)
def test_flipped_bits_give_an_error_or_the_same(which: str, tmp_path: Path) -> None:
    data = small_files(tmp_path)[which]
    whole = formats.read(data)
    chance = random.Random(which)
    positions = [(at, chance.randrange(8)) for at in range(len(data))]
    for at, bit in positions if len(positions) < 4000 else chance.sample(positions, 4000):
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        try:
            got = formats.read(bytes(flipped), format=whole.format)
        except (Damaged, Unsupported):
            continue
        if which in ("torch", "numpy", "pth", "npz", "protobuf"):  # the others have no checksum
            assert not got.not_understood, at
            check(whole.state, got.state, f"byte {at}")


@pytest.mark.parametrize("which", FILES)
def test_bytes_at_random_places_end_in_time(which: str, tmp_path: Path) -> None:
    data = small_files(tmp_path)[which]
    form, chance = formats.read(data).format, random.Random(which)
    with bounded():
        for _ in range(1500):
            mutated = bytearray(data)
            for _ in range(chance.randrange(1, 6)):
                at, count = chance.randrange(len(mutated)), chance.randrange(1, 9)
                mutated[at : at + chance.randrange(9)] = chance.randbytes(count)
            with contextlib.suppress(Damaged, Unsupported):
                formats.read(bytes(mutated), format=form)


# --------------------------------------------------------------------------------------------------- safetensors


def tensors_file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": offsets,
        **more,
    }


FALSE_HEADERS = {
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, 6),
    "same place": ({"a": entry(), "b": entry()}, 4),
    "hole": ({"a": entry(), "b": entry(offsets=(5, 9))}, 9),
    "not from the start": ({"a": entry(offsets=(1, 5))}, 5),
    "beyond": ({"a": entry()}, 3),
    "more": ({"a": entry()}, 5),
    "backwards": ({"a": entry(offsets=(4, 0))}, 4),
    "negative": ({"a": entry(offsets=(-4, 0))}, 4),
    "float offsets": ({"a": entry(offsets=(0.0, 4.0))}, 4),
    "huge offsets": ({"a": entry(offsets=(0, 2**64), shape=(2**64,))}, 4),
    "three offsets": ({"a": entry(offsets=(0, 4, 4))}, 4),
    "other shape": ({"a": entry(shape=(5,))}, 4),
    "negative shape": ({"a": entry(shape=(-2, -2))}, 4),
    "overflow": ({"a": entry(shape=(2**33, 2**33), offsets=(0, 0))}, 0),
    "bool shape": ({"a": entry(shape=(True, 4))}, 4),
    "empty and huge": ({"a": entry(shape=(0, 2**61, 2**61), offsets=(0, 0))}, 0),
    "axes": ({"a": entry(shape=(1,) * 70 + (4,))}, 4),
    "dtype": ({"a": entry(dtype="F128")}, 4),
    "dtype list": ({"a": entry(dtype=["U8"])}, 4),
    "extra": ({"a": entry(x=1)}, 4),
    "missing": ({"a": {"dtype": "U8", "shape": [4]}}, 4),
    "list": ([1], 0),
    "number": ({"a": 4}, 0),
    "null": (b"null", 0),
    "metadata": ({"__metadata__": {"a": 1}}, 0),
    "metadata list": ({"__metadata__": ["a"]}, 0),
    "not JSON": (b"{", 0),
    "twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), 4),
    "twice inside": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4),
    "not UTF-8": (b'{"\xff":1}', 0),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0),
    "long number": (b'{"a":' + b"1" * 10_000 + b"}", 0),
    "truth values": ({"a": entry(dtype="BOOL")}, 4),
}


@pytest.mark.parametrize("header, size", FALSE_HEADERS.values(), ids=FALSE_HEADERS)
def test_false_headers_of_safetensors(header: Any, size: int) -> None:
    with bounded(mib=16), pytest.raises(Damaged):
        formats.read(tensors_file(header, b"\x07" * size), format="safetensors")


def test_headers_longer_than_allowed_or_than_the_file() -> None:
    for length in (10**8 + 1, 2**63, 2**64 - 1):
        with bounded(mib=1), pytest.raises(Unsupported, match="at most"):
            formats.read(tensors_file({}, length=length), format="safetensors")
    with bounded(mib=1), pytest.raises(Damaged):
        formats.read(tensors_file({}, length=10**8), format="safetensors")


def test_packed_elements_are_not_understood() -> None:
    content = formats.read(tensors_file({"a": entry(dtype="F4", shape=(8,)), "b": entry(offsets=(4, 8))}, bytes(8)))
    assert [(o.path, o.class_name) for o in content.not_understood] == [("a", "safetensors F4")]
    check({"b": np.zeros(4, "u1")}, content.understood())


@MANY
@given(data=st.data())
def test_never_laxer_than_the_package(data: st.DataObject) -> None:
    small = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16, 2**63, -1])
    offsets = st.lists(small, min_size=2, max_size=2)
    one = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "I16", "F32", "I64", "BF16", "F16"]),
            "shape": st.lists(small, max_size=3),
            "data_offsets": offsets,
        }
    )
    header = data.draw(st.dictionaries(st.sampled_from("abc"), one, max_size=3))
    body = bytes(data.draw(small.filter(lambda n: 0 <= n < 100)))
    raw = tensors_file(header, body)
    try:
        got = formats.read(raw, format="safetensors").state
    except (Damaged, Unsupported):
        return
    theirs = dict(safetensors.deserialize(raw))
    assert theirs.keys() == got.keys()
    assert all(
        tuple(theirs[key]["shape"]) == value.shape and theirs[key]["data"] == value.tobytes()
        for key, value in got.items()
    )


def tables() -> Iterator[tuple[str, dict[str, Any]]]:
    """False tables of a nested state, beside one array `a` of four bytes."""
    whole = {"format": 1, "nodes": [["dict", ["k"]], ["leaf", 0]], "values": [], "leaves": [["a", "|u1", "array"]]}
    yield "another array", whole | {"leaves": [["b", "|u1", "array"]]}
    yield "another dtype", whole | {"leaves": [["a", "<f8", "array"]]}
    yield "objects", whole | {"leaves": [["a", "|O", "array"]]}
    yield "no dtype", whole | {"leaves": [["a", "system", "array"]]}
    yield "a kind", whole | {"leaves": [["a", "|u1", "torch.tensor"]]}
    yield "a scalar of four", whole | {"leaves": [["a", "|u1", "scalar"]]}
    yield "no text", whole | {"leaves": [["a", "|u1", "str"]]}
    yield "no leaf", whole | {"leaves": []}
    yield "no node", whole | {"nodes": []}
    yield "deep", whole | {"nodes": [["list", 1]] * 5000 + [["leaf", 0]]}
    yield "composite", whole | {"nodes": [["composite", "torch.sparse", ["k"]], ["leaf", 0]]}
    yield "shape of the table", whole | {"nodes": 3}
    yield "values", whole | {"nodes": [["value", 0]], "values": [{"x": "os.system"}]}


@pytest.mark.parametrize("table", [pytest.param(table, id=id) for id, table in tables()])
def test_false_tables_of_a_nested_state(table: dict[str, Any], tmp_path: Path) -> None:
    body = b"\xff\xfe\xfd\xfc"
    header = {"__metadata__": {"everystep": json.dumps(table)}, "a": entry()}
    np.savez(
        tmp_path / "x.npz", a=np.frombuffer(body, "u1"), __everystep__=np.frombuffer(json.dumps(table).encode(), "u1")
    )
    for data in (tensors_file(header, body), (tmp_path / "x.npz").read_bytes()):
        with bounded(mib=16), pytest.raises(Damaged):
            formats.read(data)


def test_a_table_of_a_newer_version_is_refused() -> None:
    table = {"format": 2, "nodes": [], "values": [], "leaves": []}
    with pytest.raises(Unsupported, match="newer"):
        formats.read(tensors_file({"__metadata__": {"everystep": json.dumps(table)}}))


# ----------------------------------------------------------------------------------------------------------- npz


def array_file(header: str, body: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    text = header.encode("latin1")
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(2 if version == 1 else 4, "little") + text + body


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (4,)}"
FALSE_ARRAYS = {
    "empty": b"",
    "no magic": bytes(40),
    "version": array_file(HEADER, bytes(4), 9),
    "header beyond": array_file(HEADER, bytes(4), length=60000),
    "header of 4 GiB": array_file(HEADER, bytes(4), 2, 2**32 - 1),
    "long header": array_file(HEADER + " " * 10_000, bytes(4)),
    "call": array_file("__import__('os').system('x')"),
    "number": array_file("1"),
    "cut": array_file(HEADER[:-1], bytes(4)),
    "more keys": array_file(HEADER[:-1] + ", 'x': 1}", bytes(4)),
    "short": array_file(HEADER, bytes(3)),
    "long": array_file(HEADER, bytes(5)),
    "huge": array_file(HEADER.replace("(4,)", "(2**62,)"), bytes(4)),
    "huge number": array_file(HEADER.replace("4,", f"{2**62},"), bytes(4)),
    "overflow": array_file(HEADER.replace("4,", f"{2**32}, {2**32}"), b""),
    "negative": array_file(HEADER.replace("4,", "-2, -2"), bytes(4)),
    "list shape": array_file(HEADER.replace("(4,)", "[4]"), bytes(4)),
    "bool shape": array_file(HEADER.replace("4,", "True, 4"), bytes(4)),
    "order": array_file(HEADER.replace("False", "0"), bytes(4)),
    "deep": array_file("(" * 5000 + ")" * 5000),
    "minus": array_file("-" * 9000 + "1"),
    "no dtype": array_file(HEADER.replace("|u1", "system"), bytes(4)),
    "dtype of numbers": array_file(HEADER.replace("'|u1'", "[(1, 2)]"), bytes(4)),
    "truth values": array_file(HEADER.replace("|u1", "|b1"), b"\x02" * 4),
    "axes": array_file(HEADER.replace("4,", "1, " * 80 + "4"), bytes(4)),
}


@pytest.mark.parametrize("array", FALSE_ARRAYS.values(), ids=FALSE_ARRAYS)
def test_false_arrays_of_npz(array: bytes) -> None:
    with bounded(mib=8), pytest.raises(Damaged):
        formats.read(packed(lambda a: a.writestr("a.npy", array)))


def test_the_array_above_is_whole_but_for_one_thing() -> None:
    check(
        {"a": np.zeros(4, "u1")},
        formats.read(packed(lambda a: a.writestr("a.npy", array_file(HEADER, bytes(4))))).state,
    )
    python_2 = array_file(HEADER.replace("4,", "2L, 2L"), bytes(4))
    check({"a": np.zeros((2, 2), "u1")}, formats.read(packed(lambda a: a.writestr("a.npy", python_2))).state)
