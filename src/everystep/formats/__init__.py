"""Foreign checkpoint files: one file a format, each with `read` and `write`; the closed list of them is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from everystep.errors import Unsupported, UsageError
from everystep.formats import (
    hdf5,
    keras_file,
    keras_weights,
    npz,
    orbax,
    params,
    protobuf,
    pth,
    safetensors,
    saved_model,
    shards,
    tf_bundle,
)
from everystep.formats.content import Content, Note, Opaque, Written
from everystep.formats.file import Source, Target, made, opened
from everystep.seam import REAL, Seam

__all__ = [
    "ATTACHMENTS",
    "FOLDERS",
    "FORMATS",
    "Content",
    "Folder",
    "Format",
    "Note",
    "Opaque",
    "Written",
    "folder_of",
    "format_of",
    "read",
    "write",
]


class Format(Protocol):
    """What each file of this room offers; `owns` looks at the bytes, never at the name."""

    EXTENSIONS: tuple[str, ...]

    def owns(self, source: Source) -> bool: ...

    def read(self, source: Source) -> Content: ...

    def write(self, state: Any, target: Target) -> list[Note]: ...


class Folder(Protocol):
    """A format whose checkpoint is a folder; `owns_folder` looks at the names in it, and at little else."""

    def owns_folder(self, seam: Seam, path: str) -> bool: ...

    def read_folder(self, seam: Seam, path: str) -> Content: ...


FORMATS: dict[str, Format] = {
    "pth": pth,
    "npz": npz,
    "safetensors": safetensors,
    "shards": shards,
    "protobuf": protobuf,
    "params": params,
    "keras": keras_file,
    "keras_weights": keras_weights,
    "hdf5": hdf5,
    "tf_bundle": tf_bundle,
}
FOLDERS: dict[str, Folder] = {"orbax": orbax, "shards": shards, "saved_model": saved_model, "keras": keras_file}
ATTACHMENTS: dict[str, tuple[str, ...]] = dict.fromkeys(("keras", "keras_weights"), keras_file.ATTACHMENTS)
"""What of a run's attachments belongs into files of a format."""
_METADATA = ("safetensors", "shards", "protobuf")
_EXTENSIONS = tuple(extension for form in FORMATS.values() for extension in form.EXTENSIONS)
_RELATIVES = {
    b"\x93NUMPY": "a single .npy array: load it with np.load() and save it with np.savez()",
    b"\x80": "a plain pickle: load it where you trust it, and save it with torch.save() or np.savez()",
}


def format_of(path: str) -> str:
    """The format that a name ends like.

    Raises:
        UsageError: if there is none.
    """
    for name, form in FORMATS.items():
        if path.lower().endswith(form.EXTENSIONS):
            return name
    known = ", ".join(_EXTENSIONS)
    raise UsageError(f"no format for this name; known endings: {known}", where=path, do="give format=")


def folder_of(path: str, seam: Seam = REAL) -> str:
    """The format of a folder that is one checkpoint; empty for one that is not."""
    return next((name for name, form in FOLDERS.items() if form.owns_folder(seam, path)), "")


def read(source: Any, *, format: str | None = None, strict: bool = False, seam: Seam = REAL) -> Content:
    """The state in a foreign file, or in a folder that is one checkpoint. No code runs, whatever the file says.

    Args:
        source: a path, or the bytes of a file (a bytes-like object).
        format: a name in `FORMATS`; found from the bytes if not given.
        strict: whether objects that could only be built by running code are an error; they are listed otherwise.

    Raises:
        Damaged: for bytes that no writer of the format makes.
        Unsupported: for a file of no known format, and for what exceeds the bounds of a reader.
        NotFound, StorageError: if the file cannot be read.
    """
    path = "" if isinstance(source, (bytes, bytearray, memoryview)) else seam.files.absolute(source)
    if path and seam.files.is_folder(path):
        content = _folder(path, format, seam)
    else:
        with opened(tf_bundle.located(seam, path) if path else source, seam) as file:
            name = _format(file) if format is None else _known(format)
            content = FORMATS[name].read(file)
    if strict:
        try:
            content.check()
        except Unsupported as error:
            error.where = path or "the bytes given"
            raise
    return content


def write(
    path: Any,
    state: Any,
    *,
    format: str | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    attachments: Mapping[str, bytes] | None = None,
    seam: Seam = REAL,
) -> Written:
    """A state as a foreign file, which appears whole or not at all.

    Args:
        state: dict, list, tuple, plain values and NumPy arrays.
        format: a name in `FORMATS`; by the ending of the path if not given.
        metadata: text beside the state, where the format has a place for it (safetensors, Protocol Buffers).
        max_shard_size: bytes, or text such as "5GB": a larger .safetensors file becomes several, and an index beside
            them, whose path is in the answer.
        attachments: files that belong to the state, of which a format needs those in `ATTACHMENTS`: a model's
            configuration (Keras).

    Raises:
        UsageError: for `metadata` and `max_shard_size` with another format, or a size that is none.
        Unsupported: naming the path of what the format has no form for.
        Conflict: if there is such a file and `overwrite` is False.
        NotFound, StorageError: if the file cannot be written.
    """
    path = seam.files.absolute(path)
    name = format_of(path) if format is None else _known(format)
    if metadata and name not in _METADATA:
        raise UsageError(f"{name} has no place for metadata", where=path, do=f"one of {', '.join(_METADATA)}")
    if max_shard_size is not None:
        if name not in ("safetensors", "shards"):
            raise UsageError(f"{name} has no shards", where=path, do="give a .safetensors file, or no max_shard_size")
        if name == "safetensors" and shards.needed(state, max_shard_size):
            path, name = f"{path}.index.json", "shards"
    with made(path, seam, overwrite) as target:
        if name == "shards":
            changed = shards.write(
                state, target, metadata, shards.SHARD_BYTES if max_shard_size is None else max_shard_size
            )
        elif metadata and name in _METADATA:
            changed = {"safetensors": safetensors, "protobuf": protobuf}[name].write(state, target, metadata)
        elif name in ATTACHMENTS:
            changed = {"keras": keras_file, "keras_weights": keras_weights}[name].write(state, target, attachments)
        else:
            changed = FORMATS[name].write(state, target)
    return Written(path, target.nbytes_in_all, tuple(changed))


def _folder(path: str, format: str | None, seam: Seam) -> Content:
    name = folder_of(path, seam) if format is None else format
    if name not in FOLDERS:
        do = f"give one file of it; or import it: everystep import {path}"
        raise Unsupported("a folder that is not one checkpoint of a known format", where=path, do=do)
    return FOLDERS[name].read_folder(seam, path)


def _known(format: str) -> str:
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", do=f"one of {', '.join(FORMATS)}")
    return format


def _format(source: Source) -> str:
    for name, form in FORMATS.items():
        if form.owns(source):
            return name
    head = source.head()
    found = next((text for start, text in _RELATIVES.items() if head.startswith(start)), "")
    if head[257:262] == b"ustar":
        found = (
            "a tar file, as torch wrote before 2018: with torch, torch.save(torch.load(path), path) makes it a new one"
        )
    if not found and source.name.lower().endswith(_EXTENSIONS):
        return format_of(source.name)  # its reader can say what is wrong with it
    what = found or "a file of no format that is read here"
    raise Unsupported(what, where=source.name, do=f"known formats: {', '.join(FORMATS)}; give format= if it is one")
