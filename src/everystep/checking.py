"""Does a store do what checkpoints need? Tried on the user's own folder or bucket."""

from __future__ import annotations

from everystep.errors import UsageError
from everystep.seam import REAL, Seam
from everystep.settings import DEFAULT, Settings
from everystep.storage import LocalStorage, open_storage
from everystep.storage.conformance import Progress, StorageReport, check


def check_storage(
    place: str, *, settings: Settings = DEFAULT, seam: Seam = REAL, progress: Progress | None = None
) -> StorageReport:
    """Tries a store with what everystep needs of it: writes about 2,000 small objects and one of 64 MiB below the
    place, in a folder of its own, and deletes them again. What else lies there is left alone.

    Args:
        place: a folder, or a URL.
        progress: told (what is checked now, checks done, checks in all).

    Raises:
        StorageError: if the store takes nothing at all.
        UsageError: for a folder that is not there, or a URL of no kind that is known.
    """
    place = place if isinstance(place, str) else place.__fspath__()
    storage = open_storage(place, seam, settings)
    if not isinstance(storage, LocalStorage):
        report = check(storage, seam, progress)
        remove = getattr(getattr(storage, "inner", None), "remove_folder", None)
        if remove is not None and not report.left:  # HDFS keeps folders of which everything was deleted
            remove(report.folder)
        return report
    if not seam.files.is_folder(storage.root):
        raise UsageError("there is no such folder", where=storage.root, do="make it first, or give the one above it")
    # Objects leave their folders behind, which only a disk has.
    with seam.scratch_folder(storage.root) as scratch:
        return check(LocalStorage(scratch, seam), seam, progress)
