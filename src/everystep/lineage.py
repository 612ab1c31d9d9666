"""Where a run goes on from: back on purpose along its own line, or warm from another run's checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from everystep.checkpoint import Checkpoint
from everystep.errors import CheckpointRetired, Damaged, NotFound, SaveAbandoned, UsageError
from everystep.past import PastRun
from everystep.save.commit import check_fence, pause_seconds
from everystep.vault import Committed, History, Place, RunVault, Term
from everystep.vault.record import Rewind


def find_origin(place: Place, source: str | Checkpoint) -> Checkpoint:
    """The checkpoint that "other@best" names, of another run in the same repository.

    Raises:
        UsageError: if it names no run and checkpoint.
        NotFound: naming what is near.
    """
    if isinstance(source, Checkpoint):
        return source
    name, mark, spec = source.rpartition("@") if isinstance(source, str) else ("", "", "")
    if not (name and mark and spec):
        raise UsageError(f"{source!r} does not say which checkpoint", do='"other@best", "other@1200", or a Checkpoint')
    runs = sorted(place.runs()) if place.exists else []
    if name not in runs:
        near = difflib.get_close_matches(name, runs, 3) or runs[:5]
        raise NotFound(
            f"no run {name!r}",
            where=place.storage.url,
            do=f"runs here: {', '.join(near)}" if near else "check the name",
        )
    return PastRun(place, name).find(spec)


def chosen(tracked: Mapping[str, Any], only: str | Iterable[str] | None) -> dict[str, Any]:
    """The tracked objects that are to be filled.

    Raises:
        UsageError: for a name that is not tracked, or if nothing is.
    """
    names = list(tracked) if only is None else [only] if isinstance(only, str) else list(only)
    unknown = [name for name in names if name not in tracked]
    if unknown or not names:
        raise UsageError(
            f"{', '.join(map(repr, unknown)) or 'nothing'} is tracked",
            do=f"tracked: {', '.join(tracked)}" if tracked else "run.track(model=…) before start_from()",
        )
    return {name: tracked[name] for name in names}


def check_whole(history: History, checkpoint: Checkpoint, where: str) -> Committed:
    """The commit to go back to.

    Raises:
        NotFound: if it is not one of this run.
        CheckpointRetired: if it was dropped, or thinned to its weights.
    """
    commit = history.commits.get(checkpoint.id)
    if commit is None:
        raise NotFound(f"{checkpoint!r} is not a checkpoint of this run", where=where, do="start_from() takes others'")
    if commit.event.id not in history.live or commit.event.id in history.thin:
        gone = "its optimizer state has been dropped" if commit.event.id in history.live else "it has been dropped"
        raise CheckpointRetired(
            f"cannot go back to step {checkpoint.step}: {gone}",
            where=where,
            do="undo() brings back what was dropped last; start_from() begins a new run with its weights",
        )
    return commit


def check_alone(rank: int, ranks: int, step: int, error: Damaged) -> None:
    """
    Raises:
        Damaged: of several ranks none goes back alone: what the others read of the checkpoint may be whole.
    """
    if ranks > 1:
        raise Damaged(
            f"the checkpoint of step {step} is damaged where rank {rank} reads it: {error.what}",
            where=error.where,
            do="run fsck to see which are whole, and go back to one of them on every rank: rewind(STEP)",
        ) from error


def write_rewind(vault: RunVault, term: Term, commit: Committed, author: str, *, first: bool) -> None:
    """Makes a checkpoint the tip of the run; other ranks than the first wait until it is.

    Raises:
        RunTakenOver: if another process has taken the run.
        SaveAbandoned: if the first rank did not go back in time.
    """
    id = commit.event.id

    def decide(history: History) -> list[Any] | None:
        check_fence(history, term, vault.where)
        return [Rewind(id)] if history.latest is None or history.latest.event.id != id else None

    if first:
        vault.log.append(decide, author)
        return
    begun = vault.seam.monotonic()
    while True:
        history = vault.history()
        if history.latest is not None and history.latest.event.id == id:
            return
        waited = vault.seam.monotonic() - begun
        if waited > vault.settings.rank_deadline_seconds:
            raise SaveAbandoned(
                f"rank 0 did not go back to step {commit.event.step} in time",
                where=vault.where,
                do="call rewind() on every rank",
            )
        others = history.owner.ranks - 1 if history.owner is not None else 1
        vault.seam.sleep(pause_seconds(vault, waited, term.writer, others))
