"""A run of 10,000 checkpoints: what it takes to list it, to ask it, to drop half of it, and how much memory.

python -m benchmarks.scale [--count 10000] [--rounds 3] [--folder DIR] [--json]

States are tiny (1 KB), so that only what lies around them is measured. `first` opens the repository anew and has no
catalog in the cache folder yet; `again` opens it anew and has one. The command line is a process of its own, start
included. Memory is what comes on top of the process as it was before, at the most.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import everystep
from benchmarks import results, timing, usage
from benchmarks.results import NOTHING, Table
from benchmarks.timing import Stopwatch
from everystep.seam import Files, Seam

METRIC = "val_loss"
Ask = Callable[[everystep.PastRun], object]
QUESTIONS: dict[str, Ask] = {
    "latest": lambda past: past.latest,
    "log: checkpoints()": lambda past: [(each.step, each.metrics, each.tags) for each in past.checkpoints()],
    "at(step)": lambda past: past.at(past.latest.step // 2 if past.latest else 0),
    "best(val_loss)": lambda past: past.best(METRIC),
    "query(val_loss < 0.3 and step > 500)": lambda past: past.query(f"{METRIC} < 0.3 and step > 500"),
    "ranking(val_loss)": lambda past: past.ranking(METRIC, limit=10),
    "stats()": lambda past: past.stats(),
}
COMMANDS = {"everystep log": ("log", "bench"), "everystep log --json": ("log", "bench", "--json")}


class Unsynced(Files):
    """The operating system's file calls, but the disk is not waited for: making the run is not what is measured."""

    def fsync(self, fd: int) -> None:
        return

    def fsync_folder(self, path: str) -> None:
        return


def make(folder: str, count: int) -> None:
    chance = np.random.default_rng(0)
    state = {"model": {"w": chance.standard_normal(256).astype(np.float32)}}
    with everystep.open(folder, seam=Seam(Unsynced())).run("bench") as run:
        for step in range(count):
            state["model"]["w"] += np.float32(1e-3)
            run.save(step, state=state, metrics={METRIC: float(chance.random())})


def timed(call: Callable[[], object]) -> dict[str, float]:
    before = usage.resident()
    with usage.peak() as most:
        watch = Stopwatch()
        call()
        seconds = watch.seconds()
    return {"seconds": seconds, "memory_mb": max(0, most[0] - before) / 1e6}


def ask(folder: str, question: Ask) -> dict[str, float]:
    def anew() -> object:
        past = everystep.open(folder)["bench"]
        with past.holding():
            return question(past)

    return timed(anew)


def measure(count: int, rounds: int, place: str | None) -> dict[str, Any]:
    out: dict[str, Any] = {"count": count, "rows": {}}
    with timing.scratch(place) as scratch:
        folder, cache = os.path.join(scratch, "runs"), timing.subfolder(scratch, "cache")
        os.environ["EVERYSTEP_CACHE"] = cache
        timing.say(f"{count} saves")
        make(folder, count)
        out["folder_bytes"] = timing.folder_bytes(folder)
        out["files"] = sum(len(names) for _, _, names in os.walk(folder))
        for name, question in QUESTIONS.items():
            timing.say(name)
            shutil.rmtree(cache)
            os.mkdir(cache)
            first = ask(folder, question)
            again = [ask(folder, question) for _ in range(rounds)]
            out["rows"][name] = {"first": first, "again": _middle(again)}
        for name, arguments in COMMANDS.items():
            command = [sys.executable, "-m", "everystep", "-r", folder, *arguments]
            again = [timed(lambda command=command: _run(command)) for _ in range(rounds)]
            out["rows"][name] = {"again": _middle(again)}
        past = everystep.open(folder)["bench"]
        half = everystep.every(2)
        drop: dict[str, Callable[[], object]] = {
            "forget, half of it, dry run": lambda: past.forget(keep=half, dry_run=True),
            "forget, half of it": lambda: past.forget(keep=half, force=True),
            "prune, half of it": lambda: past.prune(now=True),
            "prune again, nothing to do": lambda: past.prune(now=True),
        }
        for name, call in drop.items():
            timing.say(name)
            out["rows"][name] = {"first": timed(call)}
        out["left"] = len(everystep.open(folder)["bench"].checkpoints())
    return out


def _middle(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def _run(command: list[str]) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def tables(result: dict[str, Any]) -> list[Table]:
    def seconds(found: dict[str, float] | None) -> str:
        return NOTHING if found is None else f"{found['seconds']:.3f}"

    rows = [
        [name, seconds(found.get("first")), seconds(found.get("again")),
         f"{max(each['memory_mb'] for each in found.values()):.0f}"]
        for name, found in result["rows"].items()
    ]  # fmt: skip
    notes = [
        f"the folder holds {result['folder_bytes'] / 1e6:.0f} MB in {result['files']:,} files before half is dropped, "
        f"and {result['left']:,} checkpoints after"
    ]
    head = ("", "first s", "again s", "memory MB")
    return [Table(f"A run of {result['count']:,} checkpoints", head, rows, notes)]


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.scale", __doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    timing.warn_of_load()
    result = measure(given.count, given.rounds, given.folder)
    results.publish("scale", result, tables(result), given, results.command("benchmarks.scale", arguments))


if __name__ == "__main__":
    main()
