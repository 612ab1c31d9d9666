"""MXNet: NDArrays dense and sparse, Gluon blocks, Trainer, and random numbers that are a function of the step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import mxnet as mx
import numpy as np
from blake3 import blake3
from mxnet.base import _LIB, check_call
from mxnet.ndarray.sparse import BaseSparseNDArray

from everystep.adapters import composites, mxnet_trainer
from everystep.adapters import numpy as numpy_adapter
from everystep.adapters.mxnet_arrays import (
    ARRAY,
    CSR,
    NUMPY,
    ROW_SPARSE,
    make,
    make_csr,
    make_row_sparse,
    name_of_dtype,
    shape_of,
    sparse_parts,
)
from everystep.adapters.mxnet_blocks import apply_block, capture_block, not_captured_of_block
from everystep.errors import Unsupported
from everystep.schema import Composite, Described, Leaf, LoadReport

KINDS = (ARRAY, NUMPY, ROW_SPARSE, CSR)
RANDOM = ("mxnet",)
Array = np.ndarray[Any, Any]
NDArray = mx.nd.NDArray

_now: dict[str, int] = {}
"""The seed and the step that MXNet's generators were last made from."""


def describe(value: Any, path: str) -> Described | Composite | None:
    if not isinstance(value, NDArray):
        return None
    if isinstance(value, BaseSparseNDArray):
        return Composite(ROW_SPARSE if value.stype == "row_sparse" else CSR, sparse_parts(value, path))
    kind = NUMPY if isinstance(value, mx.np.ndarray) else ARRAY
    # Names of one parameter are names of one object; views of one memory are not told apart, and saved each.
    return Described(name_of_dtype(value.dtype, path), shape_of(value, path), kind, value, ("mxnet", id(value)))


def build(leaf: Leaf, data: Array) -> Any:
    """An array in CPU memory from a flat uint8 array."""
    return make(numpy_adapter.as_array(leaf, data), leaf.kind == NUMPY, leaf.path)


MAKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {ROW_SPARSE: make_row_sparse, CSR: make_csr}
MISFITS = (*composites.MISFITS, mx.MXNetError)


def view(payload: Any) -> Array | None:
    """Its memory may be written to by the engine's threads, or be laid out for one processor: only `copy` waits for the
    one and undoes the other."""
    return None


def copy(payload: Any, target: Array) -> None:
    """MXNet waits for what still writes to this array, and copies straight to where the bytes shall lie."""
    if target.nbytes:
        count = target.nbytes // np.dtype(payload.dtype).itemsize
        with mx.util.np_shape(True):
            check_call(
                _LIB.MXNDArraySyncCopyToCPU(payload.handle, ctypes.c_void_p(target.ctypes.data), ctypes.c_size_t(count))
            )


def cut(payload: Any, start: int, stop: int) -> Any:
    size = np.dtype(payload.dtype).itemsize
    if start % size or stop % size or not payload.shape or stop <= start:
        return None
    flat = payload.as_nd_ndarray() if isinstance(payload, mx.np.ndarray) else payload
    with mx.autograd.pause():
        return flat.reshape((-1,))[start // size : stop // size]


def standing(targets: Iterable[Any]) -> set[Hashable]:
    return set()


def mark(payload: Any, declared: Collection[Hashable]) -> Hashable:
    return None  # nothing counts what is written to an array


def owns(target: Any) -> bool:
    return isinstance(target, (mx.gluon.Block, mx.gluon.Trainer))


def capture(target: Any, path: str, tracked: Mapping[str, Any]) -> Any:
    if isinstance(target, mx.gluon.Block):
        return capture_block(target, path)
    if isinstance(target, mx.gluon.Trainer):
        return mxnet_trainer.capture(target, path, tracked)
    if isinstance(target, (mx.gluon.Parameter, mx.gluon.ParameterDict, mx.optimizer.Updater, mx.optimizer.Optimizer)):
        raise Unsupported(
            f"a {type(target).__name__} is part of something that can be tracked",
            where=path,
            do="track the Gluon block and the gluon.Trainer that it belongs to",
        )
    return None


def apply(
    target: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport
) -> Callable[[], None] | None:
    if isinstance(target, mx.gluon.Block):
        return apply_block(target, state, path, report)
    if isinstance(target, mx.gluon.Trainer):
        return mxnet_trainer.apply(target, state, path, tracked, report)
    return None


def not_captured(target: Any, path: str) -> list[str]:
    """What of a tracked object a save leaves out, as sentences."""
    if isinstance(target, mx.gluon.Trainer):
        return mxnet_trainer.not_captured(target, path)
    return not_captured_of_block(target, path) if isinstance(target, mx.gluon.Block) else []


def fence() -> None:
    """Each copy waits for what writes to its own array."""


def world() -> tuple[int, int] | None:
    return None


def random_state() -> dict[str, Any]:
    return {"mxnet": dict(_now)} if _now else {}


def set_random_state(state: dict[str, Any]) -> list[str]:
    if "mxnet" not in state:
        return []
    try:
        seed, step = int(state["mxnet"]["seed"]), int(state["mxnet"]["step"])
    except (KeyError, TypeError, ValueError) as error:
        return [f"random state of mxnet: {error!r}"]
    _go_on(seed, step)
    return []


def reseed(step: int, seeds: dict[str, Any]) -> None:
    """MXNet tells nobody the state of its generators, and does not take one: only a seed. So each step has a seed of
    its own, which is what the run's seed and the step make, in a run that was resumed as in one that was not.

    The run's seed is drawn from MXNet's own generators, after the run's first step: mx.random.seed() says what it is.
    """
    if "mxnet" not in seeds:
        drawn = mx.nd.random.randint(0, 2**31 - 1, shape=(1,), dtype="int32", ctx=mx.cpu())
        seeds["mxnet"] = {"seed": int(drawn.asnumpy()[0])}
    seed = seeds["mxnet"]["seed"]
    seeds["mxnet"] = {"seed": seed, "step": step}
    _go_on(seed, step)


def _go_on(seed: int, step: int) -> None:
    _now.update(seed=seed, step=step)
    mixed = int.from_bytes(blake3(f"{seed} {step}".encode()).digest(length=4), "little")
    mx.random.seed(mixed & 0x7FFFFFFF)
