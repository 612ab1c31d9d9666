"""A file's bytes in whole blocks, which a disk takes from this process's memory without a copy in the system's."""

from __future__ import annotations

import errno
import mmap
from typing import Any

import numpy as np

from everystep.seam import Files

BLOCK_BYTES = 4 << 20
ALIGN = 4096
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


def new_block() -> mmap.mmap:
    """Memory at an address that any disk takes. A child of this process gets its own."""
    return mmap.mmap(-1, BLOCK_BYTES, **_PRIVATE)


class Blocks:
    """Takes pieces of any length for a file that is written directly; what is behind the last whole block goes the
    usual way, and so does the rest of a file on whose system a direct write comes to nothing.

    Args:
        block: from `new_block`; nobody else's until `end` has returned.
    """

    def __init__(self, files: Files, fd: int, block: mmap.mmap) -> None:
        self._files, self._fd = files, fd
        self._bytes = np.frombuffer(block, np.uint8)
        self._filled = 0
        self._direct = True

    def add(self, piece: Any) -> None:
        source, at = np.asarray(memoryview(piece).cast("B")), 0
        while at < len(source):
            taken = min(len(source) - at, BLOCK_BYTES - self._filled)
            np.copyto(self._bytes[self._filled : self._filled + taken], source[at : at + taken])
            at, self._filled = at + taken, self._filled + taken
            if self._filled == BLOCK_BYTES:
                self._write()

    def end(self) -> None:
        self._go_usual()
        self._write()

    def _write(self) -> None:
        data, at = memoryview(self._bytes[: self._filled]), 0
        while at < len(data):
            if at % ALIGN:  # only a part was taken, and not to the end of a block
                self._go_usual()
            try:
                taken = self._files.write(self._fd, data[at:])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._go_usual()
                continue
            if taken <= 0:
                raise OSError(errno.EIO, "the file takes no bytes")
            at += taken
        self._filled = 0

    def _go_usual(self) -> None:
        if self._direct:
            self._files.set_direct(self._fd, False)
            self._direct = False
