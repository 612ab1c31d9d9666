"""Saved bytes as JAX arrays and random keys, on the devices where they are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from everystep.adapters import numpy as numpy_adapter
from everystep.errors import Damaged, Unsupported
from everystep.schema import NOTHING, Box, Leaf
from everystep.schema.dtype import FOREIGN

ARRAY, WEAK, KEY = "jax.array", "jax.weak", "jax.key"
"""Kinds of leaves and composites. A weak array takes on the element type of what it is computed with."""
Array = np.ndarray[Any, Any]


def is_key(value: Any) -> bool:
    """Whether it is an array of typed random keys, or stands for one."""
    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def build(leaf: Leaf, data: Array) -> Any:
    """An array on the default device over a flat uint8 array that nobody else uses.

    Raises:
        Unsupported: for an element type that JAX has not, or not as it is set up.
    """
    if leaf.dtype in FOREIGN:
        raise Unsupported(f"JAX has no {leaf.dtype[:80]}", where=leaf.path, do='load with like="saved" or "numpy"')
    return put(numpy_adapter.as_array(leaf, data), leaf.path, weak=leaf.kind == WEAK)


def put(array: Array, where: str, like: Any = None, *, weak: bool = False) -> Any:
    """A JAX array of these bytes.

    Args:
        where: path of the leaf, for an error.
        like: an array or jax.ShapeDtypeStruct whose devices it goes to; the default device otherwise.

    Raises:
        Unsupported: for an element type that JAX has not, or not as it is set up.
    """
    sharding, array = sharding_of(like), _native(array)

    def make() -> Any:
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        return _over_devices(array.shape, sharding, array.dtype, lambda index: array[index])

    return _made(make, array.dtype, array.shape, where, weak=weak)


def put_boxes(boxes: Mapping[Box, Array], where: str, like: Any, *, weak: bool = False) -> Any:
    """The same of an array over several processes, from the boxes of it that `boxes_here` named."""
    parts = {box: _native(array) for box, array in boxes.items()}
    sharding, shape, dtype = sharding_of(like), tuple(like.shape), next(iter(parts.values())).dtype

    def part(index: tuple[slice, ...]) -> Array:
        if not sharding.addressable_devices:  # JAX asks for one even there, and lets it go
            return np.broadcast_to(np.zeros((), dtype), shape)[index]
        return parts[_box(index, shape)]

    return _made(lambda: _over_devices(shape, sharding, dtype, part), dtype, shape, where, weak=weak)


def _native(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _made(make: Callable[[], Any], dtype: Any, shape: tuple[int, ...], where: str, *, weak: bool) -> Any:
    try:
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise Unsupported(
                f"JAX is set up without {dtype}, and would cut its values",
                where=where,
                do='jax.config.update("jax_enable_x64", True) at the start of the program, or load with like="numpy"',
            )
        made = make()
    except (TypeError, ValueError) as error:
        do = 'load with like="saved" or "numpy"; or give a sharding that fits the shape'
        raise Unsupported(f"JAX cannot hold {dtype}{list(shape)} so: {error}", where=where, do=do) from error
    if weak:
        made.aval = made.aval.update(weak_type=True)
    return made


def _over_devices(shape: tuple[int, ...], sharding: Any, dtype: Any, part: Callable[[Any], Any]) -> Any:
    """An array over devices of several processes, of which this one is asked for its part alone."""
    told = {} if sharding.addressable_devices else {"dtype": dtype}  # where no part says it
    return jax.make_array_from_callback(shape, sharding, part, **told)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    ends = [part.indices(length)[:2] for part, length in zip(index, shape)]
    return Box(tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends))


def boxes_here(like: Any, shape: tuple[int, ...]) -> tuple[Box, ...] | None:
    """What the devices of this process hold of an array that lies where a template does; None for all of it."""
    sharding = sharding_of(like)
    try:
        if sharding is None or sharding.is_fully_addressable:
            return None
        places = sharding.addressable_devices_indices_map(shape).values()
    except ValueError:
        return None  # `put` says what is wrong
    boxes = dict.fromkeys(_box(index, shape) for index in places)
    # Devices hold the same or have nothing in common.
    return None if sum(box.size for box in boxes) == math.prod(shape) else tuple(boxes) or (NOTHING,)


def wanted(takers: Iterable[tuple[Any, Leaf]]) -> dict[str, tuple[Box, ...]]:
    """Of each (what takes it, saved leaf), the boxes that this process takes; not of leaves that others take whole."""
    boxes: dict[str, dict[Box, None]] = {}
    whole: set[str] = set()
    for like, leaf in takers:
        mine = None
        if isinstance(like, (jax.Array, jax.ShapeDtypeStruct)) and tuple(like.shape) == leaf.shape and not is_key(like):
            mine = boxes_here(like, leaf.shape)
        if mine is None or leaf.kind in ("bytes", "str"):
            whole.add(leaf.path)
        else:
            boxes.setdefault(leaf.path, {}).update(dict.fromkeys(mine))
    return {path: tuple(found) for path, found in boxes.items() if path not in whole}


def sharding_of(like: Any) -> Any:
    """Where a template lies; None where that was left to JAX."""
    if isinstance(like, jax.Array) and not is_key(like) and not like.committed:
        return None
    return getattr(like, "sharding", None)


IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
"""Those that JAX brings along."""


def impl_of(like: Any) -> str | None:
    """The name of the implementation of random keys, or of what stands for them; None if it has none."""
    if isinstance(like, jax.Array):
        found = jax.random.key_impl(like)
        return found if isinstance(found, str) else None
    return next((impl for impl in IMPLS if jax.random.key(0, impl=impl).dtype == like.dtype), None)


def make_key(data: Array, impl: str, where: str) -> Any:
    """Typed random keys from their bits.

    Raises:
        Damaged, Unsupported: for bits that make no keys; for an implementation that this program has not.
    """
    if data.dtype != np.uint32:
        raise Damaged(f"random keys of {data.dtype}, which is not uint32", where=where)
    try:
        return jax.random.wrap_key_data(jax.device_put(data), impl=impl)
    except (TypeError, ValueError) as error:
        what = f"no random keys of {impl[:80]!r} can be made here: {error}"
        raise Unsupported(what, where=where, do='load with like="numpy" for their bits') from error


def put_key(key: Any, where: str, like: Any) -> Any:
    """Random keys on the devices of what they are to be like.

    Raises:
        Unsupported: for a sharding that does not fit their shape.
    """
    sharding = sharding_of(like)
    try:
        if sharding is None or len(sharding.device_set) == 1:
            return key
        if sharding.is_fully_addressable:
            return jax.device_put(key, sharding)
        return _over_devices(key.shape, sharding, key.dtype, lambda index: key[index])
    except ValueError as error:
        what = f"JAX cannot hold random keys of {list(key.shape)} so: {error}"
        raise Unsupported(what, where=where, do="give a sharding that fits the shape") from error
