"""Ranks of one job over gloo: they save sharded in one way, and load sharded in every other; see test_sharded.py.

One process imports torch and forks the ranks, which write what they found into a file each.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import everystep
from everystep import adapters
from everystep.adapters import torch_sharded
from everystep.storage import LocalStorage

RANKS = 4
SOURCES = ("fsdp", "hsdp", "mesh", "tp", "ddp")
TARGETS = ("fsdp1", "fsdp2", "fsdp3", "fsdp4", "hsdp4", "mesh4", "tp2", "tp4", "ddp2", "ddp3", "ddp4", "one")
SETTINGS = everystep.Settings(
    chunk_bytes_max=4096, small_leaf_bytes=1024, poll_seconds=0.01, rank_deadline_seconds=60, workers=1
)
DEADLINE = 6.0
STEPS = 2


class Net(nn.Module):
    """Axes that come out even, uneven and empty on four ranks; a tied weight, buffers that differ, a leaf to split."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.mid = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 7)
        self.norm, self.odd, self.tied = nn.BatchNorm1d(7), nn.Linear(7, 5), nn.Linear(7, 5, bias=False)
        self.tied.weight = self.odd.weight
        self.wide = nn.Parameter(torch.randn(512, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.mid(self.down(self.up(x).relu())))
        return self.odd(h).sum(1) + self.tied(h).sum(1).square() + (h @ self.wide[:7]).sum(1)


# how they are cut ----------------------------------------------------------------------------------------------------


class Cuts:
    """Makes the model in each form; all ranks make the groups, the first `ranks` of them use it."""

    def __init__(self) -> None:
        numbers = list(range(RANKS))
        self.flat = {count: DeviceMesh("cpu", numbers[:count]) for count in range(1, RANKS + 1)}
        self.square = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
        self.copies = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))

    def has(self, form: str) -> bool:
        return dist.get_rank() < ranks_of(form)

    def make(self, form: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model: nn.Module = Net(seed)
        kind, mesh = form.rstrip("0123456789"), self.flat[ranks_of(form)]
        if kind in ("tp", "mesh"):
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, mesh if kind == "tp" else self.square["tp"], plan)
        if kind in ("fsdp", "hsdp", "mesh"):
            fully_shard(model, mesh={"fsdp": mesh, "hsdp": self.copies, "mesh": self.square["dp"]}[kind])
        if kind == "ddp":
            model = DistributedDataParallel(model, process_group=mesh.get_group())
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


def ranks_of(form: str) -> int:
    return 1 if form == "one" else int(form[-1]) if form[-1].isdigit() else RANKS


def train(form: str, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    share = {"tp": 0, "mesh": dist.get_rank() // 2}.get(form, dist.get_rank())
    optimizer.zero_grad()
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + share))).square().mean().backward()
    optimizer.step()


def look(model: nn.Module) -> None:
    """An evaluation, behind which FSDP2 leaves whole parameters in the place of its own."""
    model.eval()
    with torch.no_grad():
        model(torch.ones(4, 6))
    model.train()


def picture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every parameter with its state, whole, by name."""
    found = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(param)
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name} {key}"] = whole(value)
    return found


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def bits(found: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in found.items()}


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): value.clone() for name, value in model.named_buffers()}


# four ranks save, and load -------------------------------------------------------------------------------------------


def save_and_load(folder: Path, rank: int) -> dict[str, Any]:
    cuts, repo = Cuts(), everystep.open(str(folder / "runs"), settings=SETTINGS)
    check_boxes()
    check_what_is_vouched_for()
    saved = {form: save(repo, cuts, form) for form in SOURCES}
    facts: dict[str, Any] = {"read": {}, "rank": rank}
    for source in SOURCES:
        checkpoint = repo[source].at(STEPS)
        for target in TARGETS:
            if cuts.has(target):
                facts["read"][f"{source} {target}"] = load(checkpoint, cuts, target, *saved[source])
    for form in SOURCES:
        go_on(repo, cuts, form)
    of_others(repo, cuts)
    alone(repo, cuts)
    return facts


def save(repo: everystep.Repository, cuts: Cuts, form: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What it held when it was saved, whole: parameters with their state, and the first rank's buffers."""
    model, optimizer = cuts.make(form, 1)
    with repo.run(form, launch="first").track(optimizer=optimizer, model=model) as run:
        for step in range(1, STEPS + 1):
            train(form, model, optimizer, step)
            look(model)
            saved = run.save(step)
            if step == STEPS:
                held = [bits(buffers(model))]
                found = bits(picture(model, optimizer))
            train(form, model, optimizer, 50)  # the snapshot is the state when save returned
            assert saved.wait().ranks == RANKS
    dist.broadcast_object_list(held)
    return found, held[0]


