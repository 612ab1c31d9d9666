"""HDF5 files: groups as dicts, datasets as arrays. They are read here, within bounds, and no file leads to another; to
write them, h5py makes all but the elements."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np

from everystep.errors import Error, Unsupported
from everystep.formats import keras_legacy, named
from everystep.formats.content import Content, Note
from everystep.formats.file import Source, Target
from everystep.formats.hdf5_emit import emit
from everystep.formats.hdf5_format import MAGIC
from everystep.formats.hdf5_walk import Walk, shown

EXTENSIONS: tuple[str, ...] = (".hdf5", ".h5")
_OURS = f"__{named.KEY}__"
TABLE = f"{_OURS}/table"
"""Where a file of Keras has the table of the state, among all its arrays by their names."""
_NATIVE = {np.dtype(code).newbyteorder(order) for code in ("?", *"bhilqBHILQefdFD") for order in "<>"}


def owns(source: Source) -> bool:
    return source.head().startswith(MAGIC)


def read(source: Source) -> Content:
    """Groups as dicts and datasets as arrays; the nested state where the file was written by `write`; the layers and
    their weights where Keras wrote a whole model. Attributes that are plain are in the metadata, as `path@name`.

    Raises:
        Damaged: for what is no whole HDF5 file.
        Unsupported: for what exceeds the bounds of a reader.
    """
    return contents(source)[0]


def contents(source: Source) -> tuple[Content, bool]:
    """What `read` gives, and whether the file has a table of ours."""
    if not owns(source):
        raise source.damaged("it does not begin like an HDF5 file")
    walk = Walk(source)
    opaque, changed = tuple(walk.not_understood), tuple(walk.changed)
    tables = [path for path in ((_OURS,), tuple(TABLE.split("/"))) if path in walk.arrays]
    if tables and not opaque:
        return Content(_own(walk, tables[0], source), "hdf5", changed=changed), True
    state = keras_legacy.state_of(walk.state, walk.attributes) or walk.state
    return Content(state, "hdf5", opaque, changed, metadata_of(walk)), False


def library(where: str) -> Any:
    """h5py, which is imported here and nowhere else.

    Raises:
        Unsupported: if it is not there.
    """
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        do = 'pip install "everystep[hdf5]"'
        raise Unsupported("HDF5 files need the package h5py", where=where, do=do) from error


def metadata_of(walk: Walk) -> dict[str, str]:
    """Attributes as text: what is none as JSON. The names that Keras gives its layers are one table."""
    named_groups = {path: found for path, found in walk.attributes.items() if path[-1:] == ("vars",)}
    names = {shown(path): found.pop("name") for path, found in named_groups.items() if "name" in found}
    made = {"names": json.dumps(names)} if names else {}
    for path, values in walk.attributes.items():
        for name, value in values.items():
            made[f"{shown(path)}@{name}" if path else name] = value if isinstance(value, str) else _text(value)
    return made


def _text(value: Any) -> str:
    return (
        value.decode("latin1") if isinstance(value, bytes) else json.dumps(value, default=lambda b: b.decode("latin1"))
    )


def _own(walk: Walk, path: tuple[str, ...], source: Source) -> Any:
    """What `write` wrote, or a file of Keras with our table in a group beside what Keras reads."""
    table, above = walk.arrays[path], path[:-1]
    if not isinstance(table, np.ndarray) or table.dtype != np.uint8:
        raise source.damaged("the table of the state is no array of bytes")
    arrays = {
        "/".join(map(_back, found[len(above) :])): value
        for found, value in walk.arrays.items()
        if isinstance(value, np.ndarray) and found[: len(above)] == above and found != path
    }
    try:
        return named.put_together(table.tobytes(), arrays, source.name)
    except Error as error:
        error.where = error.where or source.name
        raise


def own_path(name: str) -> str:
    """Where a file of Keras has an array of ours."""
    return f"{_OURS}/{_there(name)}"


def write(state: Any, target: Target) -> list[Note]:
    """Arrays as datasets under their paths (a tied array under all of them), and the table of the state."""
    parts = named.take_apart(state, is_native)
    arrays = {_there(name): array for name, array in parts.arrays.items()}
    arrays[_OURS] = np.frombuffer(parts.table, np.uint8)
    links = {_there(name): _there(kept) for name, kept in parts.aliases.items()}
    emit(library(target.name), target, arrays, links)
    return parts.changed


def is_native(dtype: np.dtype[Any]) -> bool:
    """Whether HDF5 has it, and h5py gives it back."""
    return dtype.metadata is None and dtype in _NATIVE


def _there(name: str) -> str:
    """A name of ours as a path of HDF5, where a dot stands for the group itself."""
    return "/".join("%2E" if part == "." else part for part in name.split("/"))


def _back(part: str) -> str:
    return "." if part == "%2E" else part
