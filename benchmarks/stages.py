"""What each stage of a save and of a load costs, in CPU time of one thread, against a memcpy of the state.

python -m benchmarks.stages [--first 14] [--rounds 7] [--json]

The state is that of the gpt sequence, weights and both averages, in chunks as a save cuts them, with the checkpoint
before as the base. Each stage does for all chunks what a save or a load does for them, and nothing else; so the sum is
the work, without threads that wait for each other. Writing and reading are those of a local folder; the time
in which a thread waits for the disk is no work of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from benchmarks import results, sequences, timing
from benchmarks.chunks import chunks
from benchmarks.results import Table, number, ratio, spread
from benchmarks.sequences import Array
from benchmarks.timing import Samples
from everystep import codecs
from everystep.codecs import delta, packed, planes
from everystep.seam import REAL
from everystep.settings import DEFAULT
from everystep.storage import LocalStorage

ROLES = ("weights", "exp_avg", "exp_avg_sq")
COPY = "memcpy"
SAVE = ("hash", "look at a sample", "pack residuals", "split into planes", "zstd", "write")
LOAD = ("read", "unpack residuals", "unpack zstd, join planes", "verify the hash")


@dataclass
class Job:
    """One chunk, and what encoding makes of it."""

    dtype: str
    data: Array
    base: Array
    out: Array
    codec: int = 0
    pieces: list[Any] = field(default_factory=list)
    stored: memoryview = field(default_factory=lambda: memoryview(b""))

    def __post_init__(self) -> None:
        self.codec, self.pieces = self.encode()
        self.stored = memoryview(b"".join(self.pieces))

    def encode(self) -> tuple[int, list[Any]]:
        options = (DEFAULT.zstd_level, DEFAULT.sample_bytes, DEFAULT.worth_ratio)
        return codecs.encode(self.data, self.dtype, *options, base=self.base)

    def plan(self) -> packed.Plan:
        return packed.plan(self.data, self.base, delta.form_of(self.dtype, self.data.nbytes))

    def rows(self) -> Array:
        return planes.rows_of(self.data, planes.form_of(self.dtype, self.data.nbytes))

    def decode(self) -> None:
        codecs.decode(self.codec, self.stored, self.data.nbytes, self.base, self.out)


def jobs(first: int) -> list[Job]:
    sequence, found = sequences.load("gpt", first + 2), []
    for role in ROLES:
        pairs = zip(*(list(chunks(sequence[index], sequence.roles, role)) for index in (first, first + 1)))
        found += [Job(now.dtype, now.data, before.data, np.ones_like(now.data)) for before, now in pairs]
    return found


def stages(work: Sequence[Job], storage: LocalStorage) -> dict[str, Callable[[], None]]:
    leaning = [job for job in work if job.codec in codecs.LEANING]
    alone = [job for job in work if job.codec == codecs.PLANES]

    def each(chosen: Sequence[Job], verb: Callable[[Job], Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            for job in chosen:
                verb(job)

        return all_of_them

    keys: list[str] = []

    def write() -> None:
        keys.append(f"stored/{len(keys)}")
        storage.put(keys[-1], (job.stored for job in work))

    def read() -> None:
        at = 0
        for job in work:
            storage.get(keys[-1], at, at + len(job.stored))
            at += len(job.stored)

    return {
        COPY: each(work, lambda job: np.copyto(job.out, job.data)),
        "hash": each(work, lambda job: blake3(job.data).digest()),
        "look at a sample": each(work, Job.plan),
        "with the sample: leaning": each(leaning, Job.encode),
        "split into planes": each(alone, Job.rows),
        "with the sample: alone": each(alone, Job.encode),
        "sample: alone": each(alone, Job.plan),
        "sample: leaning": each(leaning, Job.plan),
        "write": write,
        "read": read,
        "unpack residuals": each(leaning, Job.decode),
        "unpack zstd, join planes": each(alone, Job.decode),
        "verify the hash": each(work, lambda job: blake3(job.out).digest()),
    }


def measure(call: Callable[[], None]) -> Callable[[], dict[str, float]]:
    def once() -> dict[str, float]:
        begun = time.thread_time()
        call()
        return {"seconds": time.thread_time() - begun}

    return once


def run(first: int, rounds: int, folder: str | None) -> dict[str, Any]:
    work = jobs(first)
    with timing.scratch(folder) as place:
        calls = stages(work, LocalStorage(place, REAL))
        calls["write"]()
        found = timing.alternate({name: measure(call) for name, call in calls.items()}, rounds=rounds)
    values = {name: found.values[name]["seconds"] for name in found.values}
    # What only comes together is told apart within each round.
    values["pack residuals"] = _less(values.pop("with the sample: leaning"), values.pop("sample: leaning"))
    whole = _less(values.pop("with the sample: alone"), values.pop("sample: alone"))
    values["zstd"] = _less(whole, values["split into planes"])
    return {
        "first": first, "rounds": rounds, "nbytes": sum(job.data.nbytes for job in work),
        "stored": sum(len(job.stored) for job in work),
        "samples": Samples({name: {"seconds": seconds} for name, seconds in values.items()}).as_dict(),
        "missing": {},
    }  # fmt: skip


def _less(values: list[float], others: list[float]) -> list[float]:
    return [value - other for value, other in zip(values, others)]


def tables(result: dict[str, Any]) -> list[Table]:
    samples = Samples.from_dict(result["samples"])
    copy = samples.median(COPY, "seconds") or 1.0
    rows = [[COPY, spread(samples.values[COPY]["seconds"], 1e3), ratio(1.0)]]
    for title, names in (("save", SAVE), ("load", LOAD)):
        total = 0.0
        for name in names:
            median = samples.median(name, "seconds") or 0.0
            total += median
            rows.append([f"{title}: {name}", spread(samples.values[name]["seconds"], 1e3), ratio(median / copy)])
        rows.append([f"**{title}: together**", number(1e3 * total, 1), ratio(total / copy)])
    size, stored = result["nbytes"] / 1e6, result["stored"] / result["nbytes"]
    note = f"{size:.0f} MB, stored as {stored:.3f} of that; medians (min–max) of {result['rounds']} rounds"
    return [Table("CPU time of one thread, ms", ("", "ms", "/ memcpy"), rows, [note])]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.stages", __doc__)
    parser.add_argument("--first", type=int, default=14, help="the base's number in the sequence")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    result = run(given.first, given.rounds, given.folder)
    results.publish("stages", result, tables(result), given, results.command("benchmarks.stages", arguments))


if __name__ == "__main__":
    main()
