"""MXNet's arrays: what they are called on disk, how they are made and filled, and what a sparse one consists of."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.base import _LIB, check_call
from mxnet.ndarray.sparse import BaseSparseNDArray

from everystep.adapters.composites import Misfit
from everystep.errors import Unsupported
from everystep.schema.dtype import name_of, parse

ARRAY, NUMPY, ROW_SPARSE, CSR = "mxnet.ndarray", "mxnet.numpy", "mxnet.row_sparse", "mxnet.csr"
Array = np.ndarray[Any, Any]
NDArray = mx.nd.NDArray

BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
"""What MXNet calls it; NumPy's own name for it is that of ml_dtypes."""
_NAMES = ("<f4", "<f8", "<f2", "|u1", "<i4", "|i1", "<i8", "|b1")
_DTYPES: dict[str, Any] = {**{name: np.dtype(name) for name in _NAMES}, "bfloat16": BFLOAT16}


def name_of_dtype(dtype: Any, path: str) -> str:
    """The name on disk of an element type, as MXNet gives it."""
    found = np.dtype(dtype)
    name = "bfloat16" if found.names == ("bfloat16",) else found.str
    if name not in _DTYPES:
        raise Unsupported(f"the dtype {dtype} has no name in the format", where=path, do="cast it: x.astype('float32')")
    return name


def shape_of(value: Any, path: str) -> tuple[int, ...]:
    shape = value.shape
    if shape is None or not shape or 0 in shape or -1 in shape:
        # Without NumPy's semantics, MXNet says () and 0 of what it does not know yet.
        with mx.util.np_shape(True):
            shape = value.shape
        if shape is None or -1 in shape:
            raise Unsupported("an array that has no shape yet", where=path, do="use it once before the save")
    return tuple(int(n) for n in shape)


def host(value: Any) -> Array:
    """A dense array's values as a NumPy array, bfloat16 by the name that NumPy knows."""
    with mx.util.np_shape(True):
        array: Array = value.asnumpy()
    return array.view(parse("bfloat16")) if array.dtype.names == ("bfloat16",) else array


def make(array: Array, numpy_like: bool, path: str) -> Any:
    """A new array on the CPU with these values.

    Raises:
        Unsupported: for an element type that MXNet has not.
    """
    dtype = _DTYPES.get(name_of(array.dtype, path))
    if dtype is None:
        raise Unsupported(
            f"MXNet has no {array.dtype}", where=path, do='load with like="numpy", and convert it to what MXNet has'
        )
    with mx.util.np_shape(True):
        made = mx.nd.empty(array.shape, mx.cpu(), dtype)
        fill(made, array)
        return made.as_np_ndarray() if numpy_like else made


def fill(target: Any, values: Any) -> None:
    """Puts values of the same shape and type into a dense array, whatever device it is on."""
    array = host(values) if isinstance(values, NDArray) else np.asarray(values)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    if array.nbytes:
        with mx.util.np_shape(True):
            check_call(
                _LIB.MXNDArraySyncCopyFromCPU(
                    target.handle, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.size)
                )
            )


def form_of(value: Any, path: str) -> tuple[str, str, tuple[int, ...]] | None:
    """What two arrays must have in common for one to take the other's values; None for what is no array."""
    if isinstance(value, BaseSparseNDArray):
        return value.stype, name_of_dtype(value.dtype, path), tuple(value.shape)
    if isinstance(value, NDArray):
        return "default", name_of_dtype(value.dtype, path), shape_of(value, path)
    if isinstance(value, (np.ndarray, np.generic)) and not np.asarray(value).dtype.hasobject:
        return "default", name_of(np.asarray(value).dtype).replace(">", "<"), np.shape(value)
    return None


def put(target: Any, value: Any) -> None:
    """Like `fill`, of sparse arrays too."""
    if isinstance(target, BaseSparseNDArray):
        value.copyto(target)
    else:
        fill(target, value)


def same_bits(one: Any, other: Any) -> bool:
    """Whether two nested values of arrays and plain values agree bit for bit."""
    if isinstance(one, BaseSparseNDArray) and isinstance(other, BaseSparseNDArray):
        return one.stype == other.stype and same_bits(sparse_parts(one, ""), sparse_parts(other, ""))
    if isinstance(one, (NDArray, np.ndarray)) and isinstance(other, (NDArray, np.ndarray)):
        first, second = (host(value) if isinstance(value, NDArray) else value for value in (one, other))
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        return all(same_bits(first, second) for first, second in zip(one, other))
    return type(one) is type(other) and bool(one == other)


def sparse_parts(value: Any, path: str) -> dict[str, Any]:
    """The arrays that a sparse one consists of, its shape and its element type."""
    name = name_of_dtype(value.dtype, path)
    parts: dict[str, Any] = {"shape": list(value.shape), "dtype": name}
    if value.stype == "row_sparse":
        return {**parts, "indices": host(value.indices), "data": host(value.data)}
    return {**parts, "indptr": host(value.indptr), "indices": host(value.indices), "data": host(value.data)}


def make_row_sparse(parts: Mapping[str, Any]) -> Any:
    """Indices outside the shape would let later code read foreign memory: they are checked.

    Raises:
        Misfit: if they do not fit.
    """
    shape, dtype, indices, data = _common(parts, 0)
    if len(shape) < 2 or data.shape != (len(indices), *shape[1:]) or (np.diff(indices) <= 0).any():
        raise Misfit(f"rows that do not fit {shape}")
    if not len(indices):
        return mx.nd.sparse.zeros("row_sparse", shape, ctx=mx.cpu(), dtype=dtype)
    made = make(data, False, ""), make(indices, False, "")
    return mx.nd.sparse.row_sparse_array(made, shape=shape, ctx=mx.cpu(), dtype=dtype)


def make_csr(parts: Mapping[str, Any]) -> Any:
    """As `make_row_sparse`."""
    shape, dtype, indices, data = _common(parts, 1)
    indptr = np.asarray(parts["indptr"])
    if indptr.dtype != np.int64 or indptr.shape != (shape[0] + 1,) or len(shape) != 2:
        raise Misfit(f"pointers that do not fit {shape}")
    if data.shape != indices.shape or indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise Misfit(f"values that do not fit {shape}")
    if not len(indices):
        return mx.nd.sparse.zeros("csr", shape, ctx=mx.cpu(), dtype=dtype)
    arrays = tuple(make(array, False, "") for array in (data, indices, indptr))
    return mx.nd.sparse.csr_matrix(arrays, shape=shape, ctx=mx.cpu(), dtype=dtype)


def _common(parts: Mapping[str, Any], axis: int) -> tuple[tuple[int, ...], Any, Array, Array]:
    """Shape, element type, indices along an axis, values."""
    shape, dtype = tuple(int(n) for n in parts["shape"]), _DTYPES[parts["dtype"]]
    indices, data = np.asarray(parts["indices"]), np.asarray(parts["data"])
    limit = shape[axis]
    if indices.dtype != np.int64 or indices.ndim != 1 or (indices < 0).any() or (indices >= limit).any():
        raise Misfit(f"indices outside of {shape}")
    return shape, dtype, indices, data
