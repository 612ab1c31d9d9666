"""What a log says beside its checkpoints, as events for the log of a copy: tags, notes, metrics, configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from everystep.schema.plain import encode_metric
from everystep.vault import History
from everystep.vault.record import Attach, Config, Copy, Metrics, Note, Rewind, Series, Tag


class Beside:
    """Compares two logs. Remembers what it found to be said, so that the next look costs little.

    Args:
        origin: answers the id of the source's repository, and what its run is called.
        follow: the target is this run's own copy: tags that are taken away go there, too, and its newest checkpoint is
            the source's whatever else lies there.
    """

    def __init__(self, origin: Callable[[], tuple[str, str]], *, follow: bool) -> None:
        self._origin, self._follow = origin, follow
        self._metrics: dict[str, Any] = {}
        self._series: dict[int, Any] = {}

    def of_checkpoint(self, source: History, target: History, id: str) -> list[Any]:
        """What was said of a checkpoint that is being committed there."""
        return [
            *_metrics(source, target, [id]),
            *_notes(source, target, {id}),
            *_tags(source, target, {id}),
            *_stays(source, target, id, follow=self._follow),
        ]

    def of_run(self, source: History, target: History, *, whole: bool, tip: bool = True) -> list[Any]:
        """What the source says and the target does not: of the run, and of checkpoints that both have.

        Args:
            whole: all that the source has kept is there, so that metrics of what it dropped belong there, too.
            tip: also which checkpoint is the newest.
        """
        there = target.commits.keys()
        late = [id for id, row in source.metrics.items() if id in there and self._metrics.get(id) is not row]
        changes = {name: value for name, value in source.config.items() if target.config.get(name, _NONE) != value}
        origins = [origin for origin in source.origins if origin not in target.origins]
        rows = {step: row for step, row in source.series.items() if self._series.get(step) is not row}
        if whole:
            rows.update(_of_dropped(source, target))
        return [
            *([Config(changes)] if changes else []),
            *origins,
            *self._gaps(source, target),
            *_series(rows, target),
            *_metrics(source, target, late),
            *_notes(source, target, {None, *there}),
            *_tags(source, target, target.live.keys()),
            *(_untag(source, target) if self._follow else []),
            *(_tip(source, target, follow=self._follow) if tip else []),
        ]

    def _gaps(self, source: History, target: History) -> Iterator[Copy]:
        """Which checkpoint is before one whose parent did not come: another, if that came later."""
        for id, commit in target.commits.items():
            if id not in source.commits or commit.event.parent is None or commit.event.parent in target.commits:
                continue
            after = source.nearest(id, target.commits)
            if after != commit.after:
                yield Copy(id, *self._origin(), commit.time, commit.author, after)

    def said(self, source: History) -> None:
        """All of that is in the target's log now."""
        self._metrics, self._series = dict(source.metrics), dict(source.series)


def files(source: History, target: History) -> list[Attach]:
    """Attached files that the target lacks, or has with another content."""
    there = {name: _content(event) for name, event in target.attachments.items()}
    return [event for name, event in source.attachments.items() if there.get(name) != _content(event)]


def _content(event: Attach) -> tuple[Any, ...]:
    return event.nbytes, *(page.blake3 for page in event.where)


_NONE = object()


def _alike(one: Any, other: Any) -> bool:
    """Two NaN are alike."""
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _new(row: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: encode_metric(value, name) for name, value in row.items() if not _alike(there.get(name, _NONE), value)
    }


def _metrics(source: History, target: History, ids: Iterable[str]) -> Iterator[Metrics]:
    for id in ids:
        changes = _new(source.metrics.get(id, {}), target.metrics.get(id, {}))
        if changes:
            yield Metrics(id, changes)


def _of_dropped(source: History, target: History) -> dict[int, dict[str, Any]]:
    """step -> metrics of checkpoints of the line that the source has dropped: they stay in its series."""
    gone = [one.event for one in source.ancestry() if one.event.id not in source.live]
    return {
        event.step: {**source.series.get(event.step, {}), **source.metrics_of(event.id)}
        for event in gone
        if event.id not in target.commits
    }


def _series(rows: Mapping[int, Mapping[str, Any]], target: History) -> Iterator[Series]:
    new = {step: _new(row, target.series.get(step, {})) for step, row in rows.items()}
    steps = sorted(step for step, row in new.items() if row)
    if steps:
        names = sorted({name for step in steps for name in new[step]})
        yield Series(steps, {name: [new[step].get(name) for step in steps] for name in names})


def _notes(source: History, target: History, of: Iterable[str | None]) -> Iterator[Note]:
    there, wanted = Counter(target.notes), set(of)
    for id, text in source.notes:
        if there[id, text] > 0:
            there[id, text] -= 1
        elif id in wanted:
            yield Note(text, id)


def _tags(source: History, target: History, live: Iterable[str]) -> Iterator[Tag]:
    """A tag that somebody gave there, to a checkpoint that the source does not know, stays where it is."""
    there = set(live)
    for name, id in source.tags.items():
        holder = target.tags.get(name)
        if id in there and holder != id and (holder is None or holder in source.commits):
            yield Tag(name, id)


def _untag(source: History, target: History) -> Iterator[Tag]:
    for name, holder in target.tags.items():
        if name in source.tags_ever and name not in source.tags and holder in source.commits:
            yield Tag(name, None)


def _tip(source: History, target: History, *, follow: bool) -> Iterator[Rewind]:
    """The newest checkpoint there is the source's newest; not where the run goes on there by itself."""
    latest = target.latest
    if latest is None or (latest.event.id not in source.commits and not follow):
        return
    shared = [id for id in source.live if id in target.live]
    tip = source.tip if source.tip in target.live else shared[-1] if shared else None
    if tip is not None and tip != latest.event.id:
        yield Rewind(tip)


def _stays(source: History, target: History, id: str, *, follow: bool) -> Iterator[Rewind]:
    """A commit makes a checkpoint the newest. What was it before stays it, in the same record, if the source does not
    know that one, or saved it later."""
    latest = target.latest
    if latest is None:
        return
    known = source.commits.get(latest.event.id)
    if (known is None and not follow) or (known is not None and known.slot > source.commits[id].slot):
        yield Rewind(latest.event.id)
