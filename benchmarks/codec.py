"""How fast our codecs are, hash included, against the memcpy of the same bytes with as many threads beside it.

python -m benchmarks.codec [--first 14] [--rounds 10] [--passes 3] [--forms kernel,numpy] [--json]

Weights and both of Adam's averages of the gpt sequence, in chunks as a save cuts them: two checkpoints in a row, the
later one encoded with the earlier one's chunks as bases, and alone. Encoding hashes each chunk; decoding checks the
hash of what it gives, in memory that is there already. All of it runs in turn with the memcpy, by one thread and by
two. The C kernel and its NumPy form each run in processes of their own (EVERYSTEP_KERNEL=0 turns the kernel off), by
turns.

`bound` is the entropy of the residual given the base's exponent or, where that is less, of the value alone
(benchmarks.bound). The second table has the same by the codec that was chosen, one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from benchmarks import bound, results, sequences, timing
from benchmarks.chunks import chunks
from benchmarks.results import Table, number, ratio
from benchmarks.sequences import Array
from benchmarks.timing import Samples, Stopwatch
from everystep import codecs
from everystep.settings import DEFAULT

ROLES = ("weights", "exp_avg", "exp_avg_sq")
FORMS = {"kernel": "1", "numpy": "0"}
LABELS = {"kernel": "C kernel", "numpy": "NumPy"}
THREADS = (1, 2)
WAYS = {"based": "with a base", "alone": "alone"}

# in a process of one form -------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One chunk, and what encoding made of it."""

    dtype: str
    data: Array
    base: Array | None
    out: Array
    digest: bytes = b""
    codec: int = 0
    stored: memoryview = field(default_factory=lambda: memoryview(b""))
    seconds: dict[str, float] = field(default_factory=dict)

    def copy(self) -> None:
        np.copyto(self.out, self.data)

    def encode(self) -> None:
        begun = time.perf_counter()
        self.digest = blake3(self.data).digest()
        options = (DEFAULT.zstd_level, DEFAULT.sample_bytes, DEFAULT.worth_ratio)
        self.codec, self.pieces = codecs.encode(self.data, self.dtype, *options, base=self.base)
        self._took("encode", begun)

    def join(self) -> None:
        """What is read later lies in one piece; no part of the time."""
        self.stored = memoryview(b"".join(self.pieces))

    def decode(self) -> None:
        begun = time.perf_counter()
        plain = codecs.decode(self.codec, self.stored, self.data.nbytes, self.base, self.out)
        if blake3(plain).digest() != self.digest:
            raise SystemExit("a chunk did not come back as it was")
        self._took("decode", begun)

    def _took(self, what: str, begun: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begun


def jobs(first: int) -> dict[str, list[Job]]:
    sequence = sequences.load("gpt", first + 2)
    found: dict[str, list[Job]] = {way: [] for way in WAYS}
    for role in ROLES:
        pairs = zip(*(list(chunks(sequence[index], sequence.roles, role)) for index in (first, first + 1)))
        for before, now in pairs:
            for way in WAYS:
                base = before.data if way == "based" else None
                found[way].append(Job(now.dtype, now.data, base, np.ones_like(now.data)))
    return found


def in_threads(pool: ThreadPoolExecutor, work: Sequence[Job], verb: str) -> Callable[[], dict[str, float]]:
    def once() -> dict[str, float]:
        watch = Stopwatch()
        list(pool.map(lambda job: getattr(job, verb)(), work))
        seconds = watch.seconds()
        if verb == "encode":
            for job in work:
                job.join()
        return {"seconds": seconds}

    return once


def run_form(first: int, rounds: int) -> dict[str, Any]:
    found, calls = jobs(first), dict[str, Callable[[], dict[str, float]]]()
    for work in found.values():
        for job in work:
            job.encode()
            job.join()
            job.decode()
            job.seconds.clear()
    pools = {count: ThreadPoolExecutor(count) for count in THREADS}
    for count, pool in pools.items():
        calls[f"memcpy|{count}"] = in_threads(pool, found["alone"], "copy")
        for way, work in found.items():
            calls |= {f"{way}|{verb}|{count}": in_threads(pool, work, verb) for verb in ("encode", "decode")}
    samples = timing.alternate(calls, rounds=rounds)
    for pool in pools.values():
        pool.shutdown()
    return {
        "kernel": codecs.HAS_KERNEL,
        "nbytes": sum(job.data.nbytes for job in found["alone"]),
        "samples": samples.as_dict(),
        "stored": {way: sum(len(job.stored) for job in work) for way, work in found.items()},
        "codecs": {way: _by_codec(work) for way, work in found.items()},
    }


def _by_codec(work: list[Job]) -> dict[str, dict[str, float]]:
    """Of single chunks, in one thread, once more: with two, each waits for the other's share of the memory."""
    out: dict[str, dict[str, float]] = {}
    for job in work:
        job.seconds.clear()
        for verb in (job.encode, job.join, job.decode):
            verb()
        entry = out.setdefault(codecs.NAMES[job.codec], {"raw": 0, "stored": 0, "encode": 0.0, "decode": 0.0})
        entry["raw"] += job.data.nbytes
        entry["stored"] += len(job.stored)
        for verb_name, seconds in job.seconds.items():
            entry[verb_name] += seconds
    return out


# both forms, by turns -----------------------------------------------------------------------------------------------


def run(first: int, rounds: int, passes: int, forms: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {"first": first, "rounds": rounds * passes, "forms": {}, "missing": {}}
    for turn in range(passes):
        for form in forms:
            timing.say(f"{LABELS[form]}, pass {turn + 1} of {passes}")
            command = [sys.executable, "-m", "benchmarks.codec", "--child", f"--first={first}", f"--rounds={rounds}"]
            environment = {**os.environ, "EVERYSTEP_KERNEL": FORMS[form]}
            answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
            found = json.loads(answer)
            if found["kernel"] != (form == "kernel"):
                out["missing"][LABELS[form]] = "not built here, or EVERYSTEP_KERNEL does not turn it off"
                continue
            before = out["forms"].setdefault(form, found)
            if before is not found:
                merged = Samples.from_dict(before["samples"])
                merged.merge(Samples.from_dict(found["samples"]))
                before["samples"] = merged.as_dict()
    data = jobs(first)
    out["bound"] = {way: sum(bound.of(j.data, j.base, j.dtype) for j in work) for way, work in data.items()}
    return out


def tables(result: dict[str, Any]) -> list[Table]:
    rows, codec_rows = [], []
    for form, found in result["forms"].items():
        samples, nbytes = Samples.from_dict(found["samples"]), found["nbytes"]
        for way, label in WAYS.items():
            for verb in ("encode", "decode"):
                for count in THREADS:
                    name, copy = f"{way}|{verb}|{count}", f"memcpy|{count}"
                    pairs = samples.pairs(copy, name, "seconds")
                    share = sorted(pairs)[len(pairs) // 2] if pairs else None
                    rows.append([
                        f"{LABELS[form]}: {verb} {label}, {count} thread{'s' if count > 1 else ''}",
                        _rate(nbytes, samples.median(name, "seconds")), _rate(nbytes, samples.median(copy, "seconds")),
                        number(share), _against_numpy(result, form, name),
                        number(found["stored"][way] / nbytes, 4), number(result["bound"][way] / nbytes, 4),
                    ])  # fmt: skip
            for codec, entry in sorted(found["codecs"][way].items()):
                codec_rows.append([
                    f"{LABELS[form]}: {codec}, {label}", f"{entry['raw'] / 1e6:.0f}",
                    number(entry["stored"] / entry["raw"], 4), _rate(entry["raw"], entry["encode"]),
                    _rate(entry["raw"], entry["decode"]),
                ])  # fmt: skip
    head = ("", "GB/s", "memcpy GB/s", "/ memcpy", "/ NumPy", "stored / raw", "bound")
    notes = [f"medians of {result['rounds']} rounds; ratios are medians within a round", *results.left_out(result)]
    size = next((found["nbytes"] / 1e6 for found in result["forms"].values()), 0.0)
    title = f"Weights and both averages of gpt, checkpoint {result['first'] + 1}, {size:.0f} MB"
    codec_head = ("", "MB", "stored / raw", "encode GB/s", "decode GB/s")
    return [
        Table(f"{title}: hash included", head, rows, notes),
        Table(f"{title}: by codec, one thread", codec_head, codec_rows),
    ]


def _rate(nbytes: float, seconds: float | None) -> str:
    return number(nbytes / seconds / 1e9 if seconds else None, 2)


def _against_numpy(result: dict[str, Any], form: str, name: str) -> str:
    """How many times as fast as the NumPy form."""
    if form == "numpy" or "numpy" not in result["forms"]:
        return results.NOTHING
    here, there = (
        Samples.from_dict(result["forms"][each]["samples"]).median(name, "seconds") for each in (form, "numpy")
    )
    return ratio(there / here if here and there else None)


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.codec", __doc__)
    parser.add_argument("--first", type=int, default=14, help="the base's number in the sequence")
    parser.add_argument("--rounds", type=int, default=10, help="in each pass")
    parser.add_argument("--passes", type=int, default=3, help="processes of each form")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--child", action="store_true", help="one pass of the form that this process has, as JSON")
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(run_form(given.first, given.rounds)))
        return
    forms = given.forms.split(",")
    if {*forms} - {*FORMS}:
        parser.error(f"not known: {given.forms}")
    timing.warn_of_load()
    result = run(given.first, given.rounds, given.passes, forms)
    given.record = given.record and len(forms) == len(FORMS)
    results.publish("codec", result, tables(result), given, results.command("benchmarks.codec", arguments))


if __name__ == "__main__":
    main()
