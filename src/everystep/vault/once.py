"""Create an object exactly once, whatever becomes of the single attempts."""

from __future__ import annotations

from typing import Any

from everystep.errors import AlreadyExists, ReadOnly, StorageError, StorageFull, UnknownOutcome, Unreachable
from everystep.seam import Seam
from everystep.settings import Settings

PAUSE_SECONDS_MAX = 10.0


def put_once(storage: Any, key: str, data: bytes, seam: Seam, settings: Settings) -> bool:
    """Whether the object under this key, durable now, is this one; False if another has the key.

    An attempt that failed may have landed all the same, so the same bytes go to the same key again: then the storage
    says that it is taken, and by what. A place that is far away repeats what it knows not to have landed by itself, and
    leaves the rest to this function, which asks for as long.

    Raises:
        StorageError: after all attempts failed; the object may still be there.
    """
    begun, pause = seam.monotonic(), settings.retry_seconds
    is_far = storage.fan_out > 1
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
        except StorageError as error:
            is_over = attempt >= settings.put_attempts
            if is_far and isinstance(error, (UnknownOutcome, Unreachable)):
                is_over = isinstance(error, Unreachable) or seam.monotonic() - begun >= settings.outage_seconds
            if is_over:
                raise
        seam.sleep(pause)
        pause = min(2 * pause, PAUSE_SECONDS_MAX)
