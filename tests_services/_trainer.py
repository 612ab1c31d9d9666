"""A training in a process of its own, to be killed: each step's state follows from the one before.

python _trainer.py URL RUN STEPS SAVE_EVERY MIB [REQUEST_SECONDS OUTAGE_SECONDS PAUSE]

A step takes PAUSE seconds. Prints "step N" behind each step, and "end DIGEST" behind the last.
"""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any

import numpy as np

import everystep

LEAVES = 4


class Model:
    """Something that every step changes all over, in a way that depends on all steps before it."""

    def __init__(self, mib: int) -> None:
        self.leaves = [np.full((mib << 20) // 4 // LEAVES, n, np.float32) for n in range(LEAVES)]

    def train(self) -> None:
        for leaf in self.leaves:
            leaf *= np.float32(0.999)
            leaf += np.random.standard_normal(leaf.size).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {f"leaf{n}": leaf for n, leaf in enumerate(self.leaves)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.leaves = [np.array(state[f"leaf{n}"]) for n in range(LEAVES)]

    def digest(self) -> str:
        found = hashlib.sha256()
        for leaf in self.leaves:
            found.update(leaf.tobytes())
        return found.hexdigest()


def main() -> None:
    url, name, (steps, save_every, mib) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:6])
    request, outage, pause = map(float, sys.argv[6:] or (30, 120, 0))
    settings = everystep.Settings(
        pack_bytes_max=1 << 20, chunk_bytes_max=256 << 10, request_seconds=request, upload_seconds=2 * request,
        outage_seconds=outage, put_attempts=1 if outage < 10 else 3,
    )  # fmt: skip
    np.random.seed(0)
    model = Model(mib)
    with everystep.open(url, settings=settings).run(name) as run:
        run.track(model=model)
        for step in run.steps(steps, save_every=save_every):
            model.train()
            time.sleep(pause)
            run.record(loss=1.0 / step)
            print("step", step, flush=True)
    print("end", model.digest(), flush=True)


if __name__ == "__main__":
    main()
