"""Keras's .keras files, a zip archive of configuration and weights; and its .weights.h5 files, written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from everystep.errors import Unsupported
from everystep.formats import hdf5, named
from everystep.formats.content import Content, Note
from everystep.formats.file import Array, Source, Target, opened
from everystep.formats.hdf5_emit import emit
from everystep.formats.keras_layout import CONFIG, OPTIMIZER, Placed, is_raw, model_of, parsed, places, raw
from everystep.formats.keras_optimizer import places_of
from everystep.formats.keras_optimizer import state_of as optimizer_of
from everystep.formats.zipped import MAGIC, Archive, Writer
from everystep.schema import join
from everystep.schema.dtype import ML_DTYPES
from everystep.seam import Seam
from everystep.settings import VERSION

EXTENSIONS: tuple[str, ...] = (".keras",)
METADATA = "keras/metadata.json"
ATTACHMENTS = (CONFIG, METADATA)
"""What of a run belongs into such a file."""
_CONFIG, _METADATA, _WEIGHTS, _PICKLED = "config.json", "metadata.json", "model.weights.h5", "model.weights.npz"
_TEXT_MAX = 256 << 20
_BFLOAT16 = ML_DTYPES["bfloat16"]


def owns(source: Source) -> bool:
    return source.head().startswith(MAGIC) and {_CONFIG, _METADATA} <= set(Archive(source).names)


def read(source: Source) -> Content:
    """`model` and `optimizer` by the names of layers and variables; the configuration as text, never run.

    Raises:
        Damaged, Unsupported: see `everystep.formats.read`.
    """
    archive = Archive(source)
    if _WEIGHTS not in archive.names:
        what = "its weights are a pickle" if _PICKLED in archive.names else "it has no weights"
        raise Unsupported(f"a .keras file that is not read: {what}", where=source.name, do="save it with model.save()")
    texts = {name: archive.read(name).tobytes() for name in (_CONFIG, _METADATA) if name in archive.names}
    content = _content(archive.source(_WEIGHTS), texts, source)
    known = {_CONFIG, _METADATA, _WEIGHTS}
    left = tuple(Note("", f"the file {name[:200]!r} in it is left out") for name in archive.names if name not in known)
    return replace(content, changed=(*content.changed, *left))


def owns_folder(seam: Seam, path: str) -> bool:
    """What `model.save(zipped=False)` makes."""
    return {_CONFIG, _WEIGHTS} <= {name for name, is_folder in seam.files.names(path) if not is_folder}


def read_folder(seam: Seam, path: str) -> Content:
    with opened(f"{path}/{_WEIGHTS}", seam) as source:
        beside = source.beside(_CONFIG)
        text = beside.bytes_at(0, min(beside.size, _TEXT_MAX)).tobytes()
        return _content(source, {_CONFIG: text}, beside)


def _content(weights: Source, texts: Mapping[str, bytes], source: Source) -> Content:
    content, is_ours = hdf5.contents(weights)
    config = parsed(texts[_CONFIG], source.name) if _CONFIG in texts else {}
    state = content.state
    if is_raw(state) and not is_ours:
        model = model_of(state, config)
        kept = {OPTIMIZER: optimizer_of(state[OPTIMIZER], model, config)} if OPTIMIZER in state else {}
        state = {"model": model, **kept}
    beside = {f"keras/{name}": text.decode("utf-8", "replace") for name, text in texts.items()}
    return replace(content, state=state, format="keras", metadata={**beside, **content.metadata})


def write(state: Any, target: Target, attachments: Mapping[str, bytes] | None = None) -> list[Note]:
    """What `keras.models.load_model` takes.

    Raises:
        Unsupported: without the configuration of the model among the attachments, and as `write_weights` does.
    """
    texts = attachments or {}
    if CONFIG not in texts:
        raise _unconfigured(target)
    parsed(texts[CONFIG], CONFIG)
    archive = Writer(target)
    metadata = texts.get(METADATA, json.dumps({"keras_version": "3", "written_by": f"everystep {VERSION}"}).encode())
    for name, text in ((_METADATA, metadata), (_CONFIG, texts[CONFIG])):
        with archive.entry(name, len(text)) as entry:
            entry.write(text)
    plan = _Plan(state, target, texts)
    with archive.entry(_WEIGHTS, plan.nbytes) as entry:
        plan.emit(entry)
    archive.close()
    return plan.changed


def write_weights(state: Any, target: Target, attachments: Mapping[str, bytes] | None = None) -> list[Note]:
    """What `model.load_weights` takes.

    Raises:
        Unsupported: naming the path of what Keras has no form for; without the configuration of the model, unless the
            state is that of a .weights.h5 file.
    """
    plan = _Plan(state, target, attachments or {})
    plan.emit(target)
    return plan.changed


class _Plan:
    """Where in a file of weights each array goes: to Keras's place under its number; and all of them, by links, to one
    of ours under their names, with the table of the state."""

    def __init__(self, state: Any, target: Target, attachments: Mapping[str, bytes]) -> None:
        parts = named.take_apart(state, lambda dtype: hdf5.is_native(dtype) or dtype == _BFLOAT16)
        self._library = hdf5.library(target.name)
        self._arrays: dict[str, Array] = {}
        self._links: dict[str, str] = {}
        self._attributes: dict[str, dict[str, Any]] = {}
        self.changed = parts.changed
        placed = self._placed(state, target, attachments)
        changed = {note.path: note.text for note in parts.changed}
        there: dict[str, str] = {}
        for path, name in placed.arrays.items():
            kept = parts.aliases.get(name, name)
            array = parts.arrays[kept]
            if kept in changed:
                do = "export it to another format"
                what = f"Keras has no form for this in a file: {changed[kept]}"
                raise Unsupported(what, where=name, do=do)
            if kept in there:
                self._links[path] = there[kept]
            else:
                there[kept] = path
                self._add(path, array)
        for name, array in parts.arrays.items():
            ours = hdf5.own_path(name)
            if name in there:
                self._links[ours] = there[name]
            else:
                self._add(ours, array)
        self._add(hdf5.TABLE, np.frombuffer(parts.table, np.uint8))
        held = {path: path for path in self._arrays} | self._links
        for path, kept in placed.links.items():
            below = {f"{path}/{of[len(kept) + 1 :]}": to for of, to in held.items() if of.startswith(f"{kept}/")}
            held.update({of: to for of, to in below.items() if of not in held})
        self._links = {of: to for of, to in held.items() if of != to}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def emit(self, target: Any) -> None:
        emit(self._library, target, self._arrays, self._links, self._attributes)

    def _add(self, path: str, array: Array) -> None:
        if array.dtype == _BFLOAT16:
            array = array.view("V2")
            self._attributes[path] = {"dtype": "bfloat16"}
        self._arrays[path] = array

    def _placed(self, state: Any, target: Target, attachments: Mapping[str, bytes]) -> Placed:
        if is_raw(state):
            return Placed(dict(raw(state)))
        if not isinstance(state, dict):
            raise Unsupported("a state that is no model", where=target.name, do="give the model's: only='model'")
        if CONFIG not in attachments:
            raise _unconfigured(target)
        config = parsed(attachments[CONFIG], CONFIG)
        above = "model" if isinstance(state.get("model"), dict) else ""
        model = dict(state["model"] if above else state)
        inside = model.pop(OPTIMIZER, None)
        placed = places(model, config, above)
        if placed.left:
            what = f"no place in a file of Keras for {', '.join(placed.left[:3])}"
            raise Unsupported(what, where=target.name, do="does the attached configuration belong to this model?")
        outside = state.get(OPTIMIZER) if above else None
        kept, path = (inside, join(above, OPTIMIZER)) if inside is not None else (outside, OPTIMIZER)
        if isinstance(kept, dict) and kept:
            found = places_of(kept, config, path)
            if found is None:
                self.changed.append(Note(path, "Keras will not find the optimizer's state in this file"))
            placed.arrays.update(found or {})
        return placed


def _unconfigured(target: Target) -> Unsupported:
    do = f"attach it in the program that trains: run.attach({CONFIG!r}, model.to_json().encode())"
    return Unsupported(
        "a file of Keras needs the model's configuration, and this run has none", where=target.name, do=do
    )
