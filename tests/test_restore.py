"""A load puts bytes where they belong: in place, in bounded memory, and damage is named where it lies."""

from __future__ import annotations

import itertools
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _train import WithoutGit, new_repository
from hypothesis import given
from hypothesis import strategies as st
from test_ranks import beside, runs_on, together

import everystep
from everystep import Checkpoint, Part, Repository, Settings, codecs
from everystep.restore import room
from everystep.restore.boxes import range_of
from everystep.schema import Box
from everystep.storage import LocalStorage, MemoryStorage
from everystep.vault import Spot
from everystep.vault.names import pack_key

Array = np.ndarray[Any, Any]
State = dict[str, dict[str, Array]]
DEPTH = 8
LONG = {"base_depth_max": DEPTH, "slow_bytes_per_second": 0}
SMALL = {"chunk_bytes_max": 8192, "small_leaf_bytes": 4096, **LONG}
LIKES = ("numpy", "torch", "saved")


def drifting(count: int, sizes: dict[str, int], seed: int = 1) -> Iterator[State]:
    """States that move a little at each step, so that each leans on the one before."""
    chance = np.random.default_rng(seed)
    values = {name: chance.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    for _ in range(count):
        yield {"params": dict(values)}
        values = {name: (v * (1 + 1e-4 * chance.normal(size=v.size))).astype(np.float32) for name, v in values.items()}


# `large` has five chunks, the last of which is short; the small ones lie across the borders of theirs.
SIZES = {"large": 9000, "a": 900, "b": 1000, "c": 700, "empty": 0, "one": 1}


def saved(storage: Any, states: list[State], **settings: Any) -> Repository:
    repo = new_repository(storage=storage, **{**SMALL, **settings})
    with repo.run("r") as run:
        for step, state in enumerate(states):
            run.save(step, state=state).wait()
    return repo


def same(loaded: Any, state: State) -> bool:
    found = {name: np.asarray(value) for name, value in loaded["params"].items()}
    return found.keys() == state["params"].keys() and all(
        found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes()
        for name, value in state["params"].items()
    )


def chains(checkpoint: Checkpoint) -> list[list[Spot]]:
    """Of each chunk of the state: its own place, then those of all that it leans on."""
    view = checkpoint._vault.manifest(checkpoint._commit).views[0]
    return [list(view.spot(index).links()) for index in range(len(view.layout.chunks))]


# in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("like", LIKES)
@pytest.mark.parametrize("readers", [0, 3])
def test_every_depth_of_a_chain_comes_back(like: str, readers: int) -> None:
    states = list(drifting(2 * DEPTH + 3, SIZES))
    repo = saved(MemoryStorage(), states, readers=readers)
    depths = set()
    for step, state in enumerate(states):
        checkpoint = repo["r"].at(step)
        depths.add(max(map(len, chains(checkpoint))) - 1)
        assert same(checkpoint.load(like=like), state)
    assert depths == set(range(DEPTH + 1))


def test_a_chain_is_decoded_in_the_memory_of_the_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second buffer for what lies in one leaf: each link is decoded over the one before, in its place."""
    states = list(drifting(DEPTH + 1, SIZES))
    checkpoint = saved(MemoryStorage(), states)["r"].at(DEPTH)
    calls: list[tuple[Array | None, Array]] = []
    decode = codecs.decode

    def noted(codec: int, stored: memoryview, nbytes: int, base: Any = None, out: Any = None) -> Array:
        if out is not None:  # a page of the manifest has none
            calls.append((base, out))
        return decode(codec, stored, nbytes, base, out)

    monkeypatch.setattr(codecs, "decode", noted)
    loaded = checkpoint.load()["params"]
    assert same({"params": loaded}, states[DEPTH])
    large = [(base, out) for base, out in calls if np.shares_memory(out, loaded["large"])]
    found = [chain for chain in chains(checkpoint) if len(chain) == DEPTH + 1]
    assert len(found) >= 5 and len(large) == 5 * (DEPTH + 1) < len(calls)
    assert sum(base is None for base, _ in large) == 5 and all(base is None or base is out for base, out in large)
    others = [out for _, out in calls if not np.shares_memory(out, loaded["large"])]
    assert not any(np.shares_memory(out, loaded[name]) for out in others for name in ("a", "b", "c"))


def test_what_is_loaded_is_nobody_elses(tmp_path: Path) -> None:
    (state,) = drifting(1, {**SIZES, "wide": 300_000, "wider": 400_000})
    repo = everystep.open(str(tmp_path))
    with repo.run("r") as run:
        run.save(1, state=state).wait()
    checkpoint = repo["r"].at(1)
    first, second = checkpoint.load(), checkpoint.load()
    for value in first["params"].values():
        assert value.flags.writeable and value.flags.c_contiguous
        value.fill(7)
    assert same(second, state) and same(checkpoint.load(like="torch"), state)
    several = checkpoint.load(only=["params", "params/large"])
    several["params"]["large"].fill(7)
    assert several["params/large"].tobytes() == state["params"]["large"].tobytes()


def test_parts_that_share_chunks_are_read_once() -> None:
    class Counting(MemoryStorage):
        read = 0

        def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
            self.read += "/packs/" in key
            return super().get(key, start, stop)

    storage = Counting()
    (state,) = drifting(1, dict.fromkeys("abcdefgh", 100))
    checkpoint = saved(storage, [state])["r"].at(0)
    checkpoint.leaves()
    storage.read = 0
    parts = checkpoint.load(only=[f"params/{name}" for name in "abcdefgh"])
    assert storage.read == 1
    assert all(value.tobytes() == state["params"][path[-1]].tobytes() for path, value in parts.items())


# damage ------------------------------------------------------------------------------------------------------------


def flipped(storage: MemoryStorage, folder: str, spot: Spot, at: int) -> tuple[str, bytes]:
    key = pack_key(folder, spot.pack)
    good = storage.objects[key]
    place = spot.offset + at
    storage.objects[key] = good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :]
    return key, good


@pytest.mark.parametrize("readers", [0, 2])
def test_damage_is_named_by_the_link_that_it_is_in(readers: int) -> None:
    """Wherever in a chain, and wherever in the link: its header, its middle, its end. Only the last link's hash is
    looked at on the way, and never is wrong data the answer."""
    storage = MemoryStorage()
    states = list(drifting(DEPTH + 1, SIZES))
    repo = saved(storage, states, readers=readers)
    checkpoint = repo["r"].at(DEPTH)
    folder, found = checkpoint._vault.folder, chains(checkpoint)
    assert max(map(len, found)) == DEPTH + 1
    named = 0
    for chain in (found[1], found[-1]):
        for depth, spot in enumerate(chain):
            for at in (0, 3, spot.length // 2, spot.length - 1):
                key, good = flipped(storage, folder, spot, at)
                fresh = repo["r"].at(DEPTH)
                for ask in (fresh.load, fresh.verify):
                    try:
                        loaded = ask()
                        assert ask == fresh.verify or same(loaded, states[DEPTH])  # a bit that says nothing
                    except everystep.Damaged as error:
                        assert error.where == f"{storage.url}/{key} at {spot.offset}" and error.do, (depth, at)
                        named += 1
                storage.objects[key] = good
    assert named >= 6 * sum(len(chain) for chain in (found[1], found[-1]))
    assert same(checkpoint.load(), states[DEPTH])


def test_of_two_damaged_links_the_first_is_named() -> None:
    storage = MemoryStorage()
    repo = saved(storage, list(drifting(5, SIZES)))
    checkpoint = repo["r"].at(4)
    chain = chains(checkpoint)[0]
    for spot in (chain[1], chain[3]):
        flipped(storage, checkpoint._vault.folder, spot, spot.length // 2)
    with pytest.raises(everystep.Damaged) as caught:
        checkpoint.load()
    assert str(caught.value.where).endswith(f"{pack_key('', chain[3].pack)} at {chain[3].offset}")


def test_damage_is_in_all_that_lean_on_it_and_in_nothing_else() -> None:
    """The first state is damaged: whatever leans on it is, and nothing else."""
    storage = MemoryStorage()
    states = list(drifting(4, SIZES))
    repo = saved(storage, states)
    past = repo["r"]
    hit = chains(past.at(0))[2][0]
    leaning = {step for step in range(4) if any(hit in chain for chain in chains(past.at(step)))}
    flipped(storage, past._vault.folder, hit, 5)
    assert leaning == {0, 1, 2, 3}
    assert [checked.whole for checked in repo.check().checked] == [step not in leaning for step in range(4)]
    for step in range(4):
        with pytest.raises(everystep.Damaged, match="at "):
            past.at(step).load(only="params/large")
        part = past.at(step).load(only="params/a")
        assert part.tobytes() == states[step]["params"]["a"].tobytes()


def test_bytes_that_come_wrong_once_are_read_again() -> None:
    class Once(MemoryStorage):
        """The first answer from each pack has a bit flipped in its middle."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()
            self.flips = False

        def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
            data = super().get(key, start, stop)
            if not self.flips or key in self.seen:
                return data
            self.seen.add(key)
            wrong = bytearray(data)
            wrong[len(wrong) // 2] ^= 1
            return memoryview(wrong)

    storage = Once()
    states = list(drifting(5, SIZES))
    checkpoint = saved(storage, states)["r"].at(4)
    checkpoint.leaves()
    storage.flips = True
    assert same(checkpoint.load(), states[4])
    assert len(storage.seen) >= 5


def test_a_chain_against_a_wrong_base_ends_in_damage() -> None:
    """Whatever a base is made of, decoding against it answers something or raises Damaged."""
    storage = MemoryStorage()
    states = list(drifting(3, SIZES))
    checkpoint = saved(storage, states)["r"].at(2)
    vault, chance = checkpoint._vault, np.random.default_rng(7)
    tried = 0
    for chain in chains(checkpoint):
        spot = chain[0]
        if spot.base is None:
            continue
        stored = storage.get(pack_key(vault.folder, spot.pack), spot.offset, spot.offset + spot.length)
        nbytes = vault.read_chunk(spot, plain_length(checkpoint, spot)).nbytes
        for base in (np.zeros(nbytes, np.uint8), np.full(nbytes, 255, np.uint8), chance.bytes(nbytes)):
            out = np.frombuffer(bytearray(base), np.uint8)
            try:
                found = codecs.decode(spot.codec, stored, nbytes, out, out)
            except everystep.Damaged:
                continue
            finally:
                tried += 1
            assert found is out and out.nbytes == nbytes
    assert tried >= 12


def plain_length(checkpoint: Checkpoint, spot: Spot) -> int:
    view = checkpoint._vault.manifest(checkpoint._commit).views[0]
    return next(chunk.nbytes for index, chunk in enumerate(view.layout.chunks) if view.spot(index) == spot)


# memory ------------------------------------------------------------------------------------------------------------


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that were allocated at one time meanwhile, beside those that were there before."""
    tracemalloc.start()
    try:
        kept = work()
        del kept
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [0, 4])
def test_a_load_takes_little_more_than_the_state(tmp_path: Path, depth: int) -> None:
    sizes = {"large": 6 << 20, **{f"middle{i}": 200_000 for i in range(10)}, **{f"small{i}": 9000 for i in range(99)}}
    repo = new_repository(storage=LocalStorage(str(tmp_path), WithoutGit()), **LONG)
    with repo.run("r") as run:
        for step, state in enumerate(drifting(depth + 1, sizes)):
            run.save(step, state=state).wait()
    nbytes = sum(value.nbytes for value in state["params"].values())
    checkpoint = repo["r"].at(depth)
    assert max(map(len, chains(checkpoint))) == depth + 1 and same(checkpoint.load(), state)
    peak = peak_of(checkpoint.load)
    # Two threads, each with up to 8 MiB (or the links of one chunk) as stored and what their codecs need for a chunk.
    links = (depth + 1) * Settings().chunk_bytes_max
    assert nbytes < peak < 1.15 * nbytes + 2 * (max(8 << 20, links) + 6 * Settings().chunk_bytes_max)


def test_verifying_takes_no_more_for_chunks_that_are_stored_in_nothing() -> None:
    """Hundreds of chunks of zeros lie together in a few kilobytes."""
    repo = new_repository(chunk_bytes_max=1 << 20)
    with repo.run("r") as run:
        run.save(1, state={"zeros": np.zeros(128 << 20, np.uint8)}).wait()
    checkpoint = repo["r"].at(1)
    assert checkpoint.cost["stored_bytes"] < 1 << 20
    assert peak_of(checkpoint.verify) < 16 << 20
    assert checkpoint.verify() >= 128 << 20


# rooms -------------------------------------------------------------------------------------------------------------

MIB = 1 << 20


@given(st.lists(st.one_of(st.integers(0, 1000), st.integers(0, 3 * MIB), st.just(128 << 10)), max_size=60))
def test_rooms_are_apart(sizes: list[int]) -> None:
    rooms = room.make_rooms(sizes)
    assert [one.nbytes for one in rooms] == sizes
    assert all(one.dtype == np.uint8 and one.ndim == 1 and one.flags.writeable for one in rooms)
    spans = sorted((one.__array_interface__["data"][0], one.nbytes) for one in rooms if one.nbytes)
    assert all(at + nbytes <= following for (at, nbytes), (following, _) in itertools.pairwise(spans))
    assert all(at % 16 == 0 for at, _ in spans)


def held_by(array: Array) -> int:
    """Bytes of memory that stay as long as the array does."""
    base: Any = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return int(base.nbytes)


def test_a_leaf_that_is_kept_keeps_little_else() -> None:
    sizes = [1000] * 50 + [MIB] * 100 + [40 * MIB, 5 * MIB]
    for size, one in zip(sizes, room.make_rooms(sizes)):
        assert held_by(one) == size if size < 128 << 10 else held_by(one) < size + 18 * MIB


def test_large_rooms_begin_on_a_huge_page() -> None:
    starts = [one.__array_interface__["data"][0] for one in room.make_rooms([20 * MIB, 5 * MIB])]
    assert all(start % (2 * MIB) == 0 for start in starts)


# boxes of several ranks --------------------------------------------------------------------------------------------


@given(st.data())
def test_a_box_lies_together_or_not(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(start, tuple(data.draw(st.integers(1, n - at)) for at, n in zip(start, shape)))
    places = np.arange(int(np.prod(shape))).reshape(shape)[box.index()].reshape(-1)
    together = bool((np.diff(places) == 1).all())
    assert range_of(box, shape) == ((places[0], places[-1] + 1) if together else None)


WHOLE = np.random.default_rng(2).random((60, 70)).astype(np.float32)
CUTS: dict[str, list[tuple[slice, slice]]] = {
    "rows": [(slice(0, 10), slice(None)), (slice(10, 41), slice(None)), (slice(41, 60), slice(None))],
    "rows out of order": [(slice(41, 60), slice(None)), (slice(0, 10), slice(None)), (slice(10, 41), slice(None))],
    "columns": [(slice(None), slice(0, 1)), (slice(None), slice(1, 50)), (slice(None), slice(50, 70))],
    "rows that overlap": [(slice(0, 30), slice(None)), (slice(20, 50), slice(None)), (slice(45, 60), slice(None))],
    "a replica": [(slice(0, 30), slice(None)), (slice(0, 30), slice(None)), (slice(30, 60), slice(None))],
    "one has all": [(slice(0, 30), slice(None)), (slice(None), slice(None)), (slice(3, 9), slice(2, 5))],
    "one has nothing": [(slice(0, 0), slice(None)), (slice(0, 30), slice(None)), (slice(30, 60), slice(None))],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_boxes_of_ranks_come_together(cut: list[tuple[slice, slice]]) -> None:
    """In leaves with chunks of their own, and in such that share them."""
    storage = MemoryStorage()
    small = WHOLE[:, :7]
    runs = runs_on(storage, **SMALL)

    def state(rank: int, step: int) -> dict[str, Any]:
        rows, columns = cut[rank]
        begin = (rows.start or 0, columns.start or 0)
        parts = {"w": Part((WHOLE + step)[cut[rank]].copy(), begin, WHOLE.shape), "step": step}
        for name in "xyz":
            parts[name] = Part((small * step)[rows].copy(), (begin[0], 0), small.shape)
        return {"params": parts}

    together(lambda rank: [runs[rank].save(step, state=state(rank, step)).wait() for step in (1, 2)])
    together(lambda rank: runs[rank].close())
    for step in (1, 2):
        checkpoint = beside(storage)["r"].at(step)
        loaded = checkpoint.load()["params"]
        assert loaded["w"].tobytes() == (WHOLE + step).tobytes() and loaded["w"].shape == WHOLE.shape
        assert all(loaded[name].tobytes() == (small * step).tobytes() for name in "xyz")
        assert checkpoint.load(only="params/y").tobytes() == (small * step).tobytes()


GAPS = {
    "a gap": ([slice(0, 10), slice(10, 41), slice(45, 60)], 3920),
    "as much twice as is missing": ([slice(0, 30), slice(10, 20), slice(40, 60)], 3500),
}


@pytest.mark.parametrize(("rows", "held"), GAPS.values(), ids=GAPS)
def test_what_the_ranks_do_not_hold_is_named(rows: list[slice], held: int) -> None:
    storage = MemoryStorage()
    runs = runs_on(storage)
    parts = [{"params": {"w": Part(WHOLE[cut], (cut.start, 0), WHOLE.shape)}} for cut in rows]
    together(lambda rank: runs[rank].save(1, state=parts[rank]).wait())
    together(lambda rank: runs[rank].close())
    with pytest.raises(everystep.Damaged, match=f"hold {held} of 4200 elements") as caught:
        beside(storage)["r"].at(1).load()
    assert caught.value.where == "state/params/w"


# readers -----------------------------------------------------------------------------------------------------------


def test_a_load_is_cut_into_work_for_all() -> None:
    """Many small pieces, so that no thread has much left to do when the others have ended."""
    values = np.random.default_rng(4).random(8 << 20).astype(np.float32)
    repo = new_repository(chunk_bytes_max=1 << 20)
    with repo.run("r") as run:
        run.save(1, state={"w": values}).wait()
    told: list[int] = []
    loaded = repo["r"].at(1).load(progress=told.append)
    assert loaded["w"].tobytes() == values.tobytes()
    assert sum(told) == 32 << 20 and max(told) <= 4 << 20 and len(told) >= 8


def test_readers_read_ahead_of_those_that_decode() -> None:
    """A store that answers only once four have asked: no single one of two workers would get anywhere."""

    class Far(MemoryStorage):
        def __init__(self) -> None:
            super().__init__()
            self.gate: threading.Barrier | None = None

        def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
            if self.gate is not None and "/packs/" in key:
                self.gate.wait(30)
            return super().get(key, start, stop)

    storage = Far()
    (state,) = drifting(1, {f"leaf{i}": 2 << 20 for i in range(4)})
    repo = saved(storage, [state], readers=4, chunk_bytes_max=8 << 20, pack_bytes_max=1)
    checkpoint = repo["r"].at(0)
    checkpoint.leaves()
    storage.gate = threading.Barrier(4)
    assert same(checkpoint.load(), state)
