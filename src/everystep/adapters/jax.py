"""JAX: arrays of every element type and sharding, typed random keys, pytrees, and the objects of Flax NNX."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from everystep.adapters import Shared, composites, jax_nnx, jax_place, jax_tree
from everystep.adapters import numpy as numpy_adapter
from everystep.adapters.composites import Misfit
from everystep.adapters.jax_place import ARRAY, KEY, WEAK, is_key, make_key
from everystep.adapters.jax_place import build as build
from everystep.errors import Unsupported
from everystep.schema import NOTHING, Box, Composite, Described, LoadReport, Roled
from everystep.schema.dtype import name_of

KINDS = (ARRAY, WEAK, KEY)
RANDOM: tuple[str, ...] = ()
"""JAX has no generator of its own: keys are values in the state."""
Array = np.ndarray[Any, Any]


class Pieces(NamedTuple):
    """A box of an array that several devices hold: its shape, and what lies at which place in it."""

    shape: tuple[int, ...]
    parts: list[tuple[Box, Any]]


def describe(value: Any, path: str) -> Any:
    if isinstance(value, jax.Array):
        return _array(value, path)
    if isinstance(value, (np.ndarray, np.generic)):
        return None
    if jax_nnx.is_variable(value):
        return jax_nnx.describe(value)
    if jax_nnx.owns(value):
        return jax_nnx.capture(value)
    return jax_tree.plain_node(value)


def _array(value: jax.Array, path: str) -> Described | Composite | Shared:
    if isinstance(value, jax.core.Tracer):
        do = "save outside of jit, grad, vmap and scan: return the value, and save what was returned"
        raise Unsupported("a value that is being traced has no bytes", where=path, do=do)
    if value.is_deleted():
        raise Unsupported(
            "this array is deleted: its memory was given away (donate_argnums, delete())",
            where=path,
            do="save what the jitted function returned, under the name that is rebound to it",
        )
    if is_key(value):
        return _key(value, path)
    name, kind = name_of(np.dtype(value.dtype), path), WEAK if value.weak_type else ARRAY
    shape, identity = tuple(value.shape), ("jax", id(value)) if value.size else None
    if value.is_fully_addressable:
        return Described(name, shape, kind, _whole(value), identity)
    boxes, payload = _held(value)
    return Shared(Described(name, shape, kind, payload, None, boxes), None, jax.process_count())


def _key(value: Any, path: str) -> Composite:
    impl = jax.random.key_impl(value)
    if not isinstance(impl, str):
        do = "register the implementation under a name, or save jax.random.key_data(key)"
        raise Unsupported(f"random keys of {impl!r}, which has no name", where=path, do=do)
    return Composite(KEY, {"impl": impl, "data": Roled("rng", jax.random.key_data(value))})


def _whole(value: jax.Array) -> Any:
    """One device's array where that is all of it; else the pieces, each once."""
    if value.is_fully_replicated:
        return value.addressable_data(0)
    return Pieces(tuple(value.shape), [(box, data) for box, data in _shards(value)])


def _shards(value: jax.Array) -> list[tuple[Box, Any]]:
    """What this process holds of an array, without what another device holds as the first."""
    found = []
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            start = tuple(int(part.start or 0) for part in shard.index)
            found.append((Box(start, tuple(shard.data.shape)), shard.data))
    return found


def _held(value: jax.Array) -> tuple[tuple[Box, ...], Any]:
    """The boxes that this process holds of an array of many processes: one, where the devices' make up a rectangle; an
    empty one if others hold all of it first."""
    shards = _shards(value)
    if not shards:
        return (NOTHING,), Pieces((0,), [])
    start = tuple(min(ends) for ends in zip(*(box.start for box, _ in shards)))
    stops = zip(*(tuple(a + n for a, n in zip(box.start, box.shape)) for box, _ in shards))
    box = Box(start, tuple(max(ends) - first for ends, first in zip(stops, start)))
    if box.size != sum(one.size for one, _ in shards):
        return tuple(box for box, _ in shards), Pieces((), shards)
    moved = [(Box(tuple(a - b for a, b in zip(one.start, start)), one.shape), data) for one, data in shards]
    return (box,), moved[0][1] if len(moved) == 1 else Pieces(box.shape, moved)


