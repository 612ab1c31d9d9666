"""PyTorch's files, read against torch.save and written against torch.load."""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import pathlib
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from _formats import DTYPES, NUMPY, PLAIN, check, each_way, neutral, random_tensor, raw, saved, through
from torch import nn

import everystep
from everystep import formats
from everystep.errors import Unsupported
from everystep.formats import Opaque
from everystep.schema import Fields

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

# --------------------------------------------------------------------------------------------- reading what torch saves


@each_way
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_dtype_in_every_shape_and_view(dtype: torch.dtype, way: dict[str, Any]) -> None:
    x = random_tensor(dtype, 4, 6)
    state = {
        "whole": x, "scalar": x[1, 2], "row": x[2], "column": x[:, 3], "transposed": x.T, "steps": x[::2, 1::3],
        "expanded": x[:1].expand(5, 6), "empty": x[:0], "none": torch.empty(0, dtype=dtype),
        "three": x.reshape(2, 2, 6),
        "parameter": nn.Parameter(x, requires_grad=False), "diagonal": x.as_strided((4,), (7,)),
    }  # fmt: skip
    content = through(state, **way)
    assert content.format == "pth" and not content.not_understood and not content.changed
    check(state, content.state)


@each_way
def test_two_names_of_one_memory_are_one_array(way: dict[str, Any]) -> None:
    x = torch.randn(3, 4)
    state = {
        "a": x,
        "b": x,
        "c": nn.Parameter(x),
        "d": x.view(3, 4),
        "row": x[0],
        "flat": x.view(12),
        "copy": x.clone(),
    }
    got = through(state, **way).state
    assert got["a"] is got["b"] is got["c"] is got["d"]
    assert np.shares_memory(got["a"], got["row"]) and np.shares_memory(got["a"], got["flat"])
    assert got["copy"] is not got["a"] and not np.shares_memory(got["copy"], got["a"])
    check(state, got)
    got["a"][0, 0] = 7.0
    assert got["flat"][0] == 7.0  # arrays can be written to, as after torch.load


def test_tied_weights_survive_a_model() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("seen", torch.tensor(3))

    model = Tied()
    content = through(model.state_dict())
    assert content.state["embed.weight"] is content.state["head.weight"]
    assert type(content.state) is collections.OrderedDict and not content.changed
    check(model.state_dict(), content.state)


def test_conjugates_and_negatives_are_what_they_show() -> None:
    x = torch.tensor([1 + 2j, 3 - 4j])
    state = {"conj": x.conj(), "plain": x, "rows": torch.randn(3, 4, dtype=torch.cfloat).mH}
    check(state, through(state).state)
    check([x.clone().conj().imag], through([x.clone().conj().imag]).state)


@each_way
def test_attributes_of_tensors_are_said_to_be_left_out(way: dict[str, Any]) -> None:
    tensor, parameter = torch.ones(2), nn.Parameter(torch.zeros(3))
    tensor.note, parameter.tag = "x", 1  # type: ignore[attr-defined]
    content = through([tensor, parameter, nn.Parameter(torch.ones(1)), nn.Buffer(torch.ones(2))], **way)
    check([tensor, parameter, torch.ones(1), torch.ones(2)], content.state)
    assert [note.path for note in content.changed] == ["[0]", "[1]", "[3]"]


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    lambda p: torch.optim.AdamW(p, torch.tensor(1e-3), betas=(0.8, 0.9)),
    lambda p: torch.optim.Adagrad(p),
    lambda p: torch.optim.Adadelta(p),
    lambda p: torch.optim.Adamax(p),
    lambda p: torch.optim.NAdam(p),
    lambda p: torch.optim.RAdam(p),
    lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.1),
    lambda p: torch.optim.Rprop(p),
    lambda p: torch.optim.ASGD(p),
    lambda p: torch.optim.LBFGS(p, max_iter=3),
]
SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 2, 2]),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
]


