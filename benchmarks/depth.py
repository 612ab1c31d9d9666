"""How deep chains of differences may go, against size and load: the table that decides the default.

python -m benchmarks.depth [gpt ft_bf16] [--count 30] [--settings base_depth_max=0 base_depth_max=1,workers=1 …]
                           [--rounds 2] [--folder DIR] [--json]

For each policy a run is saved, and every fifth and the nine newest checkpoints are loaded, in alternation with
torch.load of the same state; all bytes are summed up on both sides. `reads` is what a load reads of the files, in times
of the raw state: what counts behind a slow link.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

import everystep
from benchmarks import peers, results, sequences, timing
from benchmarks.results import Table, number, ratio
from benchmarks.timing import Samples, Stopwatch
from benchmarks.work import Replay
from everystep.seam import Files, Seam

TORCH = "torch.load"
POLICIES = tuple(f"base_depth_max={depth}" for depth in (0, 1, 2, 3, 4, 6, 8))
NEWEST = 9


class Counting(Files):
    """The operating system's file calls; counts the bytes that are read."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        got = super().read(fd, into, offset)
        self.read_bytes += got
        return got


def settings_of(policy: str) -> everystep.Settings:
    """
    Raises:
        SystemExit: for a setting that there is not.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(everystep.Settings)}
    given = {}
    for each in filter(None, policy.split(",")):
        name, _, value = each.partition("=")
        if name not in kinds:
            raise SystemExit(f"there is no setting {name!r}; there are {', '.join(kinds)}")
        given[name] = kinds[name](float(value))
    return everystep.Settings(**given)


def by_torch(path: str) -> dict[str, float]:
    watch = Stopwatch()
    peers.touch(torch.load(path, mmap=False, weights_only=True))
    return {"load": watch.seconds()}


def by_us(folder: str, step: int) -> dict[str, float]:
    watch = Stopwatch()
    peers.touch(everystep.open(folder)["bench"].at(step).load(like="torch"))
    return {"load": watch.seconds()}


def bytes_read(folder: str, step: int) -> int:
    files = Counting()
    everystep.open(folder, seam=Seam(files))["bench"].at(step).load()
    return files.read_bytes


def measure(policy: str, work: Replay, count: int, rounds: int, place: str | None) -> dict[str, Any]:
    state = work.memory.state()
    with timing.scratch(place) as scratch:
        folder, path = os.path.join(scratch, "runs"), os.path.join(scratch, "state.pth")
        with everystep.open(folder, settings=settings_of(policy)).run("bench") as run:
            for step in range(count):
                work.show(step)
                run.save(step, state=state).wait()
        torch.save({part: dict(values) for part, values in state.items()}, path)
        stored = timing.folder_bytes(folder)
        steps = sorted({*range(0, count, 5), *range(max(0, count - NEWEST), count)})
        reads = {step: bytes_read(folder, step) / work.nbytes for step in steps}
        calls: dict[str, Callable[[], dict[str, float]]] = {TORCH: lambda: by_torch(path)}
        calls |= {str(step): lambda step=step: by_us(folder, step) for step in steps}
        samples = timing.alternate(calls, rounds=rounds)
    return {
        "policy": policy, "stored": stored / count / work.nbytes, "reads": reads, "samples": samples.as_dict(),
    }  # fmt: skip


def shown(found: dict[str, Any]) -> list[str]:
    samples = Samples.from_dict(found["samples"])
    steps = sorted(int(name) for name in samples.values if name != TORCH)
    times = {step: samples.ratio(str(step), TORCH, "load") or 0.0 for step in steps}
    reads = {int(step): value for step, value in found["reads"].items()}
    newest = steps[-NEWEST:]
    return [
        found["policy"], number(found["stored"]), ratio(times[steps[-1]]),
        ratio(sum(times[step] for step in newest) / len(newest)), ratio(max(times.values())),
        number(reads[steps[-1]], 2), number(sum(reads.values()) / len(reads), 2), number(max(reads.values()), 2),
    ]  # fmt: skip


def tables(result: dict[str, Any]) -> list[Table]:
    head = (
        "", "stored / raw", "newest / torch.load", "mean of the last 9", "slowest", "newest reads / raw", "mean reads",
        "most reads",
    )  # fmt: skip
    return [
        Table(f"{name}, n = {found['count']}", head, [shown(each) for each in found["policies"]])
        for name, found in result["sequences"].items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.depth", __doc__)
    parser.add_argument("names", nargs="*", default=["gpt", "ft_bf16"], help="sequences")
    parser.add_argument("--count", type=int, default=sequences.COUNT)
    parser.add_argument("--settings", nargs="+", default=POLICIES, metavar="NAME=VALUE,…", help="policies")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args(arguments)
    for policy in given.settings:
        settings_of(policy)
    timing.warn_of_load()
    result: dict[str, Any] = {"sequences": {}}
    for name in given.names:
        work = Replay(sequences.load(name, given.count))
        found = []
        for policy in given.settings:
            timing.say(f"{name}: {policy}")
            found.append(measure(policy, work, given.count, given.rounds, given.folder))
        work.close()
        result["sequences"][name] = {"count": given.count, "nbytes": work.nbytes, "policies": found}
    results.publish("depth", result, tables(result), given, results.command("benchmarks.depth", arguments))


if __name__ == "__main__":
    main()
