"""What leaning on bases costs: links read by a restore, and bytes held by a run that drops what it kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from _train import new_repository

import everystep
from everystep import Checkpoint, Repository
from everystep.storage import MemoryStorage
from everystep.vault import Spot
from everystep.vault.names import pack_key

DEPTH_MAX = everystep.Settings().base_depth_max
CHUNK_BYTES, CHUNKS = 8192, 5
Array = np.ndarray[Any, Any]


class Counting(MemoryStorage):
    """Notes what is read, and the most that it held after any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[str, int]] = []
        self.most = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        data = super().get(key, start, stop)
        self.read.append((key, len(data)))
        return data

    def put(self, key: str, data: Iterable[Any]) -> None:
        super().put(key, data)
        self._look()

    def put_new(self, key: str, data: bytes) -> None:
        super().put_new(key, data)
        self._look()

    def delete(self, key: str) -> None:
        super().delete(key)
        self._look()

    def _look(self) -> None:
        self.most = max(self.most, sum(map(len, self.objects.values())))


def weights(count: int, size: int, step: float) -> Iterator[Array]:
    """A random walk: each differs from the one before by about `step` of itself, in every element."""
    chance = np.random.default_rng(3)
    value = chance.normal(size=size).astype(np.float32)
    for _ in range(count):
        yield value
        value = (value * (1 + step * chance.normal(size=size))).astype(np.float32)


def links(checkpoint: Checkpoint) -> list[list[Spot]]:
    """Of each chunk of weights: its own place, and those of all that it leans on."""
    view = checkpoint._vault.manifest(checkpoint._commit).views[0]
    streams, chunks = view.layout.streams, view.layout.chunks
    return [list(view.spot(i).links()) for i, chunk in enumerate(chunks) if streams[chunk.stream].role == "weights"]


def new(storage: Any, **settings: Any) -> Repository:
    return new_repository(storage=storage, **{"chunk_bytes_max": CHUNK_BYTES, "small_leaf_bytes": 0, **settings})


def test_a_restore_reads_each_link_of_a_chunk_once() -> None:
    storage = Counting()
    repo = new(storage)
    states = list(weights(5 * DEPTH_MAX, CHUNKS * CHUNK_BYTES // 4, 1e-3))
    with repo.run("r") as run:
        for step, value in enumerate(states):
            run.save(step, state={"params": value})
    depths = set()
    for step, value in enumerate(states):
        checkpoint = repo["r"].at(step)
        found = links(checkpoint)
        depth = max(map(len, found)) - 1
        depths.add(depth)
        packs = Counter(pack_key(checkpoint._vault.folder, spot.pack) for chain in found for spot in chain)
        storage.read.clear()
        assert checkpoint.load()["params"].tobytes() == value.tobytes()
        read = [(key, nbytes) for key, nbytes in storage.read if key in packs]
        # Chunks that lie together are read in one piece: a pack once, and no more packs than a chain has links.
        assert sorted(key for key, _ in read) == sorted(packs) and len(packs) == depth + 1
        assert sum(nbytes for _, nbytes in read) == sum(spot.length for chain in found for spot in chain)
    assert depths == set(range(DEPTH_MAX + 1))


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_no_chain_is_longer_than_its_setting(limit: int) -> None:
    storage = Counting()
    repo = new(storage, base_depth_max=limit)
    with repo.run("r") as run:
        for step, value in enumerate(weights(4 * limit + 6, CHUNK_BYTES // 2, 1e-3)):
            run.save(step, state={"params": value})
    lengths = {len(chain) for checkpoint in repo["r"].checkpoints() for chain in links(checkpoint)}
    assert lengths == set(range(1, limit + 2))


def test_where_rules_drop_one_link_is_all() -> None:
    """Everything leans on an anchor that stands alone."""
    storage = Counting()
    repo = new(storage)
    with repo.run("r", keep=everystep.last(3)) as run:
        for step, value in enumerate(weights(20, CHUNKS * CHUNK_BYTES // 4, 1e-6)):
            run.save(step, state={"params": value}).wait()
            for checkpoint in repo["r"].checkpoints():
                assert all(len(chain) <= 2 for chain in links(checkpoint))
            assert step == 0 or any(len(chain) == 2 for chain in links(repo["r"].at(step if step % 8 else step - 1)))


@pytest.mark.parametrize("step", [1e-6, 1.0], ids=["leaning", "alone"])
def test_the_last_three_take_the_room_of_four_and_a_half(step: float) -> None:
    """Three, one being written, one that they lean on: at no moment more than 4.5 states as they are in memory."""
    storage, size = Counting(), 16 * CHUNK_BYTES // 4
    repo, chance = new(storage), np.random.default_rng(5)
    with repo.run("r", keep=everystep.last(3)) as run:
        for number, value in enumerate(weights(25, size, step)):
            noise = chance.normal(size=2 * size).astype(np.float32)
            run.save(number, state={"params": value, "opt_state": noise}).wait()
    assert [checkpoint.step for checkpoint in repo["r"].checkpoints()] == [22, 23, 24]
    assert 3 * 0.5 < storage.most / (3 * 4 * size) <= 4.5
