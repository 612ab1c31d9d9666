"""TensorFlow and Keras: tensors of every kind, variables, modules, models, optimizers, generators, iterators."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from everystep.adapters import composites, tensorflow_graph, tensorflow_loader, tensorflow_values
from everystep.adapters.composites import Misfit, known
from everystep.adapters.tensorflow_random import RANDOM as RANDOM
from everystep.adapters.tensorflow_random import random_state as random_state
from everystep.adapters.tensorflow_random import set_random_state as set_random_state
from everystep.adapters.tensorflow_slots import Slot, match, nested
from everystep.adapters.tensorflow_values import Cell, as_array, components, is_variable, keras, unwrap
from everystep.adapters.tensorflow_values import world as world
from everystep.errors import Damaged, Mismatch, Unsupported
from everystep.schema import Composite, Described, Leaf, LoadReport
from everystep.schema.dtype import name_of, parse

KINDS = (
    "tensorflow.tensor", "tensorflow.string", "tensorflow.ragged", "tensorflow.sparse", "tensorflow.slices",
    "tensorflow.shape", "tensorflow.dtype",
)  # fmt: skip
Array = np.ndarray[Any, Any]


def _dtypes() -> dict[str, Any]:
    """Name on disk -> TensorFlow's element type, of all that have fixed bytes; an old TensorFlow lacks some."""
    found: dict[str, Any] = {}
    for name in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32",
        "float64", "complex64", "complex128", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz",
        "float8_e4m3b11fnuz", "float8_e5m2fnuz", "int4", "uint4", "int2", "uint2",
    ):  # fmt: skip
        try:
            dtype = tf.as_dtype(name)
        except TypeError:
            continue
        found[name_of(np.dtype(dtype.as_numpy_dtype))] = dtype
    return found


_DTYPES = _dtypes()
_DISK_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RAGGED_DEPTH_MAX = 64


def describe(value: Any, path: str) -> Described | Composite | None:
    if is_variable(value):
        variable = components(unwrap(value, path))[0]
        tensorflow_values.check(variable, path)
        cell = Cell(variable)
        return Described(_name(variable.dtype, path), _shape(variable, path), KINDS[0], cell, cell.key)
    if isinstance(value, tf.Tensor):
        return _tensor(value, path)
    if isinstance(value, tf.RaggedTensor):
        return _ragged(value)
    if isinstance(value, tf.SparseTensor):
        parts = {"indices": value.indices, "values": value.values, "shape": value.dense_shape}
        return Composite("tensorflow.sparse", parts)
    if isinstance(value, tf.IndexedSlices):
        slices = {"values": value.values, "indices": value.indices, "shape": value.dense_shape}
        return Composite("tensorflow.slices", slices)
    if isinstance(value, tf.TensorShape):
        return Composite("tensorflow.shape", {"sizes": None if value.rank is None else value.as_list()})
    if isinstance(value, tf.DType):
        return Composite("tensorflow.dtype", {"name": value.name})
    if isinstance(value, tf.distribute.DistributedValues):
        raise Unsupported(
            "a value of each replica is many tensors", where=path, do="save strategy.experimental_local_results(x)"
        )
    return None


def _name(dtype: Any, path: str) -> str:
    name = _DISK_NAMES.get(dtype)
    if name is None:
        do = "convert it: tf.bitcast(x, tf.int8) of a quantized tensor; leave out what is a resource or variant"
        raise Unsupported(f"the dtype {dtype.name} has no name in the format", where=path, do=do)
    return name


def _shape(variable: Any, path: str) -> tuple[int, ...]:
    """Of the value that a variable has now, which its own shape may leave open."""
    if variable.shape.is_fully_defined():
        return tuple(variable.shape)
    return tuple(Cell(variable).read().shape)


def _tensor(value: Any, path: str) -> Described | Composite:
    if not hasattr(value, "_numpy"):
        raise Unsupported(
            "a symbolic tensor has no value", where=path, do="save outside of tf.function, or save the variable"
        )
    if value.dtype == tf.string:
        return _strings(value)
    return Described(_name(value.dtype, path), tuple(value.shape), KINDS[0], value, ("tensorflow", id(value)))


def _strings(value: Any) -> Composite:
    texts = [bytes(text) for text in np.asarray(value._numpy(), object).reshape(-1)]
    lengths = np.array([len(text) for text in texts], np.int64)
    return Composite("tensorflow.string", {"shape": list(value.shape), "lengths": lengths, "bytes": b"".join(texts)})


def _make_strings(parts: Mapping[str, Any]) -> Any:
    shape, lengths, body = parts["shape"], np.asarray(parts["lengths"]), parts["bytes"]
    if lengths.ndim != 1 or np.any(lengths < 0) or math.prod(shape) != len(lengths) or sum(lengths) != len(body):
        raise ValueError(f"{len(body)} bytes do not make {len(lengths)} strings")
    ends = np.cumsum(lengths)
    texts = [body[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist())]
    return tf.constant(texts, tf.string, shape) if texts else tf.zeros(shape, tf.string)


def _ragged(value: Any) -> Composite:
    rows: list[dict[str, Any]] = []
    while isinstance(value, tf.RaggedTensor):
        length = value.uniform_row_length
        if length is None:
            rows.append({"splits": value.row_splits})
        else:
            rows.append({"length": int(length), "count": int(value.nrows()), "type": value.row_splits.dtype.name})
        value = value.values
    return Composite("tensorflow.ragged", {"rows": rows, "values": value})


