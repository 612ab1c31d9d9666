"""A nested state as arrays with names, for formats that hold nothing else; and back, by a table kept beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from everystep.errors import Damaged, Unsupported
from everystep.formats.content import Note
from everystep.formats.file import Array
from everystep.schema import Described, Leaf, Tree, flatten, paths_of, unflatten
from everystep.schema.dtype import name_of, parse

KEY = "everystep"
"""Name of the table in the metadata."""
TABLE_FORMAT = 1
_TEXT_KINDS = ("str", "bytes")
_NAME_MAX = 10_000  # zip archives hold names of 65,535 bytes


class Table(msgspec.Struct, frozen=True):
    """The tree of the state; `leaves` are [name of the array, dtype, kind]."""

    format: int
    nodes: list[Any]
    values: list[Any]
    leaves: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Named:
    """`aliases` are further names of arrays that are there once."""

    arrays: dict[str, Array]
    aliases: dict[str, str]
    table: bytes
    changed: list[Note]


def take_apart(state: Any, is_native: Callable[[np.dtype[Any]], bool]) -> Named:
    """Arrays by their paths; those that the format has no dtype for as their bits, in unsigned integers.

    Raises:
        Unsupported: naming the path of what could only be restored by running code.
    """
    tree = flatten(state, describe)
    arrays: dict[str, Array] = {}
    changed: list[Note] = []
    for leaf, payload in zip(tree.leaves, tree.payloads):
        array = payload if isinstance(payload, np.ndarray) else np.frombuffer(payload, np.uint8)
        name = _name(leaf.path)
        if name in arrays or name.startswith("__") or len(name) > _NAME_MAX:
            what = "a name that this format keeps for itself, or has no room for"
            raise Unsupported(what, where=leaf.path[:_NAME_MAX], do="rename this entry")
        if leaf.kind in _TEXT_KINDS:
            changed.append(Note(leaf.path, "long text or bytes is an array of bytes for other readers"))
        elif not is_native(array.dtype):
            changed.append(Note(leaf.path, f"{leaf.dtype} is unsigned integers with its bits for other readers"))
            array = _bits(array, is_native(np.dtype("u2")))
        arrays[name] = array
    if len(tree.values):
        changed.append(Note("", f"{len(tree.values)} plain values are in the metadata only"))
    names = [_name(leaf.path) for leaf in tree.leaves]
    found = ((_name(path), tree.nodes[at]) for path, at, _ in paths_of(tree))
    aliases = {name: names[node[1]] for name, node in found if node[0] == "leaf"}
    leaves = [(name, leaf.dtype, leaf.kind) for name, leaf in zip(names, tree.leaves)]
    table = msgspec.json.encode(Table(TABLE_FORMAT, tree.nodes, tree.values, leaves))
    ties = {name: kept for name, kept in aliases.items() if name != kept}
    return Named(arrays, ties, table, changed)


def _name(path: str) -> str:
    """A path as a name in a file. Zip archives cut names at a zero; a per cent sign in a path is %25 already."""
    return (path or "state").replace("\0", "%00")


def put_together(table: bytes | str, arrays: Mapping[str, Array], where: str) -> Any:
    """The nested state from its table.

    Raises:
        Damaged: if table and arrays do not fit together.
    """
    try:
        known = msgspec.json.decode(table, type=Table)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"the table of the state makes no sense: {error}", where=where) from error
    if known.format != TABLE_FORMAT:
        raise Unsupported("the table of a newer everystep", where=where, do="read it with that version")
    leaves = [Leaf(name, dtype, (), "other", kind) for name, dtype, kind in known.leaves]

    def leaf(index: int) -> Any:
        if index not in made:
            made[index] = _object(leaves[index], arrays)
        return made[index]

    made: dict[int, Any] = {}
    return unflatten(Tree(known.nodes, known.values, leaves), leaf, no_composite)


def _object(leaf: Leaf, arrays: Mapping[str, Array]) -> Any:
    array = arrays.get(leaf.path)
    if array is None:
        raise Damaged("an array of the state is missing", where=leaf.path)
    dtype = parse(leaf.dtype)
    try:
        if leaf.kind in _TEXT_KINDS:
            body = array.view(np.uint8).tobytes()
            return body if leaf.kind == "bytes" else body.decode("utf-8", "surrogatepass")
        same = array.dtype.newbyteorder("=") == dtype.newbyteorder("=")
        whole = array.astype(dtype, copy=False) if same else _from_bits(array, dtype)
    except (ValueError, TypeError, UnicodeError) as error:
        raise Damaged(f"an array that is not {leaf.dtype[:80]}", where=leaf.path) from error
    if leaf.kind == "scalar" and whole.shape == ():
        return whole[()]
    if leaf.kind != "array":
        raise Damaged(f"an unknown kind of array: {leaf.kind[:80]!r}", where=leaf.path)
    return whole


def _bits(array: Array, wide: bool) -> Array:
    """One unsigned integer per element where the format has one of that size; else bytes, in an axis of their own."""
    size = array.dtype.itemsize
    array = np.asarray(array, order="C")
    if size in ((1, 2) if wide else (1,)) and array.dtype.names is None:
        return array.view(f"u{size}")
    flat = np.frombuffer(array.tobytes(), np.uint8)
    return flat.reshape(*array.shape, size)


def _from_bits(array: Array, dtype: np.dtype[Any]) -> Array:
    size = dtype.itemsize
    one_each = array.dtype.itemsize == size and size in (1, 2) and dtype.names is None
    shape = array.shape if one_each else array.shape[:-1]
    if array.dtype.kind != "u" or dtype.hasobject or array.nbytes != size * int(np.prod(shape, dtype=object)):
        raise ValueError("not the bits")
    return np.ndarray(shape, dtype, array.tobytes() or b"\0").copy()


def describe(value: Any, path: str) -> Described | None:
    """What `flatten` asks for every object: arrays and scalars of NumPy are leaves."""
    if type(value) in (np.ndarray, np.memmap):
        identity = (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str)
        return Described(name_of(value.dtype, path), value.shape, "array", value, identity if value.nbytes else None)
    if isinstance(value, np.generic):
        array: Any = np.asarray(value)
        if type(array[()]) is type(value) and array.dtype.kind not in "SUO":
            return Described(name_of(array.dtype, path), (), "scalar", array)
    if hasattr(value, "__array__") or hasattr(value, "__dlpack__"):
        do = "load the state as NumPy arrays, and write that"
        raise Unsupported(f"a {type(value).__module__}.{type(value).__name__} in place of an array", where=path, do=do)
    return None


def no_composite(composite: Any) -> Any:
    """No file of another program has one."""
    raise Damaged(f"an unknown composite: {composite.kind[:80]!r}")
