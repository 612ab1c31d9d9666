"""What everystep needs of a store, tried on the store itself: each need a check, with what breaks without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everystep.errors import Error, StorageError, StorageFull
from everystep.seam import REAL, Seam
from everystep.storage.conformance_checks import CHECKS, Broken, Check, Scratch

Progress = Callable[[str, int, int], None]
IN_FLIGHT = 16


@dataclass(frozen=True)
class StorageCheck:
    """One check and how it came out."""

    name: str
    proves: str
    """What holds if it is ok."""
    without: str
    """What breaks if it is not."""
    needed: bool
    """False: everystep can do without."""
    ok: bool
    found: str
    """What was seen."""
    seconds: float


@dataclass(frozen=True)
class StorageReport:
    """What a store does of what everystep needs."""

    url: str
    folder: str
    """Where in the store it was tried."""
    checks: list[StorageCheck]
    left: str
    """Why not all of that folder could be deleted again; nothing, if it could."""

    @property
    def ok(self) -> bool:
        """Whether all that is needed holds."""
        return not any(check.needed for check in self.failed)

    @property
    def failed(self) -> list[StorageCheck]:
        """The checks that did not come out well, the needless ones too."""
        return [check for check in self.checks if not check.ok]


def check(
    storage: Any, seam: Seam = REAL, progress: Progress | None = None, *, only: list[str] | None = None
) -> StorageReport:
    """Tries a store, in a folder of its own that is deleted again: about 2,000 small objects and one of 64 MiB.

    Args:
        progress: told (what is checked now, checks done, checks in all).
        only: names of checks, if not all of them.

    Raises:
        StorageError: if the store takes nothing at all, or is full before the end.
    """
    chosen = [each for each in CHECKS if only is None or each.name in only]
    folder = f"everystep-check-{seam.token(8)}/"
    pool = seam.pool(IN_FLIGHT, "everystep-check")
    tell = progress or (lambda name, done, total: None)
    done: list[StorageCheck] = []
    try:
        storage.put(f"{folder}first", [b"first"])  # whoever may not write, or finds nobody there, is told so at once
        try:
            for each in chosen:
                tell(each.name, len(done), len(chosen))
                done.append(_run(each, Scratch(storage, seam, pool, f"{folder}{each.name}/")))
        except BaseException:  # full, or interrupted: what was written goes all the same
            _clean(storage, folder, pool)
            raise
        tell("cleaning up", len(done), len(chosen))
        left = _clean(storage, folder, pool)
    finally:
        pool.close()
    return StorageReport(str(storage.url), folder, done, left)


def _run(each: Check, scratch: Scratch) -> StorageCheck:
    begun = scratch.seam.monotonic()
    try:
        ok, found = True, each.run(scratch)
    except Broken as broken:
        ok, found = False, str(broken)
    except StorageFull:  # which says nothing about what the store can do
        raise
    except Error as error:
        ok, found = False, f"{error.kind}: {error.what}"
    except Exception as error:  # noqa: BLE001  callers wait for errors of ours; what a library says may hold a secret
        ok, found = False, f"an untyped error came through: {type(error).__name__}"
    seconds = scratch.seam.monotonic() - begun
    return StorageCheck(each.name, each.proves, each.without, each.needed, ok, found, seconds)


def _clean(storage: Any, folder: str, pool: Any) -> str:
    try:
        keys = list(storage.list(folder))
        for _ in pool.map(storage.delete, keys, IN_FLIGHT):
            pass
        rest = list(storage.list(folder))
    except StorageError as error:
        return error.what
    return f"{len(rest)} objects are still listed" if rest else ""