@each_way
@pytest.mark.parametrize("make", range(len(OPTIMIZERS)))
def test_states_of_optimizers(make: int, way: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = OPTIMIZERS[make](model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    content = through(state, **way)
    assert not content.not_understood and not content.changed
    check(state, content.state)


@pytest.mark.parametrize("make", range(len(SCHEDULERS)))
def test_states_of_schedulers_scalers_and_generators(make: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1)
    scheduler = SCHEDULERS[make](optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step(0.5) if make == 4 else scheduler.step()
    swa = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    state = {
        "scheduler": scheduler.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "swa": swa.state_dict(), "torch": torch.get_rng_state(), "numpy": np.random.get_state(),
        "pcg": np.random.default_rng(1).bit_generator.state,
    }  # fmt: skip
    content = through(state)
    assert not content.not_understood
    check(state, content.state)


class Callback:
    pass


class HyperParameters:
    def __init__(self) -> None:
        self.lr = 0.1


def lightning_like() -> dict[str, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
        "callbacks": {
            Callback: {"best": torch.tensor(0.25)},
            "ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.5), "dirpath": "/x"},
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "lr": 0.1,
            "args": argparse.Namespace(width=8),
            "model": HyperParameters(),
            "act": nn.ReLU,
        },
        "datamodule": HyperParameters(),
    }


@each_way
def test_a_checkpoint_like_lightnings(way: dict[str, Any], tmp_path: Path) -> None:
    state = lightning_like()
    content = through(state, **way)
    name = f"{__name__}.HyperParameters"
    found = {o.path: o.class_name for o in content.not_understood}
    assert found == {
        "hyper_parameters/model": name, "hyper_parameters/act": "torch.nn.modules.activation.ReLU", "datamodule": name,
    }  # fmt: skip
    got = content.understood()
    assert "datamodule" not in got and got["hyper_parameters"] == {"lr": 0.1, "args": {"width": 8}}
    assert got["callbacks"][f"{__name__}.Callback"]["best"] == 0.25
    assert {n.path for n in content.changed} == {f"callbacks/{__name__}.Callback", "hyper_parameters/args"}
    for key in ("epoch", "global_step", "state_dict", "loops", "optimizer_states", "lr_schedulers"):
        check(state[key], got[key])
    with pytest.raises(Unsupported, match="hyper_parameters/model"):
        formats.read(saved(state, **way), strict=True)
    with everystep.open(str(tmp_path / "repo")).run("imported") as run:  # what was understood can be kept
        run.save(1, state=got).wait()
    check(got, everystep.open(str(tmp_path / "repo"))["imported"].latest.load())


@each_way
def test_a_whole_pickled_module_is_never_built(way: dict[str, Any]) -> None:
    content = through(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), **way)
    assert isinstance(content.state, Opaque) and content.understood() is None
    assert [(o.path, o.class_name) for o in content.not_understood] == [("", "torch.nn.modules.container.Sequential")]


@each_way
@pytest.mark.parametrize("value", NUMPY, ids=lambda v: f"{type(v).__name__}-{v.dtype}".replace(" ", ""))
def test_numpy_in_a_torch_file(value: Any, way: dict[str, Any]) -> None:
    content = through({"x": value, "again": value}, **way)
    assert not content.not_understood and not content.changed
    check({"x": value, "again": value}, content.state)


CHANGED: list[tuple[Any, Any]] = [
    (torch.Size([2, 3]), (2, 3)), (torch.device("cuda", 1), "cuda:1"), (torch.device("cpu"), "cpu"),
    (torch.float8_e4m3fn, "torch.float8_e4m3fn"), (torch.strided, "strided"), ({3}, [3]), (frozenset([4]), [4]),
    (bytearray(b"ab"), b"ab"), (collections.deque([1, 2], 5), [1, 2]),
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
    (argparse.Namespace(a=1, b=[2]), {"a": 1, "b": [2]}), (types.SimpleNamespace(a=1), {"a": 1}),
    (pathlib.PurePosixPath("/a/b"), "/a/b"), (pathlib.PurePosixPath("a/b"), "a/b"), (bytearray(), b""),
]  # fmt: skip


@each_way
@pytest.mark.parametrize("value, neutral", CHANGED, ids=lambda v: type(v).__name__)
def test_other_forms_are_said(value: Any, neutral: Any, way: dict[str, Any]) -> None:
    content = through({"x": [value]}, **way)
    check({"x": [neutral]}, content.state)
    assert not content.not_understood and (value is torch.strided or [n.path for n in content.changed] == ["x/[0]"])


@each_way
def test_plain_values_are_exact(way: dict[str, Any]) -> None:
    check(PLAIN, through(PLAIN, **way).state)


@each_way
def test_tensors_of_other_layouts_come_in_parts(way: dict[str, Any]) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    quantized = torch.quantize_per_channel(x, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 2, 3]), 0, torch.qint8)
    content = through({"coo": x.to_sparse(), "csc": x.to_sparse_csc(), "q": quantized}, **way)
    coo, csc, q = content.state.values()
    assert (coo["layout"], coo["shape"], coo["coalesced"]) == ("sparse_coo", [3, 4], True)
    assert torch.equal(torch.sparse_coo_tensor(coo["indices"], coo["values"], coo["shape"]).to_dense(), x)
    parts = [torch.from_numpy(csc[name]) for name in ("compressed", "plain", "values")]
    assert torch.equal(torch.sparse_csc_tensor(*parts, csc["shape"]).to_dense(), x)
    shown = (q["int_repr"].astype("f4") - q["zero_point"][:, None]) * q["scale"][:, None]
    np.testing.assert_allclose(shown, quantized.dequantize(), rtol=1e-6)
    assert {n.path for n in content.changed} == {"coo", "csc", "q"}


