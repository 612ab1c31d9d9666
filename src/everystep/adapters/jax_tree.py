"""Pytrees: nodes of any registered class as plain containers, and a saved state back in the form of a template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from everystep.adapters import Boxed, Kept, jax_nnx
from everystep.adapters import numpy as numpy_adapter
from everystep.adapters.jax_place import ARRAY, KEY, WEAK, build, impl_of, is_key, make_key, put, put_boxes, put_key
from everystep.schema import Composite, Fields, Leaf, LoadReport, Roled, join
from everystep.schema.plain import is_plain

_MISSING: Any = object()
_KINDS = (ARRAY, WEAK)
_ROLES = {"params": "weights", "opt_state": "optimizer", "batch_stats": "buffer"}
"""Fields of a training state (Flax's TrainState), which has both of the first two."""
Array = np.ndarray[Any, Any]


# out ----------------------------------------------------------------------------------------------------------------


def children(node: Any) -> tuple[list[tuple[Any, Any]], Any] | None:
    """(key, child) of a pytree's node, and the form that takes other children; None for what JAX knows no inside of."""
    found, form = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)
    if len(found) == 1 and not found[0][0]:
        return None
    return [(_key(path[0]), child) for path, child in found], form


def _key(key: Any) -> Any:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return getattr(key, name)
    return str(key)


