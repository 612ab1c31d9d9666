"""What a benchmark found: tables for people, and a file that the report is made of."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.timing import Samples
from everystep import codecs

FOLDER = Path(__file__).parents[1] / "bench-out" / "results"
PACKAGES = (
    "everystep", "numpy", "torch", "safetensors", "orbax-checkpoint", "jax", "tensorflow", "zipnn", "zstandard",
    "blake3",
)  # fmt: skip
PROGRAMS = {"restic": ("restic", "version"), "borg": ("borg", "--version")}


@dataclass(frozen=True)
class Table:
    """The first column names the row; `notes` are sentences below it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())

    def text(self) -> str:
        lines = [list(self.head), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        out = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
            )
            for line in lines
        ]
        body = [out[0], "  ".join("-" * width for width in widths), *out[1:]]
        return "\n".join([self.title, "", *body, *(("", *self.notes) if self.notes else ())])

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        body = [f"| {' | '.join(line)} |" for line in lines]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", *body, *(("", *notes) if notes else ())])


# cells ---------------------------------------------------------------------------------------------------------------

NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def spread(values: Sequence[float], scale: float = 1.0, digits: int | None = None) -> str:
    """The median, and the least and the most."""
    if not values:
        return NOTHING
    found = [scale * each for each in (statistics.median(values), min(values), max(values))]
    places = digits if digits is not None else 1 if found[0] < 100 else 0
    middle, low, high = (f"{each:.{places}f}" for each in found)
    return f"{middle} ({low}–{high})" if len(values) > 1 else middle


def left_out(result: dict[str, Any], samples: Samples | None = None) -> list[str]:
    """One note for each peer that is not in the table, and why."""
    missing = [f"left out, {name}: {reason}" for name, reason in sorted(result.get("missing", {}).items())]
    failed = {**(samples.failed if samples is not None else {}), **result.get("failed", {})}
    return missing + [f"failed, {name}: {reason}" for name, reason in sorted(failed.items())]


# files ---------------------------------------------------------------------------------------------------------------


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--folder", help="on the disk to measure; default: the system's folder for temporary files")
    made.add_argument("--json", action="store_true", help="print the result as one line of JSON, not as tables")
    made.add_argument("--results", type=Path, default=FOLDER, help="where the result is kept for the report")
    made.add_argument("--no-record", dest="record", action="store_false", help="only print it")
    return made


def command(module: str, arguments: list[str] | None) -> str:
    """What runs the same again, on any machine."""
    given, kept = iter(sys.argv[1:] if arguments is None else arguments), []
    for each in given:
        if each in ("--folder", "--results"):
            next(given, None)
        elif not each.startswith(("--json", "--no-record", "--folder=", "--results=")):
            kept.append(each)
    return " ".join(["python", "-m", module, *kept])


def publish(name: str, result: dict[str, Any], tables: Sequence[Table], given: argparse.Namespace, run: str) -> None:
    """Prints it and, unless a part of the contestants was chosen, keeps it for the report."""
    whole = {"benchmark": name, "command": run, "date": _now(), **surroundings(), "result": result}
    if given.json:
        print(json.dumps(whole), flush=True)
    else:
        print("\n" + "\n\n".join(table.text() for table in tables) + "\n", flush=True)
    if given.record and not getattr(given, "peers", None):
        _keep(given.results, name, whole)


def fail(folder: Path, name: str, run: str, reason: str) -> None:
    """In place of a result: the report names it."""
    _keep(folder, name, {"benchmark": name, "command": run, "date": _now(), **surroundings(), "failed": reason})


def read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _keep(folder: Path, name: str, whole: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.json.tmp"
    temporary.write_text(json.dumps(whole, indent=1), "utf-8")
    temporary.replace(folder / f"{name}.json")


def _now() -> str:
    return datetime.datetime.now().isoformat(" ", "minutes")


def surroundings() -> dict[str, Any]:
    """The machine, and the versions of all that is measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for program, asked in PROGRAMS.items():
        if shutil.which(program):
            answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
            versions[program] = answer[1] if len(answer) > 1 else "?"
    machine = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "kernel": codecs.HAS_KERNEL,
        "load": round(os.getloadavg()[0], 2),
    }
    return {"machine": machine, "versions": versions}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