def test_storages_meta_tensors_and_packed_elements() -> None:
    x, y = torch.arange(3.0), torch.arange(4.0)
    bits = random_tensor(torch.uint8, 3).view(torch.bits8)
    content = through({"s": x.untyped_storage(), "t": y.storage(), "y": y, "meta": x.to("meta"), "bits": bits})
    assert content.state["s"].tobytes() == raw(x)
    check(y, content.state["t"])
    assert np.shares_memory(content.state["t"], content.state["y"])
    assert [n.path for n in content.changed] == ["s", "t"]
    assert {o.path for o in content.not_understood} == {"meta", "bits"}


class Named:
    """An object whose class takes its arguments by name."""

    def __new__(cls, *, lr: float) -> Named:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (), {"lr": 0.1}


class OwnTensor(torch.Tensor):
    pass


@pytest.mark.parametrize("protocol", [2, 4])
def test_other_classes_of_tensors_and_objects_made_by_name(protocol: int) -> None:
    weights = torch.arange(8.0).reshape(2, 4)
    scales = torch.ones(2), torch.zeros(2)
    packed = torch.quantize_per_channel(weights, *scales, 0, torch.quint4x2)
    state = {"own": torch.ones(2).as_subclass(OwnTensor), "packed": packed, "named": Named(lr=0.1), "good": weights}
    content = through(state, pickle_protocol=protocol)
    assert {o.path for o in content.not_understood} == {"own", "packed", "named"}
    check({"good": weights}, content.understood())


def test_keys_of_other_types_become_text_or_tuples() -> None:
    content = through({torch.Size([1, 2]): 1, torch.float32: 2, (torch.device("cpu"), 3): {"x": torch.Size([4])}})
    check({(1, 2): 1, "torch.float32": 2, ("cpu", 3): {"x": (4,)}}, content.state)
    assert len(content.changed) == 4 and not content.not_understood


def test_files_without_crc_and_from_the_other_byte_order_and_packed_again() -> None:
    state = {
        "f": torch.randn(3, 4),
        "c": torch.randn(2, dtype=torch.cfloat),
        "b": random_tensor(torch.bfloat16, 5),
        "u": torch.arange(4),
    }
    torch.serialization.set_crc32_options(False)
    try:
        check(state, through(state).state)
    finally:
        torch.serialization.set_crc32_options(True)
    units = {"0": 4, "1": 4, "2": 2, "3": 8}
    for method, other_order in itertools.product((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), (False, True)):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(saved(state))) as old, zipfile.ZipFile(out, "w", method) as new:
            for name in old.namelist():
                data, last = old.read(name), name.rpartition("/")[2]
                if other_order and last == "byteorder":
                    data = {"little": b"big", "big": b"little"}[sys.byteorder]
                if other_order and name.startswith("archive/data/"):
                    data = np.frombuffer(data, f"u{units[last]}").byteswap().tobytes()
                new.writestr(name, data)
        check(state, formats.read(out.getvalue()).state)


