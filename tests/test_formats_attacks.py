"""Hostile and damaged foreign files: nothing runs, nothing false comes back, and it costs bounded time and memory."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import io
import json
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from _formats import check, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everystep import formats
from everystep.errors import Damaged, Error, Unsupported
from everystep.formats import pth_state, pth_stream
from everystep.formats.pth_objects import Objects
from everystep.formats.pth_stream import Machine, Wrapped
from everystep.schema.tree import DEPTH_MAX

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def bounded(seconds: float = 20.0, mib: float = 64.0) -> Iterator[None]:
    """Far above what these files cost, far below what they ask for."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib * 2**20
        assert time.perf_counter() - begin < seconds
    finally:
        tracemalloc.stop()


def torch_file(stream: bytes, method: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/byteorder", b"little")
        for name, data in records.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", data)
    return out.getvalue()


def stream(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def tensor(
    offset: Any = 0,
    shape: Any = (2,),
    strides: Any = (1,),
    size: int = 2,
    kind: str = "FloatStorage",
    key: str = "0",
    **more: Any,
) -> bytes:
    """A call of _rebuild_tensor_v2 with these arguments."""

    def value(of: Any) -> bytes:
        return pickle.dumps(of, 2)[2:-1]

    id = b"(" + text("storage") + name(f"torch.{kind}") + text(key) + text("cpu") + value(size) + b"tQ"
    rest = value(offset) + value(shape) + value(strides) + b"\x89" + name("collections.OrderedDict") + b")R"
    return name("torch._utils._rebuild_tensor_v2") + b"(" + id + rest + (value(more["extra"]) if more else b"") + b"tR"


FLOATS = np.array([1.0, 2.0], "<f4").tobytes()


# --------------------------------------------------------------------------------------------------- nothing runs


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


class Evil:
    """Runs when it is built, when its state is set, and when it is collected."""

    ran: list[str] = []  # noqa: RUF012

    def __new__(cls, *args: Any) -> Evil:
        cls.ran.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.ran.append("state")

    def __getnewargs__(self) -> tuple[int]:
        return (1,)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("legacy", [False, True])
def test_calls_do_nothing_and_are_listed(protocol: int, legacy: bool, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    command = f"touch {target}"
    state = {
        "system": Calls(os.system, command), "eval": Calls(eval, f"open({str(target)!r}, 'w')"), "exec": Calls(exec, "raise 1"),
        "getattr": Calls(Calls(getattr, os, "system"), command) if protocol > 3 else Calls(getattr, 1, "real"),
        "open": Calls(open, str(target), "w"), "import": Calls(__import__, "this"), "new": Evil(),
        "loads": Calls(pickle.loads, b"."), "copyreg": Calls(copyreg._reconstructor, Evil, object, None),  # type: ignore[attr-defined]
        "nested": [{"deep": (Calls(os.system, command),)}], "good": torch.ones(2),
    }  # fmt: skip
    state["getattr"] = Calls(getattr, Evil, "ran")
    Evil.ran.clear()
    data = saved(state, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    Evil.ran.clear()
    content = formats.read(data)
    assert not target.exists() and not Evil.ran
    listed = {o.path: o.class_name for o in content.not_understood}
    assert listed.keys() == state.keys() - {"good", "nested"} | {"nested/[0]/deep/[0]"}
    assert listed["system"] in ("posix.system", "nt.system") and listed["new"] == f"{__name__}.Evil"
    check({"nested": [{"deep": (None,)}], "good": torch.ones(2)}, content.understood())
    with pytest.raises(Unsupported, match=r"posix\.system|nt\.system"):
        formats.read(data, strict=True)
    with pytest.raises(Error):
        formats.write(tmp_path / "x.pth", content.state)


def test_a_name_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for part in (name("evil_module.f"), name("evil_module.f") + b")R", b"\x8c\x0bevil_module\x8c\x01f\x93)\x81}b"):
        content = formats.read(torch_file(stream(part)))
        assert [o.class_name for o in content.not_understood] == ["evil_module.f"]
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("part", [
    b"(ios\nsystem\n", b"(" + name("os.system") + text("x") + b"o", b"\x82\x01", b"Pid\n", b"\x97", b"I1\n", b"S'x'\n",
], ids=["INST", "OBJ", "EXT1", "PERSID", "NEXT_BUFFER", "INT", "STRING"])  # fmt: skip
def test_opcodes_that_need_a_program_are_refused(part: bytes) -> None:
    with pytest.raises(Unsupported, match="opcode"):
        formats.read(torch_file(stream(part)))


def test_arrays_of_objects_are_not_loaded(tmp_path: Path) -> None:
    evil = np.array([Calls(os.system, f"touch {tmp_path / 'ran'}")], dtype=object)
    np.savez(tmp_path / "x.npz", a=evil)
    for content in (formats.read(tmp_path / "x.npz"), formats.read(saved({"a": evil}))):
        assert [o.path for o in content.not_understood] == ["a"]
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------- streams: as Python reads them, or an error

plain_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(), st.binary()),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(st.one_of(st.text(), st.integers(-9, 2**40)), inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: [items, items, tuple(items)]),
    ),
    max_leaves=30,
)  # fmt: skip


@pytest.mark.parametrize("protocol", range(2, 6))
@MANY
@given(value=plain_values)
def test_the_machine_reads_what_pickle_writes(protocol: int, value: Any) -> None:
    data = pickle.dumps(value, protocol)
    got, end = Machine(memoryview(data + b"more"), Objects(len(data)), "here").load(0)
    assert got == value and end == len(data)


@MANY
@given(data=st.binary(max_size=60), value=plain_values, at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_any_stream_ends(data: bytes, value: Any, at: int, byte: int) -> None:
    mutated = bytearray(pickle.dumps(value, 4))
    mutated[at % len(mutated)] = byte
    for body in (data, b"\x80\x04" + data, bytes(mutated)):
        with contextlib.suppress(Damaged, Unsupported):
            formats.read(torch_file(body))


MALFORMED = {
    "empty": b"", "no end": b"\x80\x02]", "nothing on the stack": stream(), "two on the stack": stream(b"NN"),
    "pop of nothing": stream(b"0"), "mark never set": stream(b"t"), "mark never used": stream(b"("),
    "append to a tuple": stream(b")Na"), "entries of a list": stream(b"]NNs"), "odd entries": stream(b"}(Nu"),
    "memo never set": stream(b"h\x05"), "text cut off": b"\x80\x02X\xff\xff\xff\xff", "long bytes": stream(b"\x8e" + b"\xff" * 8),
    "long integer": stream(b"\x8b\xff\xff\xff\x7f"), "frame": stream(b"\x95" + b"\xff" * 8 + b"N"), "no UTF-8": stream(b"X\x01\0\0\0\xff"),
    "call of text": stream(text("f") + b")R"), "call without arguments": stream(name("torch.Size") + b"NR"),
    "name without end": b"\x80\x02c" + b"a" * 2000, "name of a number": stream(b"K\x01K\x01\x93"), "unknown opcode": stream(b"\xff"),
    "state of a list": stream(b"]}b"), "id": stream(b"K\x05Q"), "id of a module": stream(b"(" + text("modul") + b"tQ"),
    "storage of a class": stream(b"(" + text("storage") + name("os.system") + text("0") + text("cpu") + b"K\x01tQ"),
    "negative storage": stream(tensor(size=-1)), "no such storage": stream(tensor(key="9")), "other storage": stream(tensor(key="../0")),
    "key of the wrong type": stream(b"(" + text("storage") + name("torch.FloatStorage") + b"]" + text("cpu") + b"K\x01tQ"),
    "storage too long": stream(tensor(size=3)), "storage too short": stream(tensor(size=1, shape=(1,))),
    "of another type": stream(tensor(kind="DoubleStorage")), "beyond the end": stream(tensor(offset=1)),
    "far beyond": stream(tensor(offset=2**61)), "negative offset": stream(tensor(offset=-1)), "wide steps": stream(tensor(strides=(2,))),
    "negative steps": stream(tensor(strides=(-1,))), "huge steps": stream(tensor(strides=(2**61,))), "huge": stream(tensor(shape=(2**61,))),
    "overflow": stream(tensor(shape=(2**32, 2**32), strides=(0, 0))), "negative shape": stream(tensor(shape=(-2,))),
    "more than 64 bits": stream(tensor(shape=(2**80,), strides=(0,))), "empty and huge": stream(tensor(shape=(0, 2**61), strides=(1, 1))),
    "axes": stream(tensor(shape=(1,) * 70, strides=(1,) * 70)), "strides missing": stream(tensor(strides=())),
    "float shape": stream(tensor(shape=(2.0,))), "bool shape": stream(tensor(shape=(True,))), "metadata": stream(tensor(extra={"x": 1})),
    "truth values": stream(tensor(kind="BoolStorage", shape=(8,), size=8)),
    "size of text": stream(name("torch.Size") + b"(" + text("a") + b"\x85tR"), "complex": stream(name("builtins.complex") + text("1") + text("2") + b"\x86R"),
    "encoding": stream(name("_codecs.encode") + text("a") + text("rot13") + b"\x86R"),
    "dtype": stream(name("numpy.dtype") + text("f8") + b"\x85R" + b"(K\x03Nb"),
    "array shape": stream(name("numpy.core.numeric._frombuffer") + b"(" + b"C\x01a" + name("numpy.dtype") + text("u1") + b"\x85R"
                          + pickle.dumps((3, "|", None, None, None, -1, -1, 0), 2)[2:-1] + b"b" + b"K\x02\x85" + text("C") + b"tR"),
}  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_malformed_streams_are_damage(body: bytes) -> None:
    with bounded(mib=8), pytest.raises(Damaged) as caught:
        formats.read(torch_file(body, _0=FLOATS))
    assert caught.value.where and caught.value.do


def test_the_files_above_are_whole_but_for_one_thing() -> None:
    check(
        {"x": np.float32([1, 2])}, formats.read(torch_file(stream(b"}" + text("x") + tensor() + b"s"), _0=FLOATS)).state
    )


# ------------------------------------------------------------------------------------------------------ bombs


def laughs(levels: int, last: bytes) -> bytes:
    """Lists of two, each twice the one before."""
    parts = [b"]" + last + b"a" + b"q\x00"]
    for level in range(levels):
        parts.append(b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1]))
    return b"".join(parts)


