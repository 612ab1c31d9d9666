"""Arrays over four devices, and over two processes of two: saved once, loaded at any sharding."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import everystep

PROGRAM = Path(__file__).with_name("_jax_devices.py")


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), *map(str, words)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(*processes: subprocess.Popen[str]) -> None:
    """Waits for all; of one that failed, shows what it said."""
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, text in zip(processes, said):
        assert process.returncode == 0, text


@pytest.mark.parametrize("verb", ["shardings", "keys", "train"])
def test_over_four_devices(verb: str, tmp_path: Path) -> None:
    finish(start(verb, tmp_path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_over_two_processes(tmp_path: Path) -> None:
    whole = np.arange(96, dtype=np.float32).reshape(8, 12)
    port = free_port()
    finish(*(start("ranks", tmp_path, rank, port, "first") for rank in (0, 1)))
    latest = everystep.open(str(tmp_path / "repo"))["r"].latest
    assert (latest.step, latest.ranks) == (2, 2)
    loaded = latest.load()
    for number in range(5):
        assert (loaded[f"w{number}"] == whole + 2 + number).all() and loaded["n"] == 2
    assert (loaded["mixed"] == whole * 2).all()
    assert sorted(len(leaf.boxes) for leaf in latest.leaves()) == [1] * 6 + [2]
    raw = sum(leaf.nbytes for leaf in latest.leaves())
    assert latest.cost["raw_bytes"] == raw, "what both hold is saved by one"
    port = free_port()
    finish(*(start("ranks", tmp_path, rank, port, "second") for rank in (0, 1)))
    assert everystep.open(str(tmp_path / "repo"))["r"].latest.step == 3
