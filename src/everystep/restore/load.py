"""Open a checkpoint and build what is asked for: everything, one subtree, one leaf."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, reduce
from typing import Any, TypeVar

import msgspec
import numpy as np

from everystep import adapters
from everystep.adapters import numpy as numpy_adapter
from everystep.errors import CheckpointRetired, Damaged, NotFound, ObjectMissing, UsageError
from everystep.restore.fetch import Progress, fetch_boxes, fetch_leaves
from everystep.schema import Box, Composite, Leaf, Region, Tree, paths_of, select, unflatten, without
from everystep.seam import Pool
from everystep.vault import Committed, Manifest, PartView, RunVault
from everystep.vault.record import Attach

T = TypeVar("T")
Array = np.ndarray[Any, Any]
Held = Array | dict[Box, Array]
"""The bytes of a leaf, or of those of its boxes that are wanted."""
Boxes = Mapping[str, Sequence[Box]]
_LIKES = {"torch": "torch.tensor", "tensorflow": "tensorflow.tensor", "jax": "jax.array"}
LIKES = ("numpy", *_LIKES, "saved")
KEPT = "kept"
"""Of `build`: leaves as `adapters.Kept`, and composites as they are, for what looks like a template."""
OPTIMIZER = "optimizer"
STATE = "state"
WORKER = "worker"
SECTIONS_OF_OURS = ("rng", "loop", WORKER)


class Opened:
    """A checkpoint whose manifest has been read and verified; chunks are read as they are asked for."""

    def __init__(
        self, vault: RunVault, commit: Committed, manifest: Manifest, *, thin: bool = False, rank: int | None = None
    ) -> None:
        self._vault, self._commit, self.thin, self._rank = vault, commit, thin, rank
        views = tuple(view for view in manifest.views if rank is None or view.rank == rank)
        self.manifest = replace(manifest, views=views)

    @property
    def tree(self) -> Tree:
        """The tree of rank 0; other ranks' leaves of the same paths are parts of the same leaves."""
        return self.manifest.views[0].tree

    def of_rank(self, rank: int) -> Opened | None:
        """What one rank saved, and that alone; None if there was no such rank."""
        if all(view.rank != rank for view in self.manifest.views):
            return None
        return Opened(self._vault, self._commit, self.manifest, thin=self.thin, rank=rank)

    def names(self, base: str = "") -> list[str]:
        """The names of the state's sections, or of those below a path, as far as they are still there."""
        above = f"{base}/" if base else ""
        paths = list(self.manifest.views[0].paths)
        if self.thin:
            tree = without(self.tree, "", _is_optimizer, ("", STATE))
            paths = [path for path, _, _ in paths_of(tree)] if tree is not None else []
        below = [path.removeprefix(above) for path in paths if path.startswith(above)]
        return [path for path in below if path and "/" not in path]

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
            like: "numpy" for arrays, "torch" or "jax" for theirs, "saved" for what each leaf was.
            types: classes of named tuples and dataclasses to build.

        Raises:
            NotFound: naming the nearest paths.
            Damaged: if a byte of it is not what was saved.
        """
        return self.build_all([path], like=like, types=types, progress=progress)[path]

    def build_all(
        self,
        paths: Sequence[str],
        *,
        like: str = "numpy",
        types: Sequence[type] = (),
        progress: Progress | None = None,
        boxes: Mapping[str, Boxes] | None = None,
        kept: Collection[str] = (),
    ) -> dict[str, Any]:
        """path -> the part of the state under it, as `build` gives it; all read at once. No two share memory.

        Args:
            boxes: by path, the leaves below it of which only boxes are wanted: they are `adapters.Boxed`.
            kept: the paths below which leaves are wanted as with `KEPT`.
        """
        if like not in LIKES and like != KEPT:
            raise UsageError(f"like={like!r} is not known", do=f"one of {', '.join(LIKES)}")
        trees = {path: self._trees(path) for path in paths}
        names = {path: {leaf.path for tree in found for leaf in _leaves(tree)} for path, found in trees.items()}
        wanted = _wanted(names, boxes or {})
        data: dict[str, list[Array]] = {}
        if wanted:
            data = self._read(lambda pool: fetch_boxes(self._vault, self.manifest, wanted, pool, progress))
        built, unused = {}, set(wanted)
        for path, found in trees.items():
            own = {name: _held(data[name], wanted[name], copied=name not in unused) for name in names[path]}
            unused -= names[path]
            built[path] = reduce(_merge, [_build(tree, own, KEPT if path in kept else like, types) for tree in found])
        return built

    def leaves(self) -> list[Leaf]:
        """Every leaf of every rank that is still there; one of several ranks once."""
        found: dict[str, Leaf] = {}
        for view in self.manifest.views:
            for leaf in view.tree.leaves:
                if not (self.thin and _is_optimizer(leaf)):
                    found.setdefault(leaf.path, leaf)
        return list(found.values())

    def arrays(self, paths: Sequence[str], progress: Progress | None = None) -> dict[str, Array]:
        """path -> the leaf there as an array, whatever else it was."""
        leaves = {leaf.path: msgspec.structs.replace(leaf, kind="array") for leaf in self.leaves()}
        data = self._read(lambda pool: fetch_leaves(self._vault, self.manifest, paths, pool, progress))
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
        return self._drawn(path, lambda leaf: np.empty(0), lambda composite: composite.parts)

    def sketch(self, path: str) -> Any:
        """The same with the leaves' descriptions in place of them, and composites as they are."""
        return self._drawn(path, lambda leaf: leaf, lambda composite: composite)

    def _drawn(self, path: str, draw: Callable[[Leaf], Any], compose: Callable[[Composite], Any]) -> Any:
        drawn = [
            unflatten(tree, lambda index: draw(tree.leaves[index]), compose)  # noqa: B023
            for tree in self._trees(path)
        ]
        return reduce(_merge, drawn)

    def verify(self, progress: Progress | None = None) -> int:
        """Reads and checks every chunk; the number of plain bytes."""
        return self._read(lambda pool: self._verify(pool, progress))

    def _verify(self, pool: Pool, progress: Progress | None) -> int:
        total = 0
        for view in self.manifest.views:
            for done in self._vault.read_chunks(view, view.there(thin=self.thin), pool):
                nbytes = sum(view.layout.chunks[index].nbytes for index in done)
                total += nbytes
                if progress is not None:
                    progress(nbytes)
        return total

    def sections(self) -> list[str]:
        """The names of what was tracked and given, without those that the run adds itself."""
        return [name for name in self.names() if name not in SECTIONS_OF_OURS]

    @property
    def base(self) -> str:
        """A checkpoint of an explicit state alone is that state; one of tracked objects is a dict of them."""
        return STATE if self.sections() == [STATE] else ""

    def _select(self, path: str) -> Tree:
        """The part of the first rank's tree.

        Raises:
            NotFound: naming the nearest paths; in an explicit state as its user calls them, who gave it no name.
        """
        try:
            return select(self.tree, path)
        except NotFound as error:
            if not self.base or not path.startswith(f"{self.base}/"):
                raise
            asked = path.removeprefix(f"{self.base}/")
            do = error.do.replace(f" {self.base}/", " ")
            raise NotFound(f"no path {asked!r} in this checkpoint", do=do) from error

    def _trees(self, path: str) -> list[Tree]:
        """The part under a path, of every rank that has one, as far as it is still there."""
        spans = [(view.tree, view.paths[path]) for view in self.manifest.views if path in view.paths]
        trees = [replace(tree, nodes=tree.nodes[start:end]) for tree, (start, end) in spans] or [self._select(path)]
        # Ranks that hold boxes of the same leaves have the same nodes: whatever the first says of them counts.
        trees = [tree for number, tree in enumerate(trees) if not number or tree.nodes != trees[0].nodes]
        if not self.thin:
            return trees
        kept = [without(tree, path, _is_optimizer, ("", STATE)) for tree in trees]
        found = [tree for tree in kept if tree is not None]
        if not found:
            raise CheckpointRetired(
                f"step {self._commit.event.step} has been thinned: its optimizer state is gone",
                where=path or self._vault.where,
                do='load its weights, for example only="model"; the newest checkpoint is kept in full',
            )
        return found

    def _read(self, read: Callable[[Pool], T]) -> T:
        """What `read` reads through the manifest: from its beginning again, where the bytes are moved meanwhile."""
        with closing(self._vault.seam.pool(self._vault.settings.workers, "everystep-read")) as pool:
            while True:
                try:
                    return read(pool)
                except ObjectMissing as error:
                    moved = _moved(self._vault, self._commit, error, thin=self.thin)
                again = open_checkpoint(self._vault, moved)
                self._commit, views = again._commit, again.manifest.views
                mine = tuple(view for view in views if self._rank in (None, view.rank))
                self.manifest = replace(again.manifest, views=mine)