def nested(levels: int, around: bytes = b"\x85") -> bytes:
    return b"N" + around * levels


LONG = "k" * 100_000
BOMBS: dict[str, bytes] = {
    "laughs": stream(laughs(60, b"N")), "deep": stream(nested(200_000)), "deep lists": stream(b"]" * 1000 + b"a" * 999),
    "wrapped": stream(b"(" + tensor() + b")N" + b"t") if False else stream(
        name("torch._utils._rebuild_parameter_with_state") + b"q\x00" + b"0" + tensor()
        + b"q\x010" + b"h\x01" + b"".join([b"q\x010h\x00(h\x01NNK\x01tR"] * 2000)),
    "itself": stream(b"]q\x00h\x00a"), "itself in a dict": stream(b"}q\x00" + text("a") + b"h\x00s"),
    "tuple key": stream(b"}" + nested(1) + b"q\x00" + b"".join(b"0h\x00h\x00\x86q\x00" for _ in range(60)) + b"Ns"),
    "wide key": stream(b"}(" + b"N" * 200_000 + b"tNs"), "list key": stream(b"}]Ns"), "tensor key": stream(b"}" + tensor() + b"Ns"),
    "long key": stream(b"}" + text(LONG) + b"Ns"), "long integer keys": stream(b"}(" + b"".join(
        pickle.dumps(i * (2**61 - 1), 2)[2:-1] + b"N" for i in range(100, 3000)) + b"u"),
    "expanded": stream(tensor(shape=(2**40,), strides=(0,))),
    "many views": stream(b"]" + b"".join(tensor(shape=(2**27 - i,), strides=(0,)) + b"a" for i in range(64))),
    "copies of text": stream(text(LONG * 10) + b"q\x000](" + (name("_codecs.encode") + b"h\x00" + text("latin1") + b"\x86R") * 2000 + b"e"),
    "copies of paths": stream(text(LONG * 10) + b"q\x000](" + (name("pathlib.PosixPath") + b"h\x00h\x00\x86R") * 2000 + b"e"),
    "copies of lists": stream(b"](" + b"N" * 200_000 + b"eq\x000](" + (name("builtins.set") + b"h\x00\x85R") * 2000 + b"e"),
    "copies of dicts": stream(b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(50_000)) + b"uq\x000]("
                              + (name("collections.Counter") + b"h\x00\x85R") * 2000 + b"e"),
    "copies of scalars": stream(name("numpy.dtype") + text("S1000000") + b"\x85R" + pickle.dumps(
        (3, "|", None, None, None, 1000000, 1, 0), 2)[2:-1] + b"bq\x000" + b"B" + struct.pack("<I", 10**6) + b"x" * 10**6
        + b"q\x010](" + (name("numpy.core.multiarray.scalar") + b"h\x00h\x01\x86R") * 2000 + b"e"),
}  # fmt: skip


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused(body: bytes) -> None:
    data = torch_file(body, _0=FLOATS)
    with bounded(), pytest.raises((Damaged, Unsupported)):
        formats.read(data)


