"""Lines of a run as a small graph, newest first: which checkpoint continues from which; nothing here asks or prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CURRENT, LEFT = "●", "○"


@dataclass(frozen=True)
class Drawn:
    """What stands before one checkpoint's row."""

    node: str
    joins: str = ""
    """A line above it, where others that continue from this checkpoint come together; empty if there are none."""
    through: str = ""
    """Before whatever stands between this row and the next."""


@dataclass
class _Column:
    """One line on its way down."""

    wants: str
    begun: bool = False


@dataclass
class _Canvas:
    columns: list[_Column | None] = field(default_factory=list)

    def place(self, id: str) -> tuple[int, list[int]]:
        """The column of a checkpoint, and those of other lines that end in it."""
        found = [i for i, column in enumerate(self.columns) if column is not None and column.wants == id]
        if not found:
            free = [i for i, column in enumerate(self.columns) if column is None]
            found = [free[0] if free else len(self.columns)]
            self.columns[found[0] : found[0] + 1] = [_Column(id)]
        return found[0], found[1:]

    def draw(self, at: int | None = None, node: str = "") -> str:
        signs = ["│" if column is not None and column.begun else " " for column in self.columns]
        if at is not None:
            signs[at] = node
        return " ".join(signs).rstrip()

    def join(self, at: int, ending: Sequence[int]) -> str:
        """The line that takes columns into another one."""
        out = []
        for i, column in enumerate(self.columns[: max(ending) + 1]):
            begun = column is not None and column.begun
            if i < at:
                out.append("│ " if begun else "  ")
            elif i == at:
                out.append("├─" if begun else "╭─")
            elif i in ending:
                out.append("╯ " if i == max(ending) else "┴─")
            else:
                out.append("┼─" if begun else "──")
        rest = ["│ " if column is not None and column.begun else "  " for column in self.columns[max(ending) + 1 :]]
        return "".join([*out, *rest]).rstrip()


def draw(shown: Sequence[str], parents: Mapping[str, str | None], line: Sequence[str]) -> list[Drawn]:
    """
    Args:
        shown: ids of checkpoints, newest first.
        parents: id -> the checkpoint that it continues from, None for the first; for more than what is shown, too.
        line: ids of the current line, newest first; it is drawn leftmost.
    """
    seen, current = set(shown), set(line)
    tip = next((id for id in line if id in seen), None)
    canvas = _Canvas([_Column(tip)] if tip is not None else [])
    out = []
    for id in shown:
        at, ending = canvas.place(id)
        joins = canvas.join(at, ending) if ending else ""
        for i in ending:
            canvas.columns[i] = None
        node = canvas.draw(at, CURRENT if id in current else LEFT)
        before = _nearest(id, parents, seen)
        canvas.columns[at] = _Column(before, True) if before is not None else None
        while canvas.columns and canvas.columns[-1] is None:
            canvas.columns.pop()
        out.append(Drawn(node, joins, canvas.draw()))
    return out


def _nearest(id: str, parents: Mapping[str, str | None], seen: set[str]) -> str | None:
    """What a checkpoint continues from, past those that are not shown."""
    at = parents.get(id)
    passed = {id}
    while at is not None and at not in seen and at not in passed:
        passed.add(at)
        at = parents.get(at)
    return at if at in seen else None
