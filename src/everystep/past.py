"""A run to read: its checkpoints, tags, metrics and configuration. Reading never takes the run over."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from everystep.asking import ask, rank
from everystep.checkpoint import Checkpoint, versions_of
from everystep.errors import Damaged, DamageWarning, NotFound, UsageError
from everystep.keeping import forget
from everystep.restore import read_attachment
from everystep.rules import Rule, better, check_rule, known_mode, mode_of
from everystep.schema import plain
from everystep.schema.plain import check_text
from everystep.seam import Process
from everystep.upkeep import (
    Decision,
    Freed,
    Lag,
    Repacked,
    RunStats,
    bring_back,
    can_return,
    collect,
    measure_run,
    repack,
)
from everystep.vault import Committed, History, Place, RunVault
from everystep.vault.record import Note, Tag

_SPECS = "a step, latest, best:METRIC, best:METRIC:max, a tag, the beginning of an id"


class PastRun:
    """What a run has kept."""

    def __init__(self, place: Place, name: str) -> None:
        self._vault = RunVault(place, name)
        self.name = name

    def __repr__(self) -> str:
        return f"<run {self.name!r} in {self._vault.storage.url}>"

    @property
    def lag(self) -> Lag | None:
        """What the place behind has not got yet; None where the repository was opened without one."""
        return None

    @property
    def latest(self) -> Checkpoint | None:
        """The newest durable checkpoint; None in an empty run.

        Raises:
            Damaged: if a record behind it cannot be read: that may have been a newer one.
        """
        history = self._history()
        if history.damage_behind_latest:
            step = f"; the newest readable one is step {history.latest.event.step}" if history.latest else ""
            raise Damaged(
                f"{_records(history.damage_behind_latest)} of the log cannot be read, and may have been a newer "
                f"checkpoint{step}",
                where=self._vault.where,
                do="run fsck; at(step) loads what is readable, and resume() goes on from the newest such",
            )
        return self._checkpoint(history.latest) if history.latest else None

    def holding(self) -> AbstractContextManager[None]:
        """Within it, the run is seen as it was when it began: many questions, one look at the log. To read only."""
        return self._vault.holding()

    def checkpoints(self, *, all: bool = False) -> list[Checkpoint]:
        """The checkpoints of the current line, oldest first; with `all`, of every line, in the order of saving."""
        history = self._history()
        self._warn_damage(history)
        commits = [history.commits[id] for id in history.live] if all else history.line()
        return [self._checkpoint(commit) for commit in commits]

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step: on the current line, or else the newest of that step on another.

        Raises:
            NotFound: naming the nearest steps.
        """
        history = self._history()
        for commits in (history.line(), [history.commits[id] for id in history.live]):
            for commit in reversed(commits):
                if commit.event.step == step:
                    if any(slot > commit.slot for slot in history.damaged):
                        self._warn_damage(history)  # one of them may have been the same step, saved again
                    return self._checkpoint(commit)
        steps = sorted({history.commits[id].event.step for id in history.live}, key=lambda s: (abs(s - step), s))
        raise self._missing(history, f"no checkpoint of step {step}", steps[:3])

    def best(self, metric: str, mode: str | None = None) -> Checkpoint:
        """The checkpoint with the best value of a metric at exactly its step; the earlier one of equals.

        Args:
            mode: "min" or "max"; needed where the metric's name does not say.

        Raises:
            NotFound: if no checkpoint has the metric, naming those there are.
        """
        history = self._history()
        values = [(commit, history.metrics_of(commit.event.id).get(metric)) for commit in history.line()]
        numbers = [(float(value), commit) for commit, value in values if isinstance(value, (int, float))]
        if numbers or mode is not None:
            mode = mode_of(metric, mode)
        found: tuple[float, Committed] | None = None
        for value, commit in numbers:
            if better(value, found[0] if found else None, str(mode)):
                found = value, commit
        if found is None:
            raise self._no_metric(history, metric)
        self._warn_damage(history)
        return self._checkpoint(found[1])

    def query(self, condition: str, *, all: bool = False) -> list[Checkpoint]:
        """Checkpoints of the current line (with `all`, of every line) that meet a condition, by step.

        `val_loss < 0.3 and step > 500`, `tag == "best" or not lr >= 1e-3`: names are metrics, or step, time, term, id,
        parent, reason, thin, raw_bytes, stored_bytes, stall_seconds, tag. A checkpoint without a metric never meets a
        comparison of it.

        Raises:
            UsageError: for what is no condition, or a metric that no checkpoint has, naming near ones.
        """
        history = self._history()
        self._warn_damage(history)
        wanted = None if all else {commit.event.id for commit in history.line()}
        found = ask(self._vault, history, condition)
        return [self._checkpoint(history.commits[id]) for id in found if wanted is None or id in wanted]

    def ranking(self, metric: str, mode: str | None = None, *, limit: int = 10) -> list[Checkpoint]:
        """The checkpoints of every line with the best values of a metric, best first; the earlier of equals first.

        Args:
            mode: "min" or "max"; needed where the metric's name does not say.

        Raises:
            NotFound: if no checkpoint has the metric, naming those there are.
        """
        mode = mode_of(metric, mode)
        history = self._history()
        found = rank(self._vault, history, metric, mode, limit)
        if not found:
            raise self._no_metric(history, metric)
        self._warn_damage(history)
        return [self._checkpoint(history.commits[id]) for id in found]

    def tagged(self, name: str) -> Checkpoint:
        """The checkpoint with a tag; of a name with versions (`best_model_v1` …), the newest version.

        Raises:
            NotFound: naming the tags there are.
        """
        history = self._history()
        id = self._holder(history, name)
        if id is None:
            near = difflib.get_close_matches(name, history.tags, 3) or sorted(history.tags)[:5]
            raise self._missing(history, f"no tag {name!r}", near)
        self._warn_damage(history)  # a record that cannot be read may have moved it
        return self._checkpoint(history.commits[id])

    def _holder(self, history: History, name: str) -> str | None:
        """The live checkpoint that a tag, or the newest version of a name, is on."""
        live = {tag: id for tag, id in history.tags.items() if id in history.live}
        newest = max(versions_of(name, live), default=0)
        return live.get(name) or live.get(f"{name}_v{newest}")

    def versions(self, name: str) -> dict[int, Checkpoint]:
        """The versions of a name that `tag_version` gave, by number."""
        history = self._history()
        live = {tag: id for tag, id in history.tags.items() if id in history.live}
        return {n: self._checkpoint(history.commits[live[f"{name}_v{n}"]]) for n in versions_of(name, live)}

    def find(self, spec: str) -> Checkpoint:
        """The checkpoint for what stands behind `@` on a command line: a step, latest, best:METRIC, a tag, an id.

        Args:
            spec: "1200", "latest", "best:val_loss", "best:val_loss:max", a tag, or 4 or more digits of an id.

        Raises:
            UsageError: if it is none of these.
            NotFound: naming what is near.
        """
        if spec == "latest":
            latest = self.latest
            if latest is None:
                raise NotFound("the run has no checkpoint yet", where=self.name)
            return latest
        if spec == "best" and (metric := self._only_metric()) is not None:
            return self.best(metric)
        if spec in ("", "best", "best:"):
            raise UsageError(
                f"{spec!r} does not say which checkpoint", where=f"{self.name}@{spec}", do=f"one of {_SPECS}"
            )
        if spec.startswith("best:"):
            return self._find_best(spec)
        history = self._history()
        if self._holder(history, spec) is not None:
            return self.tagged(spec)
        is_step = spec.isascii() and spec.isdigit() and len(spec) < 19
        if is_step and any(history.commits[id].event.step == int(spec) for id in history.live):
            return self.at(int(spec))
        found = [id for id in history.live if len(spec) >= 4 and id.startswith(spec)]
        if len(found) > 1:
            raise UsageError(
                f"{len(found)} checkpoints have an id that begins with {spec!r}",
                where=self.name,
                do=f"give more of it: {', '.join(found[:3])}",
            )
        if found:
            return self._checkpoint(history.commits[found[0]])
        if is_step:
            return self.at(int(spec))
        near = difflib.get_close_matches(spec, history.tags, 3) or sorted(history.tags)[:5]
        tags = f"; tags here: {', '.join(near)}" if near else ""
        raise self._missing(history, f"no checkpoint {spec!r}", do=f"one of {_SPECS}{tags}")

    def _only_metric(self) -> str | None:
        """The one metric of the checkpoints of which it is known which way is better; of several, what validates."""
        history = self._history()
        names = {name for commit in history.line() for name in history.metrics_of(commit.event.id)}
        known = [name for name in names if known_mode(name) is not None]
        validating = [name for name in known if re.match(r"val|eval|test", name)]
        for found in (validating, known):
            if len(found) == 1:
                return found[0]
        return None

    def _find_best(self, spec: str) -> Checkpoint:
        metric, _, mode = spec.removeprefix("best:").partition(":")
        try:
            return self.best(metric, mode or None)
        except UsageError as error:
            do = f"{self.name}@best:{metric}:min or {self.name}@best:{metric}:max"
            raise UsageError(error.what, where=f"{self.name}@{spec}", do=do) from error

    def untag(self, name: str) -> None:
        """Takes a tag away."""
        self.tagged(name)
        self._append(lambda history: [Tag(name, None)] if name in history.tags else None)

    def forget(
        self,
        keep: Rule | None = None,
        keep_full: Rule | None = None,
        *,
        dry_run: bool = False,
        force: bool = False,
        undo_seconds: float | None = None,
    ) -> list[Decision]:
        """Drops what `keep` does not name, thins to its weights what `keep_full` does not; with the reason for each.

        The newest checkpoint and tagged ones always stay. What is dropped can be brought back with `undo()` for
        `undo_seconds` (default: the setting of that name), and is freed by `prune()` after that.

        Raises:
            Conflict: if more than half would go, and `force` is not given.
        """
        window = self._vault.settings.undo_seconds if undo_seconds is None else undo_seconds
        found = [check_rule(rule, "a rule of forget()") if rule is not None else None for rule in (keep, keep_full)]
        return forget(self._vault, self._vault.author, *found, dry_run=dry_run, force=force, undo_seconds=window)

    @property
    def dropped(self) -> list[Checkpoint]:
        """Checkpoints that were dropped or thinned and can be brought back, oldest first."""
        history = self._history()
        found = [history.commits[id] for id in history.commits if id in history.dropped]
        return [self._checkpoint(commit) for commit in found if can_return(history, commit.event.id)]

    def undo(self) -> list[Checkpoint]:
        """Brings back what was dropped or thinned last, all of it.

        Raises:
            NotFound: if there is nothing that can be brought back.
        """
        history = self._history()
        slots = {checkpoint.id: history.dropped[checkpoint.id].slot for checkpoint in self.dropped}
        if not slots:
            raise NotFound(
                "nothing that was dropped can be brought back", where=self._vault.where, do="look at what is kept: log"
            )
        ids = [id for id, slot in slots.items() if slot == max(slots.values())]
        bring_back(self._vault, ids, self._vault.author)
        return [self._checkpoint(history.commits[id]) for id in ids]

    def prune(self, *, now: bool = False, dry_run: bool = False) -> Freed:
        """Frees what nothing needs any more. Safe beside a process that is saving.

        Args:
            now: also what could still be brought back.
            dry_run: only say what would be freed.
        """
        freed = collect(self._vault, self._vault.author, at_once=now, rewrites=True, dry_run=dry_run)
        if not dry_run:
            self._vault.place.sweep()
        return freed

    def repack(self, *, dead: float = 0.5, progress: Callable[[int, int], None] | None = None) -> Repacked:
        """Empties packs that are mostly dead, and frees them. Safe beside a process that is saving.

        A pack is freed as a whole: a frozen leaf, or a base that a later checkpoint leans on, holds all that lies
        beside it. What is needed of such a pack is copied to new packs, for which there must be room first. All that
        is kept, or can be brought back, stays as it is.

        Args:
            dead: a pack is emptied if more than this share of it is needed by nothing.
            progress: told (bytes copied, bytes in all).

        Raises:
            Damaged: if something that would be copied is not what was saved. Nothing is moved then.
        """
        return repack(self._vault, self._vault.author, dead, progress)

    def stats(self, progress: Callable[[int, int], None] | None = None) -> RunStats:
        """What the run takes up: bytes as saved and as stored, by role and by codec. Reads manifests only.

        Args:
            progress: told (checkpoints done, checkpoints in all).
        """
        return measure_run(self._vault, progress)

    def note(self, text: str) -> None:
        """Adds a note to the run. Never takes it over."""
        check_text(text, "a note")
        self._append(lambda history: [Note(text)])

    @property
    def notes(self) -> list[str]:
        """Of the run; those of a checkpoint are its own."""
        return [text for id, text in self._history().notes if id is None]

    @property
    def tags(self) -> dict[str, Checkpoint]:
        history = self._history()
        return {
            name: self._checkpoint(history.commits[id])
            for name, id in sorted(history.tags.items())
            if id in history.live
        }

    def parents(self) -> dict[str, str | None]:
        """Id of every checkpoint, in the order of saving -> that of the nearest one still kept that it continues from.

        None for what has none before it.
        """
        history = self._history()
        return {id: history.continues(id) for id in history.live}

    @property
    def origins(self) -> list[dict[str, Any]]:
        """The other runs' checkpoints that this run began with: run, id, step, and `only` (names; empty: all)."""
        return [msgspec.structs.asdict(origin) for origin in self._history().origins]

    @property
    def config(self) -> Any:
        """The run's configuration."""
        return {name: plain.decode(value) for name, value in self._history().config.items()}

    @property
    def attachments(self) -> list[str]:
        """Names of attached files."""
        return sorted(self._history().attachments)

    def attachment(self, name: str) -> bytes:
        """The bytes of an attached file.

        Raises:
            NotFound: naming those there are.
        """
        history = self._history()
        if name not in history.attachments:
            raise self._missing(history, f"no attachment {name!r}", sorted(history.attachments)[:5])
        return read_attachment(self._vault, history.attachments[name])

    def series(self, metric: str) -> list[tuple[int, Any]]:
        """(step, value) of a metric at every step that recorded it and was made durable, by step.

        A checkpoint that was dropped leaves its metrics behind.
        """
        history = self._history()
        values = {step: row[metric] for step, row in history.series.items() if metric in row}
        for commit in history.ancestry():
            found = history.metrics_of(commit.event.id)
            if metric in found:
                values[commit.event.step] = found[metric]
        return sorted(values.items())

    @property
    def metric_names(self) -> list[str]:
        """Names of all metrics, of checkpoints and of the steps between them."""
        history = self._history()
        rows = [*map(history.metrics_of, history.commits), *history.series.values()]
        return sorted({name for row in rows for name in row})

    def sessions(self) -> list[dict[str, Any]]:
        """Each time a process took the run: term, host, pid, environment, and the checkpoint it continued from.

        `opened` and `closed` are seconds since the epoch. `ended` is "closed", "taken over", "died" (another came, or
        the process is known to be gone, and it had not closed the run), or None while it may still be writing.
        """
        history = self._history()
        return [
            {
                **opened.process,
                "term": term,
                "reason": opened.reason,
                "ranks": opened.ranks,
                "continues": opened.continues,
                "environment": opened.environment,
                "opened": history.opened_at[term],
                "closed": history.closed_at.get(term),
                "ended": self._ended(history, term),
            }
            for term, opened in sorted(history.opened.items())
        ]

    def _ended(self, history: History, term: int) -> str | None:
        if term in history.closed_at:
            return "closed"
        after = [later for later in history.opened if later > term]
        if after:
            return "taken over" if history.opened[min(after)].reason == "takeover" else "died"
        try:
            process = msgspec.convert(history.opened[term].process, Process)
        except msgspec.ValidationError:
            return None  # written by another everystep: nothing is known of that process
        return "died" if self._vault.seam.is_gone(process) else None

    def _history(self) -> History:
        return self._vault.history()

    def _checkpoint(self, commit: Committed) -> Checkpoint:
        return Checkpoint(self._vault, commit)

    def _append(self, decide: Callable[[History], list[Any] | None]) -> None:
        """An event that needs no term: a tag, a note, a late metric."""
        self._vault.log.append(decide, self._vault.author)

    def _no_metric(self, history: History, metric: str) -> NotFound | Damaged:
        names = {name for id in history.live for name in history.metrics_of(id)}
        near = difflib.get_close_matches(metric, names, 3) or sorted(names)[:5]
        return self._missing(history, f"no checkpoint with a metric {metric!r}", near)

    def _missing(self, history: History, what: str, near: Sequence[Any] = (), *, do: str = "") -> NotFound | Damaged:
        if history.damaged:
            return Damaged(
                f"{what} in what is readable, and {_records(list(history.damaged))} of the log cannot be read",
                where=self._vault.where,
                do="run fsck to see what is damaged",
            )
        hint = f"nearest: {', '.join(str(n) for n in near)}" if near else "the run has none yet"
        return NotFound(f"{what} in run {self.name!r}", where=self._vault.where, do=do or hint)

    def _warn_damage(self, history: History) -> None:
        if history.damaged:
            warnings.warn(
                f"{_records(list(history.damaged))} of run {self.name!r} cannot be read and left out; run fsck",
                DamageWarning,
                stacklevel=3,
            )


def _records(slots: list[int]) -> str:
    shown = ", ".join(str(slot) for slot in slots[:5])
    return f"record{'s' if len(slots) > 1 else ''} {shown}{' and more' if len(slots) > 5 else ''}"