def load(checkpoint: everystep.Checkpoint, cuts: Cuts, target: str, wanted: Any, held: Any) -> int:
    """How many bytes were read."""
    model, optimizer = cuts.make(target, 9)
    read: list[int] = []
    report = checkpoint.load(into={"model": model, "optimizer": optimizer}, progress=read.append)
    assert report.exact, f"{checkpoint} {target}: {report}"
    found = bits(picture(model, optimizer))
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    differing = [name for name in wanted if found[name] != wanted[name]]
    assert not differing, f"{checkpoint} into {target}: {differing}"
    assert bits(buffers(model)) == held
    for param in model.parameters():
        for key, value in optimizer.state[param].items():
            if key != "step" and isinstance(param, DTensor):
                assert value.placements == param.placements and value.to_local().shape == param.to_local().shape
    if ranks_of(target) == RANKS:
        train(target[:-1], model, optimizer, 99)  # it is of use
    return sum(read)


def go_on(repo: everystep.Repository, cuts: Cuts, form: str) -> None:
    """A resumed run is the one that was never interrupted."""
    model, optimizer = cuts.make(form, 1)
    for step in range(1, STEPS + 1):
        train(form, model, optimizer, step)
        train(form, model, optimizer, 50)
    twin, its = cuts.make(form, 9)
    look(twin)
    with repo.run(form, launch="second").track(model=twin, optimizer=its) as run:
        assert run.resume() == STEPS
        assert run.report is not None and run.report.exact, run.report
        for model_, optimizer_ in ((model, optimizer), (twin, its)):
            if model_ is twin:
                train(form, twin, its, 50)
            train(form, model_, optimizer_, 77)
        assert bits(picture(model, optimizer)) == bits(picture(twin, its)), form
        run.save(STEPS + 1).wait()


class Wrapped:
    """An object with a state of its own, as frameworks wrap what they train; one that loads whole tensors fails."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [self.model.state_dict()], "count": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["count"] == 3
        self.model.load_state_dict(state["inner"][0])


class Foreign(torch.optim.SGD):
    """With a format of its own."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


def of_others(repo: everystep.Repository, cuts: Cuts) -> None:
    made = [cuts.make("fsdp", seed)[0] for seed in (1, 9)]
    theirs = [Foreign(model.parameters(), lr=0.1, momentum=0.9) for model in made]
    train("fsdp", made[0], theirs[0], 1)
    for launch, model, optimizer in zip(("first", "second"), made, theirs):
        with repo.run("others", launch=launch).track(model=Wrapped(model), optimizer=optimizer) as run:
            if run.resume() == 0:
                run.save(1).wait()
    whole_state = repo["others"].at(1).load(only="model/inner", like="torch")[0]
    assert all(torch.equal(whole(value), whole_state[name]) for name, value in made[1].state_dict().items())
    train("fsdp", made[0], theirs[0], 2)
    train("fsdp", made[1], theirs[1], 2)
    assert bits(picture(made[0], theirs[0])) == bits(picture(made[1], theirs[1]))


