"""Hostile and damaged foreign files: nothing runs, nothing false comes back, and it costs bounded time and memory."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import inspect
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _formats import bounded, check, name, saved, stream, tensor, text, torch_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everystep import formats
from everystep.errors import Damaged, Error, Unsupported
from everystep.formats import pth_state, pth_stream
from everystep.formats.pth_objects import Objects
from everystep.formats.pth_stream import Machine, Wrapped
from everystep.schema.tree import DEPTH_MAX

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.timeout(120),
]
MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


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
        "system": Calls(os.system, command),
        "eval": Calls(eval, f"open({str(target)!r}, 'w')"),
        "exec": Calls(exec, "raise 1"),
        "open": Calls(open, str(target), "w"),
        "import": Calls(__import__, "this"),
        "new": Evil(),
        "loads": Calls(pickle.loads, b"."),
        "copyreg": Calls(copyreg._reconstructor, Evil, object, None),  # type: ignore[attr-defined]
        "getattr": Calls(getattr, Evil, "ran"),
        "nested": [{"deep": (Calls(os.system, command),)}],
        "good": torch.ones(2),
    }
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
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(), st.binary()
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers(-9, 2**40)), inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: [items, items, tuple(items)]),
    ),
    max_leaves=30,
)


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
    "empty": b"",
    "no end": b"\x80\x02]",
    "nothing on the stack": stream(),
    "two on the stack": stream(b"NN"),
    "pop of nothing": stream(b"0"),
    "mark never set": stream(b"t"),
    "mark never used": stream(b"("),
    "append to a tuple": stream(b")Na"),
    "entries of a list": stream(b"]NNs"),
    "odd entries": stream(b"}(Nu"),
    "memo never set": stream(b"h\x05"),
    "text cut off": b"\x80\x02X\xff\xff\xff\xff",
    "long bytes": stream(b"\x8e" + b"\xff" * 8),
    "long integer": stream(b"\x8b\xff\xff\xff\x7f"),
    "frame": stream(b"\x95" + b"\xff" * 8 + b"N"),
    "no UTF-8": stream(b"X\x01\0\0\0\xff"),
    "call of text": stream(text("f") + b")R"),
    "call without arguments": stream(name("torch.Size") + b"NR"),
    "name without end": b"\x80\x02c" + b"a" * 2000,
    "name of a number": stream(b"K\x01K\x01\x93"),
    "unknown opcode": stream(b"\xff"),
    "state of a list": stream(b"]}b"),
    "id": stream(b"K\x05Q"),
    "id of a module": stream(b"(" + text("modul") + b"tQ"),
    "storage of a class": stream(b"(" + text("storage") + name("os.system") + text("0") + text("cpu") + b"K\x01tQ"),
    "negative storage": stream(tensor(size=-1)),
    "no such storage": stream(tensor(key="9")),
    "other storage": stream(tensor(key="../0")),
    "key of the wrong type": stream(
        b"(" + text("storage") + name("torch.FloatStorage") + b"]" + text("cpu") + b"K\x01tQ"
    ),
    "storage too long": stream(tensor(size=3)),
    "storage too short": stream(tensor(size=1, shape=(1,))),
    "of another type": stream(tensor(kind="DoubleStorage")),
    "beyond the end": stream(tensor(offset=1)),
    "far beyond": stream(tensor(offset=2**61)),
    "negative offset": stream(tensor(offset=-1)),
    "wide steps": stream(tensor(strides=(2,))),
    "negative steps": stream(tensor(strides=(-1,))),
    "huge steps": stream(tensor(strides=(2**61,))),
    "huge": stream(tensor(shape=(2**61,))),
    "negative shape": stream(tensor(shape=(-2,))),
    "more than 64 bits": stream(tensor(shape=(2**80,), strides=(0,))),
    "empty and huge": stream(tensor(shape=(0, 2**61), strides=(1, 1))),
    "axes": stream(tensor(shape=(1,) * 70, strides=(1,) * 70)),
    "strides missing": stream(tensor(strides=())),
    "float shape": stream(tensor(shape=(2.0,))),
    "bool shape": stream(tensor(shape=(True,))),
    "metadata": stream(tensor(extra={"x": 1})),
    "truth values": stream(tensor(kind="BoolStorage", shape=(8,), size=8)),
    "size of text": stream(name("torch.Size") + b"(" + text("a") + b"\x85tR"),
    "complex": stream(name("builtins.complex") + text("1") + text("2") + b"\x86R"),
    "encoding": stream(name("_codecs.encode") + text("a") + text("rot13") + b"\x86R"),
    "dtype": stream(name("numpy.dtype") + text("f8") + b"\x85R" + b"(K\x03Nb"),
    "array shape": stream(
        name("numpy.core.numeric._frombuffer")
        + b"("
        + b"C\x01a"
        + name("numpy.dtype")
        + text("u1")
        + b"\x85R"
        + pickle.dumps((3, "|", None, None, None, -1, -1, 0), 2)[2:-1]
        + b"b"
        + b"K\x02\x85"
        + text("C")
        + b"tR"
    ),
    "path of numbers": stream(name("pathlib.PosixPath") + b"K\x01\x85R"),
    "set of a number": stream(name("builtins.set") + b"K\x01\x85R"),
    "parameter of text": stream(name("torch._utils._rebuild_parameter") + text("a") + b"NN\x87R"),
    "layout": stream(name("torch._utils._rebuild_sparse_tensor") + text("strided") + b")\x86R"),
    "element type": stream(tensor().replace(b"_v2", b"_v3")[:-2] + name("os.system") + b"tR"),
    "bytes of a number": stream(name("builtins.bytes") + b"K\x05\x85R"),
    "arguments by name": stream(name("a.B") + b"NN\x92"),
    "unit of time": stream(
        name("numpy.dtype") + text("M8") + b"\x85R",
        pickle.dumps((4, "<", None, None, None, -1, -1, 0, (None, (b"D", 1, 2, 1))), 3)[2:-1] + b"b",
    ),
    "truth values of NumPy": stream(
        name("numpy.core.multiarray.scalar") + name("numpy.dtype") + text("b1") + b"\x85R",
        pickle.dumps((3, "|", None, None, None, -1, -1, 0), 2)[2:-1] + b"bC\x01\x05\x86R",
    ),
}


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
    "laughs": stream(laughs(60, b"N")),
    "deep": stream(nested(200_000)),
    "deep lists": stream(b"]" * 1000 + b"a" * 999),
    "wrapped": stream(
        name("torch._utils._rebuild_parameter_with_state") + b"q\x000" + tensor() + b"q\x010",
        b"h\x01" + b"q\x010h\x00(h\x01NNK\x01tR" * 2000,
    ),
    "itself": stream(b"]q\x00h\x00a"),
    "itself in a dict": stream(b"}q\x00" + text("a") + b"h\x00s"),
    "tuple key": stream(b"}" + nested(1) + b"q\x00" + b"".join(b"0h\x00h\x00\x86q\x00" for _ in range(60)) + b"Ns"),
    "wide key": stream(b"}(" + b"N" * 200_000 + b"tNs"),
    "list key": stream(b"}]Ns"),
    "tensor key": stream(b"}" + tensor() + b"Ns"),
    "long key": stream(b"}" + text(LONG) + b"Ns"),
    "long integer keys": stream(
        b"}(" + b"".join(pickle.dumps(i * (2**61 - 1), 2)[2:-1] + b"N" for i in range(100, 3000)) + b"u"
    ),
    "expanded": stream(tensor(shape=(2**40,), strides=(0,))),
    "product": stream(tensor(shape=(2**32, 2**32), strides=(0, 0))),
    "many views": stream(b"]" + b"".join(tensor(shape=(2**27 - i,), strides=(0,)) + b"a" for i in range(64))),
    "copies of text": stream(
        text(LONG * 10) + b"q\x000](" + (name("_codecs.encode") + b"h\x00" + text("latin1") + b"\x86R") * 2000 + b"e"
    ),
    "copies of paths": stream(
        text(LONG * 10) + b"q\x000](" + (name("pathlib.PosixPath") + b"h\x00h\x00\x86R") * 2000 + b"e"
    ),
    "copies of lists": stream(
        b"](" + b"N" * 200_000 + b"eq\x000](" + (name("builtins.set") + b"h\x00\x85R") * 2000 + b"e"
    ),
    "copies of dicts": stream(
        b"}("
        + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(50_000))
        + b"uq\x000]("
        + (name("collections.Counter") + b"h\x00\x85R") * 2000
        + b"e"
    ),
    "copies of scalars": stream(
        name("numpy.dtype")
        + text("S1000000")
        + b"\x85R"
        + pickle.dumps((3, "|", None, None, None, 1000000, 1, 0), 2)[2:-1]
        + b"bq\x000"
        + b"B"
        + struct.pack("<I", 10**6)
        + b"x" * 10**6
        + b"q\x010]("
        + (name("numpy.core.multiarray.scalar") + b"h\x00h\x01\x86R") * 2000
        + b"e"
    ),
}


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


# -------------------------------------------------------------------------------------- legacy files


def test_false_legacy_files() -> None:
    whole = saved({"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    check({"a": torch.ones(3)}, formats.read(whole).state)
    head = whole[: whole.index(b"\x80\x02M")]
    keys = pickle.dumps([], 2)

    def made(*values: Any, tail: bytes = b"") -> bytes:
        return head + b"".join(v if isinstance(v, bytes) else pickle.dumps(v, 2) for v in values) + tail

    def long(value: int) -> bytes:
        return struct.pack("<q", value)

    state = stream(tensor())
    false = {
        "version": made(1002, {}, {}, []),
        "info": made(1001, [], {}, []),
        "no keys": made(1001, {}, {}, 3),
        "unknown key": made(1001, {}, {}, ["7"]),
        "a list as key": made(1001, {}, {}, [["7"]]),
        "missing": made(1001, {}, state, keys),
        "cut": made(1001, {}, state, ["0"], tail=long(2) + FLOATS[:-1]),
        "negative": made(1001, {}, state, ["0"], tail=long(-2)),
        "huge": made(1001, {}, state, ["0"], tail=long(2**62) + FLOATS),
        "other length": made(1001, {}, state, ["0"], tail=long(1) + FLOATS),
    }
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


def test_a_class_and_its_name_as_keys_of_one_dict() -> None:
    content = formats.read(torch_file(stream(b"}(" + name("a.B") + b"K\x01" + text("a.B") + b"K\x02u")))
    assert content.state == {"a.B": 2} and [o.class_name for o in content.not_understood] == ["a.B"]


def test_a_call_of_what_was_not_built() -> None:
    content = formats.read(torch_file(stream(name("a.f") + b")R)R)R")))
    assert [o.class_name for o in content.not_understood] == ["a.f"]


def test_a_deep_state_read_deep_in_a_program() -> None:
    state: Any = []
    for _ in range(90):
        state = [state]
    data = saved(state)

    def read(frames: int) -> Any:
        return read(frames - 1) if frames else formats.read(data)

    assert read(1).state == state
    with pytest.raises(Unsupported, match="stack"):
        read(sys.getrecursionlimit() - len(inspect.stack()) - 150)


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
