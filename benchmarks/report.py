"""RESULTS.md and its plots, made of what the benchmarks have kept.

python -m benchmarks.report [--results DIR] [--out RESULTS.md] [--plots docs/plots] [--quick]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import (
    behind,
    blocking,
    cloud,
    codec,
    depth,
    history,
    leaf,
    leaves,
    plots,
    ranks,
    ranks_at_scale,
    restore,
    results,
    scale,
    stages,
    timing,
    training,
    whole,
)
from benchmarks.results import Table

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Section:
    """What a page says of one result."""

    name: str
    """The result's."""
    title: str
    about: str
    tables: Callable[[dict[str, Any]], Sequence[Table]]
    command: str
    """What measures it, if nothing is kept of it yet."""
    plots: tuple[str, ...] = ()
    store: bool = False
    """Whether it needs an object store, which a run of all benchmarks does without."""


TRAINING = (
    "A small GPT that uses all cores, so that whatever a save does in the background is taken from it. No save is "
    "skipped, and all that a save costs lies inside its segment. Ours: differences and verification on, as by default."
)
SECTIONS = (
    Section(
        "whole", "How small a history gets",
        "Real checkpoints of real trainings, all kept, lossless; every file of a way's folder counts. Ours are all "
        "loaded back and compared bit for bit. XOR and zipnn XOR lean on the checkpoint before, back to the first.",
        whole.tables, "python -m benchmarks.whole", ("bytes", "speed"),
    ),
    Section(
        "history", "What the bytes are made of",
        "Our codecs by the role of the arrays, next to the entropy of the residual given the base's exponent. Codes "
        "that follow runs, or the parts of a leaf, can come below it.",
        history.tables, "python -m benchmarks.history",
    ),
    Section(
        "blocking-large", "One large state",
        "Blocking is what the training thread waits for. Durable is until a power cut would leave the checkpoint: an "
        "fsync of all its files and folders is part of every row. Ours also hashes every byte, and checks it at the "
        "load.",
        blocking.tables, "python -m benchmarks.blocking --mb 1500 --rounds 4",
    ),
    Section(
        "blocking-small", "One small state", "The same with the gpt sequence's state as it is.",
        blocking.tables, "python -m benchmarks.blocking --mb 0 --rounds 7",
    ),
    Section(
        "training-10", "A training loop, a save every 10 steps", TRAINING,
        training.tables, "python -m benchmarks.training --every 10", ("training",),
    ),
    Section(
        "training-5", "A training loop, a save every 5 steps", "", training.tables,
        "python -m benchmarks.training --every 5 --steps 5 --rounds 5",
    ),
    Section(
        "training-1", "A training loop, a save at every step", "", training.tables,
        "python -m benchmarks.training --every 1 --steps 5 --rounds 4",
    ),
    Section(
        "restore", "Loads out of a history",
        "From the page cache; every byte is summed up at the end of each load, on both sides. Ours opens the "
        "repository anew, folds its log and verifies every byte.",
        restore.tables, "python -m benchmarks.restore", ("depth",),
    ),
    Section(
        "depth", "How deep chains may go",
        "What each policy stores and what its loads take; what a load reads is what counts behind a slow link.",
        depth.tables, "python -m benchmarks.depth",
    ),
    Section(
        "behind", "Behind a slow link",
        "A mount through which so many megabytes a second pass, each way, for everybody; nothing is in the page cache "
        "when a load begins.",
        behind.tables, "python -m benchmarks.behind",
    ),
    Section(
        "codec", "The codecs by themselves",
        "With the hash of every chunk, against the memcpy of the same bytes by as many threads.",
        codec.tables, "python -m benchmarks.codec",
    ),
    Section(
        "stages", "What each stage costs", "The work of a save and of a load, stage by stage, by one thread.",
        stages.tables, "python -m benchmarks.stages",
    ),
    Section("leaves", "Many tiny leaves", "", leaves.tables, "python -m benchmarks.leaves"),
    Section("scale", "Many checkpoints", "", scale.tables, "python -m benchmarks.scale"),
    Section(
        "cloud", "To and from an object store",
        "Against the same bytes put and got by obstore alone, as many at once. The gateway runs on the same machine, "
        "and takes its share of both cores.",
        cloud.tables, "python -m benchmarks.cloud", store=True,
    ),
    Section(
        "cloud-apart", "The same, with cores of its own for the gateway",
        "As from a machine that only trains: one core for the store, the other for the client.",
        cloud.tables, "python -m benchmarks.cloud --apart", store=True,
    ),
    Section(
        "leaf", "One leaf of a large checkpoint", "From an object store, by a program that has just opened it.",
        leaf.tables, "python -m benchmarks.leaf", store=True,
    ),
    Section(
        "ranks", "Four ranks",
        "One state, sharded over four processes that share the machine; every rank saves its part, and two others load "
        "all of it. Ours hashes every byte, and checks it at the load.",
        ranks.tables, "python -m benchmarks.ranks",
    ),
    Section(
        "ranks-at-scale", "Many ranks, on a simulated object store",
        "The real code on a store, a clock and threads that are simulated, with the limits that S3 publishes: what is "
        "counted are requests, bytes and round trips.",
        ranks_at_scale.tables, "python -m benchmarks.ranks_at_scale",
    ),
)  # fmt: skip
CAPTIONS = {
    "bytes": "Bytes on disk over the number of checkpoints",
    "speed": "Size of a history against the time until a save is durable",
    "training": "What a save blocks and what it costs",
    "depth": "A load by the length of the chain that it reads",
}
ABOUT = """# Results

Everything here was measured by `make bench` and written by `python -m benchmarks.report`; nothing is typed by hand. The
command above each table runs it again; with `--peers NAME`, one row beside those it is compared with. What counts is
the ratio of two figures of one run: absolute times of another machine, or of a busy hour, say nothing. How each figure
is taken is told by the command's `--help` and in [docs/benchmarks.md](docs/benchmarks.md).
"""


