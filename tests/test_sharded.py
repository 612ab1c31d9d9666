"""States that lie on several ranks: saved sharded in one way, loaded in any other, each rank reading what it needs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _thorough import examples
from _train import WithoutGit, new_repository, one_thread
from benchmarks import ranks as bench
from hypothesis import given, settings
from hypothesis import strategies as st
from test_benchmarks import sequence
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

import everystep
from everystep import Damaged, Unsupported, adapters
from everystep.adapters import torch_sharded
from everystep.adapters.torch_mesh import Untold, held_boxes, replica
from everystep.adapters.torch_sharded import Alike
from everystep.restore.boxes import boxes_of, common, without
from everystep.restore.fetch import fetch_boxes
from everystep.schema import Box, Described, Leaf, Tree, flatten, lay_out
from everystep.schema.tree import Roled

__all__ = ["one_thread", "sequence"]
RANKS_SCRIPT = Path(__file__).with_name("_sharded.py")
EXAMPLE = Path(__file__).parent.parent / "examples" / "torch_fsdp_example.py"
KILLS = min(int(os.environ.get("EVERYSTEP_KILLS", "2")), 30)


# what lies where -----------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_range_of_elements_is_a_few_boxes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    count = int(np.prod(shape))
    start, stop = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    places = np.arange(count).reshape(shape)
    boxes = list(boxes_of(start, stop, shape))
    assert [at for box in boxes for at in places[box.index()].reshape(-1)] == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: tuple(sorted(pair))), max_size=6))
def test_what_is_taken_of_a_range_is_taken_once(spans: list[tuple[int, int]]) -> None:
    taken: list[tuple[int, int]] = []
    seen: list[int] = []
    for span in spans:
        new = [at for start, stop in without(span, taken) for at in range(start, stop)]
        assert sorted(new) == [at for at in range(*span) if at not in seen]
        seen += new
        assert sorted(at for start, stop in taken for at in range(start, stop)) == sorted(seen)


class Drawn:
    """Parts of several ranks in memory, as `fetch_boxes` finds them, and what of them is read."""

    def __init__(self, ranks: Sequence[tuple[Leaf, np.ndarray[Any, Any]]], chunk_bytes_max: int, small: int) -> None:
        self.views, self.data, self.read = [], [], 0
        for leaf, whole in ranks:
            beside = Leaf("beside", leaf.dtype, (3,), leaf.role)
            layout = lay_out([beside, leaf, beside], chunk_bytes_max, small)
            streams = [np.zeros(stream.nbytes, np.uint8) for stream in layout.streams]
            for region in layout.regions:
                held = whole.reshape(-1) if region.box.flat else whole
                values = held[region.box.index()] if region.leaf == 1 else np.arange(3).astype(whole.dtype)
                end = region.start + region.nbytes
                streams[region.stream][region.start : end] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self.views.append(SimpleNamespace(tree=Tree([], [], [beside, leaf, beside]), layout=layout))
            self.data.append(streams)

    def host_share(self) -> Any:
        return nullcontext()

    def read_chunks(
        self, view: Any, indices: Sequence[int], pool: Any, sink: Any, share: Any = None
    ) -> Iterator[list[int]]:
        streams = next(data for one, data in zip(self.views, self.data) if one is view)
        for index in indices:
            chunk = view.layout.chunks[index]
            data = streams[chunk.stream][chunk.start : chunk.start + chunk.nbytes]
            room = sink.room(index)
            if room is not None:
                room[:] = data
            else:
                sink.take(index, data.copy())
            self.read += chunk.nbytes
            yield [index]

    def fetch(self, wanted: Any) -> dict[str, list[np.ndarray[Any, Any]]]:
        manifest: Any = SimpleNamespace(views=tuple(self.views))
        vault: Any = self
        pool: Any = None
        return fetch_boxes(vault, manifest, wanted, pool)


def some_box(data: st.DataObject, shape: tuple[int, ...], flat: bool) -> Box:
    shape = (int(np.prod(shape)),) if flat else shape
    start = tuple(data.draw(st.integers(0, n)) for n in shape)
    return Box(start, tuple(data.draw(st.integers(0, n - at)) for at, n in zip(start, shape)), flat)


@settings(max_examples=examples(400), deadline=None)
@given(st.data())
def test_any_box_comes_from_boxes_of_any_form(data: st.DataObject) -> None:
    """Each element from one rank that holds it, whatever overlaps; what nobody holds is an error."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(["|u1", "<f4", "<c16"]))
    whole = np.random.default_rng(0).integers(1, 255, (int(np.prod(shape)), np.dtype(dtype).itemsize), np.uint8)
    whole = whole.view(dtype).reshape(shape)
    ranks = []
    covered = np.zeros(shape, bool)
    for _ in range(data.draw(st.integers(1, 4))):
        boxes = tuple(some_box(data, shape, data.draw(st.booleans())) for _ in range(data.draw(st.integers(0, 2))))
        for box in boxes or (Box.whole(shape),):
            (covered.reshape(-1) if box.flat else covered)[box.index()] = True
        ranks.append((Leaf("w", dtype, shape, "weights", "array", boxes), whole))
    wanted = tuple(some_box(data, shape, False) for _ in range(data.draw(st.integers(1, 3))))
    drawn = Drawn(ranks, data.draw(st.sampled_from([16, 48, 4096])), data.draw(st.sampled_from([0, 32, 10_000])))
    held = sum({box: box.size for leaf, _ in ranks for box in leaf.boxes or (Box.whole(shape),)}.values())
    if held < covered.size or not all(covered[box.index()].all() for box in wanted):
        with pytest.raises(Damaged, match="the ranks hold"):
            drawn.fetch({"w": wanted, "beside": None})
        return
    found = drawn.fetch({"w": wanted, "beside": None})
    assert [one.tobytes() for one in found["w"]] == [whole[box.index()].tobytes() for box in wanted]
    assert found["beside"][0].tobytes() == np.arange(3).astype(dtype).tobytes()
    if covered.all():
        assert drawn.fetch({"w": None})["w"][0].tobytes() == whole.tobytes()


