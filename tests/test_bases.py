"""How deep checkpoints lean on each other: bounded, and less where the store is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everystep

COUNT = 3 << 20  # of fp32: each save brings more than what is too little to tell how fast the store is


def depths_of(folder: Path, saves: int = 8, moving: int = 1, **settings: Any) -> list[int]:
    """The greatest depth in each of some checkpoints of weights of which every so many move a little."""
    chance = np.random.default_rng(0)
    weights = chance.standard_normal(COUNT, np.float32)
    repo = everystep.open(folder, settings=everystep.Settings(**settings))
    found = []
    with repo.run("drift") as run:
        for step in range(1, saves + 1):
            saved = run.save(step, state={"params": {"w": weights}}).wait()
            view = saved._vault.manifest(saved._commit).views[0]
            found.append(max(view.spot(index).depth for index in range(len(view.layout.chunks))))
            assert np.array_equal(saved.load()["params"]["w"], weights)
            weights[::moving] += np.float32(1e-6) * chance.standard_normal(len(weights[::moving]), np.float32)
    return found


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({"slow_bytes_per_second": 0}, [0, 1, 2, 3, 1, 2, 3, 2]),
        ({"slow_bytes_per_second": 1 << 60}, [0, 1, 1, 0, 1, 1, 0, 1]),
        ({"slow_bytes_per_second": 1 << 60, "base_depth_slow": 2}, [0, 1, 2, 1, 2, 2, 0, 1]),
        ({"slow_bytes_per_second": 1 << 60, "base_ratio_slow": 0.1}, [0] * 8),
        ({"slow_bytes_per_second": 0, "base_depth_max": 0}, [0] * 8),
    ],
)
def test_bases_go_as_deep_as_they_may(tmp_path: Path, limits: dict[str, float], expected: list[int]) -> None:
    assert depths_of(tmp_path, **limits) == expected


def test_small_links_make_longer_chains(tmp_path: Path) -> None:
    """Seven in place of three, nested in the same way; never deeper, though links grow."""
    fast = {"slow_bytes_per_second": 0}
    assert depths_of(tmp_path / "a", 17, 100, **fast) == [*range(8), *range(1, 8), 2, 3]
    assert depths_of(tmp_path / "b", 7, 100, **fast, base_depth_max=2, base_depth_small=4) == [0, 1, 2, 3, 4, 1, 2]
    slow = {"slow_bytes_per_second": 1 << 60}
    assert depths_of(tmp_path / "d", 9, 100, **slow) == [*range(8), 1], "what saves most of a chunk leans there too"
    assert depths_of(tmp_path / "c", 5, 100, **fast, base_depth_max=2, base_depth_small=1) == [0, 1, 2, 1, 2]


def test_a_small_save_says_nothing_of_the_store(tmp_path: Path) -> None:
    repo = everystep.open(tmp_path, settings=everystep.Settings(slow_bytes_per_second=1 << 60))
    with repo.run("small") as run:
        for step in range(1, 5):
            saved = run.save(step, state={"params": {"w": np.arange(5000, dtype=np.float32) + step * 1e-3}}).wait()
            view = saved._vault.manifest(saved._commit).views[0]
            assert view.spot(0).depth == step - 1
