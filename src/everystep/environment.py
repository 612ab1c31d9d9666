"""The fingerprint of the surroundings of a run: what can make the same program compute other bits."""

from __future__ import annotations

import platform
import sys
from typing import Any

from everystep import adapters
from everystep.errors import UsageError
from everystep.seam import Seam
from everystep.settings import VERSION

_PACKAGES = ("numpy", "torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "optax", "mxnet", "ml_dtypes")
# A difference in one of these can change the bits of the continuation.
MATTERS = ("python", "machine", "packages", "threads", "devices")


def fingerprint(seam: Seam) -> dict[str, Any]:
    """Versions, threads, devices, git commit and whether the tree was dirty; JSON values only."""
    found: dict[str, Any] = {
        "everystep": VERSION,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "packages": {
            name: str(getattr(sys.modules[name], "__version__", "?")) for name in _PACKAGES if name in sys.modules
        },
        "threads": _threads(seam),
        "devices": _devices(),
        "program": sys.argv[0] if sys.argv else "",
    }
    commit = seam.ask("git", "rev-parse", "HEAD")
    if commit is not None:
        dirty = seam.ask("git", "status", "--porcelain", "--untracked-files=no")
        found["git"] = {"commit": commit, "dirty": bool(dirty)}
    return found


def launch_id(seam: Seam) -> str | None:
    """What the launcher calls this start of the job, the same for all its processes; None if no launcher says."""
    job = seam.environ("TORCHELASTIC_RUN_ID")
    if job is not None:
        return f"{job}-{seam.environ('TORCHELASTIC_RESTART_COUNT') or 0}"
    job = seam.environ("SLURM_JOB_ID")
    if job is not None:
        return f"{job}.{seam.environ('SLURM_STEP_ID') or 0}-{seam.environ('SLURM_RESTART_COUNT') or 0}"
    return None


def _threads(seam: Seam) -> dict[str, Any]:
    threads: dict[str, Any] = {
        name: value for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if (value := seam.environ(name)) is not None
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        threads["torch"] = torch.get_num_threads()
    return threads


def _devices() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs that matters, as sentences. A package that only one of the two had loaded does not."""
    found = []
    for name in MATTERS:
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [
                f"{key}: was {before.get(key, 'not set')}, is {after.get(key, 'not set')}"
                for key in sorted({*before, *after})
                if before.get(key) != after.get(key) and (key not in _PACKAGES or (key in before and key in after))
            ]
        elif before != after:
            found.append(f"{name}: was {before}, is {after}")
    return found


def find_place(seam: Seam, asked: tuple[int | None, int | None, str | None], when_busy: str) -> tuple[int, int, str]:
    """(rank, ranks, launch id) as asked for, or as the framework's process group says.

    Raises:
        UsageError: for what cannot be.
    """
    world = adapters.world()
    rank = world[0] if asked[0] is None else asked[0]
    ranks = world[1] if asked[1] is None else asked[1]
    if not 0 <= rank < ranks:
        raise UsageError(f"rank {rank} of {ranks} does not exist", do="ranks count from 0")
    launch = asked[2] or launch_id(seam)
    if ranks > 1 and launch is None:
        raise UsageError(
            "several ranks need a launch id to find each other",
            do="launch=…, the same on every rank and another at each start: a job id and its count of restarts",
        )
    if ranks > 1 and when_busy == "skip":
        raise UsageError('when_busy="skip" could skip on one rank and not on another', do='when_busy="wait"')
    return rank, ranks, launch or "alone"