def alone(repo: everystep.Repository, cuts: Cuts) -> None:
    """One rank saves for all: what it has whole, and no shard."""
    for form in ("ddp", "fsdp"):
        model, optimizer = cuts.make(form, 1)
        train(form, model, optimizer, 1)
        wanted = bits(picture(model, optimizer))
        if dist.get_rank() == 0:
            with repo.run(f"alone-{form}", rank=0, ranks=1).track(model=model, optimizer=optimizer) as run:
                try:
                    saved = run.save(1).wait()
                except everystep.Unsupported as error:
                    assert form == "fsdp" and "several of 4 processes" in str(error), error
                    continue
            assert form == "ddp" and all(leaf.boxes == () for leaf in saved.leaves())
            target, its = cuts.make("one", 9)
            assert saved.load(into={"model": target, "optimizer": its}).exact
            assert bits(picture(target, its)) == wanted


def check_what_is_vouched_for() -> None:
    """What DDP keeps alike is shared out; not behind a hook that may do otherwise. Buffers that are lost are named."""
    model = DistributedDataParallel(Net(1))
    share = (dist.get_rank(), RANKS)
    names = torch_sharded.shared_names(model)
    assert names["module.wide"] == (*share, False) and names["module.norm.running_mean"] == (*share, True)
    assert not adapters.not_captured(model, "model")
    model.register_comm_hook(None, lambda state, bucket: state)
    assert torch_sharded.shared_names(model) == {} == torch_sharded.shared_params([model])
    lonely = DistributedDataParallel(Net(1), broadcast_buffers=False)
    said = adapters.not_captured(lonely, "model")
    assert len(said) == (dist.get_rank() > 0) and all("buffers of every rank but the first" in text for text in said)


def check_boxes() -> None:
    """What a rank is said to hold of a tensor is what torch gave it."""
    meshes = [DeviceMesh("cpu", list(range(RANKS))), DeviceMesh("cpu", [[0, 1], [2, 3]])]
    for mesh in meshes:
        for shape in ((8, 4), (7, 3), (5,), (1, 9), (3, 2, 6), ()):
            for placements in placings(mesh.ndim, len(shape)):
                tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
                spread = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
                for box, index in torch_sharded._parts(spread):
                    assert torch.equal(torch_sharded.local(spread)[index], tensor[box.index()]), (shape, placements)


def placings(dimensions: int, axes: int) -> Iterator[tuple[Any, ...]]:
    choices: list[Any] = [Replicate(), *(Shard(axis) for axis in range(axes))]
    for first in choices:
        if dimensions == 1:
            yield (first,)
            continue
        yield from ((first, second) for second in choices)
        if isinstance(first, Shard):
            yield _StridedShard(first.dim, split_factor=2), first


# a rank is killed in the middle of a save ----------------------------------------------------------------------------


def lives(folder: Path, kills: int) -> None:
    """In each life the ranks resume, save, and save again; in that one of them is killed."""
    chance = random.Random(5)
    for life in range(kills):
        doomed, operation = (1, 3, 2, 0)[life % 4], chance.randrange(6)
        codes = fork(RANKS, partial(live, folder, life, doomed, operation), f"{folder}/store-{life}")
        expected = [-signal.SIGKILL if rank == doomed else 0 for rank in range(RANKS)]
        assert codes == expected, f"life {life}: {codes}, rank {doomed} was to be killed at operation {operation}"
    codes = fork(RANKS, partial(live, folder, kills, -1, 0), f"{folder}/store-{kills}")
    assert codes == [0] * RANKS


