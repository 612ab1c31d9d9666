"""A checkpoint as a stream of protocol buffers, a few leaves in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from everystep.adapters import numpy as numpy_adapter
from everystep.formats import protobuf
from everystep.formats.file import Target
from everystep.restore import WORKER, Opened
from everystep.restore.fetch import Progress
from everystep.schema import Leaf, Tree, paths_of, select
from everystep.schema.dtype import name_of

LOOP = "loop"
"""The entry of a checkpoint with the place of the loop, which nobody asks for."""
BATCH_BYTES = 64 << 20


def can_stream(opened: Opened, path: str) -> bool:
    """Whether one rank holds all of it; what several hold is put together in memory."""
    views = opened.manifest.views
    whole = len(views) == 1 and not opened.thin and not any(leaf.boxes for leaf in opened.tree.leaves)
    return whole and path in views[0].paths


def stream(
    opened: Opened, path: str, target: Target, metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Writes the part of a checkpoint under a path, as `protobuf.write` writes the state that a load gives."""
    tree = select(opened.tree, path)
    tree, leaves = _renumbered(tree if path else _without_ours(tree))
    writer = protobuf.Writer(target)
    writer.header(metadata)
    writer.structure(tree)
    for batch in _batches(leaves):
        arrays = opened.arrays([full for full, _ in batch], progress)
        for full, leaf in batch:
            array = arrays.pop(full)
            writer.leaf(replace(leaf, dtype=name_of(array.dtype, leaf.path), shape=array.shape), leaf.role)
            writer.pieces(array)
    writer.end()


def _without_ours(tree: Tree) -> Tree:
    """Without the entries that nobody asks for."""
    gone = [(start, end) for path, start, end in paths_of(tree) if path in (LOOP, WORKER)]
    if not gone:
        return tree
    kept = [at for at in range(1, len(tree.nodes)) if not any(start <= at < end for start, end in gone)]
    kind, keys = tree.nodes[0]
    root = [kind, [key for key in keys if key not in (LOOP, WORKER)]]
    return Tree([root, *(tree.nodes[at] for at in kept)], tree.values, tree.leaves)


def _renumbered(tree: Tree) -> tuple[Tree, list[tuple[str, Leaf]]]:
    """The tree with leaves numbered as they come, and these: (path in the checkpoint, leaf at its path in the part).
    What only an adapter can build is a dict of its parts."""
    nodes = [["dict", node[2]] if node[0] == "composite" else node for node in tree.nodes]
    numbers: dict[int, int] = {}
    leaves: list[tuple[str, Leaf]] = []
    for path, at, _ in paths_of(tree):
        if nodes[at][0] != "leaf":
            continue
        index = nodes[at][1]
        if index not in numbers:
            numbers[index] = len(leaves)
            leaf = tree.leaves[index]
            leaves.append((leaf.path, replace(leaf, path=path, kind=_form(leaf.kind))))
        nodes[at] = ["leaf", numbers[index]]
    return Tree(nodes, tree.values, [leaf for _, leaf in leaves]), leaves


def _form(kind: str) -> str:
    """What a leaf is in the file: a framework's tensor is an array."""
    if kind in ("str", "bytes"):
        return kind
    return "scalar" if kind in numpy_adapter.KINDS and kind != "array" else "array"


def _batches(leaves: list[tuple[str, Leaf]]) -> Iterator[list[tuple[str, Leaf]]]:
    """In their order, of about so many bytes."""
    held: list[tuple[str, Leaf]] = []
    nbytes = 0
    for one in leaves:
        held.append(one)
        nbytes += one[1].nbytes
        if nbytes >= BATCH_BYTES:
            yield held
            held, nbytes = [], 0
    if held:
        yield held
