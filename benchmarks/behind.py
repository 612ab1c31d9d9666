"""Saves and loads behind a link of limited speed, the same for all: everystep and peers.

python -m benchmarks.behind [--rates 100 25] [--rounds 3] [--peers …] [--folder DIR] [--json]

The link is a mount (benchmarks.link) through which so many megabytes a second pass, each way. States are the gpt
sequence's. `stored / raw` is what a save added to the folder. Loads are of the newest checkpoint, which for ours means
of each of the last nine, so that every place in a chain of differences counts; nothing is in the page cache.
One contestant again: python -m benchmarks.behind --peers zipnn
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from benchmarks import apart, link, peers, results, sequences, timing
from benchmarks.apart import Apart
from benchmarks.blocking import check
from benchmarks.peers import slug
from benchmarks.peers.everystep import Everystep
from benchmarks.results import Table, number, ratio, spread
from benchmarks.timing import Samples
from benchmarks.work import Replay

OURS, SYNCED, PLAIN = "everystep", "safetensors + fsync", "torch.save + fsync"
ALWAYS = tuple(slug(name) for name in (OURS, SYNCED, PLAIN))
POSITIONS = 9
RATES = (100.0, 25.0)


def saving(contestant: Apart, work: Replay) -> Callable[[], dict[str, float]]:
    stored = [0]

    def once() -> dict[str, float]:
        found: dict[str, float] = contestant.call("save", work.shown, False)
        before, stored[0] = stored[0], contestant.call("stored")
        added = stored[0] - (before if contestant.peer.keeps_all else 0)
        return {**found, "stored": added / work.nbytes}

    return once


def loading(contestant: Apart, last: int) -> Callable[[], dict[str, float]]:
    if not issubclass(contestant.peer, Everystep):
        return lambda: contestant.call("load")
    steps = itertools.cycle(range(last - POSITIONS + 1, last + 1))
    return lambda: contestant.call("load", next(steps))


def measure(rate: float, rounds: int, asked: str | None, folder: str | None) -> tuple[Samples, dict[str, str]]:
    chosen, missing = peers.choose(asked, "link", ALWAYS)
    work = Replay(sequences.load("gpt"))
    work.show(0)
    with timing.scratch(folder) as place, link.mounted(place, rate) as front:
        contestants, failed = apart.start(chosen, work.memory, front, logs=place)
        try:
            measured = {name: saving(contestant, work) for name, contestant in contestants.items()}
            samples = timing.alternate(measured, rounds=rounds, before=work.next)
            check(contestants, samples, rounds, work.shown)
            ours = [c for c in contestants.values() if issubclass(c.peer, Everystep) and c.name not in samples.failed]
            while work.shown < POSITIONS:
                work.next()
                for contestant in ours:
                    contestant.call("keep", work.shown)
            rest = {name: c for name, c in contestants.items() if c not in ours and name not in samples.failed}
            of_ours = {contestant.name: loading(contestant, work.shown) for contestant in ours}
            samples.merge(timing.alternate(of_ours, rounds=POSITIONS, warmups=0))
            others = {name: loading(contestant, work.shown) for name, contestant in rest.items()}
            samples.merge(timing.alternate(others, rounds=rounds, warmups=0))
        finally:
            for contestant in contestants.values():
                contestant.close()
            work.close()
    samples.failed |= failed
    return samples, missing


def tables(result: dict[str, Any]) -> list[Table]:
    out = []
    for rate, found in result["rates"].items():
        samples = Samples.from_dict(found)
        names = sorted(samples.values, key=lambda name: samples.median(name, "durable") or 0.0)
        rows = [
            [
                name, number(samples.median(name, "stored")), spread(samples.of(name, "durable"), digits=2),
                ratio(samples.ratio(name, SYNCED, "durable")), ratio(samples.ratio(name, PLAIN, "durable")),
                spread(samples.of(name, "load"), digits=2), ratio(samples.ratio(name, PLAIN, "load")),
            ]
            for name in names
        ]  # fmt: skip
        head = ("", "stored / raw", "durable s", f"/ {SYNCED}", f"/ {PLAIN}", "load newest s", "/ torch.load")
        title = f"Behind {float(rate):g} MB/s: 68 MB, {result['rounds']} rounds"
        out.append(
            Table(title, head, rows, ["median (least–most)", *peers.remarks(names), *results.left_out(result, samples)])
        )
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.behind", __doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="megabytes a second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="files or names of peers, by commas; default: all")
    given = parser.parse_args(arguments)
    lacking = link.missing()
    if lacking is not None:
        raise SystemExit(f"there can be no link here: {lacking}")
    timing.warn_of_load()
    result: dict[str, Any] = {"rounds": given.rounds, "rates": {}}
    for rate in given.rates:
        timing.say(f"{rate:g} MB/s")
        samples, result["missing"] = measure(rate, given.rounds, given.peers, given.folder)
        result["rates"][str(rate)] = samples.as_dict()
    results.publish("behind", result, tables(result), given, results.command("benchmarks.behind", arguments))


if __name__ == "__main__":
    main()
