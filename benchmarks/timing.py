"""Times contestants in turn, in an order shuffled each round, and shows medians, quartiles and ratios."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Measure = Callable[[], Mapping[str, float]]


@dataclass
class Samples:
    """Every value that was measured: contestant -> quantity -> values, in the order of the rounds."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, name: str, found: Mapping[str, float]) -> None:
        for quantity, value in found.items():
            self.values.setdefault(name, {}).setdefault(quantity, []).append(value)

    def median(self, name: str, quantity: str) -> float | None:
        found = self.values.get(name, {}).get(quantity)
        return statistics.median(found) if found else None

    def quartiles(self, name: str, quantity: str) -> tuple[float, float] | None:
        found = self.values.get(name, {}).get(quantity)
        if not found:
            return None
        low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else [found[0]] * 3
        return low, high

    def ratio(self, name: str, base: str, quantity: str, base_quantity: str = "") -> float | None:
        """The ratio of two medians."""
        above, below = self.median(name, quantity), self.median(base, base_quantity or quantity)
        return above / below if above is not None and below else None

    def paired(self, name: str, base: str, quantity: str) -> float | None:
        """The median of the ratios within a round: what a machine's slow minutes do to both cancels out."""
        above, below = (self.values.get(n, {}).get(quantity, []) for n in (name, base))
        return statistics.median(a / b for a, b in zip(above, below)) if above and below else None

    def as_dict(self) -> dict[str, Any]:
        return {
            name: {
                quantity: {
                    "median": self.median(name, quantity),
                    "quartiles": self.quartiles(name, quantity),
                    "values": values,
                }
                for quantity, values in quantities.items()
            }
            for name, quantities in self.values.items()
        }


def alternate(contestants: Mapping[str, Measure], *, rounds: int, warmups: int = 1, seed: int = 0) -> Samples:
    """Every contestant once a round; the first `warmups` rounds are not counted.

    Args:
        contestants: name -> a call that does the work once and answers quantity -> value.
        seed: of the order, so that a run can be repeated.
    """
    samples, order, chance = Samples(), list(contestants), random.Random(seed)
    for turn in range(warmups + rounds):
        chance.shuffle(order)
        for name in order:
            gc.collect()  # each contestant pays for its own garbage only
            found = contestants[name]()
            if turn >= warmups:
                samples.add(name, found)
    return samples


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._begun


@contextmanager
def scratch(folder: str | None) -> Iterator[str]:
    """A new folder that is gone afterwards, on the disk that is to be measured."""
    with tempfile.TemporaryDirectory(prefix="everystep-bench-", dir=folder) as made:
        yield made


def free_pages(folder: str, nbytes: int) -> None:
    """Leaves as many free pages behind as a save takes, and an idle disk.

    A kernel that has to find, or get back from its host, the memory for a file takes several times as long to write
    it: without this, who comes first in a round pays for all.
    """
    path = os.path.join(folder, "free-pages")
    piece = bytes(8 << 20)
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, nbytes, len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    os.unlink(path)


def folder_bytes(folder: str) -> int:
    """The lengths of all files below a folder."""
    return sum(os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names)


# results -------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    import torch

    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def warn_of_load() -> None:
    """Says so when others use the cores."""
    here = machine()
    if here["load"] is not None and here["load"] > 0.3 * here["cpus"]:
        say(f"others use this machine (load {here['load']:.1f}, {here['cpus']} cores): the ratios will be rough")


def milliseconds(samples: Samples, name: str, quantity: str) -> str:
    """The median with its quartiles, or a dash."""
    middle, edges = samples.median(name, quantity), samples.quartiles(name, quantity)
    if middle is None or edges is None:
        return "–"
    return f"{1e3 * middle:.1f} ({1e3 * edges[0]:.1f}–{1e3 * edges[1]:.1f})"


def ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
    return "\n".join([out[0], "  ".join("-" * width for width in widths), *out[1:]])


def show(title: str, text: str, result: dict[str, Any], as_json: bool) -> None:
    """A benchmark's outcome: text for people, or one line of JSON."""
    if as_json:
        print(json.dumps({"benchmark": title, "machine": machine(), **result}), flush=True)
    else:
        print(f"\n{title}\n\n{text}\n", flush=True)


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)