def test_fields_of_fields_are_counted() -> None:
    parts = [
        name("numpy.dtype")
        + text("u1")
        + b"\x85R"
        + pickle.dumps((3, "|", None, None, None, -1, -1, 0), 2)[2:-1]
        + b"bq\x00"
    ]
    for level in range(40):
        previous = b"h" + bytes([level]) + b"K\x00\x86"
        fields = b"}(" + text("a") + previous + text("b") + previous + b"u"
        state = b"(K\x03" + text("|") + b"N" + text("a") + text("b") + b"\x86" + fields + b"K\x01K\x01K\x10tb"
        parts.append(b"0" + name("numpy.dtype") + text("V1") + b"\x85R" + state + b"q" + bytes([level + 1]))
    body = stream(*parts, b"0", name("numpy.core.multiarray.scalar"), b"h\x28C\x01a\x86R")
    with bounded():
        assert formats.read(torch_file(body)).not_understood


def test_the_number_of_opcodes_and_parts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pth_stream, "OPCODES_MAX", 1000)
    with pytest.raises(Unsupported, match="1000 opcodes"):
        formats.read(torch_file(stream(b"](" + b"N" * 2000 + b"e")))
    monkeypatch.setattr(pth_state, "PARTS_MAX", 1000)
    shared = [[0] * 10] * 10
    assert formats.read(saved([shared] * 8)).state[0] == shared
    with pytest.raises(Unsupported, match="1000 parts"):
        formats.read(saved([shared] * 10))


