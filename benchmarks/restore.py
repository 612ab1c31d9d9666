"""Loads out of a history: the newest, the oldest, any; and what one more link of a chain of differences costs.

python -m benchmarks.restore [--count 100] [--others 30] [--rounds 7] [--peers zipnn] [--folder DIR] [--json]

The history is the gpt sequence: `--count` checkpoints of ours, `--others` of those whose saves take longer or whose
checkpoints stand alone anyway. Every load ends when each byte has been summed up; all files are in the page cache; ours
opens the repository anew, folds its log and verifies every byte. torch.load reads its whole file (mmap=False,
weights_only=True). `any` is another checkpoint at each round, drawn; `slowest` the slowest of all of ours: each is
loaded once and the three slowest again in every round.

A link: of checkpoints in chains of differences, what a load takes longer for each base more that its chunks lean on, by
least squares over the depths that occur; for the weights alone, nearly every chunk of which leans, and for the whole
state. One contestant again: python -m benchmarks.restore --peers borg
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import everystep
from benchmarks import apart, peers, results, sequences, timing
from benchmarks.apart import Apart
from benchmarks.peers import slug
from benchmarks.peers.everystep import Everystep
from benchmarks.results import Table, ratio, spread
from benchmarks.timing import Samples, Stopwatch
from benchmarks.work import Replay

OURS, TORCH = "everystep", "torch.save"
ALWAYS = tuple(slug(name) for name in (OURS, TORCH))
SLOWEST = 3
LINK_COUNT = 10
QUANTITIES = ("newest", "oldest", "any", "slowest")
Loads = dict[str, Callable[[], dict[str, float]]]

# out of a history --------------------------------------------------------------------------------------------------


def fill(contestants: dict[str, Apart], work: Replay, counts: dict[str, int], failed: dict[str, str]) -> None:
    """Each checkpoint into every history that goes so far; those that stand alone keep their last only."""
    for step in range(max(counts.values())):
        work.show(step)
        for name, contestant in list(contestants.items()):
            alone = not (contestant.peer.keeps_all or getattr(contestant.peer, "leans", False))
            if step >= counts[name] or (alone and step < counts[name] - 1):
                continue
            try:
                contestant.call("keep", step)
            except apart.Failed as error:
                failed[name] = str(error)
                contestants.pop(name).close()
        if step % 10 == 9:
            timing.say(f"  {step + 1} checkpoints")


def loads_of(contestant: Apart, count: int, chance: random.Random) -> dict[str, Callable[[], dict[str, float]]]:
    """quantity -> a load."""

    def load(step: int) -> dict[str, float]:
        found: dict[str, float] = contestant.call("load", step)
        return found

    if not (contestant.peer.keeps_all or getattr(contestant.peer, "leans", False)):
        return {"newest": lambda: load(count - 1)}
    return {
        "newest": lambda: load(count - 1),
        "oldest": lambda: load(0),
        "any": lambda: load(chance.randrange(count)),
    }


def slowest(contestant: Apart, count: int) -> list[int]:
    """The steps that took longest, of one load each."""
    seconds = {step: contestant.call("load", step)["load"] for step in range(count)}
    return sorted(seconds, key=lambda step: -seconds[step])[:SLOWEST]


def measure(count: int, others: int, rounds: int, asked: str | None, place: str | None) -> dict[str, Any]:
    chosen, missing = peers.choose(asked, "restore", ALWAYS)
    work = Replay(sequences.load("gpt", count))
    work.show(0)
    counts = {peer.name: count if issubclass(peer, Everystep) else min(count, others) for peer in chosen}
    chance = random.Random(0)
    with timing.scratch(place) as folder:
        contestants, failed = apart.start(chosen, work.memory, folder)
        try:
            fill(contestants, work, counts, failed)
            calls: Loads = {}
            for name, contestant in contestants.items():
                for quantity, load in loads_of(contestant, counts[name], chance).items():
                    calls[f"{name}|{quantity}"] = load
            if OURS in contestants:
                for index, step in enumerate(slowest(contestants[OURS], count)):
                    calls[f"{OURS}|slowest {index}"] = lambda step=step: contestants[OURS].call("load", step)
            samples = timing.alternate(calls, rounds=rounds)
        finally:
            for contestant in contestants.values():
                contestant.close()
            work.close()
    samples.failed |= failed
    size = {"nbytes": work.nbytes, "counts": counts, "missing": missing}
    return {**size, "samples": samples.as_dict()}


# one link ---------------------------------------------------------------------------------------------------------


def depth_of(folder: str, step: int) -> int:
    """The longest chain that any of its chunks is at the end of."""
    checkpoint = everystep.open(folder)["bench"].at(step)
    view = checkpoint._vault.manifest(checkpoint._commit).views[0]
    return max(view.spot(index).depth for index in range(len(view.layout.chunks)))


def measure_links(rounds: int, place: str | None, *, weights_only: bool) -> dict[str, Any]:
    """Samples of torch.load and of one checkpoint for each depth that occurs."""
    sequence = sequences.load("gpt")
    names = [name for name, role in sequence.roles.items() if role in sequences.WEIGHTS or not weights_only]
    work = Replay(sequence, names=names)
    state = work.memory.state()

    def timed(call: Callable[[], Any]) -> Callable[[], dict[str, float]]:
        def once() -> dict[str, float]:
            watch = Stopwatch()
            held = call()
            peers.touch(held)
            seconds = watch.seconds()
            del held
            return {"load": seconds}

        return once

    with timing.scratch(place) as scratch:
        folder, path = os.path.join(scratch, "runs"), os.path.join(scratch, "state.pth")
        with everystep.open(folder).run("bench") as run:
            for step in range(LINK_COUNT):
                work.show(step)
                run.save(step, state=state).wait()
        torch.save({part: dict(values) for part, values in state.items()}, path)
        steps: dict[int, int] = {}
        for step in range(LINK_COUNT):
            steps.setdefault(depth_of(folder, step), step)
        calls = {TORCH: timed(lambda: torch.load(path, mmap=False, weights_only=True))}
        for depth, step in sorted(steps.items()):
            calls[str(depth)] = timed(lambda step=step: everystep.open(folder)["bench"].at(step).load(like="torch"))
        samples = timing.alternate(calls, rounds=rounds, warmups=2)
    work.close()
    return {"nbytes": work.nbytes, "samples": samples.as_dict()}


def link_cost(samples: Samples) -> float | None:
    """What one more link takes, in times of torch.load: the slope of a line through the medians."""
    depths = [int(name) for name in samples.values if name != TORCH]
    found = [samples.ratio(str(depth), TORCH, "load") for depth in depths]
    if len(depths) < 2 or None in found:
        return None
    return float(np.polyfit(depths, [value or 0.0 for value in found], 1)[0])


# the tables -------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[Table]:
    history = result["history"]
    samples = Samples.from_dict(history["samples"])
    base = f"{TORCH}|newest"
    found: dict[str, dict[str, str]] = {}
    for key in samples.values:
        name, _, quantity = key.partition("|")
        found.setdefault(name, {})[quantity] = key
    for keys in found.values():
        slow = [key for quantity, key in keys.items() if quantity.startswith("slowest")]
        if slow:
            keys["slowest"] = max(slow, key=lambda key: samples.median(key, "load") or 0.0)
    rows = []
    for name, keys in sorted(found.items(), key=lambda item: samples.median(item[1].get("newest", ""), "load") or 0.0):
        cells = [keys.get(quantity, "") for quantity in QUANTITIES]
        pairs = [(spread(samples.of(key, "load"), 1e3), ratio(samples.ratio(key, base, "load"))) for key in cells]
        count = str(history["counts"][name]) if "oldest" in keys else "1"
        rows.append([name, count, *itertools.chain.from_iterable(pairs)])
    heads = [(f"{quantity} ms", "/ torch.load") for quantity in QUANTITIES]
    head = ["", "n", *itertools.chain.from_iterable(heads)]
    notes = ["median (least–most)", *results.left_out(history, samples)]
    title = f"Loads out of a history of n checkpoints, {history['nbytes'] / 1e6:.0f} MB each"
    return [Table(title, head, rows, notes), _links(result["links"])]


def _links(links: dict[str, Any]) -> Table:
    rows, notes = [], []
    for what, found in links.items():
        samples = Samples.from_dict(found["samples"])
        title = f"{what}, {found['nbytes'] / 1e6:.0f} MB"
        for name in sorted(samples.values, key=lambda name: -1 if name == TORCH else int(name)):
            label = "torch.load" if name == TORCH else f"depth {name}"
            rows.append([f"{title}: {label}", spread(samples.of(name, "load"), 1e3),
                         ratio(samples.ratio(name, TORCH, "load"))])  # fmt: skip
        notes.append(f"{what}: one more link takes {ratio(link_cost(samples))} × torch.load")
    return Table("Chains of differences", ("", "load ms", "/ torch.load"), rows, notes)


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.restore", __doc__)
    parser.add_argument("--count", type=int, default=sequences.LONG_COUNT, help="checkpoints of ours")
    parser.add_argument("--others", type=int, default=sequences.COUNT, help="checkpoints of the others")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", help="files or names of peers, by commas; default: all")
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    links = {
        what: measure_links(given.rounds, given.folder, weights_only=what == "weights")
        for what in ("weights", "whole state")
    }
    result = {"links": links, "history": measure(given.count, given.others, given.rounds, given.peers, given.folder)}
    results.publish("restore", result, tables(result), given, results.command("benchmarks.restore", arguments))


if __name__ == "__main__":
    main()