def _make_ragged(parts: Mapping[str, Any]) -> Any:
    value = parts["values"]
    if len(parts["rows"]) > _RAGGED_DEPTH_MAX:
        raise Misfit("nested too deep")
    for row in reversed(parts["rows"]):
        if "splits" in row:
            value = tf.RaggedTensor.from_row_splits(value, row["splits"])
        else:
            kind = tf.as_dtype(known(row["type"], ("int32", "int64")))
            length, count = tf.constant(row["length"], kind), tf.constant(row["count"], kind)
            value = tf.RaggedTensor.from_uniform_row_length(value, length, nrows=count)
    return value


def _make_sparse(parts: Mapping[str, Any]) -> Any:
    """Indices outside the shape would let later code read foreign memory."""
    indices, shape = np.asarray(parts["indices"]), np.asarray(parts["shape"])
    if indices.ndim != 2 or np.any(indices < 0) or np.any(indices >= shape):
        raise Misfit("indices outside of the shape")
    return tf.SparseTensor(parts["indices"], parts["values"], parts["shape"])


_NAMED = ("string", "resource", "variant", "qint8", "quint8", "qint16", "quint16", "qint32")
MAKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "tensorflow.string": _make_strings,
    "tensorflow.ragged": _make_ragged,
    "tensorflow.sparse": _make_sparse,
    "tensorflow.slices": lambda parts: tf.IndexedSlices(parts["values"], parts["indices"], parts["shape"]),
    "tensorflow.shape": lambda parts: tf.TensorShape(parts["sizes"]),
    "tensorflow.dtype": lambda parts: tf.as_dtype(
        known(parts["name"], {*_NAMED, *(dtype.name for dtype in _DISK_NAMES)})
    ),
}
MISFITS = (*composites.MISFITS, tf.errors.OpError)


def build(leaf: Leaf, data: Array) -> Any:
    """A tensor over a flat uint8 array that nobody else uses; where its address suits TensorFlow nothing is copied."""
    if leaf.dtype not in _DTYPES:
        parse(leaf.dtype)
        raise Unsupported(
            f"tensorflow {tf.__version__} has no {leaf.dtype}", where=leaf.path, do='load with like="numpy"'
        )
    dtype = parse(leaf.dtype)
    if data.nbytes != math.prod(leaf.shape) * dtype.itemsize:
        raise Damaged(f"{data.nbytes} bytes do not make {leaf.shape} of {leaf.dtype}", where=leaf.path)
    try:
        if data.nbytes == 0:
            return tf.convert_to_tensor(np.empty(leaf.shape, dtype), _DTYPES[leaf.dtype])
        own = data if data.flags.writeable else data.copy()
        return tf.convert_to_tensor(own.view(dtype).reshape(leaf.shape), _DTYPES[leaf.dtype])
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise Damaged(f"no tensor has the shape {leaf.shape[:80]}", where=leaf.path) from error


def view(payload: Any) -> Array | None:
    array = np.ascontiguousarray(as_array(payload.read() if isinstance(payload, Cell) else payload))
    return array.reshape(-1).view(np.uint8)


def copy(payload: Any, target: Array) -> None:
    np.copyto(target, view(payload))  # type: ignore[arg-type]


def cut(payload: Any, start: int, stop: int) -> Any:
    return None  # what lies one behind the other can be viewed


def standing(targets: Iterable[Any]) -> set[Hashable]:
    """The variables that nothing trains."""
    found: set[Hashable] = set()
    for target in targets:
        if owns(target):
            found |= {Cell(part).key for slot in _slots(target) if slot.frozen for part in components(_plain(slot))}
    return found


def _slots(target: Any) -> list[Slot]:
    walk = tensorflow_graph.Walk("", {}, optimizers=False)
    walk.visit(target)
    return [slot for slot in walk.slots if type(slot) is Slot]


def _plain(slot: Slot) -> Any:
    return unwrap(slot.thing)


def mark(payload: Any, declared: Collection[Hashable]) -> Hashable:
    """Equal as long as no write has given the variable new memory; None where nothing vouches for that."""
    if not isinstance(payload, Cell) or payload.key not in declared:
        return None
    address = payload.address()
    return None if address is None else (*payload.key, address)


def owns(target: Any) -> bool:
    return tensorflow_graph.owns(target)


def capture(target: Any, path: str, tracked: Mapping[str, Any]) -> Any:
    if not owns(target):
        return None
    walk = tensorflow_graph.Walk(path, tracked)
    walk.visit(target)
    return nested(walk.slots, path)


def apply(
    target: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport
) -> Callable[[], None] | None:
    if not owns(target):
        return None
    walk = tensorflow_graph.Walk(path, tracked, state=state)
    walk.visit(target)
    single = len(walk.slots) == 1 and not walk.slots[0].names
    if not single and not isinstance(state, Mapping):
        raise Mismatch(
            f"the checkpoint has no state of a {type(target).__name__} here",
            where=path,
            do="load it into what was saved by this name",
        )
    places = match(walk.slots, state, path, report, walk.spare, walk.absent)

    def place() -> None:
        for one in places:
            one()

    return place


def not_captured(target: Any, path: str) -> list[str]:
    """What of a tracked object a save leaves out, as sentences."""
    walk = tensorflow_graph.Walk(path, {}, optimizers=False, built=False)
    walk.visit(target)
    found = [
        text
        for slot in walk.slots
        if tensorflow_loader.is_iterator(slot.thing)
        for text in tensorflow_loader.left_out(slot.thing, ".".join((path, *slot.names)))
    ]
    module = keras()
    if module is not None and isinstance(target, module.Layer):
        found += [
            f"{path}: the vocabulary of {layer.name!r}"
            for layer in target._flatten_layers()
            if hasattr(layer, "save_assets")
        ]
    return found


def fence() -> None:
    context.async_wait()
