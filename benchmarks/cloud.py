"""Saves to and loads from an object store, beside the same bytes put and got by obstore alone.

python -m benchmarks.cloud [s3://bucket/prefix] [--apart] [--mb 384] [--rounds 7] [--json]

The store is the user's own, with the credentials and the endpoint of the environment, and what is written there is
removed; or a Ceph gateway that is started for it (Debian: ceph-mon ceph-osd ceph-common radosgw). Where the store runs
on the same machine, both share its cores, unless --apart gives each one half of them.

The bytes are those that a save really sends: its packs, as they lie in the store afterwards. obstore puts them from
memory, as many at once as a save does, and gets them in the pieces and with the threads of a load. So a ratio of 1
means that encoding, hashing, committing and verifying cost nothing on top.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import everystep
from benchmarks import gateway, results, timing
from benchmarks.results import Table, number, ratio, spread
from benchmarks.timing import Samples, Stopwatch
from everystep.seam import REAL
from everystep.settings import DEFAULT
from everystep.storage import open_storage

LEAVES = 16
PIECE = 8 << 20
SAVE, PUT, LOAD, GET = "everystep save", "obstore put", "everystep load", "obstore get"
# Each state stands alone, for obstore has nothing to lean on; nothing trains here that saving should give way to.
SETTINGS = everystep.Settings(base_depth_max=0, base_depth_small=0, background_nice=0)
PAUSE_SECONDS = 0.5
"""Behind each save, for the collection that it starts: its deletes are no part of what comes next."""


class Bench:
    """A state that changes all over, each time saved alone, and the packs of a save as obstore sees them."""

    def __init__(self, url: str, mb: int) -> None:
        import obstore.store

        self._obstore, self.url = obstore, url
        random = np.random.default_rng(0)
        size = mb * 1_000_000 // 4 // LEAVES
        # The noise of real weights: about .86 of it is left by the codecs.
        self.state = {f"layer{n}": random.normal(size=size).astype(np.float32) * 0.02 for n in range(LEAVES)}
        self.nbytes = sum(leaf.nbytes for leaf in self.state.values())
        self.repo = everystep.open(url, settings=SETTINGS)
        self.storage = open_storage(url, REAL)
        self.store = obstore.store.from_url(url, client_options={"allow_http": True, "timeout": "10m"})
        self.name, self.steps = f"bench-{REAL.token(4)}", itertools.count(1)
        self.run = self.repo.run(self.name, keep=everystep.last(1)).track(rng=False)
        self.run.resume()
        self.packs: dict[str, Any] = {}
        self.puts, self.gets = ThreadPoolExecutor(DEFAULT.uploads), ThreadPoolExecutor(self.storage.fan_out)

    def save(self) -> dict[str, float]:
        for leaf in self.state.values():
            leaf += np.roll(leaf, 1)
        watch = Stopwatch()
        saved = self.run.save(next(self.steps), state=self.state)
        blocked = watch.seconds()
        checkpoint = saved.wait()
        seconds = watch.seconds()
        time.sleep(PAUSE_SECONDS)
        return {"seconds": seconds, "blocked": blocked, "stored": checkpoint.cost["stored_bytes"]}

    def take_packs(self) -> None:
        """The bytes that the last save sent."""
        if not self.packs:
            keys = [key for key in self.storage.list(f"runs/{self.name}/") if "/packs/" in key]
            self.packs = {f"raw/{number}": bytes(self.storage.get(key)) for number, key in enumerate(keys)}

    def put(self) -> dict[str, float]:
        self.take_packs()
        watch = Stopwatch()
        list(self.puts.map(lambda item: self._put(*item), self.packs.items()))
        return {"seconds": watch.seconds(), "stored": sum(map(len, self.packs.values()))}

    def load(self) -> dict[str, float]:
        checkpoint = everystep.open(self.url)[self.name].latest
        if checkpoint is None:
            raise RuntimeError("nothing was saved")
        watch = Stopwatch()
        state = checkpoint.load()
        seconds = watch.seconds()
        if any(not np.array_equal(state[name], leaf) for name, leaf in self.state.items()):
            raise RuntimeError("another state came back")
        return {"seconds": seconds}

    def get(self) -> dict[str, float]:
        self.take_packs()
        spans = [
            (key, at, min(at + PIECE, len(body)))
            for key, body in self.packs.items()
            for at in range(0, len(body), PIECE)
        ]
        watch = Stopwatch()
        found = list(self.gets.map(lambda span: self._get(*span), spans))
        seconds = watch.seconds()
        if sum(map(len, found)) != sum(map(len, self.packs.values())):  # all of it is in memory now, as after a load
            raise RuntimeError("other bytes came back")
        return {"seconds": seconds}

    def close(self) -> None:
        self.run.close()
        for part in (f"runs/{self.name}/", "raw/"):
            for key in list(self.storage.list(part)):
                self.storage.delete(key)
        self.puts.shutdown()
        self.gets.shutdown()

    def _put(self, key: str, body: bytes) -> None:
        self._obstore.put(self.store, key, body, use_multipart=False)

    def _get(self, key: str, start: int, stop: int) -> Any:
        return self._obstore.get_range(self.store, key, start=start, end=stop)


def measure(url: str, mb: int, rounds: int) -> tuple[Samples, int]:
    bench = Bench(url, mb)
    try:
        for _ in range(2):  # by then both copies of the state have their memory
            bench.save()
        bench.put()
        contestants: dict[str, Callable[[], dict[str, float]]] = {
            SAVE: bench.save, PUT: bench.put, LOAD: bench.load, GET: bench.get,
        }  # fmt: skip
        return timing.alternate(contestants, rounds=rounds), bench.nbytes
    finally:
        bench.close()


def tables(result: dict[str, Any]) -> list[Table]:
    samples = Samples.from_dict(result["samples"])
    stored = samples.median(PUT, "stored") or 0.0
    rows = []
    for name, base in ((SAVE, PUT), (PUT, PUT), (LOAD, GET), (GET, GET)):
        seconds = samples.median(name, "seconds")
        speed = samples.ratio(base, name, "seconds")
        rows.append(
            [
                name, spread(samples.of(name, "seconds"), digits=2),
                number(stored / seconds / 1e6 if seconds else None, digits=0), ratio(speed),
            ]
        )  # fmt: skip
    cores = "; store and client on cores of their own" if result.get("apart") else ""
    title = f"{result['nbytes'] / 1e6:.0f} MB of state, {stored / 1e6:.0f} MB sent, {result['rounds']} rounds{cores}"
    head = ("", "s", "sent MB/s", "speed / obstore's")
    blocked = samples.median(SAVE, "blocked")
    notes = ["median (least–most)", f"a save blocks for {blocked:.2f} s" if blocked is not None else ""]
    return [Table(title, head, rows, [note for note in (*notes, *results.left_out(result, samples)) if note])]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.cloud", __doc__)
    parser.add_argument("url", nargs="?", help="a bucket, and a prefix that nothing else uses")
    parser.add_argument("--apart", action="store_true", help="the gateway that is started has one half of the cores")
    parser.add_argument("--mb", type=int, default=384, help="of state")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    with gateway.store(given.url, apart=given.apart) as url:
        samples, nbytes = measure(url, given.mb, given.rounds)
    result = {
        "rounds": given.rounds, "nbytes": nbytes, "apart": given.apart, "samples": samples.as_dict(), "missing": {}
    }  # fmt: skip
    name = "cloud-apart" if given.apart else "cloud"
    results.publish(name, result, tables(result), given, results.command("benchmarks.cloud", arguments))


if __name__ == "__main__":
    main()
