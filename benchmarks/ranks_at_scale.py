"""1,024 ranks, 100,000 checkpoints, 100,000 leaves: requests, bytes and time on a simulated object store.

python -m benchmarks.ranks_at_scale [--ranks 16 128 1024] [--checkpoints 100000] [--leaves 100000] [--json]

The code is the real one; the store, the clock and the turns of the threads are simulated (benchmarks/simulated.py),
with the limits that S3 publishes for one prefix: 3,500 writes and 5,500 reads a second, 503 beyond them. Each rank
saves weights and optimizer state of 16 KB, for the size of the state is not what is asked here. Times are those of the
virtual clock, in which only requests take time; processor time is said apart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import results, timing
from benchmarks.results import Table
from benchmarks.simulated import Bill, Model, SimulatedStorage, World
from everystep import adapters
from everystep.repository import Repository
from everystep.save import commit as commits
from everystep.save.commit import Draft
from everystep.save.part import Known, PartWriter
from everystep.schema import Tree, flatten, lay_out
from everystep.seam import Seam
from everystep.settings import DEFAULT, Settings
from everystep.storage import MemoryStorage
from everystep.storage.retrying import RetryingStorage
from everystep.vault import Place, RunVault, Spot, Term
from everystep.vault.names import PackName, record_key
from everystep.vault.packs import MAGIC
from everystep.vault.record import Commit, Cost, Note, Open, PackRange, Where

APART = 1000.0
"""Seconds of virtual time from one save to the next."""
ROWS = 1024
SIDE = 1000
SEED = 1


@contextmanager
def world(seed: int = SEED) -> Iterator[World]:
    made = World(seed)
    try:
        yield made
    finally:
        made.end()


def repository(storage: SimulatedStorage, settings: Settings) -> Repository:
    """As one process sees it."""
    seen = RetryingStorage(storage, storage.world, settings)
    return Repository(Place(seen, storage.world, settings))


# saves by many ranks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Save:
    """What one save of all ranks together cost."""

    ranks: int
    committed: float
    """Seconds from the first rank's call until the checkpoint was durable."""
    known: float
    """… until the last rank knew."""
    requests: dict[str, int]
    refused: int
    busiest: int
    bytes_in: int
    bytes_out: int
    record_bytes: int


class Fleet:
    """Ranks that save at the same moments.

    Args:
        spread: seconds between the first and the last rank's call.
        late: rank -> seconds that it comes later, or None if it never comes.
    """

    def __init__(
        self,
        ranks: int,
        settings: Settings = DEFAULT,
        model: Model | None = None,
        *,
        spread: float = 0.5,
        late: dict[int, float | None] | None = None,
    ) -> None:
        self.ranks, self.settings, self.model, self.spread, self.late = ranks, settings, model, spread, late or {}
        self.storage = SimulatedStorage(World(SEED), model)
        self.saves: list[Save] = []
        self.bills: list[Bill] = []
        self.errors: dict[int, BaseException] = {}
        self.ids: list[set[str]] = []

    def save(self, count: int) -> list[Save]:
        """As many saves; the bill of each, from the call on until the next."""
        with world() as outside:
            self.storage = SimulatedStorage(outside, self.model)
            self._committed, self._known = [0.0] * count, [0.0] * count
            self.ids = [set() for _ in range(count)]
            works: list[Callable[[], object]] = [
                lambda rank=rank: self._rank(rank, count) for rank in range(self.ranks)
            ]
            ended = outside.run([*works, lambda: self._clerk(count)])
            self.errors = {rank: error for rank, error in enumerate(ended) if error is not None}
        return self.saves

    def _rank(self, rank: int, count: int) -> None:
        outside = self.storage.world
        run = repository(self.storage, self.settings).run("run", rank=rank, ranks=self.ranks, launch="launch")
        with closing(run.track(rng=False)):
            for number in range(count):
                self._await(APART * (number + 1) + self.spread * rank / self.ranks)
                late = self.late.get(rank, 0.0)
                if late is None:
                    return
                outside.sleep(late)
                self.ids[number].add(run.save(number + 1, state=self._state(rank, number)).wait().id)
                at = outside.time - APART * (number + 1)
                self._committed[number] = at if rank == 0 else self._committed[number]
                self._known[number] = max(at, self._known[number])
            self._await(APART * (count + 1))  # what closing the run costs is not on the bill of its last save

    def _await(self, moment: float) -> None:
        self.storage.world.sleep(max(0.0, moment - self.storage.world.time))

    def _state(self, rank: int, number: int) -> dict[str, Any]:
        chance = np.random.default_rng(rank * 1000 + number)
        return {
            "model": {f"w{rank}": chance.standard_normal(ROWS, np.float32)},
            "optimizer": {f"w{rank}": {"exp_avg": chance.standard_normal(3 * ROWS, np.float32)}},
        }

    def _clerk(self, count: int) -> None:
        """Reads the meter between the saves."""
        for number in range(count + 1):
            self._await(APART * (number + 1) - 1)
            bill = self.storage.new_bill()
            if number:
                self.bills.append(bill)
                self.saves.append(self._sum_up(bill, number - 1))

    def _sum_up(self, bill: Bill, number: int) -> Save:
        objects = self.storage.inner.objects
        record = max(len(body) for key, body in objects.items() if "/log/" in key)
        return Save(
            self.ranks, self._committed[number], self._known[number], dict(bill.requests), bill.refused, bill.busiest,
            bill.bytes_in, bill.bytes_out, record,
        )  # fmt: skip


