"""A state as a file of another format: whole, or one entry of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from everystep import adapters, formats
from everystep.adapters import numpy as numpy_adapter
from everystep.errors import Conflict, Unsupported, UsageError
from everystep.exchange.stream import LOOP, can_stream, stream
from everystep.formats import FORMATS, Written
from everystep.formats.file import made
from everystep.restore import SECTIONS_OF_OURS, WORKER, Opened
from everystep.restore.fetch import Progress
from everystep.schema import Leaf, flatten, paths_of, select, unflatten
from everystep.seam import REAL, Seam

_FOR: dict[str, dict[str, str]] = {"safetensors": {"format": "pt"}, "shards": {"format": "pt"}, "protobuf": {}}
"""`format` is what transformers asks for: the names are those of PyTorch."""


def export(
    source: Any,
    path: Any,
    *,
    only: str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    step: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    attachment: Callable[[str], bytes | None] | None = None,
    seam: Seam = REAL,
) -> Written:
    """Writes a file, or files that belong together, that appear whole or not at all.

    Args:
        source: an opened checkpoint, or a nested state of arrays (of NumPy, or of a framework that is in use).
        only: a path within it, such as "model"; without it, all of it.
        format: a name in `formats.FORMATS`; by the ending of the path if not given.
        max_shard_size: bytes, or text such as "5GB": a larger .safetensors file becomes shards with an index.
        step, metrics: said in the file, where the format has a place for it (safetensors, Protocol Buffers).
        progress: told the number of bytes as they are read from the repository.
        attachment: asked for a file that was attached to the run by this name, where the format needs one (Keras).

    Raises:
        UsageError: for a name without a known ending, an unknown format, or shards of another than safetensors.
        Conflict: if there is such a file and `overwrite` is False.
        NotFound: if nothing is under `only`.
        Unsupported: naming the path of what the format has no form for.
        StorageError: if the file cannot be written.
    """
    path = seam.files.absolute(path)
    name = formats.format_of(path) if format is None else format
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}", do=f"one of {', '.join(FORMATS)}")
    if not overwrite and _is_there(path, seam):  # said before the state is read, which may take long
        do = "give another name, or overwrite=True"
        raise Conflict("there is a file of this name already", where=path, do=do)
    inner = _path_of(source, only) if isinstance(source, Opened) else ""
    if name == "protobuf" and isinstance(source, Opened) and can_stream(source, inner) and max_shard_size is None:
        with made(path, seam, overwrite) as target:
            stream(source, inner, target, _metadata(step, metrics), progress)
        return Written(path, target.nbytes)
    state = _of_opened(source, inner, progress) if isinstance(source, Opened) else _of_state(source, only)
    text = {**_FOR[name], **_metadata(step, metrics)} if name in _FOR else None
    found = {of: attachment(of) for of in formats.ATTACHMENTS.get(name, ())} if attachment is not None else {}
    return formats.write(
        path, state, format=name, overwrite=overwrite, metadata=text, max_shard_size=max_shard_size, seam=seam,
        attachments={of: data for of, data in found.items() if data is not None},
    )  # fmt: skip


def _is_there(path: str, seam: Seam) -> bool:
    try:
        seam.files.size(path)
    except OSError:
        return False  # if it is more than missing, writing will say so
    return True


def _metadata(step: int | None, metrics: Mapping[str, Any] | None) -> dict[str, str]:
    found = {} if step is None else {"step": str(step)}
    if metrics:
        found["metrics"] = json.dumps(dict(metrics), default=str)
    return found


def _path_of(opened: Opened, only: str | None) -> str:
    """Where in the tree that lies: of a checkpoint that holds an explicit state alone, paths are those in it."""
    base = opened.base
    if only is None:
        return base
    inner = f"{base}/{only}" if base else only
    of_ours = only.partition("/")[0] in SECTIONS_OF_OURS and all(p != inner for p, _, _ in paths_of(opened.tree))
    return only if of_ours else inner


def _of_opened(opened: Opened, path: str, progress: Progress | None) -> Any:
    """What a load gives."""
    state = opened.build(path, progress=progress)
    if not path:
        for name in (LOOP, WORKER):
            state.pop(name, None)
    return state


def _of_state(state: Any, only: str | None) -> Any:
    """A nested state as NumPy arrays; those of a framework are not copied where both can see them."""
    whole = flatten(state, adapters.describe)
    tree = select(whole, only) if only else whole
    built: dict[int, Any] = {}

    def leaf(index: int) -> Any:
        if index not in built:
            built[index] = _array(tree.leaves[index], tree.payloads[index])
        return built[index]

    return unflatten(tree, leaf, lambda composite: composite.parts)


def _array(leaf: Leaf, payload: Any) -> Any:
    if leaf.boxes:
        do = "gather the whole array, and export that"
        raise Unsupported("a part of a leaf, which other ranks have the rest of", where=leaf.path, do=do)
    if leaf.kind == "array":
        return payload.payload
    data = adapters.view(payload)
    if data is None:
        data = np.empty(leaf.nbytes, np.uint8)
        adapters.copy(payload, data)
    if leaf.kind in numpy_adapter.KINDS:
        return numpy_adapter.build(leaf, data)
    return numpy_adapter.as_array(leaf, data)
