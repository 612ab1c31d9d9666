"""A save writes while it encodes, holds no more than it may, and steps back behind what trains."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _disk import Disk
from _seams import QuickSeam
from _train import WithoutGit, new_repository, one_thread
from torch import nn

import everystep
from everystep import EverystepWarning, SaveAbandoned, Settings, StorageError, UsageError, codecs
from everystep.save import part as part_module
from everystep.save.arena import Arena, Copier
from everystep.save.memory import Memory
from everystep.seam import REAL, Seam
from everystep.storage import LocalStorage, MemoryStorage
from everystep.vault.names import pack_key

__all__ = ["one_thread"]
Array = np.ndarray[Any, Any]
CHUNK = 1 << 16
PACK = 16 + 3 * CHUNK
SMALL: dict[str, Any] = {
    "chunk_bytes_max": CHUNK, "small_leaf_bytes": CHUNK // 4, "pack_bytes_max": PACK, "retry_seconds": 0.0,
}  # fmt: skip


def state_of(chunks: int, seed: int = 0) -> dict[str, Any]:
    """So many chunks that have nothing in common."""
    return {"w": np.random.default_rng(seed).standard_normal(chunks * CHUNK // 4, np.float32)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


class Encoding:
    """Counts what is encoded, and how much of that is held at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.live = self.most = 0
        self.fail_on: Array | None = None
        self.error: BaseException = ZeroDivisionError("a bug")
        self._lock = threading.Lock()
        self._gate = threading.Condition(self._lock)
        # Not in `codecs` itself: the pages of the manifest are encoded as well.
        monkeypatch.setattr(part_module, "codecs", SimpleNamespace(**{**vars(codecs), "encode": self._encode}))

    def _encode(self, data: Array, *settings: Any) -> tuple[int, list[Any]]:
        with self._gate:
            self.begun += 1
            if self.fail_on is not None and np.array_equal(data[: self.fail_on.nbytes], self.fail_on):
                raise self.error
            self.live += 1
            self.most = max(self.most, self.live)
            self._gate.notify_all()
        body = data.copy()
        weakref.finalize(body, self._gone)
        return codecs.RAW, [memoryview(body)]

    def _gone(self) -> None:
        with self._lock:
            self.live -= 1

    def wait_for(self, begun: int) -> bool:
        with self._gate:
            return self._gate.wait_for(lambda: self.begun >= begun, 60)


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Encoding:
    return Encoding(monkeypatch)


# a pack is written while it is filled --------------------------------------------------------------------------------


class Watching(MemoryStorage):
    """Hands each piece of a pack to `look`, before it takes it."""

    def __init__(self, look: Callable[[str, int, int], None]) -> None:
        super().__init__()
        self.look, self.puts = look, []

    def put(self, key: str, data: Iterable[Any]) -> None:
        self.puts.append(key)
        taken = []
        for piece in data:
            self.look(key, len(taken), len(piece))
            taken.append(bytes(piece))
        super().put(key, taken)


def test_chunks_are_written_while_those_behind_them_are_encoded(encoding: Encoding) -> None:
    """The place waits, at the first chunk, for others to be encoded; and none is encoded far ahead of it."""
    chunks, window = 60, 8
    ahead: list[int] = []

    def look(key: str, number: int, nbytes: int) -> None:
        if nbytes == CHUNK:
            if not ahead:
                assert encoding.wait_for(window), "nobody encodes while this waits"
            ahead.append(encoding.begun - len(ahead))

    storage = Watching(look)
    run = new_repository(storage=storage, **SMALL).run("r").track(rng=False)
    state = state_of(chunks)
    assert same(run.save(1, state=state).wait().load(), state)
    assert ahead[0] <= window + 1 and len(ahead) == chunks and max(ahead) <= window + 2
    assert encoding.most <= window + 2, "what is written is let go at once"
    run.close()