def _wanted(names: Mapping[str, set[str]], boxes: Mapping[str, Boxes]) -> dict[str, Sequence[Box] | None]:
    """Leaf -> the boxes that are wanted of it; None where anybody wants all of it."""
    wanted: dict[str, Sequence[Box] | None] = {}
    for path, own in names.items():
        for name in own:
            mine = boxes[path].get(name) if path in boxes else None
            others = wanted.get(name, ())
            wanted[name] = None if mine is None or others is None else tuple(dict.fromkeys((*others, *mine)))
    return wanted


def _held(arrays: list[Array], boxes: Sequence[Box] | None, *, copied: bool) -> Held:
    arrays = [array.copy() for array in arrays] if copied else arrays
    return arrays[0] if boxes is None else dict(zip(boxes, arrays))


def _leaves(tree: Tree) -> Iterator[Leaf]:
    for node in tree.nodes:
        if node[0] == "leaf":
            if type(node[1]) is not int or not 0 <= node[1] < len(tree.leaves):
                raise Damaged("a node points outside its table", do="run fsck")
            yield tree.leaves[node[1]]


def _is_optimizer(leaf: Leaf) -> bool:
    return leaf.role == OPTIMIZER


def open_checkpoint(vault: RunVault, commit: Committed) -> Opened:
    """Reads and verifies a checkpoint's manifest.

    Raises:
        CheckpointRetired, Damaged: accordingly.
    """
    while True:
        try:
            manifest, history = vault.opened(commit)
            return Opened(vault, commit, manifest, thin=commit.event.id in history.thin)
        except ObjectMissing as error:
            commit = _moved(vault, commit, error)