def test_only_chunks_with_something_of_it_are_read() -> None:
    whole = np.random.default_rng(0).random((64, 256)).astype(np.float32)  # 1 KiB a row
    rows = [Leaf("w", "<f4", whole.shape, "weights", "array", (Box((16 * i, 0), (16, 256)),)) for i in range(4)]
    drawn = Drawn([(leaf, whole) for leaf in rows], 4096, 0)

    def cost(box: Box) -> int:
        drawn.read = 0
        assert drawn.fetch({"w": [box]})["w"][0].tobytes() == whole[box.index()].tobytes()
        return drawn.read

    assert cost(Box((0, 0), (16, 256))) == 16 << 10 and cost(Box((20, 0), (4, 256))) == 4 << 10
    assert cost(Box((14, 0), (4, 256))) == 8 << 10 and cost(Box((20, 100), (4, 50))) == 4 << 10
    assert cost(Box((0, 0), (64, 8))) == 64 << 10, "every chunk has some of each column"
    wide = Drawn([(Leaf("w", "<f4", (2, 8192), "weights"), whole.reshape(2, 8192))], 4096, 0)
    assert wide.fetch({"w": [Box((0, 1024), (2, 1024))]})["w"][0].tobytes() == (
        whole.reshape(2, 8192)[:, 1024:2048].tobytes()
    )
    assert wide.read == 2 * 4096, "of each row the chunk that holds the columns"
    drawn.read = 0
    assert drawn.fetch({"w": [Box((0,), (0,), flat=True)]})["w"][0].nbytes == drawn.read == 0


def test_a_shape_that_lies_takes_no_memory() -> None:
    leaf = Leaf("w", "<f4", (1 << 40, 4), "weights", "array", (Box((0, 0), (2, 4)),))
    drawn = Drawn([(leaf, np.zeros((2, 4), np.float32))], 4096, 0)
    for wanted in (None, [Box((0, 0), (1 << 40, 1))]):
        with pytest.raises(Damaged, match="the ranks hold 8 of 4398046511104 elements"):
            drawn.fetch({"w": wanted})


# how torch cuts ------------------------------------------------------------------------------------------------------


def as_torch_cuts(whole: torch.Tensor, mesh: Sequence[int], at: Sequence[int], placements: Sequence[Any]) -> Any:
    for size, place, placement in zip(mesh, at, placements):
        if placement is not None:
            pieces, _ = placement._split_tensor(whole, size, with_padding=False, contiguous=True)
            whole = pieces[place]
    return whole