def open_manifest(storage: SimulatedStorage, settings: Settings) -> dict[str, float]:
    """What a reader pays who opens the run and the manifest of its newest checkpoint."""
    storage.new_bill()
    begun, outside = time.process_time(), storage.world
    at = outside.time
    checkpoint = repository(storage, settings)["run"].latest
    assert checkpoint is not None
    opened = storage.new_bill()
    leaves = len(list(checkpoint.leaves()))
    manifest = storage.new_bill()
    return {
        "leaves": leaves,
        "requests to open": opened.total,
        "requests of the manifest": manifest.total,
        "bytes": opened.bytes_in + manifest.bytes_in,
        "seconds": outside.time - at,
        "processor seconds": time.process_time() - begun,
    }


# a long log ----------------------------------------------------------------------------------------------------------


def long_log(checkpoints: int, settings: Settings = DEFAULT, more: int = 0) -> MemoryStorage:
    """The log of a run of so many checkpoints, each in a record of its own, and more records behind them."""
    storage, chance = MemoryStorage(), random.Random(SEED)
    vault = RunVault(Place(storage, Seam(), settings), "run")

    def drawn(size: int) -> str:
        return chance.randbytes(size).hex()

    term = vault.open_term(lambda history: Open(drawn(16), "alone", 1, {}, {}, None, "start"), "host:1")
    parent: str | None = None
    for ordinal in range(1, checkpoints + 1):
        number = 3 * ordinal
        root = Where(term.writer, number + 2, chance.randrange(9000), 300, 420, 1, drawn(32))
        commit = Commit(
            drawn(8), 100 * ordinal, parent, root, drawn(32), {"loss": chance.random(), "val_loss": chance.random()},
            [PackRange(term.writer, number, number + 2)], term.nonce, ordinal,
            Cost(*(chance.random() for _ in range(4)), 10**9, 5 * 10**8), 1, "save_every",
            [PackRange(term.writer, number, number)],
        )  # fmt: skip
        parent = commit.id
        vault.log.append(lambda history, commit=commit: [commit], "host:1")
    for _ in range(more):
        vault.log.append(lambda history: [Note("a remark")], "host:1")
    return storage


def open_log(made: MemoryStorage, settings: Settings = DEFAULT) -> dict[str, float]:
    """What opening it and asking for its newest checkpoint costs on the simulated store."""
    with world() as outside:
        storage = SimulatedStorage(outside)
        storage.inner.objects.update(made.objects)
        begun = time.process_time()
        found = repository(storage, settings)["run"].latest
        assert found is not None
        records = [body for key, body in made.objects.items() if "/log/" in key]
        volumes = [body for key, body in made.objects.items() if "/volumes/" in key]
        return {
            "checkpoints": found.step // 100,
            "records": len(records),
            "requests": storage.bill.total,
            "bytes": storage.bill.bytes_in,
            "seconds": outside.time,
            "processor seconds": time.process_time() - begun,
            "log bytes": sum(map(len, records)),
            "volume bytes": sum(map(len, volumes)),
            "volumes": len(volumes),
        }


