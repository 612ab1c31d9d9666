"""What n checkpoints take up on disk: ours through the public door, and other ways over the same bytes as files.

python -m benchmarks.whole [ROW …] [--count 30] [--peers zstd,float,xor,zipnn,restic,borg] [--folder DIR] [--json]

A row is a sequence of real checkpoints (benchmarks.sequences), or some of its arrays. For the others each checkpoint is
a file: its arrays, one behind the other. Ours counts every file in the repository's folder, log and manifests included;
each checkpoint is loaded back and compared bit for bit. All figures are stored / raw: of the whole history or, in rows
that say `later`, of what each checkpoint after the first adds.

The differences of XOR, float and zipnn reach back to the first checkpoint, 29 links for the newest; ours reads at most
8. `wrong` counts elements that come back with other bits. restic and borg keep the folder after the first checkpoint,
and after all.
"""

from __future__ import annotations

import argparse
import gzip
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard

import everystep
from benchmarks import sequences, timing
from benchmarks.history import ZipNN
from benchmarks.peers.borg import Borg
from benchmarks.peers.restic import Restic
from benchmarks.sequences import Array, Sequence
from everystep.codecs import planes
from everystep.seam import Files, Seam

WEIGHTS = frozenset({"weights", "buffer"})
OPTIMIZER = frozenset({"exp_avg", "exp_avg_sq", "momentum"})
THINNED = everystep.last(2)

# rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A history to store, and what it may come to."""

    name: str
    sequence: str
    roles: frozenset[str] = WEIGHTS | OPTIMIZER
    later: bool = False
    unchanged: bool = False
    """Only leaves that are the same in every checkpoint."""
    target: float | None = None
    target_thin: float | None = None

    def names(self, sequence: Sequence, count: int) -> list[str]:
        found = [name for name, role in sequence.roles.items() if role in self.roles]
        if not self.unchanged:
            return found
        first, last = sequence[0], sequence[count - 1]
        return [name for name in found if _same(first[name], last[name])]


ROWS = {
    row.name: row
    for row in (
        Row("gpt", "gpt", target=0.80, target_thin=0.30),
        Row("cnn", "cnn", target=0.74),
        Row("ft_bf16-weights", "ft_bf16", WEIGHTS, later=True, target=0.03),
        Row("frozen-weights", "frozen", WEIGHTS, later=True, target=0.045),
        Row("lora-weights", "lora", WEIGHTS, later=True, target=0.005),
        Row("unchanged", "frozen", WEIGHTS, later=True, unchanged=True, target=0.0005),
        Row("ft_bf16", "ft_bf16"),
        Row("frozen", "frozen"),
        Row("lora", "lora"),
        Row("emb", "emb"),
    )
}
Checkpoint = dict[str, Array]


@dataclass(frozen=True)
class History:
    """The checkpoints of a row; `history[i]` maps names to arrays."""

    row: Row
    sequence: Sequence
    names: list[str]
    count: int

    @staticmethod
    def of(row: Row, count: int) -> History:
        sequence = sequences.load(row.sequence)
        return History(row, sequence, row.names(sequence, count), count)

    def __getitem__(self, index: int) -> Checkpoint:
        whole = self.sequence[index]
        return {name: whole[name] for name in self.names}

    def __iter__(self) -> Iterator[Checkpoint]:
        return (self[index] for index in range(self.count))

    @property
    def nbytes(self) -> int:
        """Of one checkpoint."""
        return sum(value.nbytes for value in self[0].values())

    def state(self, index: int) -> dict[str, Checkpoint]:
        """One checkpoint as a program keeps it: parameters, and the optimizer's arrays beside them."""
        here, roles = self[index], self.sequence.roles
        parts = {
            "params": {name: value for name, value in here.items() if roles[name] in WEIGHTS},
            "opt_state": {name: value for name, value in here.items() if roles[name] in OPTIMIZER},
        }
        return {name: part for name, part in parts.items() if part}


def _same(one: Array, other: Array) -> bool:
    return one.tobytes() == other.tobytes()


@dataclass
class Stored:
    """Bytes on disk after the first checkpoint, and after the last."""

    first: int
    all: int
    wrong: int | None = None
    """Elements that come back with other bits, of `elements`."""
    elements: int = 0

    def share(self, history: History) -> float:
        if history.row.later:
            return (self.all - self.first) / (history.count - 1) / history.nbytes
        return self.all / history.count / history.nbytes


# ours --------------------------------------------------------------------------------------------------------------


