"""What a run takes up, against the files that lie there."""

from pathlib import Path

import numpy as np
import pytest

import everystep
from everystep.vault.packs import MAGIC


def files(place: Path) -> int:
    return sum(path.stat().st_size for path in (place / "runs").rglob("*") if path.is_file())


@pytest.fixture
def past(tmp_path: Path) -> everystep.PastRun:
    rng = np.random.default_rng(0)
    weights, moments = rng.normal(size=(2, 300_000)).astype(np.float32)
    frozen = rng.normal(size=200_000)
    with everystep.open(str(tmp_path)).run("a") as run:
        for step in range(1, 6):
            weights, moments = weights * np.float32(1.0001), moments * np.float32(0.9)
            run.save(step, state={"params": weights, "opt_state": {"m": moments}, "table": frozen}).wait()
    return everystep.open(str(tmp_path))["a"]


def test_every_byte_has_its_place(tmp_path: Path, past: everystep.PastRun) -> None:
    seen: list[tuple[int, int]] = []
    stats = past.stats(progress=lambda *done: seen.append(done))
    assert seen == [(i, 5) for i in range(1, 6)]
    assert stats.total_bytes == files(tmp_path)
    assert stats.checkpoints == 5 and stats.thin == stats.undoable == 0
    assert stats.logical_bytes == sum(share.logical_bytes for share in stats.roles.values())
    assert stats.roles["weights"].logical_bytes == 5 * 1_200_000 == stats.roles["optimizer"].logical_bytes
    assert stats.roles["other"].stored_bytes < 1_600_100 < 8_000_000 == stats.roles["other"].logical_bytes
    assert sum(share.stored_bytes for share in stats.codecs.values()) == stats.chunk_bytes
    assert (
        any(stats.codecs[name].stored_bytes > 0 for name in ("delta", "packed") if name in stats.codecs)
        and stats.ratio < 0.7
    )
    packs = sum(1 for _ in (tmp_path / "runs").rglob("packs/*/*"))
    assert stats.other_bytes == packs * len(MAGIC), "beside the beginning of each pack, there is nothing else"


def test_what_is_dropped_is_not_counted_as_kept(tmp_path: Path, past: everystep.PastRun) -> None:
    before = past.stats()
    past.forget(keep=everystep.last(3), keep_full=everystep.last(1))
    waiting = past.stats()
    assert (waiting.checkpoints, waiting.thin, waiting.undoable) == (3, 2, 4)
    assert waiting.logical_bytes < before.logical_bytes and waiting.other_bytes > before.other_bytes
    assert waiting.total_bytes == files(tmp_path)
    freed = past.prune(now=True)
    after = past.stats()
    assert after.total_bytes == files(tmp_path) and after.undoable <= waiting.undoable
    assert waiting.total_bytes - after.total_bytes + (after.log_bytes - waiting.log_bytes) == freed.nbytes > 0
