"""What the workers of a checkpoint said of themselves: each in a line, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.text import Text

from everystep.cli import human
from everystep.cli.table import Column, Table, lay_out

WORKERS_SHOWN = 16
"""More are not listed one by one: what tells them apart is how far each metric spreads."""
_SAID_OF_ALL = ("rank", "host")


@dataclass(frozen=True)
class Spread:
    """Of one metric, over the workers that have it as a finite number; the lowest rank of equals."""

    workers: int
    least: float
    least_rank: int
    median: float
    most: float
    most_rank: int


def spreads(workers: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How far each metric spreads, where at least two workers have it as a number."""
    found = {}
    for name in dict.fromkeys(name for worker in workers for name in worker if name not in _SAID_OF_ALL):
        values = [(worker[name], worker["rank"]) for worker in workers if _is_number(worker.get(name))]
        if len(values) > 1:
            least, most = min(values), max(values, key=lambda pair: (pair[0], -pair[1]))
            middle = median(value for value, _ in values)
            whole = all(isinstance(value, int) for value, _ in values) and middle == int(middle)
            found[name] = asdict(Spread(len(values), *least, int(middle) if whole else middle, *most))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def worker_lines(workers: Sequence[dict[str, Any]], width: int | None) -> Iterator[Text]:
    """A line for each worker that said something of itself; of many, how many they are."""
    if not workers:
        return
    if len(workers) > WORKERS_SHOWN:
        yield Text(f"  {len(workers)} ranks said something of themselves; --json lists each", "dim")
        return
    names = list(dict.fromkeys(name for worker in workers for name in worker))
    columns = [
        Column(human.clean(name), right=name != "host", least=8 * (name == "host"), spare=name not in _SAID_OF_ALL)
        for name in names
    ]
    cells = [human.numbers([worker.get(name) for worker in workers]) for name in names]
    yield from _indented(lay_out(columns, [list(row) for row in zip(*cells)], width - 2 if width is not None else None))


def spread_lines(found: dict[str, dict[str, Any]], width: int | None) -> Iterator[Text]:
    """A line for each metric: the least, the median and the most, and whose they are. Who holds the others up is seen
    in its step time."""
    if not found:
        return
    columns = [
        Column("metric", least=8), Column("least", right=True), Column("rank", right=True, style="cyan"),
        Column("median", right=True), Column("most", right=True), Column("rank", right=True, style="cyan"),
        Column("workers", right=True, spare=True, style="dim"),
    ]  # fmt: skip
    rows = []
    for name, spread in found.items():
        least, middle, most = human.numbers([spread["least"], spread["median"], spread["most"]])
        same = spread["least"] == spread["most"]
        ranks = ["" if same else str(spread[f"{end}_rank"]) for end in ("least", "most")]
        rows.append([human.clean(name), least, ranks[0], middle, most, ranks[1], str(spread["workers"])])
    yield from _indented(lay_out(columns, rows, width - 2 if width is not None else None))


def _indented(table: Table) -> Iterator[Text]:
    for line in [table.head, *table.rows]:
        yield Text("  ").append_text(line)
    if table.left_out:
        yield Text(f"  no room for {', '.join(table.left_out)}", "dim")
