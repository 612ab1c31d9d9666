"""The leaves of a state as a tree that fits: parts for which there is no room are summed up in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from everystep.cli import human
from everystep.cli.table import Column, lay_out

LINES_SHOWN = 24
_PIECES = re.compile(r"[^/.]*[/.]?")


@dataclass
class Node:
    """A leaf, or a part of the tree; the labels from the top down are its path."""

    label: str
    leaf: Mapping[str, Any] | None = None
    children: dict[str, Node] = field(default_factory=dict)

    def leaves(self) -> Iterator[Mapping[str, Any]]:
        if self.leaf is not None:
            yield self.leaf
        for child in self.children.values():
            yield from child.leaves()


def grow(leaves: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Paths are split at / and, because that is what PyTorch's names have, at dots; what has one branch stays one."""
    root = Node("")
    for leaf in leaves:
        at = root
        for piece in filter(None, _PIECES.findall(leaf["path"])) if leaf["path"] else ["(the state itself)"]:
            at = at.children.setdefault(piece, Node(piece))
        at.leaf = leaf
    return [_joined(child) for child in root.children.values()]


def _joined(node: Node) -> Node:
    while node.leaf is None and len(node.children) == 1:
        (child,) = node.children.values()
        node = Node(node.label + child.label, child.leaf, child.children)
    node.children = {name: _joined(child) for name, child in node.children.items()}
    return node


def opened(top: Sequence[Node], lines: int | None) -> set[int]:
    """Which nodes (by `id`) show what is in them: from the top down, as far as so many lines reach."""
    found: set[int] = set()
    left = math.inf if lines is None else lines - len(top)
    level = [node for node in top if node.children]
    while level:
        for node in level:
            if len(node.children) <= left:
                found.add(id(node))
                left -= len(node.children)
        level = [child for node in level if id(node) in found for child in node.children.values() if child.children]
    return found


def lines_of(leaves: Sequence[Mapping[str, Any]], lines: int | None, width: int | None) -> Iterator[Text]:
    """
    Args:
        leaves: with path, dtype, shape, role, nbytes; and `summary` where numbers are to be shown, None for none.
        lines: at most so many; None: every leaf has one.
    """
    top = grow(leaves)
    shown = top if lines is None else top[:lines]
    rows = [row for node in shown for row in _rows(node, "", "", opened(top, lines))]
    numbers = any("summary" in leaf for leaf in leaves)
    columns = [
        Column("path", least=16),
        *(Column(name, right=True) for name in ("norm", "mean", "min", "max") if numbers),
        *([Column("not finite", right=True, style="bold red")] if numbers else []),
        Column("type", style="cyan", spare=numbers), Column("shape", spare=numbers),
        Column("role", style="dim", spare=numbers), Column("size", right=True, spare=numbers),
    ]  # fmt: skip
    cells = [_cells(label, node, numbers) for label, node in rows]
    marked = {(at, 0): "dim" for at, (_, node) in enumerate(rows) if node.leaf is None}
    table = lay_out(columns, cells, width - 2 if width is not None else None, marked)
    for line in [table.head, *table.rows] if rows else []:
        yield Text("  ").append_text(line)
    if numbers and not any(leaf["summary"]["not_finite"] for leaf in leaves if leaf["summary"] is not None):
        yield Text("  every number is finite", "dim")
    hidden = len(leaves) - sum(node.leaf is not None for _, node in rows)
    if hidden:
        yield Text(f"  … {human.count(hidden, 'leaf')} more: --all-leaves", "dim")


def _rows(node: Node, lead: str, below: str, opened: set[int]) -> Iterator[tuple[str, Node]]:
    yield f"{lead}{human.clean(node.label)}", node
    children = list(node.children.values()) if id(node) in opened else []
    for at, child in enumerate(children, 1):
        last = at == len(children)
        yield from _rows(child, f"{below}{'└─ ' if last else '├─ '}", f"{below}{'   ' if last else '│  '}", opened)


def _cells(label: str, node: Node, numbers: bool) -> list[str]:
    leaves = list(node.leaves())
    own = node.leaf
    roles = {leaf["role"] for leaf in leaves}
    return [
        label,
        *(_numbers([(leaf["summary"], math.prod(leaf["shape"])) for leaf in leaves]) if numbers else []),
        human.element(own["dtype"]) if own is not None else human.count(len(leaves), "leaf"),
        human.shape(own["shape"]) if own is not None else "",
        human.clean(roles.pop()) if len(roles) == 1 else "",
        human.size(sum(leaf["nbytes"] for leaf in leaves)),
    ]


def _numbers(found: Sequence[tuple[Mapping[str, Any] | None, int]]) -> list[str]:
    """Norm, mean, range and what is not finite, of one leaf or of several as if they were one."""
    known = [(summary, size) for summary, size in found if summary is not None]
    if not known:
        return ["", "", "", "", ""]
    bad = sum(summary["not_finite"] for summary, _ in known)
    finite = [(summary, count) for summary, size in known if (count := size - summary["not_finite"])]
    if not finite:
        return ["", "", "", "", str(bad) if bad else ""]
    norm = math.sqrt(sum(summary["norm"] ** 2 for summary, _ in finite))
    mean = sum(summary["mean"] * count for summary, count in finite) / sum(count for _, count in finite)
    low, high = min(summary["low"] for summary, _ in finite), max(summary["high"] for summary, _ in finite)
    return [*(f"{value:.4g}" for value in (norm, mean, low, high)), str(bad) if bad else ""]
