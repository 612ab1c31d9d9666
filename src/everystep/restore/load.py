"""Open a checkpoint and build what is asked for: everything, one subtree, one leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from everystep import adapters
from everystep.adapters import numpy as numpy_adapter
from everystep.errors import CheckpointRetired, Damaged, ObjectMissing, UsageError
from everystep.restore.fetch import Progress, fetch_leaves
from everystep.schema import Composite, Leaf, Region, Tree, paths_of, select, unflatten, without
from everystep.vault import Committed, Manifest, PartView, RunVault
from everystep.vault.record import Attach

LIKES = ("numpy", "torch", "saved")
OPTIMIZER = "optimizer"


class Opened:
    """A checkpoint whose manifest has been read and verified; chunks are read as they are asked for."""

    def __init__(self, vault: RunVault, commit: Committed, manifest: Manifest, *, thin: bool = False) -> None:
        self._vault, self._commit, self.manifest, self.thin = vault, commit, manifest, thin

    @property
    def tree(self) -> Tree:
        """The tree of rank 0; other ranks' leaves of the same paths are parts of the same leaves."""
        return self.manifest.views[0].tree

    def of_rank(self, rank: int) -> Opened | None:
        """What one rank saved, and that alone; None if there was no such rank."""
        views = tuple(view for view in self.manifest.views if view.rank == rank)
        if not views:
            return None
        return Opened(self._vault, self._commit, replace(self.manifest, views=views), thin=self.thin)

    def names(self) -> list[str]:
        """The top-level names of the state, as far as it is still there."""
        tree = without(self.tree, "", _is_optimizer, ("", "state")) if self.thin else self.tree
        return [path for path, _, _ in paths_of(tree) if path and "/" not in path] if tree is not None else []

    def build(
        self,
        path: str = "",
        *,
        like: str = "numpy",
        types: Sequence[type] = (),
        progress: Progress | None = None,
    ) -> Any:
        """The part of the state under a path.

        Args:
            like: "numpy" for arrays, "torch" for tensors, "saved" for what each leaf was.
            types: classes of named tuples and dataclasses to build.

        Raises:
            NotFound: naming the nearest paths.
            Damaged: if a byte of it is not what was saved.
        """
        if like not in LIKES:
            raise UsageError(f"like={like!r} is not known", do=f"one of {', '.join(LIKES)}")
        trees = self._trees(path)
        leaves = {tree.leaves[node[1]].path for tree in trees for node in tree.nodes if node[0] == "leaf"}
        with self._open_pool() as pool, _blame(self._vault, self._commit):
            data = fetch_leaves(self._vault, self.manifest, leaves, pool, progress)
        built = [_build(tree, data, like, types) for tree in trees]
        whole = built[0]
        for other in built[1:]:
            whole = _merge(whole, other)
        return whole

    def leaves(self) -> list[Leaf]:
        """Every leaf of every rank that is still there; one of several ranks once."""
        found: dict[str, Leaf] = {}
        for view in self.manifest.views:
            for leaf in view.tree.leaves:
                if not (self.thin and _is_optimizer(leaf)):
                    found.setdefault(leaf.path, leaf)
        return list(found.values())

    def arrays(self, paths: Sequence[str], progress: Progress | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """path -> the leaf there as an array, whatever else it was."""
        leaves = {leaf.path: msgspec.structs.replace(leaf, kind="array") for leaf in self.leaves()}
        with self._open_pool() as pool, _blame(self._vault, self._commit):
            data = fetch_leaves(self._vault, self.manifest, paths, pool, progress)
        return {path: numpy_adapter.build(leaves[path], data[path]) for path in paths}

    def print_of(self, leaf: Leaf) -> Any:
        """Equal for leaves of which it is known, without reading, that all bits are equal."""
        found = []
        for view, region in self._regions[leaf.path]:
            chunks = view.layout.chunks_of(region)
            start = region.start - view.layout.chunks[chunks[0]].start if chunks else 0
            hashes = tuple(view.hashes[index].tobytes() for index in chunks)
            found.append((region.box, start, region.nbytes, hashes))
        return leaf.dtype, leaf.shape, found

    @cached_property
    def _regions(self) -> dict[str, list[tuple[PartView, Region]]]:
        found: dict[str, list[tuple[PartView, Region]]] = {}
        for view in self.manifest.views:
            for region in view.layout.regions:
                found.setdefault(view.tree.leaves[region.leaf].path, []).append((view, region))
        return found

    def outline(self, path: str = "") -> Any:
        """The part of the state under a path, with empty arrays in place of its leaves: nothing of them is read.

        Raises:
            NotFound: naming the nearest paths.
        """
        whole, *others = [
            unflatten(tree, lambda index: np.empty(0), lambda composite: composite.parts) for tree in self._trees(path)
        ]
        for other in others:
            whole = _merge(whole, other)
        return whole

    def verify(self, progress: Progress | None = None) -> int:
        """Reads and checks every chunk; the number of plain bytes."""
        total = 0
        with self._open_pool() as pool, _blame(self._vault, self._commit):
            for view in self.manifest.views:
                for group in self._vault.read_chunks(view, view.there(thin=self.thin), pool):
                    nbytes = sum(data.nbytes for _, data in group)
                    total += nbytes
                    if progress is not None:
                        progress(nbytes)
        return total

    def _trees(self, path: str) -> list[Tree]:
        """The part under a path, of every rank that has one, as far as it is still there."""
        having = [view.tree for view in self.manifest.views if any(name == path for name, _, _ in paths_of(view.tree))]
        trees = [select(tree, path) for tree in having] or [select(self.tree, path)]
        if not self.thin:
            return trees
        kept = [without(tree, path, _is_optimizer, ("", "state")) for tree in trees]
        found = [tree for tree in kept if tree is not None]
        if not found:
            raise CheckpointRetired(
                f"step {self._commit.event.step} has been thinned: its optimizer state is gone",
                where=path or self._vault.where,
                do='load its weights, for example only="model"; the newest checkpoint is kept in full',
            )
        return found

    @contextmanager
    def _open_pool(self) -> Iterator[Any]:
        pool = self._vault.seam.pool(self._vault.settings.workers, "everystep-read")
        try:
            yield pool
        finally:
            pool.close()


def _is_optimizer(leaf: Leaf) -> bool:
    return leaf.role == OPTIMIZER


def open_checkpoint(vault: RunVault, commit: Committed) -> Opened:
    """Reads and verifies a checkpoint's manifest.

    Raises:
        CheckpointRetired, Damaged: accordingly.
    """
    with _blame(vault, commit):
        return Opened(vault, commit, vault.manifest(commit), thin=commit.event.id in vault.history().thin)


def read_attachment(vault: RunVault, attached: Attach) -> bytes:
    return vault.read_pages(attached.where, f"{vault.where} attachment {attached.name}")


@contextmanager
def _blame(vault: RunVault, commit: Committed) -> Iterator[None]:
    """A pack that is missing: was the checkpoint retired meanwhile, or is it damage?"""
    try:
        yield
    except ObjectMissing as error:
        if commit.event.id not in vault.history().live:
            raise CheckpointRetired(
                f"the checkpoint of step {commit.event.step} has been dropped",
                where=vault.where,
                do="list what is kept: everystep log",
            ) from error
        raise Damaged(
            f"the checkpoint of step {commit.event.step} has lost a file", where=error.where, do="run fsck"
        ) from error


def _build(tree: Tree, data: dict[str, np.ndarray[Any, Any]], like: str, types: Sequence[type]) -> Any:
    made: dict[int, Any] = {}

    def leaf(index: int) -> Any:
        """Two names of one leaf get one object."""
        if index not in made:
            made[index] = _leaf(tree.leaves[index], data[tree.leaves[index].path], like)
        return made[index]

    def compose(composite: Composite) -> Any:
        if like == "numpy":
            return composite.parts
        return adapters.adapter_for_kind(composite.kind).compose(composite)

    return unflatten(tree, leaf, compose, types)


def _leaf(leaf: Leaf, data: np.ndarray[Any, Any], like: str) -> Any:
    build: Callable[[Leaf, np.ndarray[Any, Any]], Any]
    if leaf.kind in ("bytes", "str"):
        return numpy_adapter.build(leaf, data)
    if like == "torch":
        build = adapters.adapter_for_kind("torch.tensor").build
    elif like == "saved":
        build = adapters.adapter_for_kind(leaf.kind).build
    else:
        build = numpy_adapter.build
    return build(leaf, data)


def _merge(ours: Any, theirs: Any) -> Any:
    """Dicts of two ranks in one; where both have a value, the lower rank's stands."""
    if type(ours) is dict and type(theirs) is dict:
        return {**theirs, **ours, **{key: _merge(ours[key], theirs[key]) for key in ours if key in theirs}}
    return ours