def live(folder: Path, life: int, doomed: int, operation: int, rank: int) -> None:
    settings = everystep.Settings(
        chunk_bytes_max=4096, small_leaf_bytes=1024, poll_seconds=0.01, rank_deadline_seconds=DEADLINE, workers=1
    )
    model = Net(0)
    fully_shard(model, mesh=DeviceMesh("cpu", list(range(RANKS))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with everystep.open(str(folder / "runs"), settings=settings).run("r", launch=f"life-{life}") as run:
        run.track(model=model, optimizer=optimizer)
        done = run.resume()
        assert done == life, f"life {life} goes on from step {done}"
        if done:
            assert all(torch.equal(local, value) for local, value in filled(model, optimizer, done)), f"step {done}"
        fill(model, optimizer, done + 1)
        run.save(done + 1).wait()
        if doomed < 0:
            return
        fill(model, optimizer, done + 2)
        if rank == doomed:
            die_at(operation)
        try:
            run.save(done + 2).wait()
        except everystep.SaveAbandoned as error:
            named = f"rank {doomed}" in str(error)
            assert named and (doomed == 0 or error.missing == (doomed,)), error
        else:
            raise AssertionError("a save without one of its ranks")
        assert run.latest is not None and run.latest.step == done + 1
        fill(model, optimizer, done + 3)  # training goes on


def values(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """(where, what) of the state that step has."""
    for number, param in enumerate(model.parameters()):
        base = torch.arange(float(param.numel())).reshape(param.shape)
        yield ("weights", param), torch.sin(base * (number + 1) + step)
        yield ("momentum", param), torch.cos(base * (number + 1) + step)


def fill(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    for (what, param), value in values(model, optimizer, step):
        cut = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
        if what == "momentum":
            optimizer.state[param]["momentum_buffer"] = cut
        else:
            torch_sharded.local(param).copy_(cut.to_local())


def filled(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for (what, param), value in values(model, optimizer, step):
        held = optimizer.state[param]["momentum_buffer"] if what == "momentum" else param
        cut = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
        yield torch_sharded.local(held), cut.to_local()


def die_at(operation: int) -> None:
    """SIGKILL before an operation of this rank's storage, or with half of what it writes on the disk."""
    count = [0]

    def passes(put: Callable[..., Any]) -> Callable[..., Any]:
        def dying(self: Any, key: str, data: Any, *rest: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] - 1 == operation // 2 or "/save/" in key or "/log/" in key:
                if operation % 2 and not isinstance(data, (bytes, memoryview)):
                    data = half(data)
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            return put(self, key, data, *rest, **named)

        return dying

    for name in ("put", "put_new"):
        setattr(LocalStorage, name, passes(getattr(LocalStorage, name)))


def half(data: Iterable[Any]) -> Iterator[Any]:
    for piece in data:
        yield memoryview(piece)[: len(piece) // 2]
        os.kill(os.getpid(), signal.SIGKILL)


# the ranks -----------------------------------------------------------------------------------------------------------


def fork(count: int, work: Callable[[int], None], store: str) -> list[int]:
    """The exit codes of so many forked ranks. When one fails, the others are ended: they may wait for it for ever."""
    running: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if not pid:
            as_rank(rank, count, work, store)
        running[pid] = rank
    codes: dict[int, int] = {}
    while running:
        pid, status = os.wait()
        rank = running.pop(pid)
        codes[rank] = os.waitstatus_to_exitcode(status)
        if codes[rank] > 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in range(count)]


def as_rank(rank: int, count: int, work: Callable[[int], None], store: str) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        work(rank)
        code = 0
    except BaseException:  # noqa: BLE001  the parent sees the code, and the test what is printed
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def example(folder: Path, count: int, name: str, path: str) -> None:
    """An example, as a launcher starts it on so many ranks."""

    def work(rank: int) -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"  # as torchrun calls every start
        sys.argv = [path, "--repo", str(folder / "runs"), "--name", name]
        runpy.run_path(path, run_name="__main__")

    assert fork(count, work, f"{folder}/store-{name}-{random.random()}") == [0] * count


def main(verb: str, folder: Path, *rest: str) -> None:
    if verb == "lives":
        lives(folder, int(rest[0]))
        return
    if verb == "example":
        example(folder, int(rest[0]), *rest[1:])
        return

    def work(rank: int) -> None:
        facts = save_and_load(folder, rank)
        (folder / f"facts-{rank}.json").write_text(json.dumps(facts))

    assert fork(RANKS, work, f"{folder}/store") == [0] * RANKS


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