@settings(max_examples=examples(300), deadline=None)
@given(st.data())
def test_boxes_of_a_mesh_are_what_torch_cuts(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    mesh = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    axes = [data.draw(st.none() | st.integers(0, len(shape) - 1)) for _ in mesh]
    factors = [data.draw(st.sampled_from([1, 1, 2, 3])) for _ in mesh]
    splits = tuple(None if axis is None else (axis, factor) for axis, factor in zip(axes, factors))
    placements = [
        None if axis is None else _StridedShard(axis, split_factor=factor) if factor > 1 else Shard(axis)
        for axis, factor in zip(axes, factors)
    ]
    whole = torch.arange(int(np.prod(shape))).reshape(shape)
    copies, count = set(), 0
    for at in np.ndindex(*mesh):
        local = as_torch_cuts(whole, mesh, at, placements)
        try:
            found = held_boxes(shape, mesh, at, splits)
        except Untold:
            return  # an axis that is cut with strides, and does not come out even: refused on every rank
        assert sum(box.size for box, _ in found) == local.numel()
        for box, index in found:
            assert torch.equal(local[index], whole[box.index()])
        number, count = replica(mesh, at, splits)
        copies.add(number)
    assert copies == set(range(count))


def test_what_cannot_be_told_is_refused_on_every_rank() -> None:
    """7 rows on a 3 x 2 mesh, cut by its second dimension first: torch's own two ways to read that differ."""
    for at in np.ndindex(3, 2):
        with pytest.raises(Untold, match="unevenly"):
            held_boxes((7,), (3, 2), at, ((0, 2), (0, 1)))
    assert held_boxes((8, 2), (2, 2), (0, 1), ((0, 2), (0, 1)))[0][0] == Box((4, 0), (2, 2))
    assert held_boxes((8,), (2, 2), (0, 1), ((0, 1), (0, 1)), ((1, 0),))[0][0] == Box((4,), (2,)), "in another order"


# what all hold alike -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1000, 40), (3, 20_000), (30_001,), (2, 2, 9000), (7,), ()])
def test_each_rank_writes_its_share(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    trees = [
        flatten({"w": Roled("weights", Alike(value, rank, 4))}, lambda one, path: adapters.describe(one, path, 4))
        for rank in range(4)
    ]
    held = [sum(box.size for box in tree.leaves[0].boxes or (Box.whole(shape),)) for tree in trees]
    assert sum(held) == value.numel()
    if value.nbytes >= torch_sharded.SPLIT_BYTES_MIN:
        assert max(held) <= value.numel() / 4 * 1.5
    else:
        assert sorted(held) == [0, 0, 0, value.numel()]
    boxes = [box for tree in trees for box in tree.leaves[0].boxes if not box.flat]
    assert not any(common(one, other) for i, one in enumerate(boxes) for other in boxes[:i])
    alone = flatten({"w": Alike(value, 0, 4)}, lambda one, path: adapters.describe(one, path, 1))
    assert alone.leaves[0].boxes == () and alone.payloads[0].payload is value
    first = [adapters.describe(Alike(value, rank, 4, True), "w", 4) for rank in range(4)]
    assert [sum(box.size for box in one.boxes or (Box.whole(shape),)) for one in first] == [value.numel(), 0, 0, 0]


def test_a_part_is_no_checkpoint_of_one_that_saves_alone() -> None:
    mine = Described("<f4", (4,), "torch.tensor", torch.ones(2), None, (Box((0,), (2,)),))
    with pytest.raises(Unsupported, match=r"(?s)several of 4 processes.*saved by 1.*where: w.*full_tensor"):
        adapters.Shared(mine, None, 4).among(1, "w")
    assert adapters.Shared(mine, None, 4).among(4, "w") is adapters.Shared(mine, None, 4).among(None, "w") is mine


def test_a_plain_module_wants_whole_leaves() -> None:
    repo = new_repository(WithoutGit())
    model = nn.Linear(3, 2)
    with repo.run("r").track(model=model) as run:
        run.save(1).wait()
    opened = repo["r"].at(1)._open()
    assert adapters.wanted(nn.Linear(3, 2), lambda: opened.sketch("model"), "model", {}).boxes == {}
    assert {name: leaf.shape for name, leaf in opened.sketch("model").items()} == {"weight": (2, 3), "bias": (2,)}
    boxes = {"model": {"model/weight": [Box((1, 0), (1, 3))]}}
    built = opened.build_all(["model"], like="saved", boxes=boxes)["model"]
    assert torch.equal(built["weight"].boxes[Box((1, 0), (1, 3))], model.weight[1:].detach())
    assert torch.equal(built["bias"], model.bias.detach())
    both = opened.build_all(["model", "model/weight"], like="saved", boxes=boxes)
    assert torch.equal(both["model/weight"], model.weight) and torch.equal(both["model"]["weight"], model.weight)


def test_the_benchmark_of_ranks(sequence: Any, tmp_path: Path) -> None:
    """Its machinery, not its figures: all save, all that they load is right, and what went wrong is named."""
    result = json.loads(json.dumps(bench.run(0, 1, "dcp-async", str(tmp_path))))
    (table,) = bench.tables(result)
    assert sorted(row[0] for row in table.rows) == ["everystep", "torch DCP", "torch DCP async"]
    assert all(cell != "–" for row in table.rows for cell in row) and not result["samples"]["failed"]
    assert not list(tmp_path.glob("everystep-bench*"))


# real ranks ----------------------------------------------------------------------------------------------------------


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(RANKS_SCRIPT), *map(str, words)], cwd=folder, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EVERYSTEP_CACHE": str(folder / "cache")},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """What the ranks said; all of them are ended, whatever happens."""
    try:
        said, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors[-5000:]
    return said


def test_saved_by_four_ranks_and_loaded_in_every_form(tmp_path: Path) -> None:
    """FSDP2, HSDP, tensor parallel, both on a mesh, DDP: into each of these, on 1 to 4 ranks, bit for bit, with the
    optimizer; and a resumed run is the one that went on."""
    finish(start(tmp_path, "all", tmp_path), 280)
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(4)]
    repo = everystep.open(str(tmp_path / "runs"))
    assert repo.check().ok
    whole = {}
    for source in ("fsdp", "hsdp", "mesh", "tp", "ddp"):
        past = repo[source]
        assert [(one.step, one.ranks) for one in past.checkpoints()] == [(1, 4), (2, 4), (3, 4)]
        opened = past.at(2)._open()
        held = [state_bytes(view) for view in opened.manifest.views]
        whole[source] = sum(leaf.nbytes for leaf in opened.leaves() if leaf.role in ("weights", "optimizer"))
        if source not in ("tp", "mesh"):  # where nothing says that ranks of one shard hold the same of the wide leaf
            assert sum(held) < 1.1 * whole[source] and max(held) < 0.4 * whole[source], (source, held)
    for source in ("fsdp", "hsdp", "mesh", "ddp"):
        for target, ranks, share in (("fsdp4", 4, 0.25), ("fsdp2", 2, 0.5), ("fsdp3", 3, 0.34), ("hsdp4", 4, 0.5)):
            read = [facts[rank]["read"][f"{source} {target}"] for rank in range(ranks)]
            assert max(read) < (share + 0.15) * whole[source], (source, target, read, whole[source])


def state_bytes(view: Any) -> int:
    layout = view.layout
    return sum(s.nbytes for s in layout.streams if s.role in ("weights", "optimizer"))


@pytest.mark.timeout(300 + 30 * KILLS)
def test_a_rank_is_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """Each time the checkpoint before is whole, the rank is named, and the others go on."""
    finish(start(tmp_path, "lives", tmp_path, KILLS), 200 + 30 * KILLS)
    repo = everystep.open(str(tmp_path / "runs"))
    assert [one.step for one in repo["r"].checkpoints()] == list(range(1, KILLS + 2))
    assert repo.check().ok and all(one.verify() for one in repo["r"].checkpoints())


def test_the_example_goes_on_when_it_was_killed(tmp_path: Path) -> None:
    """With as many ranks bit for bit, and with fewer."""

    def run(name: str, ranks: int, until: str | None = None, folder: Path = tmp_path) -> list[str]:
        process = start(tmp_path, "example", folder, ranks, name, EXAMPLE)
        assert process.stdout is not None
        said = []
        for line in process.stdout if until is not None else ():
            said.append(line)
            if line.startswith(until or ""):
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return said
        return finish(process, 100).splitlines(keepends=True)

    whole = run("whole", 4)
    assert len(whole) == 24
    run("killed", 4, "step 14")
    repo = everystep.open(str(tmp_path / "runs"))
    begun = repo["killed"].latest
    assert begun is not None and begun.step in (8, 12) and begun.ranks == 4
    shutil.copytree(tmp_path / "runs", tmp_path / "fewer" / "runs")
    assert run("killed", 4) == whole[begun.step :]
    ends = [repo[name].at(24) for name in ("whole", "killed")]
    assert not [leaf.path for leaf in ends[0].diff(ends[1]).changed if not leaf.path.startswith("rng/")]
    rest = run("killed", 2, folder=tmp_path / "fewer")
    assert [line.split()[1] for line in rest] == [str(step) for step in range(begun.step + 1, 25)]
    for one, other in zip(rest, whole[begun.step :]):
        assert float(one.split()[3]) == pytest.approx(float(other.split()[3]), rel=1e-3)
    fewer = everystep.open(str(tmp_path / "fewer" / "runs"))
    assert fewer["killed"].at(24).ranks == 2 and fewer.check().ok and repo.check().ok
