"""A folder behind a link of limited speed: a FUSE mount that passes everything on, and lets so many bytes a second by.

with link.mounted(folder, megabytes_per_second) as place: …

Bytes that are written cross the link at once; bytes that are read do so whenever a file is opened anew (the kernel
forgets what it has cached of a file at its open). Reading and writing have the same speed and do not share it. What
does not move data (rename, fsync, stat) costs what it costs below. Linux only, as root or with fusermount, and with
libfuse: apt-get install fuse3.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BURST_SECONDS = 0.005  # what an idle link may catch up: half a megabyte at 100 MB/s
START_SECONDS_MAX = 30.0


class Link:
    """One direction: `carry` returns when so many bytes have passed."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._free_at, self._lock = bytes_per_second, 0.0, threading.Lock()

    def carry(self, nbytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - BURST_SECONDS) + nbytes / self._rate
            pause = self._free_at - now
        if pause > 0:
            time.sleep(pause)


@contextmanager
def mounted(folder: str, megabytes_per_second: float) -> Iterator[str]:
    """A path under which `folder`/behind is reached through the link; unmounted at the end, whatever happened.

    Raises:
        RuntimeError: saying what is missing.
    """
    behind, front = os.path.join(folder, "behind"), os.path.join(folder, "front")
    os.makedirs(behind)
    os.makedirs(front)
    command = [sys.executable, "-m", "benchmarks.link", behind, front, str(megabytes_per_second)]
    server = subprocess.Popen(command, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        _wait(server, front)
        yield front
    finally:
        _unmount(front)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def missing() -> str | None:
    """What this machine lacks, if anything."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse here"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{error}: pip install mfusepy, apt-get install fuse3"
    return None


def _wait(server: subprocess.Popen[bytes], front: str) -> None:
    until = time.monotonic() + START_SECONDS_MAX
    while not os.path.ismount(front):
        if server.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the link could not be mounted at {front}: {missing() or 'see above'}")
        time.sleep(0.02)


def _unmount(front: str) -> None:
    """Lazily at last, so that a file that is still open cannot keep the mount."""
    tools = [["umount", front], ["fusermount3", "-u", front], ["fusermount", "-u", front]]
    for command in [*tools, ["umount", "-l", front], ["fusermount", "-uz", front]]:
        if not os.path.ismount(front):
            return
        if shutil.which(command[0]):
            subprocess.run(command, capture_output=True, check=False)


# the other side ----------------------------------------------------------------------------------------------------


def serve(behind: str, front: str, megabytes_per_second: float) -> None:
    """Until it is unmounted."""
    import mfusepy

    class Passing(mfusepy.Operations):
        """Every call, on the same path below `behind`."""

        use_ns = True

        def __init__(self) -> None:
            self._up, self._down = Link(1e6 * megabytes_per_second), Link(1e6 * megabytes_per_second)

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            found = os.fstat(fh) if fh is not None else os.lstat(behind + path)
            numbers = ("mode", "ino", "nlink", "uid", "gid", "size", "blocks")
            times = {f"st_{kind}": getattr(found, f"st_{kind}_ns") for kind in ("atime", "mtime", "ctime")}
            return {**{f"st_{name}": getattr(found, f"st_{name}") for name in numbers}, **times}

        def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, Any], int]]:
            names = [".", "..", *os.listdir(behind + path)]
            return [(name, self.getattr(os.path.join(path, name)), 0) for name in names]

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(behind + path)
            return {name: getattr(found, name) for name in dir(found) if name.startswith("f_") and name != "f_fsid"}

        def create(self, path: str, mode: int, flags: int = os.O_RDWR) -> int:
            return os.open(behind + path, flags | os.O_CREAT, mode)

        def open(self, path: str, flags: int) -> int:
            return os.open(behind + path, flags & ~os.O_APPEND)  # the kernel says where to write

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            data = os.pread(fh, size, offset)
            self._down.carry(len(data))
            return data

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            self._up.carry(len(data))
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            os.truncate(behind + path if fh is None else fh, length)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            os.fsync(fh)
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            fd = os.open(behind + path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def rename(self, old: str, new: str) -> int:
            os.rename(behind + old, behind + new)
            return 0

        def link(self, target: str, source: str) -> int:
            os.link(behind + source, behind + target)
            return 0

        def symlink(self, target: str, source: str) -> int:
            os.symlink(source, behind + target)
            return 0

        def readlink(self, path: str) -> str:
            return os.readlink(behind + path)

        def unlink(self, path: str) -> int:
            os.unlink(behind + path)
            return 0

        def mkdir(self, path: str, mode: int) -> int:
            os.mkdir(behind + path, mode)
            return 0

        def rmdir(self, path: str) -> int:
            os.rmdir(behind + path)
            return 0

        def chmod(self, path: str, mode: int) -> int:
            os.chmod(behind + path, mode)
            return 0

        def chown(self, path: str, uid: int, gid: int) -> int:
            os.chown(behind + path, uid, gid)
            return 0

        def access(self, path: str, amode: int) -> int:
            if not os.access(behind + path, amode):
                raise OSError(errno.EACCES, "no access")
            return 0

        def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
            os.utime(behind + path, ns=times)
            return 0

    options = {"big_writes": True} if mfusepy.fuse_version_major == 2 else {}
    mfusepy.FUSE(Passing(), front, foreground=True, use_ino=True, fsname="everystep-link", **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link", description="Serves one mount.")
    parser.add_argument("behind")
    parser.add_argument("front")
    parser.add_argument("megabytes_per_second", type=float)
    given = parser.parse_args()
    serve(os.path.abspath(given.behind), os.path.abspath(given.front), given.megabytes_per_second)
