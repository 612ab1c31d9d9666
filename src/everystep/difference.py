"""What changed between two checkpoints: their leaves, plain values, configuration, metrics and surroundings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from everystep.analysis import LeafChange, ValueChange, compare_leaf, compare_values
from everystep.restore import WORKER, Opened
from everystep.restore.fetch import Progress
from everystep.schema import Leaf
from everystep.schema.dtype import parse

BATCH_BYTES = 64 << 20
"""Leaves that are read and compared at a time, as far as they are small."""


@dataclass(frozen=True)
class Side:
    """One of the two: the opened checkpoint, the path that its state begins at, and what stands beside the state."""

    opened: Opened
    base: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, Any]

    def leaves(self, only: str | None) -> dict[str, Leaf]:
        """Paths as `load` takes them -> leaf."""
        found = {}
        for leaf in self.opened.leaves():
            path = leaf.path.removeprefix(f"{self.base}/") if self.base else leaf.path
            if only is None or path == only or path.startswith(f"{only}/"):
                found[path] = leaf
        return found

    def values(self, only: str | None) -> Any:
        """The state with empty arrays in place of its leaves; without what workers said of themselves."""
        path = "/".join(part for part in (self.base, only or "") if part)
        found = self.opened.outline(path)
        if not path:
            found.pop(WORKER, None)
        return found


@dataclass
class Difference:
    """What changed from one checkpoint to another."""

    leaves: list[LeafChange] = field(default_factory=list)
    """Every leaf of either, those that are the same included, by path."""
    values: list[ValueChange] = field(default_factory=list)
    """Plain values of the states that differ."""
    config: list[ValueChange] = field(default_factory=list)
    environment: list[ValueChange] = field(default_factory=list)
    metrics: list[ValueChange] = field(default_factory=list)

    @property
    def changed(self) -> list[LeafChange]:
        """Leaves that are not the same."""
        return [leaf for leaf in self.leaves if leaf.kind != "same"]

    @property
    def same(self) -> bool:
        """Whether the states are equal bit for bit."""
        return not self.changed and not self.values


def compare(before: Side, after: Side, *, only: str | None, progress: Progress | None) -> Difference:
    """
    Raises:
        NotFound: if `only` is a path that neither has.
    """
    old, new = before.leaves(only), after.leaves(only)
    if only is not None and not old and not new:
        before.values(only)  # names the nearest paths
    found: dict[str, LeafChange] = {}
    for batch in _batches(old, new, before, after, found):
        # Arrays of one batch at a time: memory stays flat however large the states are.
        theirs = after.opened.arrays([new[path].path for path in batch if path in new], progress)
        ours = before.opened.arrays([old[path].path for path in batch if path in old], progress)
        for path in batch:
            one = ours[old[path].path] if path in old else None
            other = theirs[new[path].path] if path in new else None
            found[path] = compare_leaf(path, one, other)
    return Difference(
        [found[path] for path in dict.fromkeys((*old, *new))],
        list(compare_values(before.values(only), after.values(only))),
        list(compare_values(before.config, after.config)),
        list(compare_values(before.environment, after.environment)),
        list(compare_values(before.metrics, after.metrics)),
    )


def _batches(
    old: dict[str, Leaf], new: dict[str, Leaf], before: Side, after: Side, found: dict[str, LeafChange]
) -> Iterator[list[str]]:
    """Paths to read, as many as may be held at a time; what is equal by its chunks' hashes is `found` at once."""
    unequal: dict[str, int] = {}
    for path in dict.fromkeys((*old, *new)):
        if path in old and path in new and before.opened.print_of(old[path]) == after.opened.print_of(new[path]):
            form = f"{parse(new[path].dtype).name}{list(new[path].shape)}"
            found[path] = LeafChange(path, "same", 0.0, 0.0, 0.0, form, form)
        else:
            unequal[path] = sum(side[path].nbytes for side in (old, new) if path in side)
    yield from batches(unequal)


def batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Paths, given with their bytes, as many at a time as may be held."""
    batch: list[str] = []
    held = 0
    for path, nbytes in sizes.items():
        batch.append(path)
        held += nbytes
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
