"""Columns that fit: aligned, never wrapped; cut or left out only where a terminal is too narrow for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Span, Text

GAP = 2


@dataclass(frozen=True)
class Column:
    """How one column is laid out. What a title has no values for is left out."""

    title: str
    right: bool = False
    style: str = ""
    least: int = 0
    """Width down to which it may be cut; 0: never cut."""
    keep_end: bool = False
    """Cut at the beginning: the end of a path says more."""
    spare: bool = False
    """May be left out on a narrow terminal, the rightmost first."""


@dataclass(frozen=True)
class Table:
    """Laid out lines: the title's, one a row, and the titles of columns that found no room."""

    head: Text
    rows: list[Text]
    left_out: list[str]


def lay_out(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    width: int | None,
    marked: Mapping[tuple[int, int], str] | None = None,
) -> Table:
    """
    Args:
        rows: cells, as many as columns.
        width: of the terminal; None: no limit.
        marked: (row, column) -> a style of that cell's own.
    """
    marked = marked or {}
    kept = [i for i in range(len(columns)) if not rows or any(row[i] for row in rows)]
    widths = {i: max([cell_len(columns[i].title), *(cell_len(row[i]) for row in rows)]) for i in kept}
    left_out: list[str] = []
    while width is not None and _least(columns, widths) > width:
        spare = [i for i in widths if columns[i].spare]
        if not spare:
            break
        left_out.insert(0, columns[spare[-1]].title)
        del widths[spare[-1]]
    if width is not None:
        _shrink(columns, widths, width)
    head = _line(columns, [column.title for column in columns], widths, ["dim"] * len(columns))
    styles = [[marked.get((at, i), column.style) for i, column in enumerate(columns)] for at in range(len(rows))]
    return Table(head, [_line(columns, row, widths, own) for row, own in zip(rows, styles)], left_out)


def _total(widths: dict[int, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)


def _least(columns: Sequence[Column], widths: dict[int, int]) -> int:
    return _total({i: min(w, columns[i].least or w) for i, w in widths.items()})


def _shrink(columns: Sequence[Column], widths: dict[int, int], width: int) -> None:
    """Takes what is too much from the widest column that may still be cut."""
    while _total(widths) > width:
        able = [i for i, w in widths.items() if columns[i].least and w > columns[i].least]
        if not able:
            return
        widths[max(able, key=lambda i: widths[i])] -= 1


def _line(columns: Sequence[Column], cells: Sequence[str], widths: dict[int, int], styles: Sequence[str]) -> Text:
    parts: list[str] = []
    spans: list[Span] = []
    at = 0
    for i, wide in widths.items():
        cell = cut(cells[i], wide, columns[i].keep_end)
        pad = " " * (wide - cell_len(cell))
        before = (" " * GAP if parts else "") + (pad if columns[i].right else "")
        parts += (before, cell, "" if columns[i].right else pad)
        if styles[i] and cell:
            spans.append(Span(at + len(before), at + len(before) + len(cell), styles[i]))
        at += sum(map(len, parts[-3:]))
    line = Text("".join(parts), spans=spans)
    line.rstrip()
    return line


def cut(text: str, width: int | None, keep_end: bool = False) -> str:
    """Text of at most `width` cells, with … where something was taken."""
    if width is None or cell_len(text) <= width:
        return text
    if not keep_end:
        return set_cell_size(text, width - 1).rstrip() + "…"
    while cell_len(text) > width - 1:
        text = text[1:]
    return "…" + text


def headed(name: str, rest: str, style: str = "bold") -> Text:
    """A line that begins with what it is about."""
    return Text().append(name, style).append(rest)


def pairs(rows: Sequence[tuple[str, str]], indent: int = 0) -> list[Text]:
    """Names and what they are, one under the other; what has no value is left out."""
    kept = [(name, text) for name, text in rows if text]
    wide = max((cell_len(name) for name, _ in kept), default=0)
    lines = []
    for name, text in kept:
        line = Text(" " * indent).append(name, "dim").append(" " * (wide - cell_len(name) + GAP))
        lines.append(line.append(text))
    return lines