def piece(payload: Pieces, box: Box) -> Any:
    return next(part for place, part in payload.parts if place == box)


def _make_key(parts: Mapping[str, Any]) -> Any:
    if parts.keys() != {"impl", "data"} or type(parts["impl"]) is not str:
        raise Misfit(f"not a key's: {sorted(parts)[:5]}")
    return make_key(np.asarray(parts["data"]), parts["impl"], "")


MAKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {KEY: _make_key}
MISFITS = composites.MISFITS


def view(payload: Any) -> Array | None:
    """The array's own memory where the CPU is its device; NumPy holds on to it, so that nobody can be given it."""
    return numpy_adapter.view(np.asarray(payload)) if not isinstance(payload, Pieces) and _on_cpu(payload) else None


def _on_cpu(array: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


def _host(array: jax.Array) -> Array:
    """What another device holds comes over as an array of its own: the array itself would keep a copy."""
    if _on_cpu(array):
        return np.asarray(array)
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use no CPU
        return np.asarray(array)
    return np.asarray(jax.device_put(array, device))


def copy(payload: Any, target: Array) -> None:
    if not isinstance(payload, Pieces):
        numpy_adapter.copy(_host(payload), target)
        return
    for box, part in payload.parts:
        source = _host(part)
        word = np.dtype((np.void, source.dtype.itemsize))
        target.view(word).reshape(payload.shape)[box.index()] = source.view(word)


def cut(payload: Any, start: int, stop: int) -> Any:
    return None  # what lies one behind the other can be viewed


def standing(targets: Iterable[Any]) -> set[Hashable]:
    return set()


def mark(payload: Any, declared: Collection[Hashable]) -> Hashable:
    return None


def owns(target: Any) -> bool:
    return jax_nnx.owns(target)


def capture(target: Any, path: str, tracked: Mapping[str, Any]) -> Any:
    return jax_nnx.capture(target) if jax_nnx.owns(target) else None


def wanted(target: Any, sketch: Callable[[], Any]) -> dict[str, tuple[Box, ...]] | None:
    """Of the saved leaves of a target, the boxes that its arrays over several processes hold here; None for a target
    that is not JAX's. `apply` takes leaves as `Kept`: whatever is larger than one device never lies on one."""
    if jax_nnx.owns(target):
        found = jax_nnx.pairs(target, sketch())
        return jax_place.wanted(pair for one in found for pair in jax_tree.takers(*one))
    template = _asked(target)
    return None if template is None else wanted_by_template(template, sketch())


def wanted_by_template(template: Any, sketch: Any) -> dict[str, tuple[Box, ...]]:
    """The same of a template that `rebuild` will be given."""
    return jax_place.wanted(jax_tree.takers(template, sketch))


def _asked(target: Any) -> Any:
    """What the getter of a pair gives, if there are arrays of JAX in it."""
    if not isinstance(target, tuple) or len(target) != 2 or not all(map(callable, target)):
        return None
    template = target[0]()
    return template if any(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(template)) else None


def apply(
    target: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport
) -> Callable[[], None] | None:
    """NNX objects are filled in place. A setter gets what its getter gives: the same classes, devices and shardings."""
    if jax_nnx.owns(target):
        return jax_nnx.apply(target, state, path, report, jax_tree.rebuild)
    template = _asked(target)
    if template is None:
        return None
    made = jax_tree.rebuild(template, state, report, path)
    return lambda: _no_answer(target[1](made))


def _no_answer(_: Any) -> None:
    """Turns a call's answer into None."""


def rebuild(template: Any, saved: Any, report: LoadReport) -> Any:
    """A saved state in the structure, of the types and at the places of a template."""
    return jax_tree.rebuild(template, saved, report, "")


def not_captured(target: Any, path: str) -> list[str]:
    return []  # an NNX object's state is all of its variables and arrays


def fence() -> None:
    """Each array is waited for when its bytes are asked for."""


def world() -> tuple[int, int] | None:
    """Asked only of processes that have joined: to ask another would start its devices too early for that."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    return jax.process_index(), jax.process_count()


def random_state() -> dict[str, Any]:
    return {}


def set_random_state(state: dict[str, Any]) -> list[str]:
    return []