def test_the_deepest_state_that_can_be_kept_is_read(tmp_path: Path) -> None:
    state: Any = {}
    for _ in range(DEPTH_MAX - 1):
        state = {"a": [state]} if _ % 2 else {"b": state}
        if str(state).count("{") + str(state).count("[") >= DEPTH_MAX - 2:
            break
    formats.write(tmp_path / "x.pth", state)
    assert formats.read(tmp_path / "x.pth").state == state == formats.read(saved(state)).state


# ------------------------------------------------------------------------------------------------------ archives


def packed(edit: Callable[[zipfile.ZipFile], None], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        edit(archive)
    return out.getvalue()


def test_compressed_archives_grow_only_so_far() -> None:
    bomb = torch_file(stream(b"](" + b"N" * 40_000_000 + b"e"), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    with bounded(), pytest.raises(Unsupported, match="grows"):
        formats.read(bomb)
    twice = packed(
        lambda a: [a.writestr(f"{i}.npy", bytes(600 << 20)) for i in range(2)] and None, zipfile.ZIP_DEFLATED
    )
    with bounded(), pytest.raises(Unsupported, match="grows"):
        formats.read(twice)
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
    for i in range(9):  # all entries point to the first one's bytes, and claim half of the file
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
            torch_file(stream(b"N"))
            .replace(b"little", b"middle")
            .replace(*[struct.pack("<I", zlib.crc32(w)) for w in (b"little", b"middle")])
        )


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
        "torch": saved(as_torch), "legacy": saved(as_torch, _use_new_zipfile_serialization=False),
        "numpy": (folder / "np.npz").read_bytes(), "package": safetensors.numpy.save({"a": state["w"], "b": state["f"]}),
    }  # fmt: skip
    for name in formats.FORMATS:
        files[name] = Path(formats.write(folder / f"x.{name}", state).path).read_bytes()
    return files