def test_packs_have_their_size_and_optimizer_state_lies_apart() -> None:
    run = new_repository(**SMALL).run("r")
    state = {"params": state_of(11)["w"], "opt_state": state_of(9, 1)["w"]}
    saved = run.save(1, state=state).wait()
    manifest = run._vault.manifest(saved._commit)
    view = manifest.views[0]
    packs: dict[Any, set[str]] = {}
    for index, chunk in enumerate(view.layout.chunks):
        packs.setdefault(view.spot(index).pack, set()).add(view.layout.streams[chunk.stream].role)
    sizes = [run._vault.storage.stat(pack_key(run._vault.folder, pack)).nbytes for pack in packs]
    assert max(sizes) <= PACK and len(packs) >= 5
    assert {frozenset(roles & {"optimizer"}) for roles in packs.values()} == {frozenset(), frozenset({"optimizer"})}
    assert all(roles == {"optimizer"} or "optimizer" not in roles for roles in packs.values())
    assert same(saved.load(), state)
    run.close()


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("times", [1, 2])
def test_an_attempt_that_breaks_off_is_repeated_from_its_first_byte(encoding: Encoding, after: int, times: int) -> None:
    """Under a new name, with what it had taken encoded once more; the chunks behind follow."""
    broken: list[str] = []

    def look(key: str, number: int, nbytes: int) -> None:
        if number == after and len(broken) < times and nbytes == (CHUNK if after else 16):
            broken.append(key)
            raise StorageError("input/output error", where=key)

    storage = Watching(look)
    run = new_repository(storage=storage, **SMALL).run("r").track(rng=False)
    state = state_of(13)
    assert same(run.save(1, state=state).wait().load(), state)
    assert len(broken) == times and not set(broken) & storage.objects.keys()
    assert len(set(storage.puts)) == len(storage.puts), "a name was used twice"
    assert encoding.begun == 13 + times * after
    run.close()


def test_what_cannot_be_encoded_is_no_end_of_the_state(encoding: Encoding) -> None:
    """The error comes out, nothing is visible, and no attempt is made to store what came before it."""
    storage = Watching(lambda key, number, nbytes: None)
    run = new_repository(storage=storage, **SMALL).run("r").track(rng=False)
    state = state_of(13)
    for error, kind in (
        (ZeroDivisionError("a bug"), everystep.Error),
        (StorageError("gone", where="here"), StorageError),
    ):
        storage.puts.clear()
        encoding.fail_on, encoding.error = state["w"][7 * CHUNK // 4 :][:4].view(np.uint8), error
        with pytest.raises(kind):
            run.save(1, state=state).wait()
        assert len(storage.puts) == 3 and run.latest is None, "two packs, and the one that broke off"
    encoding.fail_on = None
    assert same(run.save(1, state=state).wait().load(), state)
    run.close()


def test_a_place_that_takes_half_of_a_pack_is_caught() -> None:
    class Half(MemoryStorage):
        def put(self, key: str, data: Iterable[Any]) -> None:
            super().put(key, [piece for _, piece in zip(range(3), data)])

    run = new_repository(storage=Half(), **SMALL).run("r")
    with pytest.raises(StorageError, match="a part of a pack for all of it"):
        run.save(1, state=state_of(9)).wait()
    run.close()


def test_the_disk_begins_before_a_file_is_whole() -> None:
    """In order, without gaps, and never in place of the fsync."""

    class Noting(Disk):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[str, int, int]] = []

        def set_direct(self, fd: int, on: bool) -> bool:
            return False

        def begin_sync(self, fd: int, start: int, nbytes: int) -> None:
            self.calls.append(("begin", start, nbytes))

        def fsync(self, fd: int) -> None:
            self.calls.append(("fsync", 0, 0))
            super().fsync(fd)

    disk = Noting()
    storage = LocalStorage("/runs", QuickSeam(disk))
    storage.put("a/b", (bytes(3 << 20) for _ in range(5)))
    assert disk.calls == [("begin", 0, 6 << 20), ("begin", 6 << 20, 6 << 20), ("fsync", 0, 0)]
    assert storage.stat("a/b").nbytes == 15 << 20


def test_the_system_takes_the_call_that_begins_a_sync(tmp_path: Path) -> None:
    """On real files, and where there is nothing to begin."""
    files = REAL.files
    fd = files.create(str(tmp_path / "f"))
    try:
        files.write(fd, memoryview(b"12345"))
        files.begin_sync(fd, 0, 5)
        files.begin_sync(fd, 5, 1 << 20)
        files.fsync(fd)
    finally:
        files.close(fd)
    assert (tmp_path / "f").read_bytes() == b"12345"


