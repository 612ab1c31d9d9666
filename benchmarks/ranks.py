"""Four processes that save one sharded state together, and two that load it: everystep and torch DCP.

python -m benchmarks.ranks [--mb 600] [--rounds 5] [--peers …] [--folder DIR] [--json]

The state is one real checkpoint after the other, the next at each round, in memory that all processes map; each rank
holds its rows of every tensor as a DTensor, as FSDP2 does. Every contestant has four processes of its own, joined by
gloo, and all of them save at the same moment. What a rank waits for counts as the slowest rank's: blocking until its
training may go on, durable until the checkpoint of all ranks is there, its files and folders synced. A load fills the
shards of two ranks, and ends when every byte has been summed up; ours verifies each of them. All is compared bit for
bit first. One contestant again: python -m benchmarks.ranks --peers dcp-async
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import everystep
from benchmarks import apart, peers, results, sequences, timing
from benchmarks.results import Table, ratio, spread
from benchmarks.timing import Samples, Stopwatch
from benchmarks.work import Memory, Replay, tensor_of

RANKS, LOADERS = 4, 2
ANSWER_SECONDS_MAX, END_SECONDS_MAX = 600.0, 20.0
OURS, DCP = "everystep", "torch DCP"
Shards = dict[str, dict[str, DTensor]]


class Held(nn.Module):
    """The shards of one part of the state that a rank holds, as parameters."""

    def __init__(self, shards: dict[str, DTensor]) -> None:
        super().__init__()
        for name, value in shards.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value, requires_grad=False))


def cut(memory: Memory, mesh: DeviceMesh, *, empty: bool = False) -> Shards:
    """This rank's rows of every tensor, each a storage of its own: where the whole lies, or in memory of their own."""
    found, data = {}, memory.arrays()
    for place in memory.places:
        shape = (place.shape[0] * place.shape[1], *place.shape[2:]) if len(place.shape) > 1 else place.shape
        row = place.nbytes // shape[0]
        each = -(-shape[0] // mesh.size())
        start, stop = (min(each * at, shape[0]) for at in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
        mine = tensor_of(data[place.name][start * row : stop * row], place.dtype, (stop - start, *shape[1:]))
        mine = torch.empty_like(mine) if empty else mine
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        found[place.name] = DTensor.from_local(mine, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride)
    return peers.nested(found)


def local_values(shards: Shards) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {name: value.to_local() for name, value in values.items()} for part, values in shards.items()}


# contestants ---------------------------------------------------------------------------------------------------------


class Together:
    """One way for ranks to save together; an object in each rank."""

    name = ""
    keeps_all = False

    def __init__(self, shards: Shards, folder: str) -> None:
        self.shards, self.folder, self.step = shards, folder, -1

    def save(self, step: int) -> None:
        """Until training may go on."""

    def finish(self) -> None:
        """Until it is durable."""

    def load(self, shards: Shards, group: dist.ProcessGroup) -> None:
        """The last checkpoint, into the shards of fewer ranks."""

    def close(self) -> None:
        """Frees threads and files."""


class Ours(Together):
    name = OURS
    keeps_all = True
    settings: ClassVar[everystep.Settings] = everystep.Settings()

    def __init__(self, shards: Shards, folder: str) -> None:
        super().__init__(shards, folder)
        run = everystep.open(folder, settings=self.settings).run("bench", launch="bench")
        self._run = run.track(rng=False, **{part: Held(values) for part, values in shards.items()})

    def save(self, step: int) -> None:
        self._saved = self._run.save(step)
        self.step = step

    def finish(self) -> None:
        self._saved.wait()

    def load(self, shards: Shards, group: dist.ProcessGroup) -> None:
        everystep.open(self.folder)["bench"].at(self.step).load(
            into={part: Held(values) for part, values in shards.items()}
        )

    def close(self) -> None:
        self._run.close()


class OursAlone(Ours):
    name = "everystep, no deltas"
    settings = everystep.Settings(base_depth_max=0)


class Dcp(Together):
    name = DCP

    @property
    def path(self) -> str:
        return os.path.join(self.folder, str(self.step))

    def save(self, step: int) -> None:
        self.step = step
        dcp.save(self.shards, checkpoint_id=self.path)

    def finish(self) -> None:
        """Its files are synced; the folders are not, which rank 0 does for all."""
        dist.barrier()
        if dist.get_rank() == 0:
            peers.sync(self.folder)
        dist.barrier()

    def load(self, shards: Shards, group: dist.ProcessGroup) -> None:
        dcp.load(shards, checkpoint_id=self.path, process_group=group)


class DcpAsync(Dcp):
    name = "torch DCP async"
    stager: DefaultStager | None = None

    def save(self, step: int) -> None:
        self.step = step
        self._under_way = dcp.async_save(
            self.shards, checkpoint_id=self.path, async_stager=self.stager, process_group=dist.group.WORLD
        )

    def finish(self) -> None:
        getattr(self._under_way, "upload_completion", self._under_way).result()
        super().finish()


class DcpKeptStager(DcpAsync):
    name = "torch DCP async, kept stager"

    def __init__(self, shards: Shards, folder: str) -> None:
        super().__init__(shards, folder)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    def close(self) -> None:
        assert self.stager is not None
        self.stager.close()


CONTESTANTS: tuple[type[Together], ...] = (Ours, OursAlone, Dcp, DcpAsync, DcpKeptStager)


# their processes -----------------------------------------------------------------------------------------------------


class Failed(Exception):
    """What the contestant died of."""


class Group:
    """The four processes of a contestant."""

    def __init__(self, kind: type[Together], memory: Memory, folder: str) -> None:
        os.makedirs(folder)
        self.name = kind.name
        context = multiprocessing.get_context("forkserver")
        # Or each would import torch for itself; not this module, which is the main one.
        context.set_forkserver_preload(["benchmarks.peers.dcp", "benchmarks.work", "torch.distributed.tensor"])
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(RANKS):
            pipe, other = context.Pipe()
            arguments = (other, CONTESTANTS.index(kind), memory, folder, rank)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        self.call("ready")

    def call(self, verb: str, *arguments: Any) -> list[Any]:
        """What each rank answers; they all begin at once.

        Raises:
            Failed: if one could not, or is gone.
        """
        for pipe in self._pipes:
            pipe.send((verb, arguments))
        answers, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if errors or not pipe.poll(ANSWER_SECONDS_MAX):
                    errors.append(f"no answer of rank {rank} to {verb}")
                    continue
                found, error = pipe.recv()
            except (EOFError, OSError):
                found, error = None, f"rank {rank} ended in {verb}"
            answers.append(found)
            errors += [error] if error is not None else []
        if errors:
            raise Failed(errors[0])
        return answers

    def close(self, *, kill: bool = False) -> None:
        if not kill:
            try:
                self.call("close")
            except Failed as error:
                timing.say(f"{self.name} could not be closed: {error}")
        for process in self._processes:
            process.join(0 if kill else END_SECONDS_MAX)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()


def serve(pipe: Connection, kind: int, memory: Memory, folder: str, rank: int) -> None:
    """One rank."""
    apart.answer(pipe, lambda: Member(CONTESTANTS[kind], memory, folder, rank))


class Member:
    def __init__(self, kind: type[Together], memory: Memory, folder: str, rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=RANKS)
        self._rank, self._folder, self._memory = rank, folder, memory
        self._nbytes = sum(place.nbytes for place in memory.places)
        mesh, self._few = DeviceMesh("cpu", list(range(RANKS))), DeviceMesh("cpu", list(range(LOADERS)))
        shards = cut(memory, mesh)
        peers.touch(local_values(shards))  # so that its pages count as here already
        self._way = kind(shards, folder)

    def ready(self) -> None:
        """Made, that is."""

    def save(self, step: int) -> dict[str, float]:
        if self._rank == 0:
            if not self._way.keeps_all:
                for entry in os.scandir(self._folder):
                    shutil.rmtree(entry.path)
            timing.free_pages(os.path.dirname(self._folder), self._nbytes)
        dist.barrier()
        watch = Stopwatch()
        self._way.save(step)
        blocking = watch.seconds()
        self._way.finish()
        return {"blocking": blocking, "durable": watch.seconds()}

    def load(self) -> dict[str, float]:
        if self._rank >= LOADERS:
            return {}
        shards, group = cut(self._memory, self._few, empty=True), self._few.get_group()
        dist.barrier(group)
        watch = Stopwatch()
        self._way.load(shards, group)
        peers.touch(local_values(shards))
        return {"load": watch.seconds()}

    def check(self) -> int:
        """How many tensors of a load differ from what lies in memory now."""
        if self._rank >= LOADERS:
            return 0
        shards = cut(self._memory, self._few, empty=True)
        self._way.load(shards, self._few.get_group())
        found, meant = local_values(shards), local_values(cut(self._memory, self._few))
        return sum(
            bytes(peers.bytes_of(found[part][name])) != bytes(peers.bytes_of(value))
            for part, values in meant.items()
            for name, value in values.items()
        )

    def stored(self) -> int:
        return timing.folder_bytes(self._folder) if self._rank == 0 else 0

    def close(self) -> None:
        self._way.close()
        dist.destroy_process_group()


# what is measured ----------------------------------------------------------------------------------------------------


def saving(group: Group, work: Replay, keeps_all: bool) -> Callable[[], dict[str, float]]:
    stored = [0]

    def once() -> dict[str, float]:
        answers = group.call("save", work.shown)
        before, stored[0] = stored[0] if keeps_all else 0, sum(group.call("stored"))
        slowest = {key: max(answer[key] for answer in answers) for key in answers[0]}
        return {**slowest, "stored": (stored[0] - before) / work.nbytes}

    return once


def loading(group: Group) -> Callable[[], dict[str, float]]:
    return lambda: {"load": max(answer["load"] for answer in group.call("load") if answer)}


def chosen(asked: str | None) -> list[type[Together]]:
    """Ours and DCP in any case: the others are compared with them."""
    wanted = None if asked is None else {each.strip() for each in asked.split(",")}
    return [
        kind for kind in CONTESTANTS
        if wanted is None or kind.name in (OURS, DCP) or peers.slug(kind.name).removeprefix("torch-") in wanted
    ]  # fmt: skip


def run(mb: float, rounds: int, asked: str | None, folder: str | None) -> dict[str, Any]:
    sequence = sequences.load("gpt")
    least = 2 * sum(value.nbytes for value in sequence[0].values()) / 1e6  # two copies: their rows are cut
    work = Replay(sequence, mb=max(mb, least))
    work.next()
    groups: dict[str, Group] = {}
    failed: dict[str, str] = {}
    with timing.scratch(folder) as place:
        try:
            for kind in chosen(asked):
                groups[kind.name] = Group(kind, work.memory, os.path.join(place, peers.slug(kind.name)))
                timing.say(f"  {kind.name} is ready")
            keeps = {kind.name: kind.keeps_all for kind in CONTESTANTS}
            measured = {name: saving(group, work, keeps[name]) for name, group in groups.items()}
            samples = timing.alternate(measured, rounds=rounds, warmups=2, before=work.next)
            for name, group in groups.items():
                if name not in samples.failed and (wrong := sum(group.call("check"))):
                    failed[name] = f"{wrong} tensors came back changed"
            whole = {name: loading(g) for name, g in groups.items() if name not in {**samples.failed, **failed}}
            samples.merge(timing.alternate(whole, rounds=rounds))
        finally:
            for name, group in groups.items():
                group.close(kill=name in samples.failed)
            work.close()
    samples.failed |= failed
    return {
        "nbytes": work.nbytes, "leaves": len(work.memory.places), "rounds": rounds, "samples": samples.as_dict(),
    }  # fmt: skip


def tables(result: dict[str, Any]) -> list[Table]:
    samples = Samples.from_dict(result["samples"])
    rows = [
        [
            name, spread(samples.of(name, "blocking"), 1e3), ratio(samples.ratio(name, DCP, "blocking")),
            spread(samples.of(name, "durable"), digits=2), ratio(samples.ratio(name, DCP, "durable")),
            spread(samples.of(name, "stored"), digits=2), spread(samples.of(name, "load"), 1e3),
            ratio(samples.ratio(name, DCP, "load")),
        ]
        for name in sorted(samples.values, key=lambda name: samples.median(name, "blocking") or 0.0)
    ]  # fmt: skip
    head = ("", "blocking ms", "/ DCP", "durable s", "/ DCP", "stored / raw", f"load on {LOADERS} ranks ms", "/ DCP")
    size = f"{result['nbytes'] / 1e6:.0f} MB in {result['leaves']} tensors, {result['rounds']} rounds"
    notes = ["median (least–most), of the slowest rank", *results.left_out(result, samples)]
    return [Table(f"{RANKS} ranks save together: {size}", head, rows, notes)]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.ranks", __doc__)
    parser.add_argument("--mb", type=float, default=600, help="of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="names, by commas, such as dcp-async; default: all")
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    result = run(given.mb, given.rounds, given.peers, given.folder)
    results.publish("ranks", result, tables(result), given, results.command("benchmarks.ranks", arguments))


if __name__ == "__main__":
    main()