FILES = ["torch", "legacy", "numpy", "package", *formats.FORMATS]


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
        if which in ("torch", "numpy", "pth", "npz"):  # the others have no checksum
            assert not got.not_understood, at
            check(whole.state, got.state, f"byte {at}")


@pytest.mark.parametrize("which", FILES)
def test_bytes_at_random_places_end_in_time(which: str, tmp_path: Path) -> None:
    data = small_files(tmp_path)[which]
    form, chance = formats.read(data).format, random.Random(which)
    with bounded(seconds=60):
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
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, 6), "same place": ({"a": entry(), "b": entry()}, 4),
    "hole": ({"a": entry(), "b": entry(offsets=(5, 9))}, 9), "not from the start": ({"a": entry(offsets=(1, 5))}, 5),
    "beyond": ({"a": entry()}, 3), "more": ({"a": entry()}, 5), "backwards": ({"a": entry(offsets=(4, 0))}, 4),
    "negative": ({"a": entry(offsets=(-4, 0))}, 4), "float offsets": ({"a": entry(offsets=(0.0, 4.0))}, 4),
    "huge offsets": ({"a": entry(offsets=(0, 2**64), shape=(2**64,))}, 4), "three offsets": ({"a": entry(offsets=(0, 4, 4))}, 4),
    "other shape": ({"a": entry(shape=(5,))}, 4), "negative shape": ({"a": entry(shape=(-2, -2))}, 4),
    "overflow": ({"a": entry(shape=(2**33, 2**33), offsets=(0, 0))}, 0), "bool shape": ({"a": entry(shape=(True, 4))}, 4),
    "empty and huge": ({"a": entry(shape=(0, 2**61, 2**61), offsets=(0, 0))}, 0), "axes": ({"a": entry(shape=(1,) * 70 + (4,))}, 4),
    "dtype": ({"a": entry(dtype="F128")}, 4), "dtype list": ({"a": entry(dtype=["U8"])}, 4), "extra": ({"a": entry(x=1)}, 4),
    "missing": ({"a": {"dtype": "U8", "shape": [4]}}, 4), "list": ([1], 0), "number": ({"a": 4}, 0), "null": (b"null", 0),
    "metadata": ({"__metadata__": {"a": 1}}, 0), "metadata list": ({"__metadata__": ["a"]}, 0), "not JSON": (b"{", 0),
    "twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), 4), "twice inside": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4), "not UTF-8": (b'{"\xff":1}', 0),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0), "long number": (b'{"a":' + b"1" * 10_000 + b"}", 0),
    "truth values": ({"a": entry(dtype="BOOL")}, 4),
}  # fmt: skip


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
    one = st.fixed_dictionaries({
        "dtype": st.sampled_from(["U8", "I16", "F32", "I64", "BF16", "F16"]), "shape": st.lists(small, max_size=3), "data_offsets": offsets,
    })  # fmt: skip
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
    "empty": b"", "no magic": bytes(40), "version": array_file(HEADER, bytes(4), 9), "header beyond": array_file(HEADER, bytes(4), length=60000),
    "header of 4 GiB": array_file(HEADER, bytes(4), 2, 2**32 - 1), "long header": array_file(HEADER + " " * 10_000, bytes(4)),
    "call": array_file("__import__('os').system('x')"), "number": array_file("1"), "cut": array_file(HEADER[:-1], bytes(4)),
    "more keys": array_file(HEADER[:-1] + ", 'x': 1}", bytes(4)), "short": array_file(HEADER, bytes(3)), "long": array_file(HEADER, bytes(5)),
    "huge": array_file(HEADER.replace("(4,)", "(2**62,)"), bytes(4)), "huge number": array_file(HEADER.replace("4,", f"{2**62},"), bytes(4)),
    "overflow": array_file(HEADER.replace("4,", f"{2**32}, {2**32}"), b""), "negative": array_file(HEADER.replace("4,", "-2, -2"), bytes(4)),
    "list shape": array_file(HEADER.replace("(4,)", "[4]"), bytes(4)), "bool shape": array_file(HEADER.replace("4,", "True, 4"), bytes(4)),
    "order": array_file(HEADER.replace("False", "0"), bytes(4)), "deep": array_file("(" * 5000 + ")" * 5000), "minus": array_file("-" * 9000 + "1"),
    "no dtype": array_file(HEADER.replace("|u1", "system"), bytes(4)), "dtype of numbers": array_file(HEADER.replace("'|u1'", "[(1, 2)]"), bytes(4)),
    "truth values": array_file(HEADER.replace("|u1", "|b1"), b"\x02" * 4), "axes": array_file(HEADER.replace("4,", "1, " * 80 + "4"), bytes(4)),
}  # fmt: skip


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