class Direct(Disk):
    """Notes what is written in which way; `takes` says how much of a write the file takes."""

    def __init__(self, takes: Callable[[bool, memoryview], int] = lambda direct, data: len(data)) -> None:
        super().__init__()
        self.takes, self.calls = takes, list[tuple[bool, int]]()

    def write(self, fd: int, data: memoryview) -> int:
        direct = self._handles[fd].direct
        taken = super().write(fd, data[: self.takes(direct, data)])
        self.calls.append((direct, taken))
        return taken


def put_pieces(disk: Disk, nbytes: int, pieces: int) -> None:
    body = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    storage = LocalStorage("/runs", QuickSeam(disk))
    for key in ("a/b", "a/c"):  # the second in memory that the first has left
        storage.put(key, iter(np.array_split(body, pieces)))
        assert bytes(storage.get(key)) == body.tobytes()


@pytest.mark.parametrize(
    ("nbytes", "blocks", "rest"), [(0, 0, 0), (1000, 0, 1000), (4 << 20, 1, 0), (9_000_001, 2, 611_393)]
)
def test_whole_blocks_go_to_the_disk_directly(nbytes: int, blocks: int, rest: int) -> None:
    for pieces in (1, 7):
        disk = Direct()
        put_pieces(disk, nbytes, pieces)
        assert disk.calls == 2 * ([(True, 4 << 20)] * blocks + [(False, rest)] * bool(rest))


def test_a_direct_write_that_takes_a_part_is_gone_on_with() -> None:
    """In whole sectors it stays direct; elsewhere, the rest of the file goes the usual way."""
    disk = Direct(lambda direct, data: min(len(data), 1 << 20))
    put_pieces(disk, 9_000_001, 3)
    assert [direct for direct, _ in disk.calls] == 2 * ([True] * 8 + [False])
    disk = Direct(lambda direct, data: len(data) - 512 if direct else min(len(data), 100_000))
    put_pieces(disk, 9_000_001, 3)
    assert [direct for direct, _ in disk.calls] == 2 * ([True] + [False] * (1 + 42 + 7))


def test_a_file_system_that_takes_no_direct_write_when_it_comes() -> None:
    def refuses(direct: bool, data: memoryview) -> int:
        if direct:
            raise OSError(errno.EINVAL, "no")
        return len(data)

    disk = Direct(refuses)
    put_pieces(disk, 9_000_001, 3)
    assert disk.calls == 2 * [(False, 4 << 20), (False, 4 << 20), (False, 611_393)]


def test_direct_writes_to_a_real_file(tmp_path: Path) -> None:
    """Whichever way its file system takes them."""
    body = np.random.default_rng(0).integers(0, 256, 9_000_001, dtype=np.uint8)
    storage = LocalStorage(str(tmp_path), REAL)
    storage.put("a", iter(np.array_split(body, 5)))
    assert (tmp_path / "a").read_bytes() == body.tobytes() == bytes(storage.get("a"))
    fd = REAL.files.create(str(tmp_path / "b"))
    try:
        if REAL.files.set_direct(fd, True):
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT and REAL.files.set_direct(fd, False)
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        REAL.files.close(fd)


# memory --------------------------------------------------------------------------------------------------------------

