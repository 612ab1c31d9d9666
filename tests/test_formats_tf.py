"""TensorFlow's checkpoints without TensorFlow: against files that TensorFlow wrote, and against the format itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from _formats import check
from _golden import FILES, reads_as_told
from hypothesis import given, settings
from hypothesis import strategies as st

from everystep import formats
from everystep.errors import Conflict, Damaged, NotFound, Unsupported, UsageError
from everystep.formats.file import opened
from everystep.formats.tf_bundle import state_of
from everystep.formats.tf_bundle_crc import crc32c, mask
from everystep.formats.tf_bundle_proto import entry_of, full_names, graph_of, slice_key
from everystep.formats.tf_bundle_table import entries, table, unpacked
from everystep.seam import REAL

# -------------------------------------------------------------------------------------- what TensorFlow itself wrote


def test_a_checkpoint_by_its_objects() -> None:
    content = reads_as_told(FILES / "tf_checkpoint" / "ckpt-2.index", "tf_checkpoint", "tf_bundle")
    assert content.state["model"]["words"] == [b"one", "two ✓".encode()]
    assert json.loads(content.metadata["names"])["model/w"] == "weight"
    check(content.state, formats.read(FILES / "tf_checkpoint" / "ckpt-2").state)  # as TensorFlow calls it


def test_a_checkpoint_by_names_with_slices_and_every_dtype() -> None:
    content = reads_as_told(FILES / "tf_slices" / "model.index", "tf_slices", "tf_bundle")
    assert "dense" in content.state and "dense/half" in content.state  # one within the other: all stay flat


def test_the_variables_of_a_saved_model() -> None:
    content = reads_as_told(FILES / "tf_saved_model", "tf_saved_model", "saved_model")
    assert list(content.state) == ["v"]


def test_the_list_of_checkpoints() -> None:
    text = (FILES / "tf_checkpoint" / "checkpoint").read_text()
    assert state_of(text) == ["ckpt-1", "ckpt-2"]
    assert state_of('model_checkpoint_path: "/a/b c-9"') == ["/a/b c-9"]
    assert state_of('all_model_checkpoint_paths: "k\\303\\244se\\"\\\\"\nall_model_checkpoint_timestamps: 1e9\n') == [
        'käse"\\'
    ]
    assert state_of("model_checkpoint_path: 'x\\x41'\nall_model_checkpoint_paths: 'y'\n") == ["y", "xA"]
    assert state_of("") == []
    for text in ("no colon", 'model_checkpoint_path: "open', "model_checkpoint_path: 3", "a: { b: 1 }", 'x: "a" "b"'):
        with pytest.raises(ValueError):
            state_of(text)


# ------------------------------------------------------------------------------------------------------ our files


def test_our_files_are_bundles(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    state = {
        "model": {"w": x, "tie": x, "l": [np.arange(3, dtype=">i4"), np.float32(3)], "a/b.c": np.ones(1, "f2")},
        "b": np.ones(3, ml_dtypes.bfloat16), "u": np.array(["ab", "c"]), "e": np.zeros((0, 3)), "step": 7,
        0: np.ones(2), "0": np.zeros(2), "text": "t" * 5000, "four": np.array([1, -2], ml_dtypes.int4),
    }  # fmt: skip
    written = formats.write(tmp_path / "ckpt-1.index", state)
    assert {note.path for note in written.changed} == {"", "u", "text", "model/tie"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-1.data-00000-of-00001", "ckpt-1.index"]
    assert written.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    got = formats.read(tmp_path / "ckpt-1", strict=True)
    check(state, got.state)
    assert got.state["model"]["tie"] is got.state["model"]["w"]
    with opened(tmp_path / "ckpt-1.index", REAL) as source:
        found = dict(entries(source))
    assert entry_of(found[b"model/w/.ATTRIBUTES/VARIABLE_VALUE"]).shape == (2, 3)
    with pytest.raises(Conflict):
        formats.write(tmp_path / "ckpt-1.index", {})
    formats.write(tmp_path / "ckpt-1.index", {"a": np.ones(2)}, overwrite=True)
    check({"a": np.ones(2)}, formats.read(tmp_path / "ckpt-1").state)


def test_names_of_objects_are_those_of_tensorflow(tmp_path: Path) -> None:
    state = {"m": {"layers": [np.ones(1), {"k/x": np.ones(2), "a.b": np.zeros(3)}]}, "s": np.ones(())}
    formats.write(tmp_path / "x.index", state)
    with opened(tmp_path / "x.index", REAL) as source:
        keys = [key.decode() for key, _ in entries(source) if key]
    value = ".ATTRIBUTES/VARIABLE_VALUE"
    assert set(keys) >= {f"m/layers/0/{value}", f"m/layers/1/k.Sx/{value}", f"m/layers/1/a..b/{value}", f"s/{value}"}
    assert keys == sorted(keys)


def test_names_that_begin_no_index_and_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="begins with its index"):
        formats.write(tmp_path / "ckpt-1", {}, format="tf_bundle")
    formats.write(tmp_path / "x.index", {"a": np.ones(9)})
    with pytest.raises(Unsupported, match="one of several files"):
        formats.read((tmp_path / "x.index").read_bytes())
    (tmp_path / "x.data-00000-of-00001").unlink()
    with pytest.raises(NotFound, match="no such file"):
        formats.read(tmp_path / "x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "saved_model.pb").touch()
    with pytest.raises(NotFound, match="without variables"):
        formats.read(tmp_path / "empty")


def test_every_byte_of_a_tensor_is_checked(tmp_path: Path) -> None:
    formats.write(tmp_path / "x.index", {"a": np.arange(50.0), "b": np.ones(3, "?")})
    path = tmp_path / "x.data-00000-of-00001"
    whole = path.read_bytes()
    for at in range(0, 403, 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(Damaged, match="CRC"):
            formats.read(tmp_path / "x")


# ----------------------------------------------------------------------------------------------------- its parts


def one_by_one(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_the_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"") == 0
    assert mask(0) == 0xA282EAD8 and mask(crc32c(b"foo")) != crc32c(b"foo")
    data = np.random.default_rng(0).integers(0, 256, 300_007, dtype=np.uint8)
    for size in (1, 3, 511, 512, 2047, 2048, 2051, 65_536, 262_143, 262_144, 262_148, 300_007):
        assert crc32c(data[:size]) == one_by_one(data[:size].tobytes()), size
        for cut in (size // 3, size - 1):
            assert crc32c(data[cut:size], crc32c(data[:cut])) == crc32c(data[:size].tobytes())


@settings(max_examples=60, deadline=None)
@given(pairs=st.dictionaries(st.binary(max_size=40), st.binary(max_size=300), max_size=60))
def test_a_table_gives_back_its_pairs(pairs: dict[bytes, bytes]) -> None:
    with opened(table(sorted(pairs.items())), REAL) as source:
        assert list(entries(source)) == sorted(pairs.items())


def test_a_table_of_many_blocks() -> None:
    pairs = [(f"model/layer{i:05}/kernel".encode(), bytes([i % 256]) * 20) for i in range(3000)]
    with opened(table(pairs), REAL) as source:
        assert list(entries(source)) == pairs


def snappy(data: bytes) -> bytes:
    """Packs runs of one byte as copies, as a writer of Snappy may."""
    out, at = bytearray(), 0
    size = len(data)
    while True:
        out.append(size & 0x7F | (0x80 if size > 0x7F else 0))
        size >>= 7
        if not size:
            break
    while at < len(data):
        run = next((n for n in range(1, len(data) - at) if data[at + n] != data[at]), len(data) - at)
        out += bytes([0, data[at]])
        left = run - 1
        while left >= 4:
            some = min(left, 11 if left < 12 else 64)
            out += bytes([(some - 4) << 2 | 1, 1]) if some < 12 else bytes([(some - 1) << 2 | 2, 1, 0])
            left -= some
        out += b"".join(bytes([0, data[at]]) for _ in range(left))
        at += run
    return bytes(out)


def test_packed_blocks() -> None:
    for data in (b"", b"a", b"a" * 9, b"abc" * 5 + b"z" * 1000, bytes(5000)):
        assert unpacked(memoryview(snappy(data)), 1 << 20) == data
    long = bytes(range(256)) * 2
    header = bytes([0x80, 4])  # 512 bytes, as one literal of a length in two bytes
    assert unpacked(memoryview(header + bytes([61 << 2]) + (511).to_bytes(2, "little") + long), 1 << 20) == long
    far = b"\x0e" + bytes([6 << 2]) + b"abcdefg" + bytes([6 << 2 | 3]) + (7).to_bytes(4, "little")
    assert unpacked(memoryview(far), 1 << 20) == b"abcdefg" * 2
    for bad in (
        b"\x05\x00a",
        b"\x01\x05\x01",
        b"\x01\x08a",
        b"\x02\x00a\x01",
        b"\xff\xff\xff\x7f\x00a",
        b"\x01\x00a\x00b",
    ):
        with pytest.raises(ValueError):
            unpacked(memoryview(bad), 1 << 20)


def test_keys_of_slices_are_in_the_order_of_the_numbers_in_them() -> None:
    assert slice_key(b"v", ((0, 2),)) == b"\0v\0\1\1\1\x80\x82"
    assert slice_key(b"v", ((0, -1),)) == b"\0v\0\1\1\1\x80\x7f"
    assert slice_key(b"a\0b\xff", ()) == b"\0a\0\xffb\xff\0\0\1\0"
    numbers = [-(2**40), -65, -64, -1, 0, 1, 63, 64, 8191, 8192, 2**20, 2**40, 2**62]
    keys = [slice_key(b"v", ((number, 1),)) for number in numbers]
    assert keys == sorted(keys)
    assert slice_key(b"v", ((64, 1),)) == b"\0v\0\1\1\1\xc0\x40\x81"


def test_objects_and_their_names() -> None:
    graph = graph_of([(("m", "w"), "m/w/K"), (("m", "again"), "m/w/K"), (("s",), "s/K")])
    assert dict(full_names(graph)) == {"m/w/K": "m/w/K", "s/K": "s/K"}


def test_big_endian_files(tmp_path: Path) -> None:
    """A header that says so turns the bytes around; its own tensors are as long as any."""
    formats.write(tmp_path / "x.index", {"a": np.arange(3, dtype="i2")})
    with opened(tmp_path / "x.index", REAL) as source:
        found = dict(entries(source))
    del found[b"__everystep__"]
    found[b""] = b"\x08\x01\x10\x01\x1a\x02\x08\x01"
    (tmp_path / "x.index").write_bytes(table(sorted(found.items())))
    got: Any = formats.read(tmp_path / "x").state["a"]
    assert got.dtype == ">i2" and got.tolist() == [0, 256, 512]
