"""What every rank of a host reads, read by one of them: ranges of objects, handed on in a folder of the host's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from blake3 import blake3

from everystep.seam import Seam

STALE_SECONDS = 3600.0
"""A folder that nobody uses, left by processes that were killed, is removed after so long."""
FREE_SHARE = 4
"""Of the free space there, each process uses at most one part in so many."""
_USERS = "users"


class HostShare:
    """Ranges of objects that processes of this host hand each other. Whoever comes first reads a range from the store,
    those who want it meanwhile wait for it, and whoever leaves last removes everything.

    Nothing depends on it: what cannot be handed on is read from the store. Nor is it trusted: whoever reads holds what
    comes from it against its hashes, as what comes from the store.
    """

    def __init__(self, folder: str, seam: Seam, turn: float) -> None:
        self._folder, self._files = folder, seam.files
        self.turn = turn
        """Where in the order of things this process begins: a share of the whole, another one for each."""
        self._left = self._files.free(folder) // FREE_SHARE

    def get(self, storage: Any, key: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of an object, as the storage gives them."""
        nbytes = stop - start
        name = blake3(f"{key} {start} {stop}".encode()).hexdigest()[:32]
        try:
            fd = self._files.open_shared(f"{self._folder}/{name}")
        except OSError:
            return memoryview(storage.get(key, start, stop))
        try:
            found = self._found(fd, nbytes)
            if found is None:
                found = memoryview(storage.get(key, start, stop))
                self._hand_on(fd, found)
            return found
        finally:
            self._files.close(fd)

    def _found(self, fd: int, nbytes: int) -> memoryview | None:
        """What another process has left; while one is at it, it is waited for. None: it is left to this one."""
        try:
            self._files.lock(fd, alone=True)
            return self._files.map(fd, nbytes) if self._files.nbytes(fd) == nbytes > 0 else None
        except (OSError, ValueError):
            return None

    def _hand_on(self, fd: int, data: memoryview) -> None:
        """It is whole when it is as long as it is to be: whoever is killed meanwhile leaves less."""
        try:
            if self._files.nbytes(fd) or len(data) > self._left:
                return
            self._left -= len(data)
            while data:
                data = data[self._files.write(fd, data) :]
        except OSError:
            return  # a full disk: the others read it from the store


@contextmanager
def host_share(storage: Any, folder: str, seam: Seam, ranks: int) -> Iterator[HostShare | None]:
    """What processes of this host hand each other while they read a run; None where there is nothing to gain.

    Args:
        ranks: of the job, on this host.
    """
    root = seam.host_folder()
    if ranks <= 1 or storage.fan_out <= 1 or root is None:
        yield None
        return
    identity = blake3(f"{getattr(storage, 'identity', storage.url)} {folder}".encode()).hexdigest()[:32]
    users = _enter(seam, root, f"{root}/{identity}")
    if users is None:
        yield None
        return
    local = seam.environ("LOCAL_RANK") or ""
    number = int(local) if local.isdigit() else seam.pid()
    share: HostShare | None = None
    with suppress(OSError):
        share = HostShare(f"{root}/{identity}", seam, number % ranks / ranks)
    try:
        yield share
    finally:
        _leave(seam, users, f"{root}/{identity}")


def _enter(seam: Seam, root: str, folder: str) -> int | None:
    """The open file whose lock says that this process uses the folder; None where there can be none."""
    files = seam.files
    try:
        if not files.own_folder(root):
            return None
        _tidy(seam, root, folder)
        while True:
            try:
                if not files.own_folder(folder):
                    return None
                users = files.open_shared(f"{folder}/{_USERS}")
            except FileNotFoundError:
                continue  # whoever left last has just removed it
            files.lock(users, alone=False)
            if files.is_at(users, f"{folder}/{_USERS}"):
                return users
            files.close(users)
    except OSError:
        return None


def _leave(seam: Seam, users: int, folder: str) -> None:
    """Removes the folder, if nobody else uses it."""
    try:
        if seam.files.lock(users, alone=True, wait=False):
            seam.files.remove_tree(folder)
    except OSError:
        return  # an odd file system: whoever comes in an hour removes it
    finally:
        seam.files.close(users)


def _tidy(seam: Seam, root: str, but: str) -> None:
    files = seam.files
    for name, is_folder in files.names(root):
        folder = f"{root}/{name}"
        with suppress(FileNotFoundError):  # others tidy, too
            if is_folder and folder != but and seam.now() - files.modified(folder) > STALE_SECONDS:
                _leave(seam, files.open_shared(f"{folder}/{_USERS}"), folder)
