"""Leaves that are declared frozen: copied and hashed once, and looked at in full every few saves."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep import adapters
from everystep.save.arena import PREPARED_BYTES, Array, Copier, new_pages
from everystep.schema import Layout, Tree


@dataclass(frozen=True)
class Declared:
    """What a program says that it does not change.

    Args:
        memories: of the arrays that nothing trains.
        below: names that they must lie under ("model.encoder"); None for all.
    """

    memories: Collection[Hashable] = ()
    below: tuple[str, ...] | None = None

    def covers(self, path: str) -> bool:
        name = path.replace("/", ".")
        return self.below is None or any(name == top or name.startswith(f"{top}.") for top in self.below)


@dataclass(frozen=True)
class Standing:
    """A leaf that is declared frozen, as it is found at a save."""

    path: str
    payload: Any
    mark: Hashable
    nbytes: int


@dataclass
class FrozenLeaf:
    """The bytes of one leaf; snapshots share it. What changes gets a new one, as a base may still show the old."""

    mark: Hashable
    """Equal as long as nothing that counts its writes has written to the leaf."""
    payload: Any
    """Held, so that no other array can come to lie at the same address."""
    data: Array
    checked: int
    """The save that compared all of it."""
    hashes: dict[int, bytes]
    """Of its chunks, by where they begin."""


class FrozenLeaves:
    """Those of one run, by path.

    Args:
        every: each is compared in full at every so many saves, not all at the same.
    """

    def __init__(self, every: int, copier: Copier) -> None:
        self._every, self._copier = every, copier
        self._leaves: dict[str, FrozenLeaf] = {}
        self._saves = 0
        self.notices: list[str] = []

    def forget(self) -> None:
        """Something has written to the leaves: all are copied anew."""
        self._leaves = {}

    def bytes_with(self, standing: Mapping[int, Standing]) -> int:
        """What is held once these have been taken: what a base still shows of them is counted, too."""
        again = {
            leaf.path
            for leaf in standing.values()
            if (old := self._leaves.get(leaf.path)) is not None and old.mark == leaf.mark
        }
        left = sum(old.data.nbytes for path, old in self._leaves.items() if path not in again)
        return left + sum(leaf.nbytes for leaf in standing.values())

    def take(self, standing: Mapping[int, Standing]) -> Mapping[int, FrozenLeaf]:
        """By stream, the bytes of what stands still, copied only where that is new."""
        self._saves += 1
        before, self._leaves = self._leaves, {}
        found: dict[int, FrozenLeaf] = {}
        for stream, leaf in standing.items():
            kept = self._kept(leaf, before.pop(leaf.path, None))
            self._leaves[leaf.path] = found[stream] = kept or self._copy(leaf, len(found))
        return found

    def _kept(self, leaf: Standing, old: FrozenLeaf | None) -> FrozenLeaf | None:
        """What is held of a leaf, if that is what it holds now."""
        if old is None or old.mark != leaf.mark:
            return None
        if self._saves - old.checked >= self._every:
            if self._changed(leaf, old):
                self.notices.append(
                    f"{leaf.path} was declared frozen, and something has changed it that does not show (.data, a NumPy "
                    f"view, a fused kernel): this checkpoint has it as it is now, those of up to {self._every - 1} "
                    "saves before as it was. Do not declare it frozen"
                )
                return None
            old.checked = self._saves
        return old

    def _changed(self, leaf: Standing, old: FrozenLeaf) -> bool:
        now = adapters.view(leaf.payload)
        if now is not None:
            return self._copier.differs(now, old.data)
        # Not all of it at once, where the leaf can be cut.
        step = PREPARED_BYTES if adapters.cut(leaf.payload, 0, 0) is not None else leaf.nbytes
        for start in range(0, leaf.nbytes, step):
            stop = min(start + step, leaf.nbytes)
            piece = np.empty(stop - start, np.uint8)
            adapters.copy(adapters.cut(leaf.payload, start, stop) or leaf.payload, piece)
            if self._copier.differs(piece, old.data[start:stop]):
                return True
        return False

    def _copy(self, leaf: Standing, number: int) -> FrozenLeaf:
        data = new_pages(leaf.nbytes)
        source = adapters.view(leaf.payload)
        if source is None:
            adapters.copy(leaf.payload, data)
        else:
            self._copier.copy([(data, source)])
        return FrozenLeaf(leaf.mark, leaf.payload, data, self._saves - number % self._every, {})


def standing(tree: Tree, layout: Layout, declared: Declared, least: int) -> dict[int, Standing]:
    """By stream, the declared leaves that are whole in a stream of their own, which those of `least` bytes have."""
    found: dict[int, Standing] = {}
    for region in layout.regions if declared.memories else ():
        if not least <= region.nbytes == layout.streams[region.stream].nbytes > 0:
            continue
        path, payload = tree.leaves[region.leaf].path, tree.payloads[region.leaf]
        mark = adapters.mark(payload, declared.memories) if declared.covers(path) else None
        if mark is not None:
            found[region.stream] = Standing(path, payload, mark, region.nbytes)
    return found