def plain_node(value: Any) -> Any:
    """A node of a class of its program as a dict, a list or named fields; None for no node.

    What a class declares static belongs to the program: of that, plain values are kept, and functions left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    found = children(value)
    if found is None:
        return None
    entries = found[0]
    keys = [key for key, _ in entries]
    if isinstance(value, Mapping):
        return dict(entries)
    if keys and keys == list(range(len(keys))):
        return [child for _, child in entries]
    if all(type(key) is str for key in keys):
        return Fields(type(value).__qualname__, entries)
    return dict(entries)


def _fields(value: Any) -> Fields | None:
    """None for a dataclass that is no pytree, or says nothing of its fields there: it is what its fields are."""
    found = children(value)
    fields = [field.name for field in dataclasses.fields(value)]
    if found is None or not {key for key, _ in found[0]} <= set(fields):
        return None
    entries = dict(found[0])
    if {"params", "opt_state"} <= entries.keys():
        entries = {name: Roled(_ROLES[name], child) if name in _ROLES else child for name, child in entries.items()}
    for name in fields:
        if name not in entries and _is_settled(static := getattr(value, name, _MISSING)):
            entries[name] = static
    return Fields(type(value).__qualname__, [(name, entries[name]) for name in fields if name in entries])


def _is_settled(value: Any) -> bool:
    return is_plain(value) or (type(value) in (tuple, list) and all(map(_is_settled, value)))


# back in ------------------------------------------------------------------------------------------------------------


def rebuild(template: Any, saved: Any, report: LoadReport, path: str) -> Any:
    """A saved state in the form of a template: its classes and functions, on its devices, with the values saved.

    Args:
        template: a pytree; jax.ShapeDtypeStruct, with a sharding or without, can stand for arrays.
        saved: as a load gives it: arrays as they are, `Kept`, or `Boxed` where `takers` led to that.
        report: told what came in, what is missing, unexpected, or of another shape or type. What did not come in is
            the template's own.
    """
    if jax_nnx.is_variable(template):
        return template.copy(rebuild(template.get_raw_value(), saved, report, path))
    if template is None or _is_leaf(template):
        return _leaf(template, saved, report, path)
    known = _node(template)
    if known is None:  # a function, or another object that no state has inside
        if saved is not _MISSING:
            report.unexpected.append(path)
        return template
    entries = _entries(saved)
    if entries is None:
        if saved is not None or jax.tree_util.tree_leaves(template):
            report.reshaped.append(path)
        return template
    used: set[Any] = set()
    made: dict[Any, Any] = {}
    for key, child, is_static in known:
        given = _name(key, entries)
        used.add(given)
        where = join(path, key)
        if given is not _MISSING:
            made[key] = rebuild(child, entries[given], report, where)
            continue
        made[key] = child
        if not is_static and jax.tree_util.tree_leaves(child):
            report.missing.append(where)
    report.unexpected += [join(path, name) for name, value in entries.items() if name not in used and _holds(value)]
    return _assembled(template, made)


def takers(template: Any, saved: Any) -> Iterator[tuple[Any, Leaf]]:
    """(what takes it, None if that is no array; description) of the leaves that `rebuild` would take.

    Args:
        saved: a state with the descriptions of leaves in place of them.
    """
    if jax_nnx.is_variable(template):
        yield from takers(template.get_raw_value(), saved)
        return
    if isinstance(saved, Leaf):
        yield template, saved
        return
    entries = _entries(saved.parts if isinstance(saved, Composite) else saved) or {}
    if isinstance(saved, Composite) or template is None or _is_leaf(template):
        for value in entries.values():
            yield from takers(None, value)
        return
    for key, child, _ in _node(template) or ():
        if (given := _name(key, entries)) is not _MISSING:
            yield from takers(child, entries[given])


def _name(key: Any, entries: Mapping[Any, Any]) -> Any:
    """What a key of the template is called in what was saved."""
    return next((name for name in (key, str(key)) if name in entries), _MISSING)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)) or is_plain(value)


def _is_dict(template: Any) -> bool:
    """Of those that JAX knows, only dict itself: it would put the keys of that in another order."""
    kind = type(template)
    return kind is dict or (isinstance(template, dict) and jax.tree_util.all_leaves([template]))


def _node(template: Any) -> list[tuple[Any, Any, bool]] | None:
    """(key, child, whether it is static) of a container."""
    if _is_dict(template):
        return [(key, child, False) for key, child in template.items()]
    found = children(template)
    if not dataclasses.is_dataclass(template):
        return None if found is None else [(key, child, False) for key, child in found[0]]
    names = {field.name: getattr(template, field.name, None) for field in dataclasses.fields(template)}
    keys = set(names) if found is None else {key for key, _ in found[0]}
    static = set(names) - keys if keys <= set(names) else set()
    return [(name, child, name in static) for name, child in names.items()]


def _entries(saved: Any) -> dict[Any, Any] | None:
    """What a saved container holds, by key."""
    if isinstance(saved, Mapping):
        return dict(saved)
    if isinstance(saved, tuple) and hasattr(saved, "_fields"):
        return dict(zip(saved._fields, saved))
    if isinstance(saved, (list, tuple)):
        return dict(enumerate(saved))
    if dataclasses.is_dataclass(saved) and not isinstance(saved, (Kept, Composite, type)):
        return {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
    return None


def _holds(saved: Any) -> bool:
    """Whether there is a leaf in what was saved."""
    entries = _entries(saved)
    return saved is not None if entries is None else any(map(_holds, entries.values()))


def _assembled(template: Any, made: dict[Any, Any]) -> Any:
    """A container like the template; of a dataclass fields are set without its __init__, as a load does it."""
    if _is_dict(template):
        filled = template.copy()
        for key, value in made.items():
            dict.__setitem__(filled, key, value)
        return filled
    if not dataclasses.is_dataclass(template):
        found = children(template)
        assert found is not None
        return jax.tree_util.tree_unflatten(found[1], [made[key] for key, _ in found[0]])
    whole: Any = object.__new__(type(template))
    for name, value in made.items():
        object.__setattr__(whole, name, value)
    return whole


def _leaf(template: Any, saved: Any, report: LoadReport, path: str) -> Any:
    if template is None:
        if _holds(saved):
            report.unexpected.append(path)
        return None
    made = _fit(template, saved, path)
    (report.reshaped if made is _MISSING else report.loaded).append(path)
    return template if made is _MISSING else made


def _fit(template: Any, saved: Any, path: str) -> Any:
    """The saved value as what the template is; _MISSING if it has another shape or type."""
    if isinstance(template, (jax.Array, jax.ShapeDtypeStruct)):
        return _fit_key(template, saved, path) if is_key(template) else _fit_array(template, saved, path)
    array = _array(saved)
    if isinstance(template, (np.ndarray, np.generic)):
        if array is None or (array.shape, array.dtype) != (template.shape, template.dtype):
            return _MISSING
        return array[()] if isinstance(template, np.generic) else array
    if is_plain(saved):
        return saved if type(saved) is type(template) or (_is_number(saved) and _is_number(template)) else _MISSING
    # A count that began as Python's number, and came out of a jitted function as an array.
    if array is None or array.shape != () or not _is_number(template):
        return _MISSING
    if isinstance(saved, Kept):
        return (
            build(saved.leaf, saved.data) if saved.leaf.kind in _KINDS else numpy_adapter.build(saved.leaf, saved.data)
        )
    return saved


def _is_number(value: Any) -> bool:
    return type(value) in (bool, int, float, complex)


def _array(saved: Any) -> Array | None:
    """The bytes of a saved leaf as a NumPy array; None if it is none."""
    if isinstance(saved, Kept):
        return numpy_adapter.as_array(saved.leaf, saved.data)
    if isinstance(saved, jax.Array):
        return None if is_key(saved) else np.asarray(saved)
    return np.asarray(saved) if isinstance(saved, (np.ndarray, np.generic)) else None


def _is_weak(saved: Any, otherwise: bool) -> bool:
    if isinstance(saved, (Kept, Boxed)):
        return saved.leaf.kind == WEAK if saved.leaf.kind in _KINDS else otherwise
    return bool(saved.weak_type) if isinstance(saved, jax.Array) else otherwise


def _fit_array(template: Any, saved: Any, path: str) -> Any:
    array, weak = _array(saved), _is_weak(saved, bool(getattr(template, "weak_type", False)))
    if isinstance(saved, Boxed):
        boxes = {box: numpy_adapter.as_array(kept.leaf, kept.data) for box, kept in saved.boxes.items()}
        fits = saved.shape == tuple(template.shape) and all(one.dtype == template.dtype for one in boxes.values())
        return put_boxes(boxes, path, template, weak=weak) if fits else _MISSING
    if _is_number(saved) and template.shape == ():
        array, weak = np.asarray(saved).astype(template.dtype), True
        if array != saved and saved == saved:
            return _MISSING
    if array is None or (array.shape, array.dtype) != (tuple(template.shape), template.dtype):
        return _MISSING
    return put(array, path, template, weak=weak)


def _fit_key(template: Any, saved: Any, path: str) -> Any:
    if isinstance(saved, Composite) and saved.kind == KEY:
        saved = saved.parts
    impl: str | None
    if isinstance(saved, Mapping) and saved.keys() == {"impl", "data"} and type(saved["impl"]) is str:
        data, impl = _array(saved["data"]), saved["impl"]
    elif isinstance(saved, jax.Array) and is_key(saved):
        data, impl = np.asarray(jax.random.key_data(saved)), impl_of(saved)
    else:  # bits alone, as other programs keep them
        data, impl = _array(saved), impl_of(template)
    if data is None or impl is None or data.dtype != np.uint32:
        return _MISSING
    made = make_key(data, impl, path)
    fits = (made.shape, made.dtype) == (tuple(template.shape), template.dtype)
    return put_key(made, path, template) if fits else _MISSING
