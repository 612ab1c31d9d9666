"""PyTorch's element types, and the bytes of its tensors: out of them, and tensors over them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from everystep.errors import Damaged, Unsupported
from everystep.schema import Leaf
from everystep.schema.dtype import name_of

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor

# torch's name of an element type -> its name on disk; a torch that is too old for one simply lacks it.
NAMES = {
    "bool": "|b1", "uint8": "|u1", "int8": "|i1", "uint16": "<u2", "int16": "<i2", "uint32": "<u4", "int32": "<i4",
    "uint64": "<u8", "int64": "<i8", "float16": "<f2", "float32": "<f4", "float64": "<f8", "complex64": "<c8",
    "complex128": "<c16",
    **{name: name for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
                               "float8_e8m0fnu")},
    **{name: f"torch.{name}" for name in ("complex32", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4",
                                          "bits4x2", *(f"{s}int{n}" for s in ("", "u") for n in range(1, 8)))},
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {disk: vars(torch)[name] for name, disk in NAMES.items() if name in vars(torch)}
DISK_NAMES = {dtype: disk for disk, dtype in DTYPES.items()}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_SHARED = frozenset(dtype for dtype, disk in DISK_NAMES.items() if disk[0] in "<|")


def build(leaf: Leaf, data: Array) -> Tensor:
    """A tensor in CPU memory over a flat uint8 array that nobody else uses; nothing is copied."""
    dtype = DTYPES.get(leaf.dtype)
    if dtype is None and leaf.dtype in NAMES.values():
        raise Unsupported(
            f"torch {torch.__version__} has no {leaf.dtype}",
            where=leaf.path,
            do='update torch, or load with like="numpy"',
        )
    if dtype is None or data.nbytes != math.prod(leaf.shape) * dtype.itemsize:
        raise Damaged(f"{data.nbytes} bytes do not make {leaf.shape} of {leaf.dtype}", where=leaf.path)
    try:
        if data.nbytes == 0:
            return torch.empty(leaf.shape, dtype=dtype)
        return torch.from_numpy(data if data.flags.writeable else data.copy()).view(dtype).view(leaf.shape)
    except RuntimeError as error:
        raise Damaged(f"no tensor has the shape {leaf.shape}", where=leaf.path) from error


def view(payload: Tensor) -> Array | None:
    """torch's own copy_ is left to what NumPy cannot see: it waits for all of torch's threads at every tensor, which
    costs microseconds on idle cores and 50 times the copy itself on cores that others use."""
    if not payload.is_cpu or payload.is_conj() or payload.is_neg() or not payload.is_contiguous():
        return None
    if payload.dtype in _SHARED:
        return payload.numpy().reshape(-1).view(np.uint8)
    # Not view(-1): the one element of shape (1,) may have any stride, and then has no bytes to view.
    return payload.as_strided((payload.numel(),), (1,)).view(torch.uint8).numpy()


def copy(payload: Tensor, target: Array) -> None:
    if not payload.numel():
        return
    flat = torch.from_numpy(target)
    if payload.is_conj() or payload.is_neg():
        flat.view(payload.dtype).view(payload.shape).copy_(payload)
    elif payload.is_contiguous():
        # Not view(-1): the one element of shape (1,) may have any stride, and then has no bytes to view.
        flat.copy_(payload.as_strided((payload.numel(),), (1,)).view(torch.uint8))
    else:
        # As whole words: some element types (int4 …) have no strided copy, and no bit of a NaN may change.
        word = _WORDS[payload.dtype.itemsize]
        flat.view(word).view(payload.shape).copy_(payload.view(word))


def fit(current: Tensor, value: Any) -> Tensor | None:
    """The value as a tensor of just the same shape and type as the current one, or None."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = from_numpy(np.asarray(value))
    if not isinstance(value, Tensor) or value.layout != current.layout or value.is_quantized != current.is_quantized:
        return None
    return value if value.shape == current.shape and value.dtype == current.dtype else None


def from_numpy(array: Array) -> Tensor | None:
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    dtype = None if array.dtype.hasobject else DTYPES.get(name_of(array.dtype))
    if dtype is None:
        return None
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return build(Leaf("", name_of(array.dtype), array.shape, "other"), data)
