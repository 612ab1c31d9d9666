"""MXNet's .params files without MXNet: a file of its own tests, and all versions put together byte by byte as its
source writes them. Against MXNet itself they are read and written in tests_mxnet."""

from __future__ import annotations

import base64
import lzma
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from _formats import check

from everystep import exchange, formats
from everystep.errors import Damaged
from everystep.formats import params
from everystep.seam import Seam

# tests/python/unittest/legacy_ndarray.v0 of Apache MXNet: six arrays, as it saved them before version 0.9
LEGACY = (
    "T>t<81poj4|NsC0{{RU9Kq9?lAlr&rY4||^+~27DZAw~RBf9w00<fvb;XNci%@zL`1o*O*jBV(sVSXgnz-p{CcTr~r%8Ig&IC5O*m^EHWZv&EVp"
    "*$~H5f;ubKOV20!eyo!w?U<$!K)GmEbROfC<&vH|4IWpZWEU*&FDx=t8Y^r_1Lr5AP2KH#DTff6?R+u%p4iruM<fV+pGMYx}-kO;m`PY^@!P5W*}"
    "2PobJ*0q#yC#USEt|W}sw_+?HF~pC`Yc|JFJd00"
)
CPU = struct.pack("<ii", 1, 0)


def shape(*sizes: int, form: str = "q") -> bytes:
    return struct.pack(f"<i{len(sizes)}{form}", len(sizes), *sizes)


def flag(dtype: int) -> bytes:
    return struct.pack("<i", dtype)


def version(number: int, *parts: bytes) -> bytes:
    return struct.pack("<I", number) + b"".join(parts)


def dense(array: Any, kind: int, like: int = params.V2) -> bytes:
    return version(like, flag(0), shape(*array.shape), CPU, flag(kind), array.tobytes())


def file(arrays: list[bytes], names: list[str]) -> bytes:
    named = b"".join(struct.pack("<Q", len(name.encode())) + name.encode() for name in names)
    counts = struct.pack("<QQQ", 0x112, 0, len(arrays)), struct.pack("<Q", len(names))
    return counts[0] + b"".join(arrays) + counts[1] + named


def test_a_file_of_the_framework_from_before_versions() -> None:
    data = lzma.decompress(base64.b85decode(LEGACY), format=lzma.FORMAT_ALONE)
    content = formats.read(data)
    assert content.format == "params" and len(data) == 3224
    check([np.arange(128, dtype="f4")] * 6, content.state)


