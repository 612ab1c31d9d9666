"""Saved bytes as JAX arrays and random keys, on the devices where they are wanted."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from everystep.adapters import numpy as numpy_adapter
from everystep.errors import Damaged, Unsupported
from everystep.schema import Leaf
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
    sharding = sharding_of(like)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise Unsupported(
                f"JAX is set up without {array.dtype}, and would cut its values",
                where=where,
                do='jax.config.update("jax_enable_x64", True) at the start of the program, or load with like="numpy"',
            )
        if sharding is None or sharding.is_fully_addressable:
            made = jax.device_put(array, sharding)
        else:
            made = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    except (TypeError, ValueError) as error:
        do = 'load with like="saved" or "numpy"; or give a sharding that fits the shape'
        raise Unsupported(
            f"JAX cannot hold {array.dtype}{list(array.shape)} so: {error}", where=where, do=do
        ) from error
    if weak:
        made.aval = made.aval.update(weak_type=True)
    return made


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


def make_key(data: Array, impl: str, where: str, like: Any = None) -> Any:
    """Typed random keys from their bits.

    Raises:
        Damaged, Unsupported: for bits that make no keys; for an implementation that this program has not.
    """
    if data.dtype != np.uint32:
        raise Damaged(f"random keys of {data.dtype}, which is not uint32", where=where)
    try:
        key = jax.random.wrap_key_data(jax.device_put(data), impl=impl)
    except (TypeError, ValueError) as error:
        what = f"no random keys of {impl[:80]!r} can be made here: {error}"
        raise Unsupported(what, where=where, do='load with like="numpy" for their bits') from error
    sharding = sharding_of(like)
    if sharding is None or not sharding.is_fully_addressable or len(sharding.device_set) == 1:
        return key
    return jax.device_put(key, sharding)
