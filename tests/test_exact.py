"""One command trains the examples, kills them from outside and compares their ends; here those that need no more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _thorough import THOROUGH

import everystep

WIDE = {**os.environ, "COLUMNS": "200"}
EXACT = Path(__file__).parent.parent / "examples" / "exact.py"


@pytest.mark.parametrize(("package", "steps"), [("numpy", 60), *([("torch", 24)] if THOROUGH else [])])
def test_the_killed_run_ends_with_the_same_bits(package: str, steps: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(EXACT), "--only", package, "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=WIDE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"3 times .* yes", done.stdout), done.stdout
    killed = everystep.open(str(out / package / "runs"))["killed"]
    assert [session["ended"] for session in killed.sessions()] == ["died"] * 3 + ["closed"]
    assert any(checkpoint.load(only="loop/batch") for checkpoint in killed.checkpoints()), "saved in mid-epoch, too"


def test_a_difference_is_told(tmp_path: Path) -> None:
    """What compares the ends is no toy: another seed, another end."""
    sys.path.insert(0, str(EXACT.parent))
    try:
        import exact
    finally:
        sys.path.remove(str(EXACT.parent))
    repo = everystep.open(str(tmp_path))
    for name, last in ((exact.WHOLE, 1.0), (exact.KILLED, 1.0 + 2**-52)):
        with repo.run(name).track(rng=False) as run:
            run.save(3, state={"w": np.array([0.0, last]), "note": name})
    _, leaves, differing = exact.compare(repo)
    assert leaves == 1 and set(differing) == {"w", "note", "digest"}
