""".params files: what MXNet wrote reads equal without it, and what is written here loads in MXNet."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from _gluon import net_of, scramble
from mxnet import gluon

import everystep
from everystep import formats
from everystep.adapters.mxnet_arrays import host, same_bits
from everystep.formats import params

DTYPES = ("float16", "float32", "float64", "uint8", "int8", "int32", "int64", "bool")


def array_of(dtype: str, shape: tuple[int, ...] = (3, 4)) -> Any:
    values = np.random.RandomState(5).randint(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    return mx.nd.array(values, dtype=dtype)


def equal(found: Any, array: Any) -> bool:
    return same_bits(found, host(array))


# ------------------------------------------------------------------------------------------------ written by MXNet


def test_arrays_of_every_type(tmp_path: Path) -> None:
    path = str(tmp_path / "all.params")
    arrays = {f"arg:{dtype}": array_of(dtype) for dtype in DTYPES}
    arrays["arg:bfloat16"] = mx.nd.amp_cast(array_of("float32"), dtype="bfloat16")
    arrays["aux:größer"] = array_of("float32", (1, 2, 3, 4, 5))
    mx.nd.save(path, arrays)
    found = formats.read(path)
    assert (found.format, list(found.state)) == ("params", list(arrays))
    assert all(equal(found.state[name], array) for name, array in arrays.items())


def test_a_list_of_arrays(tmp_path: Path) -> None:
    path = str(tmp_path / "list.params")
    arrays = [array_of("float32"), array_of("int64", (5,))]
    mx.nd.save(path, arrays)
    found = formats.read(path).state
    assert type(found) is list and all(map(equal, found, arrays))
    mx.nd.save(path, arrays[0])
    (only,) = formats.read(path).state
    assert equal(only, arrays[0])


def test_sparse_arrays(tmp_path: Path) -> None:
    path = str(tmp_path / "sparse.params")
    rows = mx.nd.sparse.row_sparse_array(([[1.0, 2], [3, 4]], [1, 4]), shape=(6, 2))
    csr = mx.nd.sparse.csr_matrix(([1.0, 2, 3], [0, 2, 1], [0, 2, 2, 3]), shape=(3, 4), dtype="float64")
    mx.nd.save(path, {"rows": rows, "csr": csr, "dense": array_of("float32")})
    found = formats.read(path).state
    assert (found["rows"]["storage"], found["rows"]["shape"]) == ("row_sparse", [6, 2])
    assert equal(found["rows"]["data"], rows.data) and equal(found["rows"]["indices"], rows.indices)
    assert (found["csr"]["storage"], found["csr"]["shape"]) == ("csr", [3, 4])
    for name in ("data", "indices", "indptr"):
        assert equal(found["csr"][name], getattr(csr, name))


def test_arrays_like_those_of_numpy(tmp_path: Path) -> None:
    path = str(tmp_path / "numpy.params")
    with mx.util.np_shape(True), mx.util.np_array(True):
        arrays = {"one": mx.np.array(2.5), "none": mx.np.zeros((0, 3)), "some": mx.np.arange(6).reshape(2, 3)}
        mx.npx.save(path, arrays)
        found = formats.read(path).state
        assert found.keys() == arrays.keys() and all(equal(found[name], array) for name, array in arrays.items())


def test_a_blocks_parameters(tmp_path: Path) -> None:
    path = str(tmp_path / "net.params")
    scramble(3)
    net = net_of()
    net.save_parameters(path)
    found = formats.read(path).state
    own = net._collect_params_with_prefix()
    assert found.keys() == own.keys() and all(equal(found[name], param.data()) for name, param in own.items())


def test_a_block_that_was_exported(tmp_path: Path) -> None:
    net = net_of()
    net.hybridize()
    net(mx.nd.ones((2, 8)))
    net.export(str(tmp_path / "model"), epoch=7)
    found = formats.read(str(tmp_path / "model-0007.params")).state
    assert {name.partition(":")[0] for name in found} == {"arg", "aux"} and len(found) == 8


def old_version(array: np.ndarray, magic: int | None) -> bytes:
    """As MXNet 0.x and 1.0 wrote it."""
    dims = struct.pack(f"<{array.ndim}I", *array.shape)
    if magic is None:
        head = struct.pack("<I", array.ndim) + dims
    else:
        head = struct.pack(f"<Ii{array.ndim}q", magic, array.ndim, *array.shape)
    return head + struct.pack("<iii", 1, 0, 0) + array.tobytes()


@pytest.mark.parametrize("magic", [None, params.V1], ids=["oldest", "V1"])
def test_files_of_old_versions(magic: int | None, tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "old.params"
    names = struct.pack("<QQ", 1, 5) + b"arg:w"
    path.write_bytes(struct.pack("<QQQ", params.MAGIC, 0, 1) + old_version(array, magic) + names)
    assert same_bits(mx.nd.load(str(path))["arg:w"], array), "MXNet reads it"
    assert same_bits(formats.read(str(path)).state["arg:w"], array)


# ------------------------------------------------------------------------------------------------- written by ours


def test_mxnet_loads_what_is_written_here(tmp_path: Path) -> None:
    path = str(tmp_path / "ours.params")
    arrays = {dtype: host(array_of(dtype)) for dtype in DTYPES}
    arrays["bfloat16"] = host(mx.nd.amp_cast(array_of("float32"), dtype="bfloat16"))
    formats.write(path, arrays)
    found = mx.nd.load(path)
    assert found.keys() == arrays.keys() and all(same_bits(found[name], array) for name, array in arrays.items())


def test_both_write_the_same_bytes(tmp_path: Path) -> None:
    net = net_of()
    net.save_parameters(str(tmp_path / "theirs.params"))
    state = {name: param.data().asnumpy() for name, param in net._collect_params_with_prefix().items()}
    formats.write(str(tmp_path / "ours.params"), state)
    assert (tmp_path / "ours.params").read_bytes() == (tmp_path / "theirs.params").read_bytes()


def test_scalars_and_empty_arrays(tmp_path: Path) -> None:
    path = str(tmp_path / "numpy.params")
    state = {"one": np.array(2.5, "f4"), "none": np.zeros((0, 3), "f4"), "some": np.arange(6.0)}
    formats.write(path, state)
    with mx.util.np_shape(True), mx.util.np_array(True):
        found = mx.npx.load(path)
        assert all(same_bits(found[name], array) for name, array in state.items())


def test_a_block_takes_an_exported_checkpoint(tmp_path: Path) -> None:
    scramble(4)
    net = net_of()
    with everystep.open(str(tmp_path / "runs")).run("r").track(net=net) as run:
        run.save(1).wait().export(str(tmp_path / "net.params"), only="net")
    other = net_of()
    other.load_parameters(str(tmp_path / "net.params"))
    for name, param in net._collect_params_with_prefix().items():
        assert same_bits(param.data(), other._collect_params_with_prefix()[name].data())


def test_a_whole_checkpoint_comes_back_and_its_weights_load(tmp_path: Path) -> None:
    net = net_of()
    trainer = gluon.Trainer(net.collect_params(), "adam")
    with everystep.open(str(tmp_path / "runs")).run("r").track(net=net, trainer=trainer) as run:
        checkpoint = run.save(1).wait()
    checkpoint.export(str(tmp_path / "all.params"))
    whole = formats.read(str(tmp_path / "all.params")).state
    assert whole.keys() == checkpoint.load().keys()
    assert same_bits(whole["net"]["0.weight"], net[0].weight.data())
    assert "net/0.weight" in mx.nd.load(str(tmp_path / "all.params"))
