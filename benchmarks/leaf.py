"""What it costs to load one leaf of a large checkpoint from a store: bytes and requests, at each depth of a chain.

python -m benchmarks.leaf [s3://bucket/prefix] [--mb 2000] [--leaf-mb 16] [--saves 5] [--json]

The store is the user's own, or a folder, and what is written there is removed; or a Ceph gateway that is started for it
(Debian: ceph-mon ceph-osd ceph-common radosgw). Each save changes every element a little, so
that it leans on the one before. The leaf lies in the middle, and is loaded by a program that has just opened the place:
finding the checkpoint counts as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import everystep
from benchmarks import gateway, results, timing
from benchmarks.results import Table, number, ratio
from everystep.repository import Repository
from everystep.seam import REAL
from everystep.settings import DEFAULT
from everystep.storage import open_storage
from everystep.storage.faulty import FaultyStorage
from everystep.vault import Place

ALLOWED_BYTES = 1 << 20
"""Beside the links of the leaf: the manifest, the log, and what lies between its chunks."""


class Counting(FaultyStorage):
    """Counts what is asked of a storage, and what comes."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.nbytes = 0

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        found = super().get(key, start, stop)
        self.nbytes += len(found)
        return found


def measure(url: str, mb: int, leaf_mb: int, saves: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    count = max(mb // leaf_mb, 1)
    state = {f"layer{n}": random.normal(size=leaf_mb * 250_000).astype(np.float32) * 0.02 for n in range(count)}
    name = f"leaf-{REAL.token(4)}"
    storage = open_storage(url, REAL)
    try:
        with everystep.open(url).run(name).track(rng=False) as run:
            for step in range(saves):
                for leaf in state.values() if step else ():
                    leaf += random.normal(size=leaf.shape).astype(np.float32) * 1e-8
                run.save(step, state=state).wait()
                timing.say(f"saved {step + 1} of {saves}")
        return [_load(url, name, step, f"layer{count // 2}", state, last=step == saves - 1) for step in range(saves)]
    finally:
        for key in list(storage.list(f"runs/{name}/")):
            storage.delete(key)


def _load(url: str, name: str, step: int, path: str, state: dict[str, Any], *, last: bool) -> dict[str, Any]:
    storage = Counting(open_storage(url, REAL))
    checkpoint = Repository(Place(storage, REAL, DEFAULT))[name].at(step)
    loaded = checkpoint.load(only=path)
    if last and not np.array_equal(loaded, state[path]):
        raise RuntimeError("another leaf came back")
    own, links, depth = _stored(checkpoint, path)
    return {
        "step": step, "depth": depth, "raw": loaded.nbytes, "stored": own, "links": links, "got": storage.nbytes,
        "requests": len(storage.calls), "state": sum(leaf.nbytes for leaf in state.values()),
    }  # fmt: skip


def _stored(checkpoint: Any, path: str) -> tuple[int, int, int]:
    """Of a leaf: its stored bytes, those of all that it leans on, too, and how many links that are at most."""
    own = links = depth = 0
    for view in checkpoint._open().manifest.views:
        for region in view.layout.regions:
            if view.tree.leaves[region.leaf].path == f"state/{path}":
                for index in view.layout.chunks_of(region):
                    chain = [link.length for link in view.spot(index).links()]
                    own, links, depth = own + chain[0], links + sum(chain), max(depth, len(chain) - 1)
    return own, links, depth


def tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        [
            str(one["step"]), str(one["depth"]),
            number(one["stored"] / 1e6, digits=2), number(one["links"] / 1e6, digits=2),
            number(one["got"] / 1e6, digits=2), ratio(one["got"] / one["links"]),
            number((one["got"] - one["links"]) / 1e3, digits=1), str(one["requests"]),
        ]
        for one in result["loads"]
    ]  # fmt: skip
    first = result["loads"][0]
    head = ("step", "links before", "stored MB", "with its links MB", "got MB", "/ links", "beside them KB", "requests")
    title = f"one leaf of {first['raw'] / 1e6:.0f} MB, of a checkpoint of {first['state'] / 1e6:.0f} MB"
    worst = max(one["got"] - one["links"] for one in result["loads"])
    note = f"at most {worst / 1e3:.0f} KB beside the links of the leaf; promised: {ALLOWED_BYTES / 1e3:.0f} KB"
    return [Table(title, head, rows, [note])]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.leaf", __doc__)
    parser.add_argument("url", nargs="?", help="a bucket, and a prefix that nothing else uses; or a folder")
    parser.add_argument("--mb", type=int, default=2000, help="of the state")
    parser.add_argument("--leaf-mb", type=int, default=16)
    parser.add_argument("--saves", type=int, default=5)
    given = parser.parse_args(arguments)
    with gateway.store(given.url, apart=False) as url:
        result = {"loads": measure(url, given.mb, given.leaf_mb, given.saves), "missing": {}}
    results.publish("leaf", result, tables(result), given, results.command("benchmarks.leaf", arguments))


if __name__ == "__main__":
    main()
