"""What saving costs a training loop: segments of steps with saves, against the same segment without.

python -m benchmarks.training [--every 10] [--steps 10] [--rounds 20] [--batch 12] [--peers …] [--folder DIR] [--json]

A segment is `--steps` steps of a small GPT that uses all cores, with a save before the first and then before every
`--every`-th; no save is skipped. What is left of a save is waited for before the next one and at the segment's end, so
that all it costs is in the figure. In every round each contestant has one segment, in shuffled order, and there
are two without a save, with whose mean it is compared. One contestant again:
python -m benchmarks.training --every 10 --peers orbax-async
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers, results, timing
from benchmarks.peers import Peer, State, slug
from benchmarks.results import NOTHING, Table
from benchmarks.timing import Samples, Stopwatch
from benchmarks.work import Training

NONE, NONE_AGAIN = "no save", "no save, again"
OURS = "everystep"


def refresh(kept: State, state: State) -> None:
    with torch.no_grad():
        for part, values in kept.items():
            for name, value in values.items():
                value.copy_(state[part][name])


def measure(
    training: Training, peer: Peer | None, state: State, every: int, steps: int, folder: str
) -> Callable[[], dict[str, float]]:
    def once() -> dict[str, float]:
        if peer is not None:
            peer.clear()
        timing.free_pages(folder, training.nbytes)
        blocking, watch = [], Stopwatch()
        for step in range(steps):
            if peer is not None and step % every == 0:
                if step:
                    peer.finish()
                if peer.refers:
                    with watch.paused():
                        refresh(peer.state, state)
                begun = watch.seconds()
                peer.save(training.steps)
                blocking.append(watch.seconds() - begun)
            training.step()
        if peer is not None:
            peer.finish()
        found = {"segment": watch.seconds()}
        return {**found, "blocking": statistics.median(blocking)} if blocking else found

    return once


def run(every: int, steps: int, rounds: int, batch: int, asked: str | None, folder: str | None) -> dict[str, Any]:
    chosen, missing = peers.choose(asked, "training", (slug(OURS),))
    failed: dict[str, str] = {}
    with timing.scratch(folder) as place:
        training = Training(batch)
        state = training.state()
        contestants = {name: measure(training, None, state, every, steps, place) for name in (NONE, NONE_AGAIN)}
        made = []
        for kind in chosen:
            own = timing.subfolder(place, slug(kind.name))
            try:
                peer = kind(copy.deepcopy(state) if kind.refers else state, own)
            except Exception as error:  # noqa: BLE001  whatever a peer may do, the others go on
                failed[kind.name] = timing.described(error)
                continue
            peer.wake()
            made.append(peer)
            contestants[peer.name] = measure(training, peer, state, every, steps, place)
        samples = timing.alternate(contestants, rounds=rounds)
        for peer in made:
            peer.close()
    samples.failed |= failed
    size = {"nbytes": training.nbytes, "every": every, "steps": steps, "rounds": rounds, "batch": batch}
    return {**size, "missing": missing, "samples": samples.as_dict()}


def slowdowns(samples: Samples, name: str) -> list[float]:
    """By round: a segment against the mean of the two without a save."""
    bare = [(a + b) / 2 for a, b in zip(samples.of(NONE, "segment"), samples.of(NONE_AGAIN, "segment"))]
    return [with_saves / without - 1 for with_saves, without in zip(samples.of(name, "segment"), bare)]


def tables(result: dict[str, Any]) -> list[Table]:
    samples = Samples.from_dict(result["samples"])
    names = [name for name in samples.values if name not in (NONE, NONE_AGAIN)]
    names.sort(key=lambda name: statistics.median(slowdowns(samples, name)))
    rows = []
    for name in [NONE, *names]:
        found, blocking = slowdowns(samples, name), samples.median(name, "blocking")
        low, high = timing.quartiles(found) or (0.0, 0.0)
        slower = f"{100 * statistics.median(found):+.1f} % ({100 * low:+.1f} … {100 * high:+.1f})"
        edges = samples.quartiles(name, "segment") or (0.0, 0.0)
        segment = f"{samples.median(name, 'segment') or 0.0:.3f} ({edges[0]:.3f}–{edges[1]:.3f})"
        rows.append([name, NOTHING if name == NONE else slower, segment,
                     NOTHING if blocking is None else f"{1e3 * blocking:.1f}"])  # fmt: skip
    step = (samples.median(NONE, "segment") or 0.0) / result["steps"]
    saves = -(-result["steps"] // result["every"])
    title = (
        f"A save every {result['every']} steps: {result['nbytes'] / 1e6:.0f} MB of state, {step:.2f} s a step, "
        f"{result['rounds']} rounds"
    )
    again = 100 * statistics.median(slowdowns(samples, NONE_AGAIN)) if samples.of(NONE_AGAIN, "segment") else 0.0
    notes = [
        f"a segment is {result['steps']} steps with {saves} save{'s' if saves > 1 else ''}, all that they cost "
        "included; medians (quartiles) over the rounds",
        f"the two segments without a save in each round differ by {abs(2 * again):.1f} % in the median",
        *peers.remarks(names),
        *results.left_out(result, samples),
    ]
    return [Table(title, ("", "slower by", "segment s", "blocking a save, ms"), rows, notes)]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.training", __doc__)
    parser.add_argument("--every", type=int, default=10, help="steps between two saves")
    parser.add_argument("--steps", type=int, default=10, help="of a segment")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=12, help="texts in a batch")
    parser.add_argument("--peers", help="files or names of peers, by commas; default: all")
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    result = run(given.every, given.steps, given.rounds, given.batch, given.peers, given.folder)
    command = results.command("benchmarks.training", arguments)
    results.publish(f"training-{given.every}", result, tables(result), given, command)


if __name__ == "__main__":
    main()
