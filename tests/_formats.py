"""States, and how they are compared, for the tests of foreign files."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from everystep import formats

WAYS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip-protocol-4": {"pickle_protocol": 4},
    "zip-protocol-5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy-protocol-4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.complex32,
]  # fmt: skip


def saved(value: Any, **way: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **way)
    return out.getvalue()


def through(value: Any, **way: Any) -> formats.Content:
    return formats.read(saved(value, **way))


def raw(tensor: torch.Tensor) -> bytes:
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def check(expected: Any, got: Any, path: str = "") -> None:
    """Bit for bit, with the neutral form of what only torch or Python has."""
    if isinstance(expected, torch.Tensor):
        assert type(got) is np.ndarray, path
        assert (got.dtype.name, got.shape) == (str(expected.dtype)[6:], tuple(expected.shape)), path
        assert got.tobytes() == raw(expected), path
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert type(got) is type(expected) and got.dtype == expected.dtype and got.shape == expected.shape, path
        assert got.tobytes() == expected.tobytes(), path
    elif isinstance(expected, dict):
        kind = type(expected) if type(expected) in (collections.OrderedDict, collections.Counter) else dict
        assert type(got) is kind and list(got) == list(expected), path
        for key, value in expected.items():
            check(value, got[key], f"{path}/{key}")
    elif isinstance(expected, (list, tuple, torch.Size)):
        assert type(got) is (list if isinstance(expected, list) else tuple) and len(got) == len(expected), path
        for i, (one, other) in enumerate(zip(expected, got)):
            check(one, other, f"{path}[{i}]")
    elif isinstance(expected, float):
        assert type(got) is float and struct.pack("d", got) == struct.pack("d", expected), path
    elif isinstance(expected, (torch.dtype, torch.device)):
        assert got == str(expected), path
    else:
        assert type(got) is type(expected) and got == expected, path


NUMPY = [
    np.float32(1.5), np.float64("nan"), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1 + 2j),
    np.str_("é"), np.bytes_(b"ab"), np.datetime64("2026-11-21T01:02:03", "ms"), np.timedelta64(5, "D"),
    np.datetime64("NaT"),
    np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(3.5), np.zeros((0, 4)),
    np.array(["a", "bcd"]), np.array([b"x", b"yz"]), np.array([True, False]), np.arange(3, dtype=">i4"),
    np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8", (2,))])["a"],
    np.array([(1, 2.0)], [("a", "<i4"), ("b", "<f8")]),
    np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2), np.ones(3, ml_dtypes.bfloat16),
    np.ones(2, ml_dtypes.float8_e5m2),
    np.array(["2026-01-01", "NaT"], "<M8[25s]"), np.frombuffer(b"abcdefgh", "V4"), np.longdouble(1) / 3,
]  # fmt: skip


PLAIN = [
    None, True, 0, -1, 255, 256, -(2**31), 2**31, 2**63, -(2**63) - 1, 2**2000, 0.0, -0.0, float("inf"), 1e-310, 1 - 2j,
    "", "é\u20ac\U0001f600", "\ud800", "x" * 70000, b"", b"\x00\xff" * 200, (), (1,), (1, 2, 3, 4), [], [[]],
    {}, {1: {}},
    {(1, "a"): 2, None: 3, 1.5: 4, b"k": 5}, collections.OrderedDict(b=1, a=2), collections.Counter("hello"),
]  # fmt: skip


def neutral(value: Any) -> Any:
    """A state of torch as its file is read: arrays in place of tensors."""
    return through(value).state


# The parts of hostile files.
@contextlib.contextmanager
def bounded(mib: float = 64.0) -> Iterator[None]:
    """Far above what these files cost, far below what they ask for. For time, the timeout of a test stands."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib * 2**20
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


def packed(edit: Callable[[zipfile.ZipFile], None], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        edit(archive)
    return out.getvalue()
