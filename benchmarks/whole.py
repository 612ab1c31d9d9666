"""What n checkpoints take up on disk: ours through the public door, and every other way with the same states.

python -m benchmarks.whole [ROW …] [--count 100] [--peers zstd,restic] [--seconds 240] [--folder DIR] [--json]

A row is a sequence of real checkpoints (benchmarks.sequences), or some of its arrays. Every file of a way's folder
counts, log and manifests included. Checkpoints are loaded back and compared bit for bit: all of ours, of the others the
oldest, one in the middle and the newest. All figures are stored / raw: of the first n checkpoints or, in rows that say
`later`, of what each after the first adds.

XOR, zipnn XOR and the difference of floats lean on the checkpoint before, back to the first: as small as they get, and
99 links to load the newest of 100. Ours reads no more than its settings allow. Ways whose checkpoints take about the
same each have figures for the first row only. One row of one way again: python -m benchmarks.whole gpt --peers restic
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import everystep
from benchmarks import apart, peers, results, sequences, timing
from benchmarks.apart import Apart
from benchmarks.peers import Peer, slug
from benchmarks.peers.everystep import Everystep, EverystepThin
from benchmarks.results import Table, number
from benchmarks.sequences import OPTIMIZER, WEIGHTS, Sequence
from benchmarks.timing import Stopwatch
from benchmarks.work import Replay
from everystep.seam import Files, Seam

COUNTS = (10, 30, 50, 100)
WORKERS = 2  # sizes do not depend on the time, so that more than one way can be measured at once
SECONDS_MAX = 240.0
HELD_COUNT = 30

# rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A history to store."""

    name: str
    sequence: str
    roles: frozenset[str] = WEIGHTS | OPTIMIZER
    later: bool = False
    unchanged: bool = False
    """Only leaves that are the same in every checkpoint."""
    usual: bool = True
    """Measured unless others are asked for."""

    def names(self, sequence: Sequence) -> list[str]:
        found = [name for name, role in sequence.roles.items() if role in self.roles]
        if not self.unchanged:
            return found
        first, last = sequence[0], sequence[len(sequence) - 1]
        return [name for name in found if first[name].tobytes() == last[name].tobytes()]


ROWS = {
    row.name: row
    for row in (
        Row("gpt", "gpt"),
        Row("gpt-weights", "gpt", WEIGHTS),
        Row("cnn", "cnn"),
        Row("ft_bf16-weights", "ft_bf16", WEIGHTS, later=True),
        Row("frozen-weights", "frozen", WEIGHTS, later=True),
        Row("lora-weights", "lora", WEIGHTS, later=True),
        Row("unchanged", "frozen", WEIGHTS, later=True, unchanged=True),
        Row("ft_bf16", "ft_bf16", usual=False),
        Row("frozen", "frozen", usual=False),
        Row("lora", "lora", usual=False),
        Row("emb", "emb", usual=False),
    )
}
FIRST = "gpt"

# one way -----------------------------------------------------------------------------------------------------------


