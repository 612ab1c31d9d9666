"""Create an object exactly once, whatever becomes of the single attempts."""

from __future__ import annotations

from typing import Any

from everystep.errors import AlreadyExists, ReadOnly, StorageError, StorageFull
from everystep.seam import Seam
from everystep.settings import Settings


def put_once(storage: Any, key: str, data: bytes, seam: Seam, settings: Settings) -> bool:
    """Whether the object under this key, durable now, is this one; False if another has the key.

    An attempt that failed may have landed all the same, so the same bytes go to the same key again: then the storage
    says that it is taken, and by what.

    Raises:
        StorageError: after all attempts failed; the object may still be there.
    """
    pause = settings.retry_seconds
    attempt = 0
    while True:
        attempt += 1
        try:
            storage.put_new(key, data)
            return True
        except AlreadyExists:
            return bytes(storage.get(key)) == data
        except (StorageFull, ReadOnly):
            raise
        except StorageError:
            if attempt >= settings.put_attempts:
                raise
        seam.sleep(pause)
        pause *= 2
