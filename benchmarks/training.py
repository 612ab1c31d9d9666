"""What saving costs a training loop: segments with one save each, against the same segment without.

python -m benchmarks.training [--every 10] [--rounds 7] [--folder DIR] [--json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks import timing
from benchmarks.peers import Peer, savers
from benchmarks.timing import Samples, Stopwatch
from benchmarks.work import Language, Training

NONE = "no save"
SKIPPED = ("torch.save",)  # without fsync it keeps nothing that a power cut leaves


def measure(training: Training, peer: Peer | None, every: int, folder: str) -> Callable[[], dict[str, float]]:
    """One save, then `every` steps while it becomes durable; whatever is left of it at the end is waited for."""

    def once() -> dict[str, float]:
        if peer is not None:
            peer.clear()
        timing.free_pages(folder, training.nbytes)
        watch, found = Stopwatch(), {}
        if peer is not None:
            peer.save(training.steps)
            found["blocking"] = watch.seconds()
        for _ in range(every):
            training.step()
        if peer is not None:
            peer.finish()
        return {"segment": watch.seconds(), **found}

    return once


def run(every: int, rounds: int, folder: str | None) -> tuple[Training, Samples]:
    with timing.scratch(folder) as place:
        training = Language()
        peers = [peer for peer in savers(training, place) if peer.name not in SKIPPED]
        contestants = {NONE: measure(training, None, every, place)}
        contestants |= {peer.name: measure(training, peer, every, place) for peer in peers}
        samples = timing.alternate(contestants, rounds=rounds, warmups=2)
        for peer in peers:
            peer.close()
    return training, samples


def rows(samples: Samples) -> list[list[str]]:
    out = []
    for name in samples.values:
        slower = samples.paired(name, NONE, "segment")
        out.append(
            [
                name,
                timing.milliseconds(samples, name, "segment"),
                f"{100 * (slower - 1):+.1f} %" if slower is not None and name != NONE else "–",
                timing.milliseconds(samples, name, "blocking"),
            ]
        )
    return out


HEAD = ("", "segment ms", "slower by", "of it blocking ms")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--every", type=int, default=10, help="steps between two saves")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure; default: the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    training, samples = run(given.every, given.rounds, given.folder)
    title = f"training: {training.nbytes / 1e6:.0f} MB of state, a save every {given.every} steps"
    result = {"nbytes": training.nbytes, "every": given.every, "samples": samples.as_dict()}
    result["slowdown"] = {name: samples.paired(name, NONE, "segment") for name in samples.values}
    timing.show(title, timing.table(HEAD, rows(samples)), result, given.json)


if __name__ == "__main__":
    main()
