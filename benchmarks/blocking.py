"""How long a save blocks training, when its checkpoint is durable, and how long a load takes: everystep and peers.

python -m benchmarks.blocking [--mb 1500] [--sequence gpt] [--rounds 5] [--peers dcp,orbax] [--folder DIR] [--json]

The state is one real checkpoint after the other, the next at each round, at the same addresses; a large one is made of
several copies, each multiplied with a number of its own. Every contestant is a process of its own that maps it. What
came before is deleted just before the next save, where a peer does not keep it, and as many free pages are left behind
as a save takes. Blocking ends when training may go on; durable is after fsync of all files and folders, by the peer or,
where it does not, right after it. A load ends when every byte has been summed up. Extra memory is what the process
takes beside the state at the most, in times of the state. One row again, beside those it is compared with:
python -m benchmarks.blocking --peers orbax-async
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil

from benchmarks import apart, peers, results, sequences, timing
from benchmarks.apart import Apart
from benchmarks.peers import Peer, slug
from benchmarks.results import Table, number, ratio, spread
from benchmarks.timing import Samples
from benchmarks.work import Replay

OURS, SYNCED, LOADED = "everystep", "safetensors + fsync", "torch.save"
ALWAYS = tuple(slug(name) for name in (OURS, SYNCED, LOADED, "memcpy, one thread", "memcpy, all threads"))
SECONDS_MAX = 40.0
PROGRAM_BYTES = 150 << 20  # of each contestant's process: torch, and what it imports


def saving(contestant: Apart, work: Replay) -> Callable[[], dict[str, float]]:
    return lambda: contestant.call("save", work.shown)


def loading(contestant: Apart) -> Callable[[], dict[str, float]]:
    return lambda: contestant.call("load")


def remember(contestant: Apart, work: Replay) -> Callable[[], dict[str, float]]:
    return lambda: contestant.call("memory", work.shown + 1)


def check(contestants: dict[str, Apart], samples: Samples, rounds: int, step: int) -> None:
    """A figure counts only for a checkpoint that holds the state; who does not give it back is named and left out."""
    for name, contestant in contestants.items():
        if name in samples.failed or contestant.peer.floor:
            continue
        try:
            if len(samples.of(name, "blocking")) < rounds:  # it rested while the state went on
                contestant.call("save", step, False)
            wrong, elements = contestant.call("check")
        except apart.Failed as error:
            samples.failed[name] = str(error)
            continue
        if wrong and contestant.peer.exact:
            samples.failed[name] = f"{wrong} of {elements} elements came back changed"


def heats(chosen: list[type[Peer]], nbytes: int, available: float) -> list[list[type[Peer]]]:
    """As many contestants at a time as there is memory for; those that the others are compared with in every heat."""
    always = [peer for peer in chosen if slug(peer.name) in ALWAYS]
    others = [peer for peer in chosen if slug(peer.name) not in ALWAYS]
    found = [list(always)]
    for peer in others:
        if len(found[-1]) > len(always) and _needs([*found[-1], peer], nbytes) > available:
            found.append(list(always))
        found[-1].append(peer)
    return found


def _needs(together: list[type[Peer]], nbytes: int) -> float:
    """About how much memory: the state, what each keeps, what one of them takes beside that, and their programs."""
    states = 1 + sum(peer.kept for peer in together) + max(peer.most - peer.kept for peer in together)
    return states * nbytes + PROGRAM_BYTES * len(together)


def run_heat(chosen: list[type[Peer]], work: Replay, rounds: int, place: str, seconds_max: float) -> Samples:
    contestants, failed = apart.start(chosen, work.memory, place)
    try:
        measured = {name: saving(contestant, work) for name, contestant in contestants.items()}
        samples = timing.alternate(measured, rounds=rounds, warmups=2, before=work.next, seconds_max=seconds_max)
        check(contestants, samples, rounds, work.shown)
        whole = {name: c for name, c in contestants.items() if name not in samples.failed and not c.peer.floor}
        memory = {name: remember(contestant, work) for name, contestant in whole.items()}
        samples.merge(timing.alternate(memory, rounds=1, warmups=0))
        loads = {name: loading(contestant) for name, contestant in whole.items()}
        samples.merge(timing.alternate(loads, rounds=rounds, seconds_max=seconds_max))
    finally:
        for contestant in contestants.values():
            contestant.close()
    samples.failed |= failed
    return samples


def run(
    mb: float, sequence: str, rounds: int, asked: str | None, folder: str | None, seconds_max: float = SECONDS_MAX
) -> dict[str, Any]:
    chosen, missing = peers.choose(asked, "blocking", ALWAYS)
    work = Replay(sequences.load(sequence), mb=mb)
    work.next()
    if work.nbytes > apart.LARGE_BYTES:
        missing |= {peer.name: "takes several times the state in memory" for peer in chosen if peer.hungry}
        chosen = [peer for peer in chosen if not peer.hungry]
    found = []
    for heat in heats(chosen, work.nbytes, 0.85 * psutil.virtual_memory().available):
        timing.say(f"{len(work.memory.places)} tensors, {work.nbytes / 1e6:.0f} MB, {len(heat)} contestants")
        with timing.scratch(folder) as place:
            found.append(run_heat(heat, work, rounds, place, seconds_max))
    work.close()
    state = {"nbytes": work.nbytes, "leaves": len(work.memory.places), "sequence": sequence}
    return {**state, "rounds": rounds, "missing": missing, "heats": [samples.as_dict() for samples in found]}


def together(result: dict[str, Any]) -> tuple[Samples, dict[str, Samples]]:
    """(all heats in one, contestant -> the samples that it is compared within: of its heat, or of all)."""
    found, whole = [Samples.from_dict(heat) for heat in result["heats"]], Samples()
    for samples in found:
        whole.merge(samples)
    homes = {name: [samples for samples in found if name in samples.values] for name in whole.values}
    return whole, {name: home[0] if len(home) == 1 else whole for name, home in homes.items()}


def tables(result: dict[str, Any]) -> list[Table]:
    whole, homes = together(result)
    size = f"{result['nbytes'] / 1e6:.0f} MB in {result['leaves']} tensors, {result['rounds']} rounds"
    copies = [name for name in whole.values if name.startswith("memcpy")]
    floor = min(copies, key=lambda name: whole.median(name, "blocking") or 0.0)
    names = sorted(homes, key=lambda name: homes[name].median(name, "blocking") or 0.0)
    save = [
        [
            name, spread(home.of(name, "blocking"), 1e3), ratio(home.ratio(name, floor, "blocking")),
            ratio(home.least_ratio(name, floor, "blocking")), spread(home.of(name, "durable"), digits=2),
            ratio(home.ratio(name, SYNCED, "durable")), ratio(home.least_ratio(name, SYNCED, "durable")),
            spread(home.of(name, "cpu"), digits=2), number(home.median(name, "extra"), 2),
        ]
        for name, home in ((name, homes[name]) for name in names)
    ]  # fmt: skip
    pairs = [(name, homes[name]) for name in names if homes[name].of(name, "load")]
    load = [
        [
            name, spread(home.of(name, "load"), 1e3), ratio(home.ratio(name, LOADED, "load")),
            ratio(home.least_ratio(name, LOADED, "load")), spread(home.of(name, "load_cpu"), digits=2),
            number(home.median(name, "load_extra"), 2),
        ]
        for name, home in sorted(pairs, key=lambda pair: pair[1].median(pair[0], "load") or 0.0)
    ]  # fmt: skip
    head = (
        "", "blocking ms", "/ memcpy", "minima", "durable s", "/ safetensors + fsync", "minima", "CPU s",
        "extra memory / state",
    )  # fmt: skip
    notes = ["median (least–most); minima: the ratio of the least of each", *_heats(result)]
    load_head = ("", "load ms", "/ torch.load", "minima", "CPU s", "extra memory / state")
    return [
        Table(f"A save: {size}", head, save, [*notes, *peers.remarks(names), *results.left_out(result, whole)]),
        Table(f"A load, from the page cache: {size}", load_head, load, notes[:1]),
    ]


def _heats(result: dict[str, Any]) -> list[str]:
    if len(result["heats"]) == 1:
        return []
    return [
        f"in {len(result['heats'])} heats, for want of memory; {OURS}, {SYNCED}, {LOADED} and memcpy took part in "
        "each, and every ratio is to those of the same heat"
    ]


def name_of(nbytes: int) -> str:
    """The result's: one for large states, one for small."""
    return "blocking-large" if nbytes > apart.LARGE_BYTES else "blocking-small"


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.blocking", __doc__)
    parser.add_argument("--mb", type=float, default=1500, help="of the state; 0: as the sequence is")
    parser.add_argument("--sequence", default="gpt", choices=list(sequences.RECIPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="files or names of peers, by commas; default: all")
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    result = run(given.mb, given.sequence, given.rounds, given.peers, given.folder)
    command = results.command("benchmarks.blocking", arguments)
    results.publish(name_of(result["nbytes"]), result, tables(result), given, command)


if __name__ == "__main__":
    main()