def store(
    peer: type[Peer], sequence: Sequence, names: list[str], count: int, folder: str, seconds_max: float
) -> dict[str, Any]:
    """Bytes on disk after each checkpoint, as many as there is time for; and elements that came back changed."""
    work, watch, sizes = Replay(sequence, names=names), Stopwatch(), list[int]()
    work.show(0)
    contestant = Apart(peer, work.memory, os.path.join(folder, slug(peer.name)))
    try:
        for number_ in range(count):
            work.show(number_)
            sizes.append(contestant.call("keep", number_))
            if watch.seconds() > seconds_max:
                timing.say(f"  {peer.name} has used up its {seconds_max:.0f} s after {len(sizes)} checkpoints")
                break
        last = len(sizes) - 1
        wrong = elements = 0
        for number_ in range(last + 1) if issubclass(peer, Everystep) else sorted({0, last // 2, last}):
            work.show(number_)
            here, of = contestant.call("check", number_)
            wrong, elements = wrong + here, elements + of
        if wrong and peer.exact:
            raise apart.Failed(f"{wrong} of {elements} elements came back changed")
        return {"sizes": sizes, "wrong": wrong, "elements": elements}
    finally:
        contestant.close()
        work.close()


def share(found: dict[str, Any], row: dict[str, Any], count: int) -> float | None:
    sizes = found["sizes"]
    if len(sizes) < count:
        return None
    if row["later"]:
        return float((sizes[count - 1] - sizes[0]) / (count - 1) / row["checkpoint_bytes"])
    return float(sizes[count - 1] / count / row["checkpoint_bytes"])


def measure(row: Row, count: int, ways: list[type[Peer]], place: str | None, seconds_max: float) -> dict[str, Any]:
    count = min(count, sequences.length(row.sequence) if row.name == FIRST else sequences.COUNT)
    sequence = sequences.load(row.sequence, count)
    names = row.names(sequence)
    nbytes = sum(value.nbytes for name, value in sequence[0].items() if name in names)
    out: dict[str, Any] = {"row": row.name, "later": row.later, "checkpoint_bytes": nbytes, "count": count}
    chosen = [way for way in ways if _takes_part(way, row)]

    def one(way: type[Peer]) -> dict[str, Any] | str:
        timing.say(f"{row.name}: {way.name}")
        try:
            with timing.scratch(place) as folder:
                return store(way, sequence, names, count, folder, seconds_max)
        except apart.Failed as error:
            timing.say(f"{way.name} failed and is left out: {error}")
            return str(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        found = dict(zip((way.name for way in chosen), pool.map(one, chosen)))
    out["ways"] = {name: one for name, one in found.items() if isinstance(one, dict)}
    out["failed"] = {name: one for name, one in found.items() if isinstance(one, str)}
    return out


def _takes_part(way: type[Peer], row: Row) -> bool:
    thins = bool(OPTIMIZER & row.roles)
    return not (way.plain and row.name != FIRST) and (thins or not issubclass(way, EverystepThin))


# room while rules drop ---------------------------------------------------------------------------------------------


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


def most_held(place: str | None, keep: everystep.Rule) -> float:
    """Raw states that the folder holds at most while a run of gpt saves under a rule, after any file call."""
    work, files = Replay(sequences.load(FIRST)), Watching()
    with timing.scratch(place) as folder:
        with everystep.open(folder, seam=Seam(files)).run("bench", keep=keep) as run:
            for step in range(HELD_COUNT):
                work.show(step)
                run.save(step, state=work.memory.state()).wait()
        if files.held != timing.folder_bytes(folder):
            raise SystemExit("the file calls were not all counted")
    work.close()
    return files.most / work.nbytes


# the tables --------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[Table]:
    rows, out = result["rows"], []
    first = next((row for row in rows if row["row"] == FIRST), None)
    if first is not None:
        counts = sorted({*(count for count in COUNTS if count <= first["count"]), first["count"]})
        found = [[name, *(number(share(way, first, n)) for n in counts)] for name, way in first["ways"].items()]
        title = f"Stored / raw of n checkpoints of {FIRST}, {first['checkpoint_bytes'] / 1e6:.1f} MB each"
        out.append(Table(title, ("", *(f"n = {n}" for n in counts)), found, results.left_out(first)))
    names = list(dict.fromkeys(name for row in rows for name, way in row["ways"].items() if not _plain(name)))
    body, notes = [], []
    for row in rows:
        count = min(row["count"], sequences.COUNT)
        cells = [_cell(row["ways"].get(name), row, count) for name in names]
        body.append([row["row"] + (", later" if row["later"] else ""), f"{row['checkpoint_bytes'] / 1e6:.1f}", *cells])
        notes += [f"failed, {name} on {row['row']}: {why}" for name, why in row["failed"].items() if row is not first]
        notes += [
            f"{name} on {row['row']} gives other bits back in {way['wrong']:,} of {way['elements']:,} elements"
            for name, way in row["ways"].items()
            if way["wrong"]
        ]
    notes += results.left_out({"missing": result["missing"]})
    count = min(sequences.COUNT, max((row["count"] for row in rows), default=0))
    out.append(Table(f"Stored / raw of {count} checkpoints", ("", "MB", *names), body, notes))
    if result.get("most_held") is not None:
        held = f"{result['most_held']:.2f}"
        title = "Most that the folder holds while rules drop, in raw states"
        out.append(Table(title, ("", "at most"), [[f"{FIRST}, keep=last(3), {HELD_COUNT} saves", held]]))
    return out


def _plain(name: str) -> bool:
    return any(peer.plain for peer in peers.all_peers() if peer.name == name)


def _cell(way: dict[str, Any] | None, row: dict[str, Any], count: int) -> str:
    return results.NOTHING if way is None else number(share(way, row, count), 4)


def main(arguments: list[str] | None = None) -> None:
    parser = results.parser("benchmarks.whole", __doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: the first seven")
    parser.add_argument("--count", type=int, default=sequences.LONG_COUNT, help="checkpoints, where there are so many")
    parser.add_argument("--seconds", type=float, default=SECONDS_MAX, help="for each way on each row")
    parser.add_argument("--peers", help="files or names of peers, by commas; none: ours only; default: all")
    given = parser.parse_args(arguments)
    unknown = {*given.rows} - {*ROWS}
    if unknown or not 2 <= given.count <= sequences.LONG_COUNT:
        parser.error(f"not known: {', '.join(sorted(unknown)) or given.count}")
    ways, missing = peers.choose(given.peers, "whole", ("everystep", "everystep-keep-full-last-2"))
    chosen = [ROWS[name] for name in given.rows] or [row for row in ROWS.values() if row.usual]
    rows = [measure(row, given.count, ways, given.folder, given.seconds) for row in chosen if ready(row, missing)]
    result: dict[str, Any] = {"rows": rows, "missing": missing}
    if not given.rows:
        result["most_held"] = most_held(given.folder, everystep.last(3))
    given.record = given.record and not given.rows
    results.publish("whole", result, tables(result), given, results.command("benchmarks.whole", arguments))


def ready(row: Row, missing: dict[str, str]) -> bool:
    """Trains the row's sequence if it has not been yet; says what to install where that is missing."""
    try:
        sequences.load(row.sequence)
    except SystemExit as error:
        missing[f"the row {row.name}"] = str(error)
        timing.say(f"{error}; the row {row.name} is left out")
        return False
    return True


if __name__ == "__main__":
    main()
