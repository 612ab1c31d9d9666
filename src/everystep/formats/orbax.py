"""Orbax's folders, read only: the tree from their JSON, the arrays through TensorStore; nobody's class is built."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everystep.errors import Damaged, Error, StorageError, Unsupported
from everystep.formats.content import Content, Note, Opaque
from everystep.formats.file import Array, is_whole, opened
from everystep.schema import join
from everystep.seam import Seam

_TREE, _STEP, _MANIFEST = "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"
_STRINGS, _JSON, _METRICS, _DEFAULT = "_strings.json", "metadata", "metrics", "default"
_ABOUT_ARRAYS = "array_metadatas"
_UNFINISHED = ".orbax-checkpoint-tmp"
_SEQUENCE, _DICT = 1, 2
_EMPTY: dict[str, Any] = {"None": None, "Dict": {}, "List": [], "Tuple": (), "NamedTuple": ()}
_NUMBERED = re.compile(r"(?:.*[^0-9])?([0-9]{1,15})")
_JSON_BYTES_MAX = 256 << 20
_FILES_MAX, _DEPTH_MAX = 1_000_000, 100
# Zeros are what Zstandard makes smallest: 128 KiB of them become 4 bytes.
_RATIO_MAX, _FREE_BYTES = 1 << 15, 1 << 20
_AT_ONCE = 64
# What TensorStore and the decoding of JSON raise where the bytes make no sense.
_WRONG = (
    ValueError, TypeError, KeyError, IndexError, OSError, RuntimeError, OverflowError, MemoryError, RecursionError,
    NotImplementedError,
)  # fmt: skip


def owns_folder(seam: Seam, path: str) -> bool:
    """Whether a folder is one checkpoint: a tree, or a step with its items in folders; not a folder of many steps."""
    if _UNFINISHED in path.rpartition("/")[2]:
        return False
    names = _names(seam, path)
    if _TREE in names or _STEP in names:
        return True
    return any(
        is_folder and not _NUMBERED.fullmatch(name) and _is_tree(seam, f"{path}/{name}")
        for name, is_folder in names.items()
    )


def _is_tree(seam: Seam, path: str) -> bool:
    try:
        return _TREE in _names(seam, path)
    except StorageError:
        return False  # whoever reads the folder above says so


def read_folder(seam: Seam, path: str) -> Content:
    """The state, with the step and the metrics as text beside it. Random keys are their bits.

    Raises:
        Damaged: for a tree or arrays that make no sense, or are more than the files can hold.
        Unsupported: without TensorStore.
    """
    path = path.rstrip("/")
    names = _names(seam, path)
    items = (
        {"": path}
        if names.keys() & {_TREE, _MANIFEST}
        else {n: f"{path}/{n}" for n, is_folder in names.items() if is_folder}
    )
    state: dict[str, Any] = {}
    opaque: list[Opaque] = []
    notes: list[Note] = []
    for name, folder in items.items():
        inner = _names(seam, folder)
        if _TREE in inner:
            state[name] = _Tree(seam, folder, inner, join("", name) if len(items) > 1 and name else "", notes).read()
        elif _MANIFEST in inner:
            do = "get the folder again from where it came from"
            raise Damaged(f"arrays without their tree: {_TREE} is missing", where=folder, do=do)
        elif _JSON in inner:
            state[name] = _document(seam, f"{folder}/{_JSON}")
        elif name == _METRICS and _METRICS in inner:
            continue  # told as metadata
        elif name.startswith(".") or _UNFINISHED in name:
            continue
        else:
            opaque.append(Opaque(_handler(seam, path, names, name), join("", name)))
            state[name] = opaque[-1]
    if not state:
        raise Damaged("a step without a state in it", where=path, do="get the folder again from where it came from")
    alone = list(state) in ([""], [_DEFAULT]) and not opaque
    whole = next(iter(state.values())) if alone else state
    return Content(whole, "orbax", tuple(opaque), tuple(notes), facts_of_folder(seam, path))


def facts_of_folder(seam: Seam, path: str) -> dict[str, str]:
    """Step and metrics of a checkpoint, as text; no array is read."""
    path = path.rstrip("/")
    names = _names(seam, path)
    found = {"format": "orbax"}
    above, _, own = path.rpartition("/")
    if _STEP not in names and _STEP in _names(seam, above or "/"):  # an item of a step
        own = above.rpartition("/")[2]
    numbered = _NUMBERED.fullmatch(own)
    if numbered:
        found["step"] = str(int(numbered[1]))
    about = _about(seam, path, names)
    metrics = about.get("metrics")
    metrics = dict(metrics) if isinstance(metrics, dict) else {}
    if names.get(_METRICS) and _METRICS in _names(seam, f"{path}/{_METRICS}"):
        given = _document(seam, f"{path}/{_METRICS}/{_METRICS}")
        metrics.update(given if isinstance(given, dict) else {})
    if metrics:
        found["metrics"] = json.dumps(metrics)
    if about.get("custom_metadata"):
        found["custom_metadata"] = json.dumps(about["custom_metadata"])
    return found


def _about(seam: Seam, path: str, names: dict[str, bool]) -> dict[str, Any]:
    found = _document(seam, f"{path}/{_STEP}") if names.get(_STEP) is False else {}
    return found if isinstance(found, dict) else {}


def _handler(seam: Seam, path: str, names: dict[str, bool], item: str) -> str:
    """What wrote an item, for a message."""
    handlers = _about(seam, path, names).get("item_handlers")
    name = handlers.get(item) if isinstance(handlers, dict) else None
    return name[:200] if isinstance(name, str) else "an item of Orbax"


def _names(seam: Seam, path: str) -> dict[str, bool]:
    """name -> whether it is a folder, in their order."""
    try:
        return dict(sorted(seam.files.names(path)))
    except OSError as error:
        do = "check the path, its owner and mode"
        raise StorageError(f"cannot list this folder: {error.strerror or error}", where=path, do=do) from error


def _document(seam: Seam, path: str) -> Any:
    with opened(path, seam) as source:
        if source.size > _JSON_BYTES_MAX:
            raise Unsupported(f"JSON of {source.size} bytes, at most {_JSON_BYTES_MAX}", where=path, do="check it")
        try:
            return json.loads(source.read())
        except (ValueError, RecursionError) as error:
            raise source.damaged(f"not valid JSON: {str(error)[:200]}") from error


# one tree ----------------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A container on its way: the kind of its keys, and its children by key."""

    kind: int = 0
    children: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A leaf of the tree: the keys down to it, with their kinds, and what it was."""

    keys: tuple[tuple[str, int], ...]
    kind: str

    @property
    def name(self) -> str:
        """What its array is called."""
        return ".".join(key for key, _ in self.keys)


class _Tree:
    """A folder with a tree.

    Args:
        base: where it lies in the state.
        notes: what has another form now is added.
    """

    def __init__(self, seam: Seam, path: str, names: dict[str, bool], base: str, notes: list[Note]) -> None:
        self._seam, self._path, self._names, self._base, self._notes = seam, path, names, base, notes

    def read(self) -> Any:
        about = _document(self._seam, f"{self._path}/{_TREE}")
        entries = self._entries(about)
        arrays = _Arrays(self._path, _bytes_below(self._seam, self._path), about, _MANIFEST in self._names)
        wanted = [entry.name for entry in entries if entry.kind not in _EMPTY and entry.kind != "string"]
        found = arrays.read(wanted)
        strings = _document(self._seam, f"{self._path}/{_STRINGS}") if _STRINGS in self._names else {}
        keys = self._random_keys()
        root = _Node()
        for entry in entries:
            value = self._value(entry, found, strings)
            if not entry.keys:
                return value
            self._insert(root, entry, value)
            if entry.name in keys:
                path = self._path_of(entry)
                self._notes.append(Note(path, f"random keys of {keys[entry.name]} are their bits"))
        return self._finished(root, self._base)

    def _entries(self, about: Any) -> list[_Entry]:
        table = about.get("tree_metadata") if isinstance(about, dict) else None
        if not isinstance(table, dict):
            raise self._damaged("no tree in it")
        entries = [self._entry(one) for one in table.values()]
        if len({entry.name for entry in entries}) < len(entries) or (
            len(entries) > 1 and any(not entry.keys for entry in entries)
        ):
            raise self._damaged("two entries of one name")
        return entries

    def _entry(self, one: Any) -> _Entry:
        try:
            keys = tuple((part["key"], part["key_type"]) for part in one["key_metadata"])
            kind = one["value_metadata"]["value_type"]
        except (TypeError, KeyError) as error:
            raise self._damaged("an entry that makes no sense") from error
        known = all(type(key) is str and kind in (_SEQUENCE, _DICT) for key, kind in keys)
        if not known or type(kind) is not str or len(keys) > _DEPTH_MAX:
            raise self._damaged("an entry that makes no sense, or of a newer kind")
        return _Entry(keys, kind)

    def _value(self, entry: _Entry, found: dict[str, Array], strings: Any) -> Any:
        if entry.kind in _EMPTY:
            empty = _EMPTY[entry.kind]
            return type(empty)() if empty is not None else None
        if entry.kind == "string":
            text = strings
            for part in (entry.name,) if isinstance(strings, dict) and entry.name in strings else entry.name.split("/"):
                text = text.get(part) if isinstance(text, dict) else None
            if type(text) is not str:
                raise self._damaged(f"the text of {entry.name[:200]!r} is missing")
            return text
        array = found[entry.name]
        if entry.kind == "scalar":
            if array.shape != ():
                raise self._damaged(f"{entry.name[:200]!r} is no scalar")
            return array.item() if array.dtype.kind in "biufc" else array[()]
        return array

    def _insert(self, root: _Node, entry: _Entry, value: Any) -> None:
        node = root
        for at, (key, kind) in enumerate(entry.keys):
            if node.kind not in (0, kind):
                raise self._damaged(f"a container above {entry.name[:200]!r} is a list and a dict")
            node.kind = kind
            if at == len(entry.keys) - 1 and key not in node.children:
                node.children[key] = value
                return
            node = node.children.setdefault(key, _Node())
            if not isinstance(node, _Node) or at == len(entry.keys) - 1:
                raise self._damaged(f"{entry.name[:200]!r} is a leaf and a container")

    def _finished(self, node: _Node, path: str) -> Any:
        made = {
            key: self._finished(child, join(path, key)) if isinstance(child, _Node) else child
            for key, child in node.children.items()
        }
        if node.kind != _SEQUENCE:
            return made
        numbers = [str(number) for number in range(len(made))]
        if made.keys() == set(numbers):
            return [made[number] for number in numbers]
        self._notes.append(Note(path, "a list with holes is a dict by its numbers"))
        return made

    def _path_of(self, entry: _Entry) -> str:
        path = self._base
        for key, kind in entry.keys:
            path = join(path, int(key) if kind == _SEQUENCE and _NUMBERED.fullmatch(key) and key.isdecimal() else key)
        return path

    def _random_keys(self) -> dict[str, str]:
        """Name of an array -> the implementation of the random keys that it has the bits of."""
        found: dict[str, str] = {}
        if not self._names.get(_ABOUT_ARRAYS):
            return found
        for name, is_folder in _names(self._seam, f"{self._path}/{_ABOUT_ARRAYS}").items():
            if is_folder:
                continue
            about = _document(self._seam, f"{self._path}/{_ABOUT_ARRAYS}/{name}")
            rows = about.get("array_metadatas") if isinstance(about, dict) else None
            for row in rows if isinstance(rows, list) else ():
                one = row.get("array_metadata") if isinstance(row, dict) else None
                beside = one.get("ext_metadata") if isinstance(one, dict) else None
                impl = beside.get("random_key_impl") if isinstance(beside, dict) else None
                if one is not None and isinstance(impl, str):
                    found[str(one.get("param_name"))] = impl[:80]
        return found

    def _damaged(self, what: str) -> Damaged:
        where = f"{self._path}/{_TREE}"
        return Damaged(what, where=where, do="get the folder again from where it came from")


# its arrays --------------------------------------------------------------------------------------------------------


class _Arrays:
    """The arrays of a tree, by name.

    Args:
        nbytes: of all files, which bounds what can be in them.
        about: of the tree.
    """

    def __init__(self, path: str, nbytes: int, about: Any, has_manifest: bool) -> None:
        self._path, self._bytes_max = path, nbytes * _RATIO_MAX + _FREE_BYTES
        use = about.get("use_ocdbt")
        self._one_store = has_manifest if use is None else bool(use)
        self._driver = "zarr3" if about.get("use_zarr3") else "zarr"

    def read(self, names: list[str]) -> dict[str, Array]:
        store: Any = _tensorstore(self._path) if names else None
        found: dict[str, Array] = {}
        for first in range(0, len(names), _AT_ONCE):
            batch = names[first : first + _AT_ONCE]
            opening = [store.open(self._spec(name), open=True, read=True) for name in batch]
            for name, future in zip(batch, opening):
                try:
                    found[name] = self._checked(name, future.result())
                except Error:
                    raise
                except _WRONG as error:
                    raise self._damaged(name, f"cannot be read: {str(error)[:300]}") from error
        return found

    def _spec(self, name: str) -> dict[str, Any]:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise self._damaged(name, "is no name of an array")
        if self._one_store:
            kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self._path}/"}, "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{self._path}/{name}/"}
        return {"driver": self._driver, "kvstore": kvstore, "fill_missing_data_reads": False}

    def _checked(self, name: str, array: Any) -> Array:
        """The array's bytes, if it is not larger than its files can be."""
        dtype, shape = array.dtype.numpy_dtype, tuple(array.shape)
        nbytes = math.prod(shape) * dtype.itemsize
        chunk = math.prod(array.chunk_layout.read_chunk.shape or ()) * dtype.itemsize
        if max(nbytes, chunk) > self._bytes_max:
            raise self._damaged(name, f"claims {max(nbytes, chunk)} bytes, more than the files can hold")
        data: Array = np.asarray(array.read().result(), order="C")
        if dtype.hasobject or not is_whole(data):
            raise self._damaged(name, "holds truth values that are neither 0 nor 1, or objects")
        return data

    def _damaged(self, name: str, what: str) -> Damaged:
        do = "get the folder again from where it came from"
        return Damaged(f"the array {name[:200]!r} {what}", where=self._path, do=do)


def _tensorstore(path: str) -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise Unsupported(
            "Orbax's arrays are read with TensorStore, which is not installed",
            where=path,
            do='pip install "everystep[orbax]"',
        ) from error
    return tensorstore


def _bytes_below(seam: Seam, path: str) -> int:
    total, files, folders = 0, 0, [(path, 0)]
    while folders:
        folder, depth = folders.pop()
        for name, is_folder in _names(seam, folder).items():
            files += 1
            if files > _FILES_MAX or depth > _DEPTH_MAX:
                raise Unsupported("more files than a checkpoint has", where=path, do="is it a checkpoint at all?")
            if is_folder:
                folders.append((f"{folder}/{name}", depth + 1))
            else:
                total += seam.files.size(f"{folder}/{name}")
    return total
