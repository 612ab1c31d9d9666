"""Times contestants in turn, in an order shuffled each round, and sums up what was measured."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

Measure = Callable[[], Mapping[str, float]]
VALUES_MIN = 3  # a contestant that has used up its time rests only after so many


@dataclass
class Samples:
    """Every value that was measured: contestant -> quantity -> values, in the order of the rounds."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Contestant -> what it died of."""

    def add(self, name: str, found: Mapping[str, float]) -> None:
        for quantity, value in found.items():
            self.values.setdefault(name, {}).setdefault(quantity, []).append(value)

    def of(self, name: str, quantity: str) -> list[float]:
        return self.values.get(name, {}).get(quantity, [])

    def median(self, name: str, quantity: str) -> float | None:
        found = self.of(name, quantity)
        return statistics.median(found) if found else None

    def least(self, name: str, quantity: str) -> float | None:
        return min(self.of(name, quantity), default=None)

    def range(self, name: str, quantity: str) -> tuple[float, float] | None:
        found = self.of(name, quantity)
        return (min(found), max(found)) if found else None

    def quartiles(self, name: str, quantity: str) -> tuple[float, float] | None:
        return quartiles(self.of(name, quantity))

    def ratio(self, name: str, base: str, quantity: str, base_quantity: str = "") -> float | None:
        """The ratio of two medians."""
        above, below = self.median(name, quantity), self.median(base, base_quantity or quantity)
        return above / below if above is not None and below else None

    def least_ratio(self, name: str, base: str, quantity: str) -> float | None:
        """The ratio of two minima: of work so long that something always comes in between."""
        above, below = self.least(name, quantity), self.least(base, quantity)
        return above / below if above is not None and below else None

    def pairs(self, name: str, base: str, quantity: str) -> list[float]:
        """The ratios within a round: what a machine's slow minutes do to both cancels out."""
        return [a / b for a, b in zip(self.of(name, quantity), self.of(base, quantity))]

    def merge(self, other: Samples) -> None:
        for name, quantities in other.values.items():
            for quantity, values in quantities.items():
                self.values.setdefault(name, {}).setdefault(quantity, []).extend(values)
        self.failed |= other.failed

    def as_dict(self) -> dict[str, object]:
        return {"values": self.values, "failed": self.failed}

    @staticmethod
    def from_dict(found: dict[str, dict[str, object]]) -> Samples:
        return Samples(found["values"], found["failed"])  # type: ignore[arg-type]


def quartiles(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return low, high


def alternate(
    contestants: Mapping[str, Measure],
    *,
    rounds: int,
    warmups: int = 1,
    seed: int = 0,
    before: Callable[[], None] | None = None,
    seconds_max: float = float("inf"),
) -> Samples:
    """Every contestant once a round; the first `warmups` rounds are not counted. Who fails is named, and left out.

    Args:
        contestants: name -> a call that does the work once and answers quantity -> value.
        seed: of the order, so that a run can be repeated.
        before: called at the start of each round: new work, the same for all.
        seconds_max: a contestant that has used up more rests for the remaining rounds, once it has three values.
    """
    samples, order, chance = Samples(), list(contestants), random.Random(seed)
    used = dict.fromkeys(contestants, 0.0)
    for turn in range(warmups + rounds):
        if before is not None:
            before()
        chance.shuffle(order)
        for name in order:
            if name in samples.failed or (used[name] > seconds_max and turn >= warmups + VALUES_MIN):
                continue
            gc.collect()  # each contestant pays for its own garbage only
            watch = Stopwatch()
            try:
                found = contestants[name]()
            except Exception as error:  # noqa: BLE001  whatever a peer may do, the others go on
                samples.failed[name] = described(error)
                say(f"{name} failed and is left out: {samples.failed[name]}")
                continue
            used[name] += watch.seconds()
            if turn >= warmups:
                samples.add(name, found)
        say(f"  round {turn + 1} of {warmups + rounds}")
    return samples


def described(error: BaseException) -> str:
    """One line. What crossed a process border is told already."""
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else "no reason given"
    return text if type(error).__name__ == "Failed" else f"{type(error).__name__}: {text}"


class Stopwatch:
    """Seconds since it was made, without pauses."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun


@contextmanager
def scratch(folder: str | None) -> Iterator[str]:
    """A new folder that is gone afterwards, on the disk that is to be measured."""
    with tempfile.TemporaryDirectory(prefix="everystep-bench-", dir=folder, ignore_cleanup_errors=True) as made:
        yield made


def subfolder(folder: str, name: str) -> str:
    """A new folder in another."""
    path = os.path.join(folder, name)
    os.makedirs(path)
    return path


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
    """The lengths of all files below a folder; of those that are deleted meanwhile, nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(path, name))
    return total


def warn_of_load() -> None:
    """Says so when others use the cores."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 0.3 * cores:
        say(f"others use this machine (load {load:.1f}, {cores} cores): the ratios will be rough")


_BEGUN = time.monotonic()


def say(text: str) -> None:
    """Progress, beside the results, with the seconds since the program began."""
    print(f"[{time.monotonic() - _BEGUN:5.0f} s] {text}", file=sys.stderr, flush=True)
