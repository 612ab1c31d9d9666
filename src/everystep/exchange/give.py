"""A state as a file of another format: whole, or one entry of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from everystep import adapters, formats
from everystep.adapters import numpy as numpy_adapter
from everystep.errors import Conflict, Unsupported, UsageError
from everystep.formats import FORMATS, Written, safetensors
from everystep.formats.file import Target, made
from everystep.restore import SECTIONS_OF_OURS, Opened
from everystep.restore.fetch import Progress
from everystep.schema import Leaf, flatten, paths_of, select, unflatten
from everystep.seam import REAL, Seam

LOOP = "loop"
"""The entry of a checkpoint with the place of the loop, which nobody asks for."""
_LENGTH = 8


def export(
    source: Any,
    path: Any,
    *,
    only: str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    step: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    seam: Seam = REAL,
) -> Written:
    """Writes a file that appears whole or not at all.

    Args:
        source: an opened checkpoint, or a nested state of arrays (of NumPy, or of a framework that is in use).
        only: a path within it, such as "model"; without it, all of it.
        format: a name in `formats.FORMATS`; by the ending of the path if not given.
        step, metrics: said in the file, where the format has a place for it (safetensors).
        progress: told the number of bytes as they are read from the repository.

    Raises:
        UsageError: for a name without a known ending, or an unknown format.
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
    state = _of_opened(source, only, progress) if isinstance(source, Opened) else _of_state(source, only)
    if name != "safetensors":
        return formats.write(path, state, format=name, overwrite=overwrite, seam=seam)
    with made(path, seam, overwrite) as target:
        changed = safetensors.write(state, _Headed(target, _metadata(step, metrics)))
    return Written(path, target.nbytes, tuple(changed))


def _is_there(path: str, seam: Seam) -> bool:
    try:
        seam.files.size(path)
    except OSError:
        return False  # if it is more than missing, writing will say so
    return True


def _metadata(step: int | None, metrics: Mapping[str, Any] | None) -> dict[str, str]:
    """`format` is what transformers asks for: the names are those of PyTorch."""
    found = {"format": "pt"}
    if step is not None:
        found["step"] = str(step)
    if metrics:
        found["metrics"] = json.dumps(dict(metrics), default=str)
    return found


def _of_opened(opened: Opened, only: str | None, progress: Progress | None) -> Any:
    """What a load gives: of a checkpoint that holds an explicit state alone, that state and the paths in it."""
    base = opened.base
    if only is None:
        state = opened.build(base, progress=progress)
        if not base:
            state.pop(LOOP, None)
        return state
    inner = f"{base}/{only}" if base else only
    of_ours = only.partition("/")[0] in SECTIONS_OF_OURS and all(p != inner for p, _, _ in paths_of(opened.tree))
    return opened.build(only if of_ours else inner, progress=progress)


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


class _Headed(Target):
    """Passes a .safetensors file on, with more metadata in its header. Positions count from behind the header."""

    def __init__(self, target: Target, metadata: Mapping[str, str]) -> None:
        self._target, self._metadata = target, metadata
        self._begin: bytearray | None = bytearray()
        self.name = target.name

    def write(self, data: Any) -> int:
        if self._begin is None:
            return self._target.write(data)
        self._begin += memoryview(data).cast("B")
        end = _LENGTH + int.from_bytes(self._begin[:_LENGTH], "little")
        if len(self._begin) >= max(end, _LENGTH + 1):
            header, rest = json.loads(self._begin[_LENGTH:end]), bytes(self._begin[end:])
            self._begin = None
            self._target.write(self._header(header))
            self._target.write(rest)
        return memoryview(data).nbytes

    def _header(self, header: dict[str, Any]) -> bytes:
        header["__metadata__"] = {**self._metadata, **header.get("__metadata__", {})}
        body = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        body += b" " * (-len(body) % _LENGTH)
        if len(body) > safetensors.HEADER_MAX:
            do = "export fewer arrays, or without metrics"
            raise Unsupported(f"a header of {len(body)} bytes is more than readers take", where=self.name, do=do)
        return len(body).to_bytes(_LENGTH, "little") + body