def page(kept: Path, drawn: dict[str, Path], out: Path) -> str:
    """The text, with links relative to where it will lie."""
    found = {section.name: results.read(kept, section.name) for section in SECTIONS}
    there = [each for each in found.values() if each is not None]
    parts = [ABOUT, *([_machine(sorted(there, key=lambda each: each["date"]))] if there else [])]
    for section in SECTIONS:
        parts.append(f"## {section.title}\n")
        if section.about:
            parts.append(section.about + "\n")
        parts.append(_body(section, found[section.name]))
        parts += [
            f"![{CAPTIONS[name]}]({os.path.relpath(drawn[name], out.parent)})\n"
            for name in section.plots
            if name in drawn
        ]
    return "\n".join(parts).rstrip() + "\n"


def _body(section: Section, kept: dict[str, Any] | None) -> str:
    if kept is None:
        return f"Not measured yet: `{section.command}`\n"
    taken = f"`{kept['command']}`, {kept['date']}"
    if "failed" in kept:
        return f"{taken}: failed, {kept['failed']}\n"
    tables = [table.markdown() + "\n" for table in section.tables(kept["result"])]
    busy = kept["machine"]["load"] > 0.3 * kept["machine"]["cores"]
    note = f" (others used the machine: load {kept['machine']['load']:g} at the end)" if busy else ""
    return "\n".join([f"{taken}{note}\n", *tables])


def _machine(kept: list[dict[str, Any]]) -> str:
    """The machine of the newest result, and the newest version of each library that any was measured with."""
    machine, found = kept[-1]["machine"], dict[str, str]()
    for result in kept:
        found |= result["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    form = "with its C kernel" if machine["kernel"] else "in its NumPy form"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB, {machine['system']}, Python "
        f"{machine['python']}; {versions}. everystep {form}.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--out", type=Path, default=ROOT / "RESULTS.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots")
    parser.add_argument("--quick", action="store_true", help="from and to bench-out/quick")
    given = parser.parse_args(arguments)
    if given.quick:
        given.results = results.FOLDER.parent / "quick"
        given.out, given.plots = given.results / "RESULTS.md", given.results / "plots"
    found = {section.name: results.read(given.results, section.name) for section in SECTIONS}
    drawn = plots.draw({name: kept["result"] for name, kept in found.items() if kept and "result" in kept}, given.plots)
    given.out.write_text(page(given.results, drawn, given.out), "utf-8")
    timing.say(f"written: {given.out}, {len(drawn)} plots")


if __name__ == "__main__":
    main()