ALL = {
    0: np.float32, 1: np.float64, 2: np.float16, 3: np.uint8, 4: np.int32, 5: np.int8, 6: np.int64, 7: np.bool_,
    8: np.int16, 9: np.uint16, 10: np.uint32, 11: np.uint64, 12: ml_dtypes.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_every_dtype_of_every_version(kind: int) -> None:
    array = np.arange(6).reshape(2, 3).astype(ALL[kind])
    v0 = version(2, struct.pack("<II", 2, 3), CPU, flag(kind), array.tobytes())
    v1 = version(params.V1, shape(2, 3), CPU, flag(kind), array.tobytes())
    gpu = version(params.V2, flag(0), shape(2, 3), struct.pack("<ii", 2, 1), flag(kind), array.tobytes())
    arrays = [v0, v1, dense(array, kind), gpu, dense(array, kind, params.V3)]
    check([array] * 5, formats.read(file(arrays, [])).state)
    names = ["arg:a", "aux:b", "net.0.weight", "é", "x/y"]
    check(dict.fromkeys(names, array), formats.read(file(arrays, names)).state)


def test_arrays_without_values_and_shapes_of_numpy() -> None:
    one = np.array(2.5, "f4")
    arrays = [
        struct.pack("<I", 0), version(params.V1, shape()), version(params.V2, flag(0), shape()),
        version(params.V3, flag(0), flag(-1)), version(params.V3, flag(0), shape(2, -1)),
        dense(one, 0, params.V3), dense(np.zeros((0, 4), "f4"), 0, params.V3), dense(np.zeros((3, 0), "f4"), 0),
    ]  # fmt: skip
    check([None] * 5 + [one, np.zeros((0, 4), "f4"), np.zeros((3, 0), "f4")], formats.read(file(arrays, [])).state)


def test_sparse_arrays_are_their_parts() -> None:
    rows, columns = np.array([1, 5], "i8"), np.array([0, 2], "i8")
    data = np.arange(6, dtype="f4").reshape(2, 3)
    row_sparse = version(
        params.V2, flag(1), shape(2, 3), shape(1 << 40, 3), CPU, flag(0), flag(6), shape(2), data.tobytes(),
        rows.tobytes(),
    )  # fmt: skip
    csr = version(
        params.V2, flag(2), shape(2), shape(2, 4), CPU, flag(0), flag(6), shape(3), flag(6), shape(2),
        data[0, :2].tobytes(), np.array([0, 1, 2], "i8").tobytes(), columns.tobytes(),
    )  # fmt: skip
    content = formats.read(file([row_sparse, csr], ["rows", "csr"]))
    check(
        {
            "rows": {"storage": "row_sparse", "shape": [1 << 40, 3], "data": data, "indices": rows},
            "csr": {
                "storage": "csr", "shape": [2, 4], "data": data[0, :2], "indptr": np.array([0, 1, 2], "i8"),
                "indices": columns,
            },
        },
        content.state,
    )  # fmt: skip
    assert [note.text.split()[1] for note in content.changed] == ["row_sparse", "csr"]


def test_what_is_written_is_what_the_source_writes(tmp_path: Path) -> None:
    state = {"arg:w": np.arange(6, dtype="f4").reshape(2, 3), "aux:m": np.ones(2, ml_dtypes.bfloat16)}
    written = formats.write(tmp_path / "net-0007.params", state)
    assert Path(written.path).read_bytes() == file([dense(state["arg:w"], 0), dense(state["aux:m"], 12)], list(state))
    assert not written.changed
    check(state, formats.read(written.path).state)
    listed = [np.arange(3), np.array([True, False])]
    path = formats.write(tmp_path / "list.params", listed).path
    assert Path(path).read_bytes() == file([dense(listed[0], 6), dense(listed[1], 7)], [])
    check(listed, formats.read(path).state)
    scalars = {"count": np.array(3), "w": np.ones(2, "f4")}
    written = formats.write(tmp_path / "scalar.params", scalars)
    arrays = [dense(scalars["count"], 6, params.V3), dense(scalars["w"], 0, params.V3)]
    assert Path(written.path).read_bytes() == file(arrays, list(scalars))
    assert "mx.npx.load" in written.changed[0].text


def test_a_nested_state_has_a_table_beside_its_arrays(tmp_path: Path) -> None:
    w = np.arange(6.0).reshape(2, 3)
    state = {
        "model": {"w": w, "tie": w, "h": np.arange(4, dtype="u2"), "f8": np.ones(3, ml_dtypes.float8_e5m2)},
        "lr": 0.1,
    }
    written = formats.write(tmp_path / "x.params", state)
    got = formats.read(written.path).state
    check(state, got)
    assert got["model"]["w"] is got["model"]["tie"]
    assert any("ignore_extra" in note.text for note in written.changed)
    plain, table = params._parse(params._Cursor(_source(written.path), []))
    assert table is not None and list(plain) == ["model/w", "model/h", "model/f8", "model/tie"]
    assert all(array.dtype in params._FLAGS for array in plain.values()), "MXNet 1.9 ends at any other"


def _source(path: str) -> Any:
    from everystep.formats.file import Source

    data = Path(path).read_bytes()

    def read(into: memoryview, start: int) -> int:
        part = data[start : start + len(into)]
        into[: len(part)] = part
        return len(part)

    return Source(path, len(data), read)


def test_a_folder_of_module_checkpoints(tmp_path: Path) -> None:
    """prefix-0007.params beside prefix-symbol.json, as mx.mod.Module.save_checkpoint names them."""
    for epoch in (1, 2, 7):
        formats.write(tmp_path / f"resnet-{epoch:04d}.params", {"arg:w": np.full((2, 2), epoch, "f4")})
    (tmp_path / "resnet-symbol.json").write_text('{"nodes": []}')
    (tmp_path / "resnet-0007.states").write_bytes(b"\x80\x04N.")
    found = exchange.survey(str(tmp_path))
    assert [(one.step, one.epoch, one.how) for one in found.found] == [(n, n, "name: epoch") for n in (1, 2, 7)]
    why = {Path(one.path).name: one.why for one in found.skipped}
    assert "describes the network" in why["resnet-symbol.json"] and "pickle" in why["resnet-0007.states"]
    for one, got in exchange.each(found, Seam()):
        assert isinstance(got, exchange.Imported)
        check({"arg:w": np.full((2, 2), one.step, "f4")}, got.state)


def test_the_estimators_names(tmp_path: Path) -> None:
    for epoch, batch in ((0, 20), (1, 40)):
        formats.write(tmp_path / f"model-epoch{epoch}batch{batch}.params", {"w": np.full(3, float(batch))})
    found = exchange.survey(str(tmp_path)).found
    assert [(one.step, one.epoch, one.metrics) for one in found] == [(20, 0, {"epoch": 0.0}), (40, 1, {"epoch": 1.0})]


def test_a_look_passes_over_long_arrays(tmp_path: Path) -> None:
    state = {"model": {"w": np.zeros(1 << 18)}, "global_step": np.array(40), "loss": 0.5}
    path = formats.write(tmp_path / "x.params", state).path
    (one,) = exchange.survey(path).found
    assert (one.step, one.metrics) == (40, {"loss": 0.5})
    cut = Path(path).read_bytes()[:-1]
    with pytest.raises(Damaged):
        formats.read(cut)
