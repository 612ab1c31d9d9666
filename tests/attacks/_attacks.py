"""What holds for every attack file: refused with its kind, in bounded memory, and nothing executed or written."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _formats import bounded

from everystep import exchange, formats
from everystep.errors import Error
from everystep.exchange import Imported
from everystep.seam import Seam

_NEVER = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen",
    "pickle.find_class", "socket.connect", "socket.bind", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link",
    "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree", "urllib.Request", "webbrowser.open", "ctypes.dlopen",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_seen: list[str] = []
_watching = False


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if not _watching:
        return
    written = event == "open" and type(given[2]) is int and given[2] & _WRITES and "__pycache__" not in str(given[0])
    if event in _NEVER or written:
        _seen.append(f"{event}{given!r}"[:300])


sys.addaudithook(_hook)  # for good: there is no way to take one back, which is why it looks at a flag


@contextlib.contextmanager
def nothing_happens(mib: float = 64.0) -> Iterator[None]:
    """No program, no connection, no pickle's import, no file written; and no more memory than that."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        with bounded(mib):
            yield
    finally:
        _watching = False
    assert not _seen


def refused(source: bytes | Path, kind: str, folder: Path | None = None, name: str = "", mib: float = 64.0) -> Error:
    """
    Args:
        source: the bytes of a file, or the path of one.
        kind: of the error; several with "|" between them.
        folder: where the bytes lie as a file called `name` for the import, which must not fail as a whole.
    """
    with nothing_happens(mib), pytest.raises(Error) as caught:
        formats.read(source, strict=True)
    error = caught.value
    assert error.kind in kind.split("|"), f"{error.kind}: {error}"
    assert error.do, error
    if isinstance(source, bytes) and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source)
        source = folder / name
    if isinstance(source, Path):
        assert error.where
        imported(source.parent, mib)
    return error


def imported(folder: Path, mib: float = 64.0) -> list[Imported]:
    """What an import of the folder would save; no error but those of single files."""
    with nothing_happens(mib):
        seen = exchange.survey(str(folder), Seam())
        return [got for _, got in exchange.each(seen, Seam()) if isinstance(got, Imported)]


def every_damage_is_an_error(
    data: bytes, read: Callable[[bytes], Any], same: Callable[[Any], bool], tries: int = 400, checked: bool = True
) -> None:
    """Cut at every place, with flipped bits and random bytes: an error of ours, or what was written.

    Args:
        checked: whether the format has checksums; without them damage within arrays cannot be seen.
    """
    chance = random.Random(1)
    cuts = range(len(data)) if len(data) < tries else sorted(chance.sample(range(len(data)), tries))
    for end in cuts:
        with pytest.raises(Error):
            read(data[:end])
    for _ in range(tries):
        body = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(body))
            body[at] = chance.choice((body[at] ^ 1 << chance.randrange(8), 0, 255, chance.randrange(256)))
        try:
            got = read(bytes(body))
        except Error:
            continue
        assert not checked or same(got)
