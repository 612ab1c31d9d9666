"""How long a save blocks training, when its checkpoint is durable, and how long a load takes: everystep and peers.

python -m benchmarks.blocking [--mb 400] [--leaves 300] [--rounds 7] [--folder DIR] [--json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks import timing
from benchmarks.peers import Peer, savers
from benchmarks.peers.memcpy import Memcpy, MemcpyThreads
from benchmarks.timing import Samples, Stopwatch
from benchmarks.work import Layers, Training

OURS = "everystep"


def measure_copy(training: Training, memcpy: Memcpy, folder: str) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        training.step()
        timing.free_pages(folder, training.nbytes)
        memcpy.prepare()
        watch = Stopwatch()
        memcpy.copy()
        return {"blocking": watch.seconds()}

    return measure


def measure_save(training: Training, peer: Peer, folder: str) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        training.step()
        peer.clear()
        timing.free_pages(folder, training.nbytes)
        watch = Stopwatch()
        peer.save(training.steps)
        blocking = watch.seconds()
        peer.finish()
        return {"blocking": blocking, "durable": watch.seconds()}

    return measure


def measure_load(peer: Peer) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        watch = Stopwatch()
        held = peer.load()
        seconds = watch.seconds()
        del held
        return {"load": seconds}

    return measure


def check(training: Training, peer: Peer) -> None:
    """A figure counts only for a checkpoint that holds the state."""
    peer.save(training.steps)
    peer.finish()
    found = peer.load()
    for name, value in training.model.state_dict().items():
        if not torch.equal(found[name], value):
            raise SystemExit(f"{peer.name}: {name} came back changed")


def run(mb: float, leaves: int, rounds: int, folder: str | None) -> tuple[Training, Samples]:
    with timing.scratch(folder) as place:
        training = Layers(mb, leaves)
        peers = savers(training, place)
        copies = [Memcpy(training), MemcpyThreads(training)]
        timing.say(f"{len(training.tensors())} tensors, {training.nbytes / 1e6:.0f} MB, {rounds} rounds")
        contestants = {memcpy.name: measure_copy(training, memcpy, place) for memcpy in copies}
        contestants |= {peer.name: measure_save(training, peer, place) for peer in peers}
        samples = timing.alternate(contestants, rounds=rounds, warmups=2)
        training.step()
        for peer in peers:
            peer.clear()
            check(training, peer)
        loads = timing.alternate({peer.name: measure_load(peer) for peer in peers}, rounds=rounds)
        for peer in peers:
            peer.close()
    for name, quantities in loads.values.items():
        samples.values[name].update(quantities)
    return training, samples


def rows(samples: Samples) -> list[list[str]]:
    floor = min((Memcpy.name, MemcpyThreads.name), key=lambda name: samples.median(name, "blocking") or 0.0)
    out = []
    for name in samples.values:
        row = [name]
        for quantity in ("blocking", "durable", "load"):
            row.append(timing.milliseconds(samples, name, quantity))
            if quantity == "blocking":
                row.append(timing.ratio(samples.ratio(name, floor, quantity)))
            row.append(timing.ratio(samples.ratio(name, OURS, quantity)))
        out.append(row)
    return out


HEAD = ("", "blocking ms", "/ memcpy", "/ ours", "durable ms", "/ ours", "load ms", "/ ours")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocking", description=__doc__)
    parser.add_argument("--mb", type=float, default=400)
    parser.add_argument("--leaves", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure; default: the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    training, samples = run(given.mb, given.leaves, given.rounds, given.folder)
    size = {"nbytes": training.nbytes, "leaves": len(training.tensors()), "rounds": given.rounds}
    title = f"blocking: {size['leaves']} tensors, {training.nbytes / 1e6:.0f} MB, median (quartiles) of {given.rounds}"
    timing.show(title, timing.table(HEAD, rows(samples)), {**size, "samples": samples.as_dict()}, given.json)


if __name__ == "__main__":
    main()
