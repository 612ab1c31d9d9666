"""Arrays over four devices, and over two processes of two: saved once, loaded at any sharding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _jax_programs import finish, free_port, start

import everystep

PROGRAM = "_jax_devices.py"


@pytest.mark.parametrize("verb", ["shardings", "keys", "train"])
def test_over_four_devices(verb: str, tmp_path: Path) -> None:
    finish(start(PROGRAM, verb, tmp_path))


def test_over_two_processes(tmp_path: Path) -> None:
    whole = np.arange(96, dtype=np.float32).reshape(8, 12)
    port = free_port()
    finish(*(start(PROGRAM, "ranks", tmp_path, rank, port, "first") for rank in (0, 1)))
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
    finish(*(start(PROGRAM, "ranks", tmp_path, rank, port, "second") for rank in (0, 1)))
    assert everystep.open(str(tmp_path / "repo"))["r"].latest.step == 3
