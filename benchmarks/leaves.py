"""What a leaf costs: time of save() and bytes of metadata, with many tiny leaves; and the share of a large state.

python -m benchmarks.leaves [--leaves 10000 100000] [--rounds 5] [--folder DIR] [--json]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import everystep
from benchmarks import results, timing
from benchmarks.results import Table, spread
from benchmarks.timing import Stopwatch
from everystep import adapters, codecs
from everystep.schema import flatten, lay_out
from everystep.settings import DEFAULT
from everystep.vault.manifest import SPOT, tree_page, values_page

ELEMENTS = 8
LARGE_LEAVES, LARGE_SIDE = 100_000, 1000  # 100,000 leaves of 4 MB are 400 GB
PROMISED = 1e-4

Split = Callable[[np.ndarray[Any, Any]], Sequence[Any]]


def numpy_leaves(values: np.ndarray[Any, Any]) -> Sequence[Any]:
    return list(values.reshape(-1, ELEMENTS))


def torch_leaves(values: np.ndarray[Any, Any]) -> Sequence[Any]:
    return torch.from_numpy(values).split(ELEMENTS)


class Contestant:
    """A run of its own; each call saves a state in which every byte has changed."""

    def __init__(self, split: Split, leaves: int, folder: str) -> None:
        # Bytes that no codec shrinks: what is stored beyond them is metadata.
        self._values = np.empty(leaves * ELEMENTS, np.float32)
        self._chance = np.random.default_rng(0)
        parts = split(self._values)
        self._state = {"model": {f"layers.{i}.weight": part for i, part in enumerate(parts)}}
        self._folder, self._step = folder, 0
        self._run = everystep.open(folder).run("bench")

    def measure(self) -> dict[str, float]:
        self._step += 1
        self._values.view(np.uint8)[:] = self._chance.integers(0, 256, self._values.nbytes, np.uint8)
        before = timing.folder_bytes(self._folder)
        watch = Stopwatch()
        saved = self._run.save(self._step, state=self._state)
        blocking = watch.seconds()
        saved.wait()
        durable = watch.seconds()
        stored = timing.folder_bytes(self._folder) - before - self._values.nbytes
        return {"blocking": blocking, "durable": durable, "metadata": float(stored)}

    def close(self) -> None:
        self._run.close()


def metadata_share() -> dict[str, float]:
    """The metadata of 400 GB in 100,000 leaves, made and encoded as a save does, without the 400 GB.

    One zero that looks like a large array stands for every leaf. Hashes do not compress; places are taken as they are
    in memory, which is more than they come to on disk.
    """
    one = np.broadcast_to(np.float32(0), (LARGE_SIDE, LARGE_SIDE))
    names = ("model.layers.{}.weight", "optimizer.state.{}.exp_avg", "optimizer.state.{}.exp_avg_sq")
    # Each begins at an address of its own, or all would be names of one leaf.
    table = np.zeros(LARGE_LEAVES, np.float32)
    state = {
        names[i % 3].format(i // 3): np.lib.stride_tricks.as_strided(table[i:], one.shape, one.strides)
        for i in range(LARGE_LEAVES)
    }
    tree = flatten(state, adapters.describe)
    layout = lay_out(tree.leaves, DEFAULT.chunk_bytes_max, DEFAULT.small_leaf_bytes)
    pages = [tree_page(tree), values_page(tree)]
    encoded = [codecs.encode(np.frombuffer(p, np.uint8), "|u1", DEFAULT.zstd_level, DEFAULT.sample_bytes,
                             DEFAULT.worth_ratio)[1] for p in pages]  # fmt: skip
    names_bytes = sum(len(piece) for pieces in encoded for piece in pieces)
    chunk_bytes = len(layout.chunks) * (32 + SPOT.itemsize)
    raw = sum(chunk.nbytes for chunk in layout.chunks)
    return {
        "state bytes": raw,
        "leaves": len(tree.leaves),
        "first checkpoint": names_bytes + chunk_bytes,
        "each further one": chunk_bytes,
    }


def run(counts: list[int], rounds: int, folder: str | None) -> timing.Samples:
    with timing.scratch(folder) as place:
        contestants = {
            f"{count:,} {kind} leaves": Contestant(split, count, os.path.join(place, f"{kind}-{count}"))
            for count in counts
            for kind, split in (("NumPy", numpy_leaves), ("torch", torch_leaves))
        }
        samples = timing.alternate({name: c.measure for name, c in contestants.items()}, rounds=rounds)
        for contestant in contestants.values():
            contestant.close()
    return samples


def rows(samples: timing.Samples) -> list[list[str]]:
    out = []
    for name in samples.values:
        count = int(name.split()[0].replace(",", ""))
        blocking, metadata = (samples.median(name, quantity) or 0.0 for quantity in ("blocking", "metadata"))
        times = [spread(samples.of(name, quantity), 1e3) for quantity in ("blocking", "durable")]
        out.append([name, times[0], f"{1e6 * blocking / count:.1f}", times[1], f"{metadata / count:.2f}"])
    return sorted(out)


HEAD = ("", "save() ms", "µs a leaf", "durable ms", "metadata, bytes a leaf")


def tables(result: dict[str, Any]) -> list[Table]:
    samples, share = timing.Samples.from_dict(result["samples"]), result["metadata"]
    title = f"{share['leaves']:,} leaves of 4 MB, {share['state bytes'] / 1e9:.0f} GB: metadata"
    metadata = [
        [which, f"{share[which] / 1e6:.1f}", f"{100 * share[which] / share['state bytes']:.4f}"]
        for which in ("first checkpoint", "each further one")
    ]
    notes = ["median (least–most)", *results.left_out({}, samples)]
    return [
        Table("Many tiny leaves, every byte changed", HEAD, rows(samples), notes),
        Table(title, ("", "MB", "% of the state"), metadata, [f"promised: at most {100 * PROMISED:.2f} %"]),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.leaves", __doc__)
    parser.add_argument("--leaves", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    samples = run(given.leaves, given.rounds, given.folder)
    result = {"samples": samples.as_dict(), "metadata": metadata_share()}
    results.publish("leaves", result, tables(result), given, results.command("benchmarks.leaves", arguments))


if __name__ == "__main__":
    main()