def ours(history: History, folder: str, keep_full: everystep.Rule | None = None) -> Stored:
    """Through the public door, as a user would; then everything is loaded again and compared."""
    repo = everystep.open(folder)
    with warnings.catch_warnings(), repo.run("bench", keep_full=keep_full) as run:
        if history.row.unchanged:
            warnings.filterwarnings("ignore", message=".*no byte changed")
        run.save(0, state=history.state(0)).wait()
        first = timing.folder_bytes(folder)
        for step in range(1, history.count):
            run.save(step, state=history.state(step))
    everything = timing.folder_bytes(folder)
    past = everystep.open(folder)["bench"]
    full = history.count if keep_full is None else 2
    for step in range(history.count):
        compare(past.at(step), history.state(step), whole=step >= history.count - full)
    return Stored(first, everything)


def compare(checkpoint: everystep.Checkpoint, state: dict[str, Checkpoint], *, whole: bool) -> None:
    """Ends the benchmark where a bit is another; of a thinned checkpoint only the weights are there."""
    if checkpoint.thin is whole:
        raise SystemExit(f"{checkpoint}: thinned, or not, against its run's rule")
    for part, arrays in state.items():
        if whole or part != "opt_state":
            loaded = checkpoint.load(only=part)
            if loaded.keys() != arrays.keys() or not all(_same(loaded[name], arrays[name]) for name in arrays):
                raise SystemExit(f"{checkpoint}: {part} did not come back as it was saved")


class Watching(Files):
    """The operating system's file calls; notes the most bytes that a folder held after any of them."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def write(self, fd: int, data: memoryview) -> int:
        written = super().write(fd, data)
        self.held += written
        self.most = max(self.most, self.held)
        return written

    def unlink(self, path: str) -> None:
        found = os.stat(path)
        super().unlink(path)
        self.held -= found.st_size if found.st_nlink == 1 else 0


def most_held(history: History, folder: str, keep: everystep.Rule) -> float:
    """Raw states that the repository's folder holds at most while a run saves under a rule, after any file call."""
    files = Watching()
    with everystep.open(folder, seam=Seam(files)).run("bench", keep=keep) as run:
        for step in range(history.count):
            run.save(step, state=history.state(step)).wait()
    if files.held != timing.folder_bytes(folder):
        raise SystemExit("the file calls were not all counted")
    past = everystep.open(folder)["bench"]
    for checkpoint in past.checkpoints():
        compare(checkpoint, history.state(checkpoint.step), whole=True)
    return files.most / history.nbytes


# other ways --------------------------------------------------------------------------------------------------------

Way = Callable[[Checkpoint, "Checkpoint | None"], int]
"""(a checkpoint, the one before or None) -> bytes of its file"""


def _file(checkpoint: Checkpoint) -> Array:
    return np.concatenate([np.ascontiguousarray(value).reshape(-1).view(np.uint8) for value in checkpoint.values()])


def _width(checkpoint: Checkpoint) -> int:
    """Bytes of most elements; every array of these sequences is a multiple of it."""
    return max(checkpoint.values(), key=lambda value: value.nbytes).itemsize


def zstd_alone(now: Checkpoint, before: Checkpoint | None) -> int:
    return len(zstandard.ZstdCompressor(level=3).compress(memoryview(_file(now))))


def xor_planes(now: Checkpoint, before: Checkpoint | None) -> int:
    words = _file(now).view(f"u{_width(now)}")
    if before is not None:
        words = words ^ _file(before).view(words.dtype)
    return sum(len(zstandard.ZstdCompressor(level=3).compress(memoryview(row))) for row in planes.split(words))


@dataclass
class FloatDifference:
    """Differences of floats under gzip; restored by adding them up again, as its reader has to."""

    wrong: int = 0
    all: int = 0
    restored: Checkpoint = field(default_factory=dict)

    def __call__(self, now: Checkpoint, before: Checkpoint | None) -> int:
        stored = {}
        for name, value in now.items():
            with np.errstate(all="ignore"):
                stored[name] = value if before is None else value - before[name]
                self.restored[name] = value.copy() if before is None else self.restored[name] + stored[name]
            bits = f"u{value.itemsize}"
            self.wrong += int((self.restored[name].view(bits) != value.view(bits)).sum())
            self.all += value.size
        return len(gzip.compress(memoryview(_file(stored)), 6))


def zipnn_delta() -> Way:
    """zipnn's own difference, with the whole file as numbers of its commonest type."""
    way = ZipNN()

    def stored(now: Checkpoint, before: Checkpoint | None) -> int:
        dtype = max(now.values(), key=lambda value: value.nbytes).dtype
        return way(_file(now).view(dtype), _file(before).view(dtype) if before is not None else None)

    return stored


WAYS: dict[str, Callable[[], Way]] = {
    "zstd": lambda: zstd_alone, "float": FloatDifference, "xor": lambda: xor_planes, "zipnn": zipnn_delta,
}  # fmt: skip
KEEPERS: dict[str, Any] = {"restic": Restic, "borg": Borg}
HEADS = {
    "zstd": "zstd-3", "float": "float -, gzip-6 (elements wrong)", "xor": "XOR, planes, zstd-3", "zipnn": "zipnn delta",
    "restic": "restic, max", "borg": "borg, zstd-3",
}  # fmt: skip