STATE_MIB = 300
FLIGHT = int(0.1 * (1 << 30))
"""What may be under way beside the copies: a tenth of 1 GiB, from which on 1.1 or, with a base, 2.2 copies do."""
CASES: dict[str, tuple[dict[str, Any], Callable[[int], float], bool]] = {
    "with a base": ({}, lambda nbytes: 2 * nbytes + FLIGHT, False),
    "without": ({"base_depth_max": 0}, lambda nbytes: nbytes + FLIGHT, False),
    "room for two": ({"memory_bytes_max": 720 << 20}, lambda nbytes: 720 << 20, False),
    "room for one": ({"memory_bytes_max": 400 << 20}, lambda nbytes: 400 << 20, False),
    "room for none": ({"memory_bytes_max": 90 << 20}, lambda nbytes: 90 << 20, True),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is asked of Linux's /proc")
@pytest.mark.parametrize("kernel", ["1", "0"], ids=["kernel", "numpy"])
@pytest.mark.parametrize("case", CASES)
def test_peak_memory(case: str, kernel: str) -> None:
    settings, most, waits = CASES[case]
    settings = {**settings, "slow_bytes_per_second": 0}  # what leans does not hang on how busy the disk is
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_peak.py")), str(STATE_MIB), "3", json.dumps(settings)],
        env={**os.environ, "EVERYSTEP_KERNEL": kernel}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    nbytes, peak = found["nbytes"], max(found["peaks"])
    assert found["equal"] and found["done"] == [waits] * 3, "without a copy, training waits for the save"
    assert peak <= most(nbytes), f"{peak >> 20} MiB beside a state of {nbytes >> 20} MiB"
    leaned = found["stored"][-1] < 0.7 * found["stored"][0]
    assert leaned == (case in ("with a base", "room for two")), "with a base a change of one in 10,000 costs less"
    assert peak > nbytes if not waits else peak < nbytes / 2, "measured nothing"


class OfSize(WithoutGit):
    """A machine of so much memory."""

    def __init__(self, memory: int | None, beside: str | None = None) -> None:
        super().__init__()
        self._memory, self._beside = memory, beside

    def memory(self) -> int | None:
        return self._memory

    def environ(self, name: str) -> str | None:
        return self._beside if name == "LOCAL_WORLD_SIZE" else super().environ(name)


def memory_of(limit: int = 0, seam: Seam | None = None, **settings: Any) -> Memory:
    return Memory(seam or OfSize(None), Settings(memory_bytes_max=limit, **settings))


MIB = 1 << 20


def test_what_a_limit_leaves_room_for() -> None:
    memory = memory_of(1000 * MIB)
    first, stays = memory.choose(300 * MIB, 0, None)
    assert first is not None and not stays and memory.has_room_for_base()
    base = first.reserve(300 * MIB)
    second, stays = memory.choose(300 * MIB, 0, base)
    assert stays and second is not None and second is not first
    second.reserve(300 * MIB)
    assert memory.choose(300 * MIB, 0, base) == (second, True), "they take turns"
    third, stays = memory.choose(700 * MIB, 0, base)
    assert third is not None and not stays, "the base gives way"
    assert sorted(arena.nbytes for arena in (first, second)) == [0, 300 * MIB] or third.nbytes == 0
    third.reserve(700 * MIB)
    assert not memory.has_room_for_base() and first.nbytes + second.nbytes == 700 * MIB
    assert memory.choose(2000 * MIB, 0, None) == (None, False), "not even one copy"
    assert first.nbytes == second.nbytes == 0, "and none is held"
    assert memory.choose(500 * MIB, 600 * MIB, None)[0] is None, "what is kept elsewhere counts"
    assert memory.choose(300 * MIB, 600 * MIB, None)[0] is not None and not memory.has_room_for_base()


def test_an_arena_that_has_become_too_large_is_given_back() -> None:
    memory = memory_of(1000 * MIB)
    first, _ = memory.choose(800 * MIB, 0, None)
    assert first is not None
    first.reserve(800 * MIB)
    for _ in range(2):
        arena, _ = memory.choose(300 * MIB, 400 * MIB, None)
        assert arena is not None and arena.reserve(300 * MIB).nbytes == 300 * MIB


def test_less_memory_means_less_under_way() -> None:
    windows = [(memory := memory_of(limit * MIB), memory.choose(0, 0, None), memory.window())[2] for limit in
               (28, 40, 60, 70, 80, 2000)]  # fmt: skip
    assert windows[0] == 1 and windows[-1] == 8 and windows == sorted(windows)
    assert memory_of(0, workers=16).window() == 17 and memory_of(0, chunk_bytes_max=64 * MIB).window() == 3


def test_a_limit_that_is_no_limit_is_a_share_of_the_machine() -> None:
    assert memory_of(0, OfSize(64 << 30)).limit == 32 << 30
    assert memory_of(0, OfSize(64 << 30, "8")).limit == 4 << 30
    assert memory_of(0, OfSize(64 << 30, "many")).limit == 32 << 30
    assert memory_of(0, OfSize(None)).limit == float("inf")
    assert memory_of(0, OfSize(1 << 20)).limit == 7 * 4 * MIB, "a chunk has room on any machine"
    here = REAL.memory()
    assert here is None or 1 << 28 < here < 1 << 50


def test_a_limit_below_one_chunk_is_refused() -> None:
    run = new_repository(memory_bytes_max=5 * MIB).run("r")
    with pytest.raises(
        UsageError, match="memory_bytes_max=5242880 is less than it takes to encode one chunk"
    ) as caught:
        run.save(1, state={"a": np.zeros(3)})
    least = int(re.findall(r"at least (\d+)", caught.value.do)[0])
    memory_of(least)
    with pytest.raises(UsageError):
        memory_of(least - 1)


# a state that is read where it lies ----------------------------------------------------------------------------------

TIGHT = {**SMALL, "memory_bytes_max": 8 * CHUNK}


def odd_state() -> dict[str, Any]:
    """What cannot be viewed, what shares chunks, and what ends in the middle of one."""
    chance = np.random.default_rng(5)
    square = chance.standard_normal((400, 500))
    return {
        "whole": chance.standard_normal(3 * CHUNK),
        "turned": square.T,
        "every other": square[::2, ::3],
        **{f"small {n}": chance.standard_normal(n * 37).astype(np.float32) for n in range(60)},
        "bytes": bytes(range(256)) * 400,
        "text": "word " * 4000,
        "empty": np.zeros((0, 4)),
        "plain": [1, "two", None],
        "torch": torch.arange(90_000).reshape(300, 300).t(),
        "conjugate": torch.complex(torch.ones(50_000), torch.arange(50_000.0)).conj(),
        "bf16": torch.randn(70_001).bfloat16(),
    }


def told(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.resolve_conj().contiguous().view(torch.uint8).numpy().tobytes()
    return value.tobytes() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("viewed", [True, False], ids=["", "as on a device"])
def test_without_room_for_a_copy_training_waits_and_every_bit_is_saved(
    viewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not viewed:
        monkeypatch.setattr("everystep.adapters.torch.view", lambda payload: None)
    run = new_repository(**TIGHT).run("r").track(rng=False)
    for step in range(1, 4):
        state = odd_state()
        with pytest.warns(EverystepWarning, match="no room for a copy of the state") if step == 1 else _quiet():
            saved = run.save(step, state=state)
        assert saved.done
        expected = {name: told(value) for name, value in state.items()}
        state["whole"][:] = 0
        back = saved.wait().load(like="saved")
        assert {name: told(value) for name, value in back.items()} == expected
    assert run._writer is not None and sum(arena.nbytes for arena in run._writer._memory._arenas) == 0
    run.close()


class _quiet:
    """Nothing is said: warnings are errors in these tests."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_a_system_without_memory_costs_time_and_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> Array:
        raise MemoryError("there is none")

    run = new_repository(**SMALL).run("r").track(rng=False)
    first, second = state_of(3), state_of(20, 1)
    run.save(1, state=first).wait()
    monkeypatch.setattr("everystep.save.arena.new_pages", refuse)
    with pytest.warns(EverystepWarning, match="no room for a copy of the state"):
        assert run.save(2, state=second).done
    monkeypatch.undo()
    third = run.save(3, state=first)
    assert not third.skipped and third.wait() is not None
    assert [same(run.at(step).load(), state) for step, state in ((1, first), (2, second), (3, first))] == [True] * 3
    run.close()


def test_a_model_is_saved_and_resumed_without_room_for_a_copy() -> None:
    repo = new_repository(**TIGHT)
    model, optimizer = trained(seed=1)
    with pytest.warns(EverystepWarning, match="no room"), repo.run("r").track(model=model, optimizer=optimizer) as run:
        run.save(1)
        optimizer.step()
        run.save(2).wait()
    other, its = trained(seed=2)
    again = repo.run("r").track(model=other, optimizer=its)
    assert again.resume() == 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    again.close()


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_state_that_was_left_while_it_was_read_is_no_checkpoint() -> None:
    """The program goes on, by an interrupt, before the save has read all of it."""
    storage = Gated()
    run = new_repository(storage=storage, **TIGHT).run("r").track(rng=False)
    state = state_of(20)
    storage.gate.clear()

    def interrupt() -> None:
        assert storage.reached.wait(60)
        raise KeyboardInterrupt

    run._open().wait = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), pytest.warns(EverystepWarning, match="no room"):
        run.save(1, state=state)
    del run._open().wait
    state["w"][:] = 0
    storage.gate.set()
    run._open().wait()
    with pytest.raises(SaveAbandoned, match="step 1 was interrupted while its state was read"):
        run.save(2, state=state)
    assert run.latest is None
    assert same(run.save(3, state=state).wait().load(), state)
    run.close()


class Gated(MemoryStorage):
    """Lets a pack in when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def put(self, key: str, data: Iterable[Any]) -> None:
        self.reached.set()
        assert self.gate.wait(60)
        super().put(key, data)


# pages and threads ---------------------------------------------------------------------------------------------------


def test_the_second_arena_is_ready_before_the_second_save() -> None:
    """Its pages are made in the background after the first save, and no further ones later."""
    run = new_repository().run("r")
    state = {"w": np.ones(3 * MIB, np.uint8)}
    writer = run._open()
    arenas, buffers = writer._memory._arenas, []
    for step in range(1, 5):
        state["w"][:] = step
        run.save(step, state=state).wait()
        assert _eventually(lambda: all(arena._present == arena.nbytes > 3 * MIB for arena in arenas))
        buffers.append([arena._buffer for arena in arenas])
        assert all(one is first for one, first in zip(buffers[-1], buffers[0])), "made once"
        assert writer._bases.held is buffers[0][(step - 1) % 2], "they take turns"
    run.close()


def _eventually(true: Callable[[], bool]) -> bool:
    for _ in range(6000):
        if true():
            return True
        REAL.sleep(0.01)
    return False


def test_pages_that_are_prepared_are_not_what_a_snapshot_has_filled() -> None:
    arena = Arena(REAL)
    looks = iter([False, False, True])
    arena.prepare(100 * MIB, lambda: next(looks))
    assert arena._present == 32 * MIB, "told to stop after two pieces"
    data = arena.reserve(100 * MIB)
    data[:] = 7
    arena.prepare(100 * MIB, lambda: False)
    assert arena.reserve(50 * MIB) is data and (data == 7).all()
    arena.release()
    assert arena.nbytes == 0 and not arena.holds(data)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_does_not_hold_the_pages_of_a_snapshot() -> None:
    """A loader's workers are forks: a copy for each of them at the next save would be the state once more."""
    program = """
import os
from everystep.save.arena import new_pages
data = new_pages(64 << 20)
data[:] = 7
child = os.fork()
if not child:
    os._exit(int(data[::4096].any()))
_, status = os.waitpid(child, 0)
assert (data == 7).all()
print(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("0" if sys.platform.startswith("linux") else "1")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have priorities of their own on Linux")
@pytest.mark.parametrize("nice", [0, 7])
def test_what_encodes_and_writes_steps_back_and_what_copies_does_not(
    nice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, int] = {}

    def note() -> None:
        found[threading.current_thread().name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    encode, copyto = codecs.encode, np.copyto
    monkeypatch.setattr(part_module.codecs, "encode", lambda *args: (note(), encode(*args))[1])
    monkeypatch.setattr("everystep.save.arena.np.copyto", lambda *args: (note(), copyto(*args))[1])
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    run = new_repository(
        storage=Watching(lambda *piece: note()),
        background_nice=nice,
        chunk_bytes_max=4 * MIB,
    ).run("r")
    run.save(1, state={f"w{n}": np.random.default_rng(n).standard_normal(1 << 20) for n in range(9)}).wait()
    run.close()
    back = {name: value for name, value in found.items() if name.startswith(("everystep-encode", "everystep-save"))}
    others = {name: value for name, value in found.items() if name not in back}
    assert len(back) >= 2 and set(back.values()) == {min(before + nice, 19)}
    assert others and set(others.values()) == {before}


def test_two_that_copy_bring_every_byte() -> None:
    pool = REAL.pool(3, "copy")
    try:
        source = np.random.default_rng(0).integers(0, 255, 5 * MIB + 13, np.uint8)
        target = np.zeros_like(source)
        copier = Copier(pool)
        copier.copy([(target[:MIB], source[:MIB]), (target[MIB:], source[MIB:])])
        assert np.array_equal(source, target) and not copier.differs(source, target)
        for at in (0, MIB, source.size - 1):
            target[at] ^= 1
            assert copier.differs(source, target)
            target[at] ^= 1
    finally:
        pool.close()