# many leaves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imagined:
    """A snapshot of a state that nobody has the memory for."""

    tree: Tree
    layout: Any


class ImaginedPart(PartWriter):
    """Stores no chunk, and writes the manifest as if all were new and lay where they would lie."""

    def _write_chunks(self, snapshot: Any) -> list[Spot]:
        chance, number, at = np.random.default_rng(), 0, len(MAGIC)
        self._roles, self._changed = [snapshot.layout.streams[c.stream].role for c in snapshot.layout.chunks], True
        spots = []
        for chunk in snapshot.layout.chunks:
            length = int(chunk.nbytes * chance.uniform(0.7, 0.9))
            if at + length > self._settings.pack_bytes_max:
                number, at = number + 1, len(MAGIC)
            spots.append(Spot(PackName(f"{0:032}-1", number), at, length, 1, chance.bytes(32)))
            at += length
        return spots


def many_leaves(leaves: int) -> Imagined:
    """One zero that looks like a large array stands for each of them."""
    table, names = np.zeros(leaves, np.float32), ("model.{}.weight", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq")
    # Each begins at an address of its own, or all would be names of one leaf.
    state = {
        names[i % 3].format(i // 3): np.lib.stride_tricks.as_strided(table[i:], (SIDE, SIDE), (0, 0))
        for i in range(leaves)
    }
    tree = flatten(state, adapters.describe)
    return Imagined(tree, lay_out(tree.leaves, DEFAULT.chunk_bytes_max, DEFAULT.small_leaf_bytes))


def save_manifests(vault: RunVault, term: Term, snapshot: Imagined, count: int) -> list[int]:
    """Commits as many checkpoints of which every chunk is new, and answers what each took beside its chunks."""
    known, parent, sizes = Known(), None, []
    with closing(vault.seam.pool(1, "everystep-encode")) as pool:
        for number in range(1, count + 1):
            part = ImaginedPart(vault, term, known, pool, 1)
            part.write(snapshot, 0)  # type: ignore[arg-type]
            draft = Draft(vault.seam.token(8), number, parent, {}, number, "", 1)
            stored, root, logical = commits.close_root(draft, part, [], vault.where)
            commit = commits.commit_event(draft, term, stored, [], root, logical, Cost())
            vault.log.append(lambda history, commit=commit: [commit], "host:1")
            known, parent = stored.known, draft.id
            sizes.append(stored.stored_bytes + record_bytes(vault))
    return sizes


def record_bytes(vault: RunVault) -> int:
    """Of the newest one."""
    return int(vault.storage.stat(record_key(vault.folder, vault.log.history.slots - 1)).nbytes)


def measure_leaves(leaves: int) -> dict[str, float]:
    snapshot = many_leaves(leaves)
    with world() as outside:
        storage = SimulatedStorage(outside)
        vault = RunVault(repository(storage, DEFAULT)._place, "run")
        term = vault.open_term(lambda history: Open("0" * 32, "alone", 1, {}, {}, None, "start"), "host:1")
        first, further = save_manifests(vault, term, snapshot, 2)
        state = sum(chunk.nbytes for chunk in snapshot.layout.chunks)
        return {"state": state, "first": first, "further": further, **open_manifest(storage, DEFAULT)}


# the whole -----------------------------------------------------------------------------------------------------------

UNPACED = replace(DEFAULT, polls_per_second=1e9)


def measure_ranks(ranks: int, settings: Settings = DEFAULT) -> list[dict[str, Any]]:
    """The first save, which opens the run, and one more."""
    fleet = Fleet(ranks, settings)
    saves = fleet.save(2)
    if fleet.errors:
        raise next(iter(fleet.errors.values()))
    return [vars(save) for save in saves]


def rank_row(name: str, found: dict[str, Any]) -> list[str]:
    asked = found["requests"]
    total = sum(asked.values())
    return [
        name, f"{found['committed']:.1f}", f"{found['known']:.1f}", f"{total:,}", f"{total / found['ranks']:.1f}",
        *(f"{asked.get(verb, 0):,}" for verb in ("PUT", "GET", "HEAD", "LIST")), f"{found['refused']:,}",
        f"{found['busiest']:,}", f"{found['bytes_out'] / 1e6:.1f}", f"{found['bytes_in'] / 1e6:.1f}",
        f"{found['record_bytes'] / 1e3:.1f}",
    ]  # fmt: skip


HEAD = (
    "ranks", "durable s", "all know s", "requests", "a rank", "PUT", "GET", "HEAD", "LIST", "503", "most in 1 s",
    "MB up", "MB down", "record KB",
)  # fmt: skip


def tables(result: dict[str, Any]) -> list[Table]:
    model, log, leaves = result["model"], result["log"], result["leaves"]
    rows = [rank_row(name, found) for name, found in result["ranks"].items()]
    limits = (
        f"simulated: {model['writes_per_second']:,} writes and {model['reads_per_second']:,} reads a second, 503 "
        f"beyond them; read {1e3 * model['read_seconds']:.0f}, write {1e3 * model['write_seconds']:.0f}, list "
        f"{1e3 * model['list_seconds']:.0f} ms in the middle, {model['slow_share']:.1%} take "
        f"{model['slow_seconds']:.0f} s"
    )
    opening = [
        ["checkpoints", f"{log['checkpoints']:,}"], ["records", f"{log['records']:,}"],
        ["requests", f"{log['requests']:,}"], ["MB read", f"{log['bytes'] / 1e6:.1f}"],
        ["seconds of requests", f"{log['seconds']:.2f}"],
        ["seconds of the processor", f"{log['processor seconds']:.2f}"],
        ["MB of records", f"{log['log bytes'] / 1e6:.1f}"], ["MB of volumes", f"{log['volume bytes'] / 1e6:.1f}"],
    ]  # fmt: skip
    share = 1e2 / leaves["state"]
    many = [
        ["state, GB", f"{leaves['state'] / 1e9:.0f}"],
        ["metadata of the first checkpoint, MB", f"{leaves['first'] / 1e6:.2f} ({leaves['first'] * share:.4f} %)"],
        ["of each further one, MB", f"{leaves['further'] / 1e6:.2f} ({leaves['further'] * share:.4f} %)"],
        ["of 1,000, GB", f"{(leaves['first'] + 999 * leaves['further']) / 1e9:.2f}"],
        ["requests to open the run", f"{leaves['requests to open']:.0f}"],
        ["requests of a manifest", f"{leaves['requests of the manifest']:.0f}"],
        ["seconds of requests", f"{leaves['seconds']:.2f}"],
        ["seconds of the processor", f"{leaves['processor seconds']:.2f}"],
    ]
    return [
        Table("One save by many ranks together", HEAD, rows, [limits]),
        Table("Opening a long run, and asking for its newest checkpoint", ("", ""), opening),
        Table(f"{leaves['leaves']:,} leaves of 4 MB, every byte changed", ("", ""), many, ["promised: at most 0.01 %"]),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.ranks_at_scale", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument("--checkpoints", type=int, default=100_000)
    parser.add_argument("--leaves", type=int, default=100_000)
    given = parser.parse_args(arguments)
    ranks = {}
    for count in given.ranks:
        timing.say(f"{count} ranks")
        first, ranks[f"{count:,}"] = measure_ranks(count)
    ranks[f"{given.ranks[-1]:,}, the first, which opens the run"] = first
    timing.say(f"{given.ranks[-1]} ranks, unpaced")
    unpaced = f"{given.ranks[-1]:,}, each looking every {DEFAULT.poll_seconds} s"
    ranks[unpaced] = measure_ranks(given.ranks[-1], UNPACED)[-1]
    timing.say(f"{given.checkpoints} checkpoints")
    # As many more records as make it worst: none of the last 9,999 is in a volume of 10,000.
    log = open_log(long_log(given.checkpoints, more=max(0, 9_998 - given.checkpoints % 10_000)))
    timing.say(f"{given.leaves} leaves")
    result = {"model": vars(Model()), "ranks": ranks, "log": log, "leaves": measure_leaves(given.leaves)}
    run = results.command("benchmarks.ranks_at_scale", arguments)
    results.publish("ranks-at-scale", result, tables(result), given, run)


if __name__ == "__main__":
    main()