def by_file(way: Way, history: History) -> Stored:
    sizes, before = [], None
    for now in history:
        sizes.append(way(now, before))
        before = now
    wrong = (way.wrong, way.all) if isinstance(way, FloatDifference) else (None, 0)
    return Stored(sizes[0], sum(sizes), *wrong)


def by_folder(make: Any, history: History, folder: str) -> Stored:
    files, kept = os.path.join(folder, "files"), os.path.join(folder, "kept")
    os.mkdir(files)
    os.mkdir(kept)
    keeper, first = make(kept), 0
    for number, now in enumerate(history):
        _file(now).tofile(os.path.join(files, f"{number:02}.bin"))
        if number == 0:
            keeper.add(files)
            first = keeper.nbytes()
    keeper.add(files)
    return Stored(first, keeper.nbytes())


def available(names: list[str]) -> list[str]:
    """Those that are installed; the others are named, with what to do."""
    found = []
    for name in names:
        try:
            if name in WAYS:
                WAYS[name]()
            elif not KEEPERS[name].there():
                timing.say(f"{KEEPERS[name].missing}; its column is left out")
                continue
            found.append(name)
        except ImportError:
            timing.say(f"{name} is not installed: pip install {name}; its column is left out")
    return found


def ready(row: Row) -> bool:
    """Trains the row's sequence if it has not been yet; says what to install where that is missing."""
    try:
        sequences.load(row.sequence)
    except SystemExit as error:
        timing.say(f"{error}; the row {row.name} is left out")
        return False
    return True


# the table ---------------------------------------------------------------------------------------------------------


def measure(row: Row, count: int, ways: list[str], place: str | None) -> dict[str, Any]:
    history = History.of(row, count)
    out: dict[str, Any] = {"row": row.name, "later": row.later, "checkpoint_bytes": history.nbytes, "ways": {}}
    for way in ways:
        timing.say(f"{row.name}: {way}")
        with timing.scratch(place) as folder:
            stored = by_file(WAYS[way](), history) if way in WAYS else by_folder(KEEPERS[way], history, folder)
        out["ways"][way] = {"stored": stored.share(history), "wrong": stored.wrong, "elements": stored.elements}
    timing.say(f"{row.name}: everystep")
    with timing.scratch(place) as folder:
        out["ours"] = ours(history, folder).share(history)
    thins = OPTIMIZER & row.roles
    if thins:
        with timing.scratch(place) as folder:
            out["ours_thin"] = ours(history, folder, THINNED).share(history)
    out |= {"target": row.target, "target_thin": row.target_thin}
    return out


def shown(found: dict[str, Any], ways: list[str]) -> list[str]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    others = []
    for way in ways:
        here = found["ways"][way]
        wrong = f" ({here['wrong']:,} of {here['elements']:,})" if here["wrong"] is not None else ""
        others.append(number(here["stored"]) + wrong)
    target = " / ".join(f"≤ {value:g}" for value in (found["target"], found["target_thin"]) if value is not None)
    return [
        found["row"] + (", later" if found["later"] else ""), f"{found['checkpoint_bytes'] / 1e6:.1f}", *others,
        number(found["ours"]), number(found.get("ours_thin")), target or "–",
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: those with a target")
    parser.add_argument("--count", type=int, default=sequences.COUNT, help="checkpoints of each history")
    parser.add_argument("--peers", default=",".join(HEADS), help="none, or any of " + ", ".join(HEADS))
    parser.add_argument("--folder", help="where files are written; default: the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    asked = [way for way in given.peers.split(",") if way != "none"]
    unknown = {*given.rows} - {*ROWS} or {*asked} - {*HEADS}
    if unknown or not 2 <= given.count <= sequences.COUNT:
        parser.error(f"not known: {', '.join(sorted(unknown)) or given.count}")
    ways = available(asked)
    chosen = [ROWS[name] for name in given.rows] or [row for row in ROWS.values() if row.target is not None]
    rows = [row for row in chosen if ready(row)]
    found = [measure(row, given.count, ways, given.folder) for row in rows]
    head = ["", "MB", *(HEADS[way] for way in ways), "everystep", "keep_full=last(2)", "target"]
    text = timing.table(head, [shown(one, ways) for one in found])
    result: dict[str, Any] = {"count": given.count, "rows": found}
    if ROWS["gpt"] in rows:
        with timing.scratch(given.folder) as folder:
            result["most_held"] = most_held(History.of(ROWS["gpt"], given.count), folder, everystep.last(3))
        text += f"\n\ngpt, keep=last(3): the folder holds {result['most_held']:.2f} raw states at most (target ≤ 4.5)"
    timing.show(f"stored / raw of {given.count} checkpoints", text, result, given.json)


if __name__ == "__main__":
    main()
