"""Calls of the command line, a repository for them to look at, and ways to hurt it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import everystep
from everystep.cli.app import app

COMMAND = [sys.executable, "-m", "everystep"]
QUIET = {"EVERYSTEP_REPO": None, "NO_COLOR": None, "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": None}

KILLED = """
import os, signal, sys
import numpy as np
import everystep

run = everystep.open(sys.argv[1]).run("resnet", config={"lr": 0.1, "betas": (0.9, 0.99), "amp": True})
run.attach("tokenizer.json", b"{}")
run.resume()
for step in range(1, 8):
    run.record(step=step, loss=1 / step)
    if step % 2 == 0:
        state = {"model": {"w": np.full((300, 40), step, "f4")}, "optimizer": {"m": np.zeros((300, 40), "f8")}}
        run.save(step, state=state, metrics={"val_loss": 1.5 / step, "epoch": step // 4}, reason="every 2 steps").wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def state_of(step: int) -> dict[str, Any]:
    return {"model": {"w": np.full((300, 40), step, "f4")}, "optimizer": {"m": np.zeros((300, 40), "f8")}}


def train(place: Path) -> Path:
    """A run that was killed after step 6 and went on to 12, and one with an @ in its name."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL
    repo = everystep.open(str(place))
    with repo.run("resnet") as run:
        assert run.resume() == 6
        for step in (8, 10, 12):
            loss = math.nan if step == 12 else 1.5 / step
            run.save(step, state=state_of(step), metrics={"val_loss": loss, "epoch": step // 4}).wait()
    repo["resnet"].at(4).tag("good_one")
    repo["resnet"].note("the learning rate was too high")
    with repo.run("vit@home") as run:
        run.save(1, state={"model": np.arange(6.0).reshape(2, 3)}).wait()
    return place


def call(place: Path | None, *args: str, env: dict[str, str | None] | None = None) -> Result:
    given = ["-r", str(place), *args] if place is not None else [*args]
    return CliRunner(env={**QUIET, **(env or {})}).invoke(app, given)


def lines_of(place: Path | None, *args: str) -> list[str]:
    found = call(place, *args)
    assert found.exit_code == 0, found.output
    return found.stdout.splitlines()


def json_of(place: Path | None, *args: str, code: int = 0) -> Any:
    found = call(place, *args, "--json")
    assert found.exit_code == code, found.output
    return json.loads(found.stdout, parse_constant=pytest.fail)  # NaN is no JSON


def process(*args: str, **named: Any) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in QUIET}
    env.update(named.pop("env", {}))
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, env=env, check=False, **named)


def flip(path: Path, at: int = 40) -> None:
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(body)


def record_of(place: Path, run: str, slot: int) -> Path:
    return place / "runs" / run / "log" / f"{slot:020d}"


def slot_of(place: Path, run: str, step: int) -> int:
    """The record that commits a step."""
    for path in sorted((place / "runs" / run / "log").iterdir()):
        events = json.loads(path.read_bytes().split(b"\n")[0])["events"]
        if any(event["type"] == "commit" and event["step"] == step for event in events):
            return int(path.name)
    raise AssertionError(step)


def hurt(place: Path, run: str, step: int, *, manifest: bool = False) -> str:
    """Flips a bit in a pack of chunks that no checkpoint before had, or in the manifest; the checkpoint's id."""
    body = json.loads(record_of(place, run, slot_of(place, run, step)).read_bytes().split(b"\n")[0])
    (commit,) = (event for event in body["events"] if event["type"] == "commit")
    root = commit["root"]
    numbers = [n for writer, a, b in commit["packs"] for n in range(a, b + 1) if writer == root[0] and n < root[1]]
    flip(place / "runs" / run / "packs" / root[0] / str(root[1] if manifest else max(numbers)), at=30)
    return str(commit["id"])