def test_reading_imports_no_framework(tmp_path: Path) -> None:
    torch.save(lightning_like(), tmp_path / "x.ckpt")
    code = "import sys; from everystep import formats\n"
    code += "print(len(formats.read(sys.argv[1]).not_understood), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.ckpt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3", "False"]


# ------------------------------------------------------------------------------------------- writing what torch loads


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_torch_loads_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    x = random_tensor(dtype, 4, 6)
    state = {"whole": x, "scalar": x[1, 2], "column": x[:, 3], "none": x[:0], "deep": [{"row": (x[2], 1)}], 3: x.T}
    path = tmp_path / "x.pth"
    assert formats.write(path, neutral(state)).changed == ()
    for options in ({}, {"mmap": True}):
        got = torch.load(path, weights_only=True, **options)
        assert all(got[key].dtype is dtype and got[key].is_contiguous() for key in ("whole", "column", 3))
        check(got, neutral(state))
    check(state, formats.read(path).state)


def test_torch_loads_plain_values_ties_and_alignment(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = {
        "a": x,
        "tie": x,
        "view": x.T,
        "other": x.copy(),
        "plain": [v for v in PLAIN if v != 2**2000 or v is None],
        "long": 2**2000,
    }
    written = formats.write(str(tmp_path / "x.pt"), state)
    assert written.nbytes == (tmp_path / "x.pt").stat().st_size and written.changed == ()
    got = torch.load(tmp_path / "x.pt", weights_only=True)
    assert got["a"].data_ptr() == got["tie"].data_ptr() != got["other"].data_ptr()
    got["a"][0, 0] = 5
    assert got["tie"][0, 0] == 5 and got["other"][0, 0] == 0
    got["a"][0, 0] = 0
    check(got, state)
    back = formats.read(tmp_path / "x.pt").state
    assert back["a"] is back["tie"] and back["other"] is not back["a"]
    check(state, back)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            archive.fp.seek(entry.header_offset + 26)  # type: ignore[union-attr]
            name, extra = struct.unpack("<HH", archive.fp.read(4))  # type: ignore[union-attr]
            assert not entry.filename.startswith("archive/data/") or (entry.header_offset + 30 + name + extra) % 64 == 0


class Point(NamedTuple):
    x: Any
    y: Any


def test_what_torch_has_no_form_for_is_said_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    written = formats.write(
        path, {"a": np.float32(0.1), "b": Point(1, [np.int64(3)]), "c": np.str_("t"), "d": np.bool_(True)}
    )
    assert {n.path for n in written.changed} == {"a", "b", "b/[1]/[0]", "c", "d"}
    assert torch.load(path, weights_only=True) == {"a": float(np.float32(0.1)), "b": (1, [3]), "c": "t", "d": True}
    loop: list[Any] = []
    loop.append(loop)
    record = Fields("Point", [("x", 1)])
    assert [n.text for n in formats.write(path, record, overwrite=True).changed] == ["a record is an OrderedDict here"]
    check(torch.load(path, weights_only=True), collections.OrderedDict(x=1))
    refused = [
        np.array(["text"]), np.array([(1,)], [("a", "i4")]), np.array([object()]), {1, 2}, object(), torch.ones(2),
        loop, np.datetime64("2026-01-01"), np.longdouble(1), 2**3000, Opaque("a.B"),
        {(1, frozenset()): 2}, {frozenset(): 1},
        lambda: None, np.ma.masked_array([1], [True]), np.ones(2, ml_dtypes.int4),
    ]  # fmt: skip
    for value in refused:
        with pytest.raises(Unsupported) as caught:
            formats.write(path, {"deep": [value]}, overwrite=True)
        assert caught.value.where.startswith("deep"), value
    assert torch.load(path, weights_only=True)["x"] == 1  # a refused state leaves the earlier file as it was
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_model_goes_out_and_in_again(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    formats.write(tmp_path / "x.ckpt", neutral({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    got = torch.load(tmp_path / "x.ckpt", weights_only=True)
    other.load_state_dict(got["model"])
    twin = torch.optim.AdamW(other.parameters())
    twin.load_state_dict(got["optimizer"])
    check(model.state_dict(), neutral(other.state_dict()))
    check(optimizer.state_dict(), neutral(twin.state_dict()))
