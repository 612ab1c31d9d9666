"""The store of a benchmark: one that is given, or a Ceph object gateway that is started for as long as it takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import timing

SERVICES = Path(__file__).parents[1] / "tests_services"
STORE_BYTES = 8 << 30
BUCKET = "bench"


@contextmanager
def store(url: str | None, *, apart: bool) -> Iterator[str]:
    """The URL of a place to measure.

    Args:
        url: the user's own; None for a gateway that is started here, as the tests start theirs.
        apart: the gateway gets one half of the cores and this process the other, as if each had its machine.

    Raises:
        RuntimeError: if it does not start, or there is but one core.
    """
    if url is not None:
        yield url
        return
    sys.path.insert(0, str(SERVICES))
    try:
        import _ceph
    finally:
        sys.path.remove(str(SERVICES))
    with timing.scratch(None) as folder, _kept(os.environ):
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        if apart and not half:
            raise RuntimeError("--apart needs two cores")
        if apart:
            os.sched_setaffinity(0, cores[:half])  # whom this process starts takes that over
        try:
            ceph = _ceph.Ceph(Path(folder), STORE_BYTES)
        finally:
            os.sched_setaffinity(0, cores[half:] if apart else cores)
        try:
            place = ceph.place()
            os.environ.update(place.environment)
            place.create(BUCKET)
            yield f"s3://{BUCKET}/everystep"
        finally:
            ceph.stop()
            os.sched_setaffinity(0, cores)


@contextmanager
def _kept(environment: os._Environ[str]) -> Iterator[None]:
    """Afterwards all is as it was."""
    before = dict(environment)
    try:
        yield
    finally:
        environment.clear()
        environment.update(before)
