"""HDF5 and Keras's files: against h5py, and against what Keras itself wrote (golden files)."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from _formats import check
from _golden import FILES, expected, reads_as_told, same

import everystep
from everystep import formats
from everystep.errors import Unsupported
from everystep.formats.hdf5_data import fletcher32
from everystep.formats.keras_layout import layers_of

BF16 = ml_dtypes.bfloat16
CHUNKED: dict[str, dict[str, Any]] = {
    "plain": {}, "deflate": {"compression": "gzip"}, "shuffle": {"compression": "gzip", "shuffle": True},
    "checked": {"fletcher32": True}, "all": {"compression": 9, "shuffle": True, "fletcher32": True},
}  # fmt: skip


def file(fill: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    with h5py.File(out, "w", **options) as made:
        fill(made)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------- written by h5py


@pytest.mark.parametrize("version", ["earliest", "v108", "v110", "latest"])
def test_every_dtype_reads_as_h5py_reads_it(version: str) -> None:
    chance = np.random.default_rng(0)
    codes = ["i1", "u1", "<i2", ">i4", "<u8", "f2", ">f4", "f8", "c8", ">c16", "?", "S5"]
    arrays = {
        f"g{at % 2}/{code}": (chance.random((3, 4)) * 200).astype(code) if code != "?" else chance.random((3, 4)) < 0.5
        for at, code in enumerate(codes)
    }
    arrays |= {"scalar": np.array(2.5), "empty": np.zeros((0, 3), "f4"), "deep/er/x": np.arange(3)}
    arrays["fields"] = np.array([(1, 2.5, (3, 4))], [("a", "<i4"), ("b", ">f8"), ("c", "<i2", (2,))])
    data = file(lambda f: [f.create_dataset(name, data=array) for name, array in arrays.items()], libver=version)
    content = formats.read(data, strict=True)
    assert content.format == "hdf5" and not content.changed
    for name, array in arrays.items():
        got: Any = content.state
        for part in name.split("/"):
            got = got[part]
        check(array, got)


@pytest.mark.parametrize("options", CHUNKED.values(), ids=CHUNKED)
@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize(
    "shape, chunk", [((1000,), (64,)), ((7, 11, 5), (3, 4, 5)), ((5, 6), (5, 6)), ((2, 3), (8, 8)), ((3000,), (2,))]
)
def test_chunks(options: dict[str, Any], version: str, shape: Any, chunk: Any) -> None:
    x = np.random.default_rng(1).integers(0, 50, shape).astype("<i4")
    more = {"maxshape": tuple(max(n, c) for n, c in zip(shape, chunk))} if version == "earliest" else {}
    chunk = chunk if version == "earliest" else tuple(min(n, c) for n, c in zip(shape, chunk))
    data = file(lambda f: f.create_dataset("x", data=x, chunks=chunk, **more, **options), libver=version)
    check({"x": x}, formats.read(data, strict=True).state)


def test_chunks_of_the_newest_layout_that_may_become_more_are_listed() -> None:
    content = formats.read(
        file(lambda f: f.create_dataset("x", data=np.ones(9), chunks=(2,), maxshape=(None,)), libver="latest")
    )
    assert [one.class_name for one in content.not_understood] == ["HDF5 chunks in an index that libver='latest' wrote"]


@pytest.mark.parametrize("options", [{"libver": "latest"}, {"track_order": True}, {}], ids=str)
@pytest.mark.parametrize("count", [3, 9, 700, 4000])
def test_many_links_and_attributes(options: dict[str, Any], count: int) -> None:
    def fill(made: Any) -> None:
        for number in range(count):
            made[f"name{number}"] = np.array(number)
        for number in range(min(count, 500)):
            made.attrs[f"a{number}"] = number

    content = formats.read(file(fill, **options), strict=True)
    assert {name: int(value) for name, value in content.state.items()} == {f"name{n}": n for n in range(count)}
    assert content.metadata == {f"a{n}": str(n) for n in range(min(count, 500))}


def test_what_was_never_written_is_the_fill_value() -> None:
    def fill(made: Any) -> None:
        made.create_dataset("whole", (3, 2), "f4", fillvalue=-0.0)
        made.create_dataset("zero", (4,), "i2")
        made.create_dataset("some", (5, 5), "i2", chunks=(2, 2), fillvalue=-1)[2:4, :2] = 7

    want = np.full((5, 5), -1, "i2")
    want[2:4, :2] = 7
    got = formats.read(file(fill), strict=True).state
    check({"some": want, "whole": np.full((3, 2), -0.0, "f4"), "zero": np.zeros(4, "i2")}, got)


def test_text_and_attributes() -> None:
    text = h5py.string_dtype()

    def fill(made: Any) -> None:
        made["name"] = "né"
        made["many"] = np.array([["a", "b" * 9000], ["", "d"]], text)
        made.create_dataset("packed", data=np.array(["x", "yz"] * 50, text), chunks=(7,), compression="gzip")
        made.attrs.update(
            {"step": 12, "note": "té", "rates": [0.5, 2.0], "bytes": np.bytes_(b"ab"), "list": ["p", "q"]}
        )
        made["name"].attrs["fixed"] = np.array([b"r", b"st"])
        made.attrs["ref"] = made["name"].ref

    content = formats.read(file(fill), strict=True)
    assert content.state == {"name": "né", "many": [["a", "b" * 9000], ["", "d"]], "packed": ["x", "yz"] * 50}
    assert content.metadata == {
        "step": "12", "note": "té", "rates": "[0.5, 2.0]", "bytes": "ab", "list": '["p", "q"]',
        "name@fixed": '["r", "st"]',
    }  # fmt: skip
    assert [note.path for note in content.changed] == [""] and "'ref'" in content.changed[0].text


def test_one_array_under_two_names_is_one() -> None:
    def fill(made: Any) -> None:
        made["a"] = np.arange(3)
        made["g/b"] = made["a"]

    state = formats.read(file(fill)).state
    assert state["a"] is state["g"]["b"]


def test_what_is_not_understood_is_listed(tmp_path: Path) -> None:
    def fill(made: Any) -> None:
        made["good"] = np.ones(2)
        made["soft"] = h5py.SoftLink("/good")
        made.create_group("links")["elsewhere"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/x")
        made["again/loop"] = made["/"]
        made["null"] = h5py.Empty("f4")
        made["pointer"] = np.array([made["good"].ref], h5py.ref_dtype)
        made.create_dataset("ragged", (1,), h5py.vlen_dtype("i4"))[0] = [1, 2]
        made.create_dataset("lzf", data=np.zeros(50), compression="lzf")
        made.create_dataset("outside", (4,), "u1", external=[(str(tmp_path / "raw"), 0, 4)])
        layout = h5py.VirtualLayout((2,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (2,))
        made.create_virtual_dataset("virtual", layout)
        made["type"] = np.dtype("f4")

    content = formats.read(file(fill))
    listed = {one.path: one.class_name for one in content.not_understood}
    assert listed.keys() == {
        "soft", "links/elsewhere", "again/loop", "null", "pointer", "ragged", "lzf", "outside", "virtual", "type",
    }  # fmt: skip
    check({"again": {}, "good": np.ones(2), "links": {}}, content.understood())
    with pytest.raises(Unsupported, match="elsewhere"):
        formats.read(file(fill), strict=True)


def test_the_checksum_of_chunks_against_bytes_counted_one_by_one() -> None:
    chance = np.random.default_rng(3)
    for size in (0, 1, 2, 3, 719, 720, 721, 200_001):
        data = chance.integers(0, 256, size, dtype=np.uint8)
        one = other = 0
        for at in range(0, size, 2):
            word = int(data[at]) << 8 | (int(data[at + 1]) if at + 1 < size else 0)
            one = (one + word) % 65535
            other = (other + one) % 65535
        got = int.from_bytes(fletcher32(data), "little")
        assert (got >> 16) % 65535 == other and (got & 0xFFFF) % 65535 == one


# ------------------------------------------------------------------------------------------------- written by us


def test_our_files_are_plain_hdf5(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    state = {
        "model": {"w": x, "tie": x, ".": {"..": np.arange(3, dtype=">i4")}, "flag": np.array([True, False])},
        "bf16": np.ones(3, BF16),
        "c": np.ones(2, "c8"),
        "empty": np.zeros((0, 2)),
        "list": [np.float32(0.5), 3, "text"],
        "é/x": np.ones(1, "f2"),
    }
    written = formats.write(tmp_path / "x.h5", state)
    assert {note.path for note in written.changed} == {"", "bf16"}
    with h5py.File(written.path) as got:
        check(x, got["model/w"][()])
        assert got["model/tie"] == got["model/w"] and got["model/w"].chunks is None
        check(np.arange(3, dtype=">i4"), got["model/%2E/.."][()])
        check(np.array([True, False]), got["model/flag"][()])
        check(np.ones(2, "c8"), got["c"][()])
        check(np.ones(3, BF16).view("u2"), got["bf16"][()])
        assert got["list/[0]"][()] == 0.5 and got["é%2Fx"].shape == (1,)
    check(state, formats.read(written.path, strict=True).state)
    again = formats.write(tmp_path / "y.hdf5", state)
    assert Path(again.path).read_bytes() == Path(written.path).read_bytes()


def test_arrays_go_through_without_a_second_copy(tmp_path: Path) -> None:
    state = {"a": np.ones(3 << 20), "b": {"c": np.ones(2 << 20)}}
    tracemalloc.start()
    formats.write(tmp_path / "x.h5", state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    check(state, formats.read(tmp_path / "x.h5").state)


def test_ten_thousand_arrays(tmp_path: Path) -> None:
    state = {f"layer{i}": {"w": np.full(2, i, "i4")} for i in range(5000)}
    check(state, formats.read(formats.write(tmp_path / "x.h5", state).path).state)


def test_only_to_write_there_is_h5py_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write(tmp_path / "x.h5", {"a": np.ones(2)})
    monkeypatch.setitem(sys.modules, "h5py", None)
    check({"a": np.ones(2)}, formats.read(tmp_path / "x.h5").state)
    with pytest.raises(Unsupported) as caught:
        formats.write(tmp_path / "y.h5", {})
    assert caught.value.do == 'pip install "everystep[hdf5]"'
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


# ------------------------------------------------------------------------------------------------------- Keras


def test_a_keras_file_by_the_names_of_its_layers() -> None:
    content = reads_as_told(FILES / "keras" / "model.keras", "keras", "keras")
    assert not content.not_understood
    config = json.loads(content.metadata["keras/config.json"])
    assert [layer.name for layer in layers_of(config)] == ["encoder", "batch_normalization", "dropout", "dense"]
    assert json.loads(content.metadata["keras/metadata.json"])["keras_version"].startswith("3.")


def test_weights_alone_keep_the_numbers_that_keras_gives_them(tmp_path: Path) -> None:
    content = formats.read(FILES / "keras" / "model.weights.h5", strict=True)
    whole = formats.read(FILES / "keras" / "model.keras").state
    layers = content.state["layers"]
    check(whole["model"]["encoder"]["bias"], layers["dense"]["vars"]["1"])
    check(whole["model"]["batch_normalization"]["moving_mean"], layers["batch_normalization"]["vars"]["2"])
    assert layers["dense_1"]["vars"]["0"].dtype == BF16
    assert json.loads(content.metadata["names"])["layers/dense/vars"] == "encoder"
    written = formats.write(tmp_path / "again.weights.h5", content.state)
    check(content.state, formats.read(written.path, strict=True).state)
    with h5py.File(written.path) as got:
        assert got["layers/dense_1/vars/0"].attrs["dtype"] == "bfloat16"


def test_whole_models_of_keras_2() -> None:
    content = reads_as_told(FILES / "keras_legacy" / "model.h5", "keras_legacy", "hdf5")
    assert json.loads(content.metadata["model_config"])["class_name"] == "Sequential"
    assert not content.not_understood and not any("weight_names" in key for key in content.metadata)


def test_what_comes_out_of_a_keras_file_goes_into_one_in_the_same_places(tmp_path: Path) -> None:
    source = FILES / "keras" / "model.keras"
    content = formats.read(source)
    attachments = {name: content.metadata[name].encode() for name in formats.ATTACHMENTS["keras"]}
    written = formats.write(tmp_path / "x.keras", content.state, attachments=attachments)
    assert not any("optimizer" in note.text for note in written.changed)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(written.path) as new:
        assert old.read("config.json") == new.read("config.json") and new.testzip() is None
        theirs = h5py.File(io.BytesIO(old.read("model.weights.h5")))
        ours = h5py.File(io.BytesIO(new.read("model.weights.h5")))
    found: list[str] = []
    theirs.visititems(lambda name, one: found.append(name) if isinstance(one, h5py.Dataset) else None)
    assert len(found) >= 19
    for name in found:
        check(theirs[name][()], ours[name][()])
        assert dict(theirs[name].attrs) == dict(ours[name].attrs)
    check(content.state, formats.read(written.path, strict=True).state)


def test_a_checkpoint_becomes_a_keras_file_with_the_attached_configuration(tmp_path: Path) -> None:
    content = formats.read(FILES / "keras" / "model.keras")
    with everystep.open(tmp_path / "runs").run("m") as run:
        run.attach("keras/config.json", content.metadata["keras/config.json"].encode())
        run.save(3, state=content.state)
    checkpoint = everystep.open(tmp_path / "runs")["m"].latest
    assert checkpoint is not None
    checkpoint.export(tmp_path / "x.keras")
    checkpoint.export(tmp_path / "x.weights.h5", only="model")
    check(content.state, formats.read(tmp_path / "x.keras").state)
    check(content.state["model"], formats.read(tmp_path / "x.weights.h5").state)
    with h5py.File(tmp_path / "x.weights.h5") as got:
        check(content.state["model"]["dense"]["kernel"].view("V2"), got["layers/dense_1/vars/0"][()])


def test_what_keras_needs_or_cannot_hold_is_said(tmp_path: Path) -> None:
    config = {"keras/config.json": b'{"class_name": "Sequential", "config": {"layers": []}}'}
    with pytest.raises(Unsupported, match="needs the model's configuration") as caught:
        formats.write(tmp_path / "x.keras", {"model": {"dense": {"kernel": np.ones(2)}}})
    assert "run.attach('keras/config.json'" in caught.value.do
    for state, match in (
        ({"model": {"w": np.ones(2, ml_dtypes.float8_e5m2)}}, "no form for this in a file: float8_e5m2"),
        ({"model": {"a": {"items": {"0": {"w": np.ones(2)}}}}}, "no place .* model/a/items/0"),
        ([np.ones(2)], "no model"),
    ):  # fmt: skip
        with pytest.raises(Unsupported, match=match):
            formats.write(tmp_path / "x.weights.h5", state, attachments=config)
    with pytest.raises(Unsupported, match="not valid JSON"):
        formats.write(tmp_path / "x.keras", {}, attachments={"keras/config.json": b"{"})
    assert not list(tmp_path.iterdir())


def test_an_optimizer_whose_order_is_not_known_is_kept_for_us_and_noted(tmp_path: Path) -> None:
    config = {"keras/config.json": b'{"class_name": "X", "compile_config": {"optimizer": {"class_name": "Mine"}}}'}
    state = {
        "model": {"w": np.ones(2)},
        "optimizer": {"state": {"model.w": {"m": np.zeros(2)}}, "iteration": np.ones(())},
    }
    written = formats.write(tmp_path / "x.keras", state, attachments=config)
    assert [note.path for note in written.changed] == ["optimizer"]
    check(state, formats.read(written.path).state)


def test_a_folder_of_keras_reads_as_its_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(FILES / "keras" / "model.keras") as archive:
        archive.extractall(tmp_path / "model")
    same(formats.read(tmp_path / "model").state, expected("keras"))
    with pytest.raises(Unsupported, match="not one checkpoint"):
        formats.read(tmp_path)
