"""A program that saves a state a few times, and says how much memory that took at its peak beside the state itself."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import everystep

LEAVES = 8


def status(name: str) -> int:
    """Bytes, as the kernel counts them."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status has no {name}")


def change(weights: list[Any], chance: np.random.Generator) -> None:
    """Every element a little, and nothing of the size of a leaf beside it."""
    for weight in weights:
        for piece in np.array_split(weight, max(1, weight.nbytes >> 20)):
            piece += chance.standard_normal(piece.size, np.float32) * np.float32(1e-4)


def main(state_mib: int, saves: int, settings: dict[str, Any]) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    weights = [np.zeros((state_mib << 20) // 4 // LEAVES, np.float32) for _ in range(LEAVES)]
    for weight in weights:
        for piece in np.array_split(weight, max(1, weight.nbytes >> 20)):
            chance.standard_normal(out=piece, dtype=np.float32)
    state = {"params": {f"w{number}": weight for number, weight in enumerate(weights)}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", everystep.EverystepWarning)
        run = everystep.open(folder, settings=everystep.Settings(**settings)).run("r")
        run.save(0, state={"params": {"a": np.zeros(9)}}).wait()  # what is imported and started at the first save
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        peaks, done = [], []
        for step in range(1, saves + 1):
            saved = run.save(step, state=state)
            done.append(saved.done)
            saved.wait()
            peaks.append(status("VmHWM") - before)
            if step == saves:
                back = run.at(step).load()["params"]
                equal = all(back[name].tobytes() == weight.tobytes() for name, weight in state["params"].items())
            else:
                change(weights, chance)
        stored = [checkpoint.cost["stored_bytes"] for checkpoint in run.checkpoints()[1:]]
        run.close()
    return {"nbytes": sum(w.nbytes for w in weights), "peaks": peaks, "done": done, "equal": equal, "stored": stored}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))))
