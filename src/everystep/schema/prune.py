"""A tree without some of its leaves: whole entries of the outer dicts go, so that nothing is left in halves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from everystep.schema.tree import Leaf, Tree, paths_of


def without(tree: Tree, path: str, gone: Callable[[Leaf], bool], outer: Collection[str]) -> Tree | None:
    """A tree without the entries that hold a leaf which is gone; None if that is all of it.

    Args:
        path: where the tree itself lies.
        outer: paths of dicts that lose single entries; anything else is kept or lost as a whole.
    """
    spans = list(paths_of(tree))

    def hit(start: int, end: int) -> bool:
        return any(node[0] == "leaf" and gone(tree.leaves[node[1]]) for node in tree.nodes[start:end])

    def visit(at: int) -> list[Any] | None:
        name, start, end = spans[at]
        where = f"{path}/{name}" if path and name else path or name
        node = tree.nodes[start]
        if not hit(start, end):
            return tree.nodes[start:end]
        if where not in outer or node[0] not in ("dict", "ordered"):
            return None
        keys, nodes, child = [], [], start + 1
        for key in node[1]:
            kept = visit(child)
            if kept is not None:
                keys.append(key)
                nodes += kept
            child = spans[child][2]
        return [[node[0], keys], *nodes] if keys else None

    found = visit(0)
    return Tree(found, tree.values, tree.leaves, tree.payloads) if found is not None else None
