"""A script that is killed from outside, started again, and compared with one that nobody killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import everystep

EXAMPLES = Path(__file__).parent.parent / "examples"
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false",
}


class Script:
    """An example as a process of its own."""

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        command = [sys.executable, str(EXAMPLES / name), "--repo", str(folder / "runs"), *options]
        environment = {**os.environ, **QUIET}
        self.lines: list[str] = []
        self._errors = (folder / "errors.txt").open("a+")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=folder, env=environment
        )

    def run_to(self, line: str | None) -> None:
        """Until it prints a line that begins so; to its end, for None."""
        assert self.process.stdout is not None
        for said in self.process.stdout:
            self.lines.append(said.rstrip("\n"))
            if line is not None and said.startswith(line):
                return
        code = self.process.wait()
        self._errors.seek(0)
        assert code == 0 and line is None, f"ended with {code}: {self.lines[-3:]}\n{self._errors.read()[-4000:]}"

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self.process.kill()
        self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


def run_whole(name: str, folder: Path, *options: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    script = Script(name, folder, *options)
    try:
        script.run_to(None)
    finally:
        script.end()
    return script.lines


def run_killed(name: str, folder: Path, at: str, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    script = Script(name, folder, *options)
    try:
        script.run_to(at)
        script.kill()
    finally:
        script.end()


def check_resumes_exactly(name: str, run: str, tmp_path: Path, *, kill_at: int, epoch: int, last: int) -> list[str]:
    """Kills in mid-epoch; what it comes to is what an uninterrupted run comes to, bit for bit. Its last lines."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole = run_whole(name, straight)
    run_killed(name, killed, f"step {kill_at}")
    begun = everystep.open(str(killed / "runs"))[run].latest
    assert begun is not None and 0 < begun.step < kill_at and begun.step % epoch, "killed in the middle of an epoch"
    rest = run_whole(name, killed)
    assert any(line.startswith("goes on from") for line in rest) and f"step {begun.step + 1}" in steps_of(rest)[0]
    assert steps_of(whole)[begun.step :] == steps_of(rest), "the same losses"
    ends = [everystep.open(str(folder / "runs"))[run].latest for folder in (straight, killed)]
    assert ends[0] is not None and ends[1] is not None and ends[0].step == ends[1].step == last
    states = [one.load(only="rng") | {"state": one.load()} for one in ends]
    found = differing(*states)
    assert found == []
    return rest


def steps_of(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("step ")]


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two loaded states differ in type, shape or any bit."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict):
        return [name for key in {**a, **b} for name in differing(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [name for i, (x, y) in enumerate(zip(a, b)) for name in differing(x, y, f"{path}/{i}")]
    if isinstance(a, (np.ndarray, np.generic)):
        same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return [] if same else [path]
    return [] if a == b or (a != a and b != b) else [path]
