"""Nested state as a table: a flat list of nodes, the plain values, and the leaves; and back again."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import enum
import functools
import heapq
import math
import types as pytypes
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from everystep.errors import Damaged, Mismatch, NotFound, Unsupported
from everystep.schema import plain
from everystep.schema.box import Box
from everystep.schema.dtype import parse

ROLES = ("weights", "optimizer", "buffer", "rng", "other")
DEPTH_MAX = 100
TEXT_MAX = 4096
KEY_TEXT_MAX = 1000
"""A longer key is cut in paths (not in the state), so that long keys of deep trees cannot make paths of any length."""
_DICTS: dict[type, str] = {dict: "dict", collections.OrderedDict: "ordered", collections.Counter: "counter"}
_DICT_TYPES: dict[str, type] = {name: kind for kind, name in _DICTS.items()}


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """One array: its path, element type, global shape, role, what it was, and the boxes held of it (none: all)."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    kind: str = "array"
    boxes: tuple[Box, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, whatever part of it is held."""
        return math.prod(self.shape) * parse(self.dtype).itemsize


class Described(msgspec.Struct, frozen=True, gc=False):
    """What an adapter says of an array it knows. `identity` is equal for two names of one memory."""

    dtype: str
    shape: tuple[int, ...]
    kind: str
    payload: Any
    identity: Hashable = None
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Composite:
    """An object that is kept as named parts and built again by its adapter (a sparse tensor, a quantised one)."""

    kind: str
    parts: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of a leaf that this rank holds: `array` lies at `start` in a leaf of global shape `shape`."""

    array: Any
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Roled:
    """Gives everything below it a role."""

    role: str
    value: Any


@dataclass(frozen=True)
class Tree:
    """Nodes in pre-order. A node is [kind, …]: see docs/format.md."""

    nodes: list[list[Any]]
    values: list[Any]
    leaves: list[Leaf]
    payloads: list[Any] = field(default_factory=list)


class Fields(collections.OrderedDict[str, Any]):
    """A named tuple or dataclass whose class was not given to the load: its fields as a mapping and as attributes."""

    def __init__(self, type_name: str = "Fields", items: Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(items)
        object.__setattr__(self, "_type_name", type_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('_type_name')} has no field {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self:
            raise AttributeError(f"{self._type_name} has no field {name!r}; add one as fields[{name!r}] = …")
        self[name] = value

    def copy(self) -> Fields:
        return Fields(self._type_name, self.items())

    def __repr__(self) -> str:
        return f"{self._type_name}({', '.join(f'{k}={v!r}' for k, v in self.items())})"


def key_text(key: Any) -> str:
    """A dict key or list index as one part of a path: without "/", and text that JSON can hold."""
    if type(key) is str and key.isascii() and not ("%" in key or "/" in key) and 0 < len(key) <= KEY_TEXT_MAX:
        return key if key[0] != "[" else "%5B" + key[1:]  # nearly all keys: .2 µs instead of .6
    text = _escape(key) if type(key) is str else f"[{_escape(_literal(key))}]"
    if len(text) > KEY_TEXT_MAX:
        text = text[:KEY_TEXT_MAX] + "…"
    return "%5B" + text[1:] if text.startswith("[") and type(key) is str else text or "%"


def _escape(text: str) -> str:
    text = text.replace("%", "%25").replace("/", "%2F")
    return text if text.isascii() else "".join(f"%u{ord(c):X}" if "\ud800" <= c <= "\udfff" else c for c in text)


def _literal(key: Any) -> str:
    """A key as Python writes it; long integers in base 16, which takes linear time and has no limit of digits."""
    if type(key) is int and key.bit_length() > 1024:
        return hex(key)
    if type(key) is tuple:
        return f"({', '.join(map(_literal, key))}{',' if len(key) == 1 else ''})"
    return repr(key)


def key_texts(keys: Iterable[Any]) -> Iterator[str]:
    """The parts of paths for the keys of one container; what looks the same (two NaN) is numbered: [nan], [nan]%#2."""
    seen: dict[str, int] = {}
    for key in keys:
        text = key_text(key)
        count = seen[text] = seen.get(text, 0) + 1
        yield text if count == 1 else f"{text}%#{count}"


def join(path: str, key: Any) -> str:
    return _join(path, key_text(key))


def _join(path: str, text: str) -> str:
    return f"{path}/{text}" if path else text


class _Flattener:
    def __init__(self, describe: Callable[[Any, str], Any], role: str) -> None:
        self.describe = describe
        self.nodes: list[list[Any]] = []
        self.values: list[Any] = []
        self.leaves: list[Leaf] = []
        self.payloads: list[Any] = []
        self.known: dict[Hashable, int] = {}
        self.foreign: set[type] = set()
        """Types that are known to be neither plain nor a container: most leaves are of one type."""

    def visit(self, value: Any, path: str, role: str, depth: int) -> None:
        if depth > DEPTH_MAX:
            raise Unsupported(
                f"state nested deeper than {DEPTH_MAX} levels", where=path, do="does it contain itself? flatten it"
            )
        if isinstance(value, Roled):
            self.visit(value.value, path, value.role, depth + 1)
        elif type(value) in self.foreign:
            self._foreign(value, path, role, depth)
        elif type(value) in (bytes, str) and len(value) > TEXT_MAX:
            self._long_text(value, path, role)
        elif plain.is_plain(value):
            self.nodes.append(["value", len(self.values)])
            self.values.append(plain.encode(value))
        else:
            self._container(value, path, role, depth)

    def _container(self, value: Any, path: str, role: str, depth: int) -> None:
        kind: type = type(value)
        if kind in _DICTS:
            self.nodes.append([_DICTS[kind], [plain.encode(key, path or _ROOT) for key in value]])
            self._children(value.keys(), value.values(), path, role, depth)
        elif kind is list or kind is tuple:
            self.nodes.append([kind.__name__, len(value)])
            self._children(range(len(value)), value, path, role, depth)
        elif kind is Fields:
            self._record("dataclass", value._type_name, value, path, role, depth)
        elif isinstance(value, (type, enum.Enum, Part)):
            self._foreign(value, path, role, depth)
        elif _is_namedtuple(kind):
            fields = dict(zip(value._fields, value))
            _check_whole(value, fields, path)
            self._record("namedtuple", kind.__qualname__, fields, path, role, depth)
        elif _is_dataclass(kind) and (found := self.describe(value, path)) is not None:
            self._found(value, found, path, role, depth)
        elif _is_dataclass(kind):
            fields = {f.name: getattr(value, f.name, _UNSET) for f in dataclasses.fields(value)}
            _check_whole(value, fields, path)
            fields = {name: child for name, child in fields.items() if child is not _UNSET}
            self._record("dataclass", kind.__qualname__, fields, path, role, depth)
        else:
            self.foreign.add(kind)
            self._foreign(value, path, role, depth)

    def _record(self, node: str, name: str, parts: dict[str, Any], path: str, role: str, depth: int) -> None:
        for text in (name, *parts):
            if type(text) is not str or plain.encode(text) is not text:
                do = "name it with letters"
                raise Unsupported("a class or field name that is not valid text", where=path or _ROOT, do=do)
        self.nodes.append([node, name, list(parts)])
        self._children(parts.keys(), parts.values(), path, role, depth)

    def _children(self, keys: Iterable[Any], values: Iterable[Any], path: str, role: str, depth: int) -> None:
        for text, child in zip(key_texts(keys), values):
            self.visit(child, _join(path, text), role, depth + 1)

    def _foreign(self, value: Any, path: str, role: str, depth: int) -> None:
        self._found(value, self.describe(value, path), path, role, depth)

    def _found(self, value: Any, found: Any, path: str, role: str, depth: int) -> None:
        if isinstance(found, Described):
            self.nodes.append(["leaf", self._leaf(found, path, role)])
        elif isinstance(found, Composite):
            self._record("composite", found.kind, found.parts, path, role, depth)
        elif found is not None:
            self.visit(found, path, role, depth + 1)
        else:
            raise refuse(value, path)

    def _leaf(self, found: Described, path: str, role: str) -> int:
        index = len(self.leaves)
        if found.identity is not None:
            first = self.known.setdefault(found.identity, index)
            if first != index:
                if self.leaves[first].role == "optimizer" != role:  # what is also a weight is not the optimizer's alone
                    self.leaves[first] = msgspec.structs.replace(self.leaves[first], role=role)
                return first
        self.leaves.append(Leaf(path, found.dtype, found.shape, role, found.kind, found.boxes))
        self.payloads.append(found.payload)
        return index

    def _long_text(self, value: bytes | str, path: str, role: str) -> None:
        """Long text and bytes are leaves: the manifest stays small."""
        body = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        kind = "bytes" if isinstance(value, bytes) else "str"
        self.nodes.append(["leaf", len(self.leaves)])
        self.leaves.append(Leaf(path, "|u1", (len(body),), role, kind))
        self.payloads.append(body)


_ROOT = "the state itself"
_UNSET = object()
_HEAP_TYPE = 1 << 9


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple)


def _is_dataclass(kind: type) -> bool:
    """Whether a class is a dataclass and nothing more: one that is a dict or an array too has more than fields."""
    return dataclasses.is_dataclass(kind) and all(c is object or c.__flags__ & _HEAP_TYPE for c in kind.__mro__)


def _check_whole(value: Any, fields: dict[str, Any], path: str) -> None:
    """Refuses attributes that are not fields, which would be lost; cached properties are computed again when asked."""
    classes = type(value).__mro__
    extra = [name for name in getattr(value, "__dict__", ()) if name not in fields]
    extra = [n for n in extra if not any(isinstance(vars(c).get(n), functools.cached_property) for c in classes)]
    for c in classes:
        slots = [name for name, item in vars(c).items() if isinstance(item, pytypes.MemberDescriptorType)]
        extra += [name for name in slots if name not in fields and hasattr(value, name)]
    if isinstance(value, tuple) and len(value) != len(fields):
        extra.append(f"{len(value)} items")
    if extra:
        raise Unsupported(
            f"a {type(value).__qualname__} holds more than its fields: {', '.join(map(str, extra[:3]))}",
            where=path or _ROOT,
            do="make fields of them, or save its state as a dict",
        )


def refuse(value: Any, path: str) -> Unsupported:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if callable(value):
        do = "keep the function in your program and save what it depends on; or leave it out of the state"
    elif kind in (set, frozenset):
        do = "save a sorted list or tuple instead"
    else:
        do = "save its state as dicts, lists, arrays and plain values (a state_dict), or leave it out"
    return Unsupported(f"a {name} could only be restored by running code", where=path or _ROOT, do=do)


def flatten(state: Any, describe: Callable[[Any, str], Any], role: str = "other") -> Tree:
    """The table of a nested state.

    Args:
        describe: asked for every object that is neither a container nor plain, and for dataclasses: answers a
            Described or Composite, or what is kept in its place, or None for what it does not know.

    Raises:
        Unsupported: naming the path of what could only be restored by running code.
    """
    work = _Flattener(describe, role)
    work.visit(state, "", role, 0)
    return Tree(work.nodes, work.values, work.leaves, work.payloads)


def _keys(node: Any, limit: int) -> Sequence[Any]:
    """Keys of a node's children; `limit` is how many nodes are left, so that a false count cannot cost memory."""
    kind = node[0] if type(node) is list and node and type(node[0]) is str else None
    keys: Sequence[Any] | None = None
    if kind in ("value", "leaf") and len(node) == 2:
        return ()
    if kind in ("list", "tuple") and len(node) == 2 and type(node[1]) is int and 0 <= node[1] <= limit:
        return range(node[1])
    if kind in _DICT_TYPES and len(node) == 2 and type(node[1]) is list and len(node[1]) <= limit:
        keys = [plain.decode(key) for key in node[1]]
    if kind in _RECORDS and len(node) == 3 and type(node[1]) is str and type(node[2]) is list and len(node[2]) <= limit:
        keys = node[2] if all(type(key) is str for key in node[2]) else None
    if keys is None or len(set(keys)) < len(keys):
        raise Damaged(f"not a node of a tree: {plain.shown(node)}")
    return keys


_RECORDS = ("namedtuple", "dataclass", "composite")


def _ends(tree: Tree) -> list[int]:
    """For every node, the index behind its last descendant.

    Raises:
        Damaged: unless the nodes are one whole tree.
    """
    ends = [0] * len(tree.nodes)
    unfinished: list[list[int]] = []
    for at, node in enumerate(tree.nodes):
        if (at > 0 and not unfinished) or len(unfinished) > DEPTH_MAX:
            raise Damaged("a tree that goes on after its last node, or nests too deep")
        if unfinished:
            unfinished[-1][1] -= 1
        unfinished.append([at, len(_keys(node, len(tree.nodes) - at - 1))])
        while unfinished and unfinished[-1][1] == 0:
            ends[unfinished.pop()[0]] = at + 1
    if unfinished or not tree.nodes:
        raise Damaged("a tree that ends before its last node")
    return ends


def paths_of(tree: Tree) -> Iterator[tuple[str, int, int]]:
    """(path, index of the node, index behind its last descendant) of every node, in pre-order."""
    ends = _ends(tree)
    above: list[tuple[str, Iterator[str]]] = []
    for at, node in enumerate(tree.nodes):
        path = ""
        while above:
            parent, texts = above[-1]
            text = next(texts, None)
            if text is not None:
                path = _join(parent, text)
                break
            above.pop()
        yield path, at, ends[at]
        above.append((path, key_texts(_keys(node, len(tree.nodes) - at - 1))))


def select(tree: Tree, path: str) -> Tree:
    """The part of a tree under a path, with the same tables of values and leaves.

    Raises:
        NotFound: naming the nearest paths.
    """
    if path == "":
        return tree
    for name, start, end in paths_of(tree):
        if name == path:
            return Tree(tree.nodes[start:end], tree.values, tree.leaves, tree.payloads)
    # difflib takes milliseconds for a pair of long texts: it sees only the few that begin or end most like the path.
    wanted = path[:200]
    names = (name for name, _, _ in paths_of(tree) if 0 < len(name) <= len(wanted) + 200)
    likely = heapq.nlargest(64, names, key=lambda name: _alike(name, wanted) + _alike(name[::-1], wanted[::-1]))
    near = difflib.get_close_matches(wanted, likely, 3) or likely[:5]
    raise NotFound(f"no path {path!r} in this checkpoint", do=f"nearest: {', '.join(near) or 'none, it has no parts'}")


def _alike(a: str, b: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def unflatten(
    tree: Tree,
    leaf: Callable[[int], Any],
    compose: Callable[[Composite], Any],
    types: Sequence[type] = (),
) -> Any:
    """The nested state of a table.

    Args:
        leaf: the object for a leaf's index; called once per place that names the leaf.
        compose: builds a composite from its parts.
        types: classes of named tuples and dataclasses, found by their qualified name; others come back as `Fields`.

    Raises:
        Damaged: for a table that `flatten` does not make.
        Mismatch: for a class in `types` that has not the fields that were saved.
    """
    _ends(tree)
    named = {kind.__qualname__: kind for kind in types}
    position = 0

    def build() -> Any:
        nonlocal position
        node = tree.nodes[position]
        position += 1
        if node[0] == "leaf":
            return leaf(_at(node, len(tree.leaves)))
        if node[0] == "value":
            return plain.decode(tree.values[_at(node, len(tree.values))])
        keys = _keys(node, len(tree.nodes) - position)
        children = [build() for _ in keys]
        return _assemble(node, keys, children, named, compose)

    return build()


def _at(node: list[Any], limit: int) -> int:
    if type(node[1]) is not int or not 0 <= node[1] < limit:
        raise Damaged(f"a node points outside its table: {plain.shown(node)}")
    return node[1]


def _assemble(
    node: list[Any],
    keys: Sequence[Any],
    children: list[Any],
    named: dict[str, type],
    compose: Callable[[Composite], Any],
) -> Any:
    kind = node[0]
    if kind == "list":
        return children
    if kind == "tuple":
        return tuple(children)
    if kind in _DICT_TYPES:
        out: Any = _DICT_TYPES[kind]()
        for key, child in zip(keys, children):
            dict.__setitem__(out, key, child) if kind == "counter" else out.__setitem__(key, child)
        return out
    if kind == "composite":
        return compose(Composite(node[1], dict(zip(keys, children))))
    target = named.get(node[1])
    if target is None:
        return Fields(node[1], zip(keys, children))
    return _record(target, dict(zip(keys, children)))


def _record(target: type, parts: dict[str, Any]) -> Any:
    """Fields are set without __init__ and __post_init__: what was saved comes back, not what they would make of it."""
    if _is_namedtuple(target) and target._fields == tuple(parts):  # type: ignore[attr-defined]
        return tuple.__new__(target, parts.values())
    if not _is_dataclass(target) or not parts.keys() <= {f.name for f in dataclasses.fields(target)}:
        raise _misfit(target, parts)
    try:
        made: Any = object.__new__(target)
        for name, child in parts.items():
            object.__setattr__(made, name, child)
    except (TypeError, AttributeError) as error:
        raise _misfit(target, parts) from error
    return made


def _misfit(target: type, parts: dict[str, Any]) -> Mismatch:
    return Mismatch(
        f"the class {target.__qualname__} has not the fields that were saved: {', '.join(parts)}",
        do="leave it out of `types` to get the fields by name",
    )
