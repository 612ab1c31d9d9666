"""Foreign files against those who own them: np.savez and np.load, the safetensors package, torch.load."""

from __future__ import annotations

import collections
import errno
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from _formats import DTYPES, NUMPY, check, neutral, random_tensor, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from everystep import formats
from everystep.errors import Conflict, Damaged, NotFound, ReadOnly, StorageError, StorageFull, Unsupported, UsageError
from everystep.formats import Opaque
from everystep.seam import Files, Seam

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

GENERAL = [name for name in formats.FORMATS if name not in formats.ATTACHMENTS]
"""What holds any state; the others need a model's configuration beside it."""
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
# ------------------------------------------------------------------------------------ all formats, there and back

plain_values = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=20), st.binary(max_size=20),
    st.complex_numbers(allow_nan=False),
)  # fmt: skip
array_values = st.tuples(
    st.sampled_from(
        ["?", "b", "H", "i4", "u8", "f2", "f4", "f8", "c8", "c16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.binary(min_size=27 * 16, max_size=27 * 16),
).map(
    lambda t: (
        (np.frombuffer(t[2], "u1") & (1 if t[0] == "?" else 255))
        .view(np.dtype(t[0]))[: int(np.prod(t[1]))]
        .reshape(t[1])
        .copy()
    )
)
keys = st.one_of(st.text(max_size=6).filter(lambda k: not k.startswith("__")), st.integers(-5, 2**40), st.booleans())
states = st.recursive(
    st.one_of(plain_values, array_values),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("name", GENERAL)
@MANY
@given(state=states)
def test_any_state_comes_back(name: str, state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("formats") / f"x{formats.FORMATS[name].EXTENSIONS[0]}"
    formats.write(path, {"state": state}, format=name)
    content = formats.read(path, strict=True)
    assert content.format == name
    check({"state": state}, content.state)
    if name == "pth":
        check(torch.load(path, weights_only=True), content.state)


@pytest.mark.parametrize("name", GENERAL)
def test_ties_other_byte_orders_and_order_of_axes(name: str, tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    state = {
        "a": x,
        "b": [x, x.T],
        "big": np.arange(4, dtype=">f4"),
        "f": np.asfortranarray(x),
        "empty": np.zeros((2, 0)),
    }
    got = formats.read(formats.write(tmp_path / f"x{formats.FORMATS[name].EXTENSIONS[0]}", state).path).state
    assert got["a"] is got["b"][0] and not np.shares_memory(got["f"], got["a"])
    for one, other in ((state["a"], got["a"]), (x.T, got["b"][1]), (state["big"], got["big"]), (x, got["f"])):
        np.testing.assert_array_equal(one, other)
    assert got["empty"].shape == (2, 0) and got["a"].flags.writeable


@pytest.mark.parametrize("name", ["npz", "safetensors"])
def test_what_only_numpy_has_keeps_its_bits(name: str, tmp_path: Path) -> None:
    state = [v for v in NUMPY if not isinstance(v, (np.str_, np.bytes_))]
    written = formats.write(tmp_path / f"x.{name}", state)
    check(state, formats.read(written.path, strict=True).state)
    for value in (np.array([object()]), object(), {1}, Opaque("a.B"), torch.ones(2)):
        with pytest.raises(Unsupported, match=r"deep/\[0\]"):
            formats.write(tmp_path / f"y.{name}", {"deep": [value]})
    with pytest.raises(Unsupported, match="keeps for itself"):
        formats.write(tmp_path / f"y.{name}", {"__metadata__": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == [f"x.{name}"]


# -------------------------------------------------------------------------------------------------------- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_against_numpy(save: Any, tmp_path: Path) -> None:
    arrays = {
        "a/b": np.arange(6).reshape(2, 3), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "zero": np.array(2.5),
        "empty": np.zeros((0, 3)), "text": np.array(["é", "bcd"]), "big": np.arange(3, dtype=">i8"),
        "time": np.array(["2026-01-01"], "M8[D]"), "fields": np.array([(1, 2.0)], [("ä", "<i4"), ("b", "<f8", (2,))]),
        "zeros": np.zeros(10_000), "flags": np.array([True, False]), "c": np.ones(2, "c8"), "half": np.ones(2, "f2"),
    }  # fmt: skip
    save(tmp_path / "x.npz", **arrays)
    content = formats.read(tmp_path / "x.npz", strict=True)
    assert content.format == "npz" and list(content.state) == list(arrays)
    with np.load(tmp_path / "x.npz") as loaded:
        check({name: loaded[name] for name in loaded.files}, content.state)
    written = formats.write(
        tmp_path / "y.npz", {"n": {"a": arrays["f"], "tie": arrays["f"], "lr": 0.1}, "b": arrays["text"]}
    )
    assert [n.path for n in written.changed] == [""]
    with np.load(written.path) as loaded:  # every name is there for those who know nothing of the table
        assert set(loaded.files) == {"n/a", "n/tie", "b", "__everystep__"}
        check(arrays["f"], loaded["n/tie"])
        check(arrays["text"], loaded["b"])


def test_npz_with_objects_and_other_members(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", good=np.ones(2), bad=np.array([{}, []], dtype=object))
    content = formats.read(tmp_path / "x.npz")
    assert [o.path for o in content.not_understood] == ["bad"]
    check({"good": np.ones(2)}, content.understood())
    with pytest.raises(Unsupported, match="bad"):
        formats.read(tmp_path / "x.npz", strict=True)
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("readme.txt", b"text")
    assert formats.read(tmp_path / "y.npz", format="npz").state == {"readme.txt": b"text"}


# ------------------------------------------------------------------------------------------------ safetensors


def test_safetensors_against_the_package(tmp_path: Path) -> None:
    dtypes = [d for d in DTYPES if d not in (torch.complex128, torch.complex32, torch.float8_e8m0fnu)]
    tensors = {str(d)[6:]: random_tensor(d, 3, 4) for d in dtypes} | {
        "zero": torch.tensor(5),
        "empty": torch.empty(0, 3),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "note": "é"})
    content = formats.read(tmp_path / "x.safetensors", strict=True)
    assert content.format == "safetensors" and content.metadata == {"format": "pt", "note": "é"}
    check(dict(sorted(tensors.items())), dict(sorted(content.state.items())))
    arrays = content.state | {"e8m0": np.array([1, 2], ml_dtypes.float8_e8m0fnu)}
    written = formats.write(tmp_path / "y.safetensors", {"model": arrays, "step": 3, "tie": arrays["zero"]})
    assert {n.path for n in written.changed} == {"", "tie"}
    got = safetensors.torch.load_file(written.path)
    assert {name.removeprefix("model/") for name in got} | {"e8m0"} == set(arrays)
    for name, tensor in tensors.items():
        check(got[f"model/{name}"], neutral(tensor))
    with safetensors.safe_open(written.path, "np") as file:
        assert json.loads(file.metadata()["everystep"])["format"] == 1
    check({"model": arrays, "step": 3, "tie": arrays["zero"]}, formats.read(written.path).state)


def test_safetensors_are_aligned_and_flat_names_stay(tmp_path: Path) -> None:
    state = {
        "layer.weight": np.ones(3, "f8"),
        "layer.bias": np.ones(1, "u1"),
        "h": np.ones(3, "f2"),
        "w": np.ones(1, "f4"),
    }
    formats.write(tmp_path / "x.safetensors", state)
    data = (tmp_path / "x.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__")
    assert header.keys() == state.keys()
    assert all((begin + e["data_offsets"][0]) % state[name].itemsize == 0 for name, e in header.items())
    got = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    check(state, {name: got[name] for name in state})


# ------------------------------------------------------------------------------------------- files, names and bytes


def test_the_bytes_decide_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(safetensors.numpy.save({"a": np.ones(2)}))
    assert formats.read(path).format == formats.read(str(path)).format == "safetensors"
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.npz").read_bytes())
    assert formats.read(tmp_path / "x.pth").format == "npz"
    assert formats.read(memoryview((tmp_path / "x.npz").read_bytes())).format == "npz"
    assert formats.format_of("a/B.CKPT") == "pth"
    for name in ("x.onnx", "x", "pth"):
        with pytest.raises(UsageError):
            formats.format_of(name)
    with pytest.raises(UsageError):
        formats.read(path, format="onnx")


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    array, script, pickled = io.BytesIO(), io.BytesIO(), saved({})[:0] + b"\x80\x04]."
    np.save(array, np.ones(2))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    tar = bytes(257) + b"ustar" + bytes(250)
    for data, match in (
        (array.getvalue(), "npy"), (script.getvalue(), "TorchScript"), (pickled, "plain pickle"), (tar, "tar file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "HDF5"), (b"", "no format"), (b"hello", "no format"),
        (bytes(500), "no format"),
    ):  # fmt: skip
        with pytest.raises(Unsupported, match=match):
            formats.read(data)
    for name in ("x.safetensors", "x.pth", "x.npz"):  # where the bytes say nothing, the reader of the name says more
        (tmp_path / name).write_bytes(b"\xff" * 600)
        with pytest.raises((Damaged, Unsupported), match=r"header of|whole zip archive"):
            formats.read(tmp_path / name)
    with pytest.raises(NotFound, match="no such file"):
        formats.read(tmp_path / "nothing.pth")
    with pytest.raises(Unsupported, match="a folder that is not one checkpoint"):
        formats.read(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    formats.write(path, {"a": np.ones(3)})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask says
    (tmp_path / "plain").unlink()
    with pytest.raises(Conflict, match="overwrite"):
        formats.write(path, {"a": np.zeros(3)})
    check({"a": np.ones(3)}, formats.read(path).state)
    formats.write(path, {"a": np.zeros(3)}, overwrite=True)
    check({"a": np.zeros(3)}, formats.read(path).state)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    with pytest.raises(NotFound):
        formats.write(tmp_path / "no" / "x.npz", {})


class Failing(Files):
    """Counts the calls that change something, and fails one of them."""

    def __init__(self, fail_at: int = -1, number: int = errno.ENOSPC) -> None:
        self.calls: list[str] = []
        self._fail_at, self._number = fail_at, number

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("create", "write", "fsync", "rename", "link", "fsync_folder"):
            return found

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._fail_at:
                raise OSError(self._number, "injected")
            return found(*args)

        return call


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", GENERAL)
def test_every_call_may_fail(name: str, overwrite: bool, tmp_path: Path) -> None:
    state, earlier = {"a": np.arange(5.0), "b": np.ones(3, "i4"), "c": 1}, {"a": np.zeros(5)}
    ending = formats.FORMATS[name].EXTENSIONS[0]

    def attempt(at: int) -> Failing:
        """Writes a file, or files that belong together; over earlier ones if they may be replaced."""
        folder = tmp_path / str(at)
        folder.mkdir()
        if overwrite:
            formats.write(folder / f"x{ending}", earlier)
        files = Failing(at)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        try:
            formats.write(folder / f"x{ending}", state, overwrite=overwrite, seam=Seam(files))
        except StorageFull as error:
            assert "injected" in str(error)
            if at < len(whole.calls) - 1:
                assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        else:
            assert at < 0
        assert not list(folder.glob(".tmp-*"))
        return files

    whole = attempt(-1)
    count = whole.calls.count("create")  # of files: one but for formats with an index
    names = ["link"] * count if not overwrite else ["rename"] * (1 if count == 1 else 2 * count)
    assert whole.calls[0] == "create" and whole.calls[-len(names) - 2 :] == ["fsync", *names, "fsync_folder"]
    for at in range(len(whole.calls)):
        attempt(at)


def test_a_file_system_without_links(tmp_path: Path) -> None:
    files = Failing(-1)
    formats.write(tmp_path / "a.npz", {"a": np.ones(2)}, seam=Seam(files))
    seam = Seam(Failing(files.calls.index("link"), errno.EPERM))
    formats.write(tmp_path / "x.npz", {"a": np.ones(2)}, seam=seam)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "x.npz"]
    check({"a": np.ones(2)}, formats.read(tmp_path / "x.npz").state)


class Odd(Files):
    """A disk that takes no bytes, a file that gets shorter, a name that somebody takes in between."""

    def __init__(self, *, full: bool = False, longer: int = 0, unseen: bool = False) -> None:
        self._full, self._longer, self._unseen = full, longer, unseen

    def write(self, fd: int, data: memoryview) -> int:
        return 0 if self._full else super().write(fd, data)

    def size(self, path: str) -> int:
        if self._unseen:
            raise FileNotFoundError(path)
        return super().size(path) + self._longer


def test_odd_disks(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(StorageError, match="takes no bytes"):
        formats.write(path, {"a": np.ones(3)}, seam=Seam(Odd(full=True)))
    with pytest.raises(ReadOnly, match="injected"):
        formats.write(path, {"a": np.ones(3)}, seam=Seam(Failing(0, errno.EACCES)))
    assert not list(tmp_path.iterdir())
    formats.write(path, {"a": np.ones(3)})
    with pytest.raises(Damaged, match="the file ends at"):
        formats.read(path, seam=Seam(Odd(longer=9)))
    with pytest.raises(Conflict):
        formats.write(path, {"a": np.zeros(3)}, seam=Seam(Odd(unseen=True)))
    check({"a": np.ones(3)}, formats.read(path).state)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("name", ["npz", "safetensors"])
def test_odd_names(name: str, tmp_path: Path) -> None:
    x = np.ones(2)
    state = {
        "": x,
        "a\0b": x.copy(),
        "a/b": x.copy(),
        "a": {"b": x.copy()},
        "%00": x.copy(),
        "%": {"": x},
        "..": [x.copy()],
    }
    check(state, formats.read(formats.write(tmp_path / f"x.{name}", state).path).state)
    long: Any = x
    for _ in range(12):
        long = {"k" * 999: long}
    with pytest.raises(Unsupported, match="no room"):
        formats.write(tmp_path / f"y.{name}", long)
    check(x, formats.read(formats.write(tmp_path / f"z.{name}", x).path).state)


@pytest.mark.parametrize("name", ["npz", "safetensors"])
def test_long_text_and_headers_that_are_too_long(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"text": "\ud800é" * 3000, "bytes": b"\x00" * 5000, "step": 1}
    written = formats.write(tmp_path / f"x.{name}", state)
    assert [n.path for n in written.changed] == ["text", "bytes", ""]
    check(state, formats.read(written.path).state)
    monkeypatch.setattr(formats.safetensors, "HEADER_MAX", 100)
    if name == "safetensors":
        with pytest.raises(Unsupported, match="structure take"):
            formats.write(tmp_path / "y.safetensors", state)
