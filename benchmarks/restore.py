"""A restore at the end of chains of bases, against torch.load of the same state: benchmarks.sequences' gpt.

python -m benchmarks.restore [--rounds 15] [--folder DIR] [--json]

`all`: weights and optimizer state; `weights`: these alone, every chunk of which leans on the one before. A checkpoint
of depth n reads n + 1 links where its chunks lean. torch.load reads the whole file (mmap=False, weights_only=True);
ours opens the repository, folds its log and verifies every byte. Files are in the page cache for both. The cost of one
link is what a restore takes longer per link, at the greatest depth measured.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

import everystep
from benchmarks import sequences, timing
from benchmarks.sequences import Sequence
from benchmarks.timing import Samples, Stopwatch

DEPTHS = (0, 1, 4, 8)
WEIGHTS = ("weights", "buffer")
TORCH = "torch.load"
TARGET = 6.0
State = dict[str, dict[str, torch.Tensor]]


def state_of(sequence: Sequence, index: int, *, weights_only: bool) -> State:
    parts: State = {"params": {}, "opt_state": {}}
    for name, value in sequence[index].items():
        part = "params" if sequence.roles[name] in WEIGHTS else "opt_state"
        parts[part][name] = torch.tensor(value)
    return {"params": parts["params"]} if weights_only else parts


def by_torch(path: str) -> State:
    return torch.load(path, mmap=False, weights_only=True)


def by_everystep(folder: str, step: int) -> State:
    return everystep.open(folder)["bench"].at(step).load(like="torch")


def measure(restore: Callable[[], State]) -> Callable[[], Mapping[str, float]]:
    def once() -> Mapping[str, float]:
        clock = Stopwatch()
        restored = restore()
        seconds = clock.seconds()
        del restored
        return {"restore": seconds}

    return once


def check(restored: State, state: State) -> None:
    for part, tensors in state.items():
        for name, value in tensors.items():
            if not torch.equal(restored[part][name].view(torch.int32), value.view(torch.int32)):
                raise SystemExit(f"{name} did not come back as it was saved")


def depth_of(folder: str, step: int) -> int:
    checkpoint = everystep.open(folder)["bench"].at(step)
    view = checkpoint._vault.manifest(checkpoint._commit).views[0]
    return max(view.spot(index).depth for index in range(len(view.layout.chunks)))


def run(rounds: int, place: str | None, *, weights_only: bool) -> tuple[int, Samples]:
    """(bytes of the state, samples); the file of torch is of the state at the greatest depth."""
    sequence = sequences.load("gpt")
    with timing.scratch(place) as scratch:
        folder, path = os.path.join(scratch, "runs"), os.path.join(scratch, "state.pth")
        with everystep.open(folder).run("bench") as saving:
            for step in range(max(DEPTHS) + 1):
                state = state_of(sequence, step, weights_only=weights_only)
                saving.save(step, state=state)
        torch.save(state, path)
        contestants: dict[str, Callable[[], State]] = {TORCH: lambda: by_torch(path)}
        for depth in DEPTHS:
            if depth_of(folder, depth) != depth:
                raise SystemExit(f"step {depth} lies at depth {depth_of(folder, depth)}")
            check(by_everystep(folder, depth), state_of(sequence, depth, weights_only=weights_only))
            contestants[f"depth {depth}"] = lambda depth=depth: by_everystep(folder, depth)
        measured = {name: measure(restore) for name, restore in contestants.items()}
        samples = timing.alternate(measured, rounds=rounds, warmups=2)
    return sum(value.nbytes for part in state.values() for value in part.values()), samples


def link_cost(samples: Samples) -> float:
    """What one more link takes, in times of torch.load."""
    shallow, deep = (samples.ratio(f"depth {depth}", TORCH, "restore") for depth in (0, max(DEPTHS)))
    assert shallow is not None and deep is not None
    return (deep - shallow) / max(DEPTHS)


def rows(title: str, samples: Samples) -> list[list[str]]:
    return [
        [
            f"{title}: {name}",
            timing.milliseconds(samples, name, "restore"),
            timing.ratio(samples.ratio(name, TORCH, "restore")),
        ]
        for name in samples.values
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.restore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", help="on the disk to measure; default: the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    table: list[list[str]] = []
    result: dict[str, Any] = {"rounds": given.rounds}
    costs = []
    for title in ("all", "weights"):
        nbytes, samples = run(given.rounds, given.folder, weights_only=title == "weights")
        table += rows(f"{title}, {nbytes / 1e6:.0f} MB", samples)
        costs.append(f"{title} {link_cost(samples):.2f}")
        result[title] = {"nbytes": nbytes, "samples": samples.as_dict(), "link": link_cost(samples)}
    text = timing.table(("", "restore ms", "/ torch.load"), table)
    text += f"\n\none link, in times of torch.load: {', '.join(costs)} (target ≤ {TARGET:g})"
    timing.show(f"restore: median (quartiles) of {given.rounds}", text, result, given.json)


if __name__ == "__main__":
    main()
