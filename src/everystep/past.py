"""A run to read: its checkpoints, tags, metrics and configuration. Reading never takes the run over."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any

from everystep.checkpoint import Checkpoint
from everystep.errors import Damaged, DamageWarning, NotFound
from everystep.restore import read_attachment
from everystep.rules import better, mode_of
from everystep.schema import plain
from everystep.vault import Committed, History, Place, RunVault
from everystep.vault.record import Note, Tag


class PastRun:
    """What a run has kept."""

    def __init__(self, place: Place, name: str) -> None:
        self._vault = RunVault(place, name)
        self.name = name

    def __repr__(self) -> str:
        return f"<run {self.name!r} in {self._vault.storage.url}>"

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
        mode = mode_of(metric, mode)
        history = self._history()
        found: tuple[float, Committed] | None = None
        for commit in history.line():
            value = history.metrics_of(commit.event.id).get(metric)
            if isinstance(value, (int, float)) and better(float(value), found[0] if found else None, mode):
                found = float(value), commit
        if found is None:
            names = {name for id in history.live for name in history.metrics_of(id)}
            near = difflib.get_close_matches(metric, names, 3) or sorted(names)[:5]
            raise self._missing(history, f"no checkpoint with a metric {metric!r}", near)
        self._warn_damage(history)
        return self._checkpoint(found[1])

    def tagged(self, name: str) -> Checkpoint:
        """The checkpoint with a tag.

        Raises:
            NotFound: naming the tags there are.
        """
        history = self._history()
        id = history.tags.get(name)
        if id is None or id not in history.live:
            near = difflib.get_close_matches(name, history.tags, 3) or sorted(history.tags)[:5]
            raise self._missing(history, f"no tag {name!r}", near)
        return self._checkpoint(history.commits[id])

    def find(self, spec: str) -> Checkpoint:
        """The checkpoint for what stands behind `@` on a command line: a step, latest, best:METRIC, a tag, an id."""
        if spec == "latest":
            latest = self.latest
            if latest is None:
                raise NotFound("the run has no checkpoint yet", where=self.name)
            return latest
        if spec.isdigit():
            return self.at(int(spec))
        if spec.startswith("best:"):
            return self.best(*spec[5:].split(":", 1))
        history = self._history()
        found = [id for id in history.live if len(spec) >= 4 and id.startswith(spec)]
        return self._checkpoint(history.commits[found[0]]) if len(found) == 1 else self.tagged(spec)

    def untag(self, name: str) -> None:
        """Takes a tag away."""
        self.tagged(name)
        self._append(lambda history: [Tag(name, None)] if name in history.tags else None)

    def note(self, text: str) -> None:
        """Adds a note to the run. Never takes it over."""
        self._append(lambda history: [Note(text)])

    @property
    def notes(self) -> list[str]:
        return [text for _, text in self._history().notes]

    @property
    def tags(self) -> dict[str, Checkpoint]:
        history = self._history()
        return {
            name: self._checkpoint(history.commits[id])
            for name, id in sorted(history.tags.items())
            if id in history.live
        }

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
        """(step, value) of a metric at every step that recorded it and was made durable, by step."""
        history = self._history()
        values = {step: row[metric] for step, row in history.series.items() if metric in row}
        for commit in history.line():
            found = history.metrics_of(commit.event.id)
            if metric in found:
                values[commit.event.step] = found[metric]
        return sorted(values.items())

    def sessions(self) -> list[dict[str, Any]]:
        """Each time a process took the run: term, host, pid, environment, and the checkpoint it continued from."""
        return [
            {"term": term, **opened.process, "continues": opened.continues, "environment": opened.environment}
            for term, opened in sorted(self._history().opened.items())
        ]

    def _history(self) -> History:
        return self._vault.history()

    def _checkpoint(self, commit: Committed) -> Checkpoint:
        return Checkpoint(self, commit)

    def _append(self, decide: Callable[[History], list[Any] | None]) -> None:
        """An event that needs no term: a tag, a note, a late metric."""
        process = self._vault.seam.process()
        self._vault.log.append(decide, f"{process.host}:{process.pid}")

    def _missing(self, history: History, what: str, near: list[Any]) -> NotFound | Damaged:
        if history.damaged:
            return Damaged(
                f"{what} in what is readable, and {_records(list(history.damaged))} of the log cannot be read",
                where=self._vault.where,
                do="run fsck to see what is damaged",
            )
        hint = f"nearest: {', '.join(str(n) for n in near)}" if near else "the run has none yet"
        return NotFound(f"{what} in run {self.name!r}", where=self._vault.where, do=hint)

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