def read_attachment(vault: RunVault, attached: Attach) -> bytes:
    """The bytes of an attached file."""
    while True:
        try:
            return vault.read_pages(attached.where, f"{vault.where} attachment {attached.name}")
        except ObjectMissing:
            now = vault.history().attachments.get(attached.name)
            if now is None or now == attached:
                raise
            attached = now


def _moved(vault: RunVault, commit: Committed, error: ObjectMissing, *, thin: bool = True) -> Committed:
    """A pack is missing: the checkpoint as it lies now, if its bytes were moved meanwhile.

    Raises:
        CheckpointRetired: if what is missing was dropped.
        Damaged: otherwise.
    """
    history, event = vault.history(), commit.event
    now = history.commits.get(event.id)
    if now is not None and now.event.root != event.root:
        return now
    if event.id not in history.live or (event.id in history.thin and not thin):
        what = "thinned: its optimizer state is gone" if event.id in history.live else "dropped"
        raise CheckpointRetired(
            f"the checkpoint of step {event.step} has been {what}",
            where=vault.where,
            do="list what is kept: everystep log",
        ) from error
    raise Damaged(f"the checkpoint of step {event.step} has lost a file", where=error.where, do="run fsck") from error


def _build(tree: Tree, data: dict[str, Held], like: str, types: Sequence[type]) -> Any:
    made: dict[int, Any] = {}

    def leaf(index: int) -> Any:
        """Two names of one leaf get one object."""
        if index not in made:
            made[index] = _leaf(tree.leaves[index], data[tree.leaves[index].path], like)
        return made[index]

    def compose(composite: Composite) -> Any:
        if like in ("numpy", KEPT):
            return composite.parts if like == "numpy" else composite
        return adapters.compose(composite)

    return unflatten(tree, leaf, compose, types)


def _leaf(leaf: Leaf, data: Held, like: str) -> Any:
    if isinstance(data, dict):
        of_box = {box: msgspec.structs.replace(leaf, shape=box.shape, boxes=()) for box in data}
        return adapters.Boxed(leaf, {box: _leaf(of_box[box], array, like) for box, array in data.items()})
    build: Callable[[Leaf, Array], Any]
    if leaf.kind in ("bytes", "str"):
        return numpy_adapter.build(leaf, data)
    if like == KEPT:
        return adapters.Kept(leaf, data)
    if like in _LIKES:
        build = adapters.adapter_for_kind(_LIKES[like]).build
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
