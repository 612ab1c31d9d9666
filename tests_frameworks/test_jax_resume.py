"""The example in JAX: killed from outside in the middle of an epoch, started again, the same bits at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from _jax import bits

import everystep

EXAMPLE = Path(__file__).parents[1] / "examples" / "jax_example.py"
STEPS = 45  # an epoch has 32


def start(repo: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE), "--repo", str(repo), "--run", name, "--steps", str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def steps_of(process: subprocess.Popen[str], kill_at: int | None = None) -> dict[int, str]:
    """step -> loss as printed; the process is dead afterwards."""
    losses: dict[int, str] = {}
    assert process.stdout is not None
    with process:
        try:
            for line in process.stdout:
                _, step, _, loss = line.split()
                losses[int(step)] = loss
                if int(step) == kill_at:
                    break
        finally:
            process.kill() if kill_at is not None else None
    return losses


def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight = steps_of(start(tmp_path, "straight"))
    assert list(straight) == list(range(1, STEPS + 1))
    seen: dict[int, str] = {}
    for kill_at in (17, 38):
        part = steps_of(start(tmp_path, "killed"), kill_at)
        assert all(straight[step] == loss for step, loss in part.items())
        seen.update(part)
    last = steps_of(start(tmp_path, "killed"))
    assert min(last) > 1, "it went on, and did not begin again"
    assert {**seen, **last} == straight
    repo = everystep.open(str(tmp_path))
    ends = [repo[name].latest for name in ("straight", "killed")]
    assert [end.step for end in ends] == [STEPS, STEPS]
    first, second = map(arrays, ends)
    assert first == second and {path.split("/")[0] for path in first} == {"params", "opt_state", "key"}
    assert all(ends[0].diff(ends[1], only=part).same for part in ("params", "opt_state", "key"))
    assert float(straight[STEPS]) < float(straight[1])


def arrays(checkpoint: everystep.Checkpoint) -> dict[str, tuple[object, ...]]:
    """Of the state; the random states of Python and NumPy, which nothing draws from, are anybody's."""
    paths = [leaf.path for leaf in checkpoint.leaves() if not leaf.path.startswith("rng/")]
    return {path: bits(checkpoint.load(only=path)) for path in paths}
