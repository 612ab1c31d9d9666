"""One kept moment of a run: look at it, load it, name it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from everystep import adapters
from everystep.analysis import LeafSummary, summarize
from everystep.difference import Difference, Side, batches, compare
from everystep.errors import CheckpointRetired, Conflict, EverystepWarning, Mismatch, UsageError
from everystep.exchange import Written, export
from everystep.metrics import plain_metrics
from everystep.restore import (
    KEPT,
    SECTIONS_OF_OURS,
    STATE,
    WORKER,
    Opened,
    open_checkpoint,
    place_tracked,
    read_attachment,
)
from everystep.restore.fetch import Progress
from everystep.schema import Leaf, paths_of
from everystep.schema.plain import check_text, decode
from everystep.vault import Committed, History, RunVault
from everystep.vault.record import Metrics, Note, Tag
from everystep.workers import workers_of

RNG, LOOP, _ = SECTIONS_OF_OURS
RESERVED = (STATE, *SECTIONS_OF_OURS)


class Checkpoint:
    """Immutable. Made by a run; reading it verifies every byte that is asked for."""

    def __init__(self, vault: RunVault, commit: Committed) -> None:
        self._vault, self._commit = vault, commit
        self._opened: Opened | None = None

    def __repr__(self) -> str:
        return f"<Checkpoint {self._vault.name}@{self.step} {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def id(self) -> str:
        return self._commit.event.id

    @property
    def run(self) -> str:
        """Name of its run."""
        return self._vault.name

    @property
    def step(self) -> int:
        """The state is the one after this many completed updates."""
        return self._commit.event.step

    @property
    def parent(self) -> str | None:
        """Id of the checkpoint that this one continues from."""
        return self._commit.event.parent

    @property
    def time(self) -> float:
        """Seconds since the epoch, by the writer's clock."""
        return self._commit.time

    @property
    def reason(self) -> str:
        """Why it was saved."""
        return self._commit.event.reason

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of exactly this step: those given at the save, and later ones."""
        return self._vault.history().metrics_of(self.id)

    @property
    def tags(self) -> list[str]:
        return sorted(name for name, id in self._vault.history().tags.items() if id == self.id)

    @property
    def thin(self) -> bool:
        """Whether its optimizer state has been dropped."""
        return self.id in self._vault.history().thin

    @property
    def cost(self) -> dict[str, float]:
        """Seconds of stall, queue, encode and write; bytes of the state, and bytes newly stored for it."""
        cost = self._commit.event.cost
        return {name: getattr(cost, name) for name in cost.__struct_fields__}

    @property
    def environment(self) -> dict[str, Any]:
        """Fingerprint of the process that saved it."""
        opened = self._vault.history().opened.get(self._commit.term)
        return dict(opened.environment) if opened is not None else {}

    @property
    def term(self) -> int:
        """The term that saved it; `run.sessions()` says which process that was."""
        return self._commit.term

    @property
    def ranks(self) -> int:
        """How many processes saved it together."""
        return self._commit.event.ranks

    @property
    def workers(self) -> list[dict[str, Any]]:
        """What each worker recorded of itself before this save, by rank: `rank`, `host`, and its metrics.

        A worker that recorded nothing with `run.record(worker=True, …)` is not listed.
        """
        return workers_of(self._open())

    def leaves(self) -> list[Leaf]:
        """Every leaf of every rank: path, dtype, shape, role, bytes. Reads the manifest only.

        The paths are those that `load(only=…)` takes.
        """
        opened = self._open()
        base = opened.base
        return [msgspec.structs.replace(leaf, path=_above(base, leaf.path)) for leaf in opened.leaves()]

    def load(
        self,
        *,
        only: str | Sequence[str] | None = None,
        into: Mapping[str, Any] | None = None,
        strict: bool = True,
        like: Any = "numpy",
        types: Sequence[type] = (),
        progress: Progress | None = None,
    ) -> Any:
        """The state as nested arrays; or, with `into`, live objects filled in place and a LoadReport.

        Args:
            only: a path ("model", "model/fc.weight") for that part alone, or several for a dict of them.
            into: name -> object, as given to `track`.
            strict: with `into` or a template: a misfit is an error and changes nothing.
            like: "numpy", "torch", "tensorflow", "jax", or "saved" for what each leaf was. Or a template: a pytree of
                JAX, whose classes, shapes, types and shardings what is loaded gets; jax.ShapeDtypeStruct may stand for
                arrays. With several paths in `only`, a dict of templates.
            types: classes of named tuples and dataclasses in the state; others come back as mappings.
            progress: told the number of bytes as they come in.

        Raises:
            NotFound, Mismatch, Damaged, CheckpointRetired: accordingly.
        """
        opened = self._open()
        if into is not None:
            if only is not None:
                raise UsageError("only= and into= say the same thing twice", do="leave only= out")
            where = f"{self._vault.name}@{self.step}"
            base = opened.base
            return place_tracked(opened, into, strict=strict, whole=False, where=where, base=base, progress=progress)
        if not isinstance(like, str):
            return self._load_like(like, only, strict, progress)
        inside = _inside(opened, only)
        built = opened.build_all(list(inside.values()), like=like, types=types, progress=progress)
        return _as_asked(opened, only, {path: built[inside[path]] for path in inside})

    def summarize(self, *, only: str | None = None, progress: Progress | None = None) -> dict[str, LeafSummary | None]:
        """Norm, mean, range and what is not finite of every leaf, by path; None for leaves that hold no numbers.

        Args:
            only: a path: the part of the state to look at.
            progress: told the number of bytes as they come in.

        Raises:
            NotFound: if `only` is a path that it does not have.
        """
        side = self._side()
        leaves = side.leaves(only)
        if not leaves:
            side.values(only)  # names the nearest paths
        found: dict[str, LeafSummary | None] = {}
        for batch in batches({path: leaf.nbytes for path, leaf in leaves.items()}):
            arrays = side.opened.arrays([leaves[path].path for path in batch], progress)
            found.update({path: summarize(arrays[leaves[path].path]) for path in batch})
        return found

    def export(
        self,
        path: str,
        *,
        only: str | None = None,
        format: str | None = None,
        overwrite: bool = False,
        max_shard_size: int | str | None = None,
        progress: Progress | None = None,
    ) -> Written:
        """Writes a file for other programs; every byte is verified on the way, and the file appears whole or not.

        Args:
            path: its ending says the format: .safetensors, .pth, .npz …
            only: a part, such as "model", which becomes a flat state_dict; without it, all.
            format: if the ending does not say it.
            overwrite: replace a file that is there.
            max_shard_size: bytes, or text such as "5GB": a larger .safetensors file becomes shards with an index.
            progress: told the number of bytes as they come in.

        Returns:
            What was written, and what has another form in the file.

        Raises:
            UsageError, Conflict, NotFound, Unsupported: accordingly; what was there before is untouched.
        """
        return export(
            self._open(), path, only=only, format=format, overwrite=overwrite, max_shard_size=max_shard_size,
            step=self.step, metrics=self.metrics, progress=progress, attachment=self._attachment,
            seam=self._vault.seam,
        )  # fmt: skip

    def _attachment(self, name: str) -> bytes | None:
        """A file that is attached to the run, if there is one of this name."""
        found = self._vault.history().attachments.get(name)
        return None if found is None else read_attachment(self._vault, found)

    def verify(self, progress: Progress | None = None) -> int:
        """Reads and checks every byte; the number of bytes.

        Raises:
            Damaged: if one is not what was saved.
        """
        return self._open().verify(progress)

    def tag(self, name: str, *, move: bool = False) -> Checkpoint:
        """Names this checkpoint. Never takes the run over.

        Raises:
            Conflict: if another checkpoint has the name; `move=True` moves it.
            CheckpointRetired: if it has been dropped.
        """
        check_tag(name)

        def decide(history: History) -> list[Any] | None:
            self._check_live(history)
            holder = history.tags.get(name)
            if holder == self.id:
                return None
            if holder is not None and holder in history.commits and not move:
                step = history.commits[holder].event.step
                raise Conflict(
                    f"the tag {name!r} is on step {step}",
                    where=self._vault.name,
                    do="choose another name, or pass move=True to move it here",
                )
            return [Tag(name, self.id)]

        self._append(decide)
        return self

    def tag_version(self, name: str) -> str:
        """Tags this checkpoint as the next version of a name: `best_model_v1`, then `best_model_v2`, and so on.

        A number is never used twice, even if its tag was taken away. A checkpoint that is the newest version already
        stays that.

        Returns:
            The tag.

        Raises:
            CheckpointRetired: if it has been dropped.
        """
        check_tag(name)
        found: list[str] = []

        def decide(history: History) -> list[Any] | None:
            self._check_live(history)
            newest = max(versions_of(name, history.tags_ever), default=0)
            if newest and history.tags.get(f"{name}_v{newest}") == self.id:
                found[:] = [f"{name}_v{newest}"]
                return None
            found[:] = [f"{name}_v{newest + 1}"]
            return [Tag(found[0], self.id)]

        self._append(decide)
        return found[0]

    def note(self, text: str) -> Checkpoint:
        """Adds a note to this checkpoint. Never takes the run over."""
        check_text(text, "a note")
        self._append(lambda history: [Note(text, self.id)])
        return self

    @property
    def notes(self) -> list[str]:
        return [text for id, text in self._vault.history().notes if id == self.id]

    def diff(self, other: Checkpoint, *, only: str | None = None, progress: Progress | None = None) -> Difference:
        """What changed from this checkpoint to another, of this run or of any other.

        Args:
            only: a path: the part of the state to compare.
            progress: told the number of bytes as they come in. Leaves that are known to be equal are not read.
        """
        mine, theirs = self._side(), other._side()
        return compare(mine, theirs, only=only, progress=progress)

    def set_random_state(self) -> list[str]:
        """Puts this process's random number generators where they were at the save: for a loop that begins of itself,
        where `resume()` would be too early.

        Returns:
            What could not be put back, as sentences.
        """
        opened = self._open()
        return adapters.set_random_state(opened.build(RNG, like="saved") if RNG in opened.names() else {})

    def scratch_folder(self) -> AbstractContextManager[str]:
        """A new empty folder, for programs that want a checkpoint as files; leaving it removes it with all in it."""
        return self._vault.seam.scratch_folder(None)

    def _side(self) -> Side:
        opened = self._open()
        config = {name: decode(value) for name, value in self._vault.history().config.items()}
        return Side(opened, opened.base, config, self.environment, self.metrics)

    def _check_live(self, history: History) -> None:
        if self.id not in history.live:
            raise CheckpointRetired(
                f"the checkpoint of step {self.step} has been dropped",
                where=self._vault.name,
                do="tag one that is kept, or bring this one back first: undo()",
            )

    def _append(self, decide: Callable[[History], list[Any] | None]) -> None:
        self._vault.log.append(decide, self._vault.author)

    def record(self, **metrics: Any) -> Checkpoint:
        """Adds metrics that came after the save. Never takes the run over."""
        late = plain_metrics(metrics)
        self._append(lambda history: [Metrics(self.id, late)])
        return self

    def _open(self) -> Opened:
        if self._opened is None:
            self._opened = open_checkpoint(self._vault, self._commit)
        return self._opened

    def _load_like(self, like: Any, only: str | Sequence[str] | None, strict: bool, progress: Progress | None) -> Any:
        opened = self._open()
        inside = _inside(opened, only)
        sketch = _as_asked(opened, only, {path: opened.sketch(inside[path]) for path in inside})
        boxes = dict.fromkeys(inside.values(), adapters.wanted_by_template(like, sketch))
        built = opened.build_all(list(inside.values()), like=KEPT, progress=progress, boxes=boxes)
        kept = _as_asked(opened, only, {path: built[inside[path]] for path in inside})
        if only is None and type(kept) is dict and RNG in kept and not (type(like) is dict and RNG in like):
            del kept[RNG]  # ours, which nobody asks for
        made, report = adapters.rebuild(like, kept)
        if not report.complete:
            what = f"the checkpoint does not fit the template\n{report}"
            where = f"{self._vault.name}@{self.step}"
            if strict:
                do = "give a template of the same structure, shapes and types, or strict=False to keep what is in it"
                raise Mismatch(what, where=where, do=do)
            warnings.warn(f"{where}: {what}", EverystepWarning, stacklevel=3)
        return made


def _inside(opened: Opened, only: str | Sequence[str] | None) -> dict[str, str]:
    """What a load was asked for, each by its path as the caller calls it: the whole path."""
    base = opened.base
    if only is None:
        return {"": base}
    return {path: _below(opened, base, path) for path in ([only] if isinstance(only, str) else only)}


def _as_asked(opened: Opened, only: str | Sequence[str] | None, found: dict[str, Any]) -> Any:
    """What lies at the paths of `_inside`, in the form that the caller gets it in."""
    if only is not None and not isinstance(only, str):
        return found
    (one,) = found.values()
    if only is None and not opened.base:
        for name in (LOOP, WORKER):
            one.pop(name, None)
    return one


def _below(opened: Opened, base: str, path: str) -> str:
    """The whole path of a path within an explicit state; what the state itself calls "rng" comes before ours."""
    head = path.partition("/")[0]
    if not base or (head in SECTIONS_OF_OURS and all(name != f"{base}/{head}" for name, _, _ in paths_of(opened.tree))):
        return path
    return f"{base}/{path}"


def _above(base: str, path: str) -> str:
    """The inverse of `_below`."""
    return path.removeprefix(f"{base}/") if base else path


def check_tag(name: str) -> None:
    """
    Raises:
        UsageError: for a name that could not be told from a step, or that means something already.
    """
    check_text(name, "a tag", empty=True)
    if (
        not name
        or name.isdigit()
        or name == "latest"
        or name.startswith("best:")
        or "@" in name
        or not name.isprintable()
    ):
        raise UsageError(
            f"{name!r} cannot be a tag", do="use a word such as best_model_v1: not a number, not 'latest', no '@'"
        )


def versions_of(name: str, tags: Iterable[str]) -> list[int]:
    """The numbers behind a name among tags such as `best_model_v2`."""
    found = (re.fullmatch(re.escape(name) + r"_v([1-9][0-9]{0,8})", tag) for tag in tags)
    return sorted(int(match[1]) for match in found if match)