# -------------------------------------------------------------------------------------- legacy files


def test_false_legacy_files() -> None:
    whole = saved({"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    check({"a": torch.ones(3)}, formats.read(whole).state)
    head = whole[: whole.index(b"\x80\x02M")]
    keys = pickle.dumps([], 2)

    def made(*values: Any, tail: bytes = b"") -> bytes:
        return head + b"".join(v if isinstance(v, bytes) else pickle.dumps(v, 2) for v in values) + tail

    state = stream(tensor())
    false = {
        "version": made(1002, {}, {}, []), "info": made(1001, [], {}, []), "no keys": made(1001, {}, {}, 3),
        "unknown key": made(1001, {}, {}, ["7"]), "a list as key": made(1001, {}, {}, [["7"]]), "missing": made(1001, {}, state, keys),
        "cut": made(1001, {}, state, ["0"], tail=struct.pack("<q", 2) + FLOATS[:-1]), "negative": made(1001, {}, state, ["0"], tail=struct.pack("<q", -2)),
        "huge": made(1001, {}, state, ["0"], tail=struct.pack("<q", 2**62) + FLOATS), "other length": made(1001, {}, state, ["0"], tail=struct.pack("<q", 1) + FLOATS),
    }  # fmt: skip
    for what, data in false.items():
        with bounded(mib=8), pytest.raises(Damaged):
            raise AssertionError(f"{what}: {formats.read(data)}")
    good = made(1001, {"little_endian": sys.byteorder == "little"}, state, ["0"], tail=struct.pack("<q", 2) + FLOATS)
    check(np.float32([1, 2]), formats.read(good).state)
    other = made(
        1001,
        {"little_endian": sys.byteorder != "little"},
        state,
        ["0"],
        tail=struct.pack("<q", 2) + np.frombuffer(FLOATS, "u4").byteswap().tobytes(),
    )
    check(np.float32([1, 2]), formats.read(other).state)


def test_parts_of_storages_as_in_files_of_2017() -> None:
    def part(start: int, size: int) -> bytes:
        view = b"(" + text("7") + b"K" + bytes([start]) + b"K" + bytes([size]) + b"t"
        id = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + b"K\x02" + view + b"tQ"
        return name("torch._utils._rebuild_tensor") + b"(" + id + b"K\x00K\x01\x85K\x01\x85tR"

    check(np.float32([2]), formats.read(torch_file(stream(part(1, 1)), _0=FLOATS)).state)
    for start, size in ((2, 1), (1, 0)):
        with pytest.raises(Damaged):
            formats.read(torch_file(stream(part(start, size)), _0=FLOATS))


def test_old_text_may_be_bytes() -> None:
    content = formats.read(torch_file(stream(b"](U\x02abU\x01\xffT\x03\x00\x00\x00xyze")))
    assert content.state == ["ab", b"\xff", "xyz"]


def test_wrapped_values_keep_their_entries_when_the_stream_adds_some() -> None:
    assert isinstance(Machine(memoryview(b"\x8f(K\x01\x90."), Objects(9), "here").load(0)[0], Wrapped)
    content = formats.read(
        torch_file(stream(name("collections.defaultdict") + name("builtins.list") + b"\x85R" + text("a") + b"Ns"))
    )
    assert content.state == {"a": None} and type(content.state) is dict
    ordered = formats.read(
        torch_file(stream(name("collections.OrderedDict") + b"](](" + text("a") + b"K\x01ee\x85R"))
    ).state
    assert ordered == collections.OrderedDict(a=1)
