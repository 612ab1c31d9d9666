"""Foreign checkpoint files: one file a format, each with `read` and `write`; the closed list of them is here."""

from __future__ import annotations

from typing import Any, Protocol

from everystep.errors import Unsupported, UsageError
from everystep.formats import npz, pth, safetensors
from everystep.formats.content import Content, Note, Opaque, Written
from everystep.formats.file import Source, Target, made, opened
from everystep.seam import REAL, Seam

__all__ = ["FORMATS", "Content", "Format", "Note", "Opaque", "Written", "format_of", "read", "write"]


class Format(Protocol):
    """What each file of this room offers; `owns` looks at the bytes, never at the name."""

    EXTENSIONS: tuple[str, ...]

    def owns(self, source: Source) -> bool: ...

    def read(self, source: Source) -> Content: ...

    def write(self, state: Any, target: Target) -> list[Note]: ...


FORMATS: dict[str, Format] = {"pth": pth, "npz": npz, "safetensors": safetensors}
_EXTENSIONS = tuple(extension for form in FORMATS.values() for extension in form.EXTENSIONS)
_RELATIVES = {
    b"\x93NUMPY": "a single .npy array: load it with np.load() and save it with np.savez()",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, which is not read yet",
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


def read(source: Any, *, format: str | None = None, strict: bool = False, seam: Seam = REAL) -> Content:
    """The state in a foreign file. No code runs, whatever the file says.

    Args:
        source: a path, or the bytes of a file (a bytes-like object).
        format: a name in `FORMATS`; found from the bytes if not given.
        strict: whether objects that could only be built by running code are an error; they are listed otherwise.

    Raises:
        Damaged: for bytes that no writer of the format makes.
        Unsupported: for a file of no known format, and for what exceeds the bounds of a reader.
        NotFound, StorageError: if the file cannot be read.
    """
    with opened(source, seam) as file:
        name = _format(file) if format is None else _known(format)
        content = FORMATS[name].read(file)
    if strict:
        content.check()
    return content


def write(path: Any, state: Any, *, format: str | None = None, overwrite: bool = False, seam: Seam = REAL) -> Written:
    """A state as a foreign file, which appears whole or not at all.

    Args:
        state: dict, list, tuple, plain values and NumPy arrays.
        format: a name in `FORMATS`; by the ending of the path if not given.

    Raises:
        Unsupported: naming the path of what the format has no form for.
        Conflict: if there is such a file and `overwrite` is False.
        NotFound, StorageError: if the file cannot be written.
    """
    path = seam.files.absolute(path)
    name = format_of(path) if format is None else _known(format)
    with made(path, seam, overwrite) as target:
        changed = FORMATS[name].write(state, target)
    return Written(path, target.nbytes, tuple(changed))


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
