"""The state of a run as its log tells it: a pure fold over records."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import msgspec

from everystep.errors import Damaged
from everystep.schema import plain
from everystep.vault import record as events
from everystep.vault.names import PackName


@dataclass(frozen=True)
class Committed:
    """A commit event and what its record says beside it."""

    event: events.Commit
    slot: int
    term: int
    time: float
    author: str
    after: str | None = None
    """The nearest checkpoint before it that came from another repository, too, where its parent did not."""

    def needs(self, *, thin: bool = False) -> set[PackName]:
        """Packs without which it cannot be loaded; thinned, without its optimizer state."""
        packs = unroll(self.event.packs)
        return packs - unroll(self.event.optimizer) if thin else packs


@dataclass(frozen=True)
class Dropped:
    """How a checkpoint, or its optimizer state, left the live set."""

    slot: int
    reason: str
    undo_seconds: float
    was_thin: bool = False
    """It had been thinned when it was retired, and comes back so."""
    before: Dropped | None = None
    """How it had been thinned: once it is back, that can be taken back, too."""


@dataclass
class History:
    """Everything the log says, up to `slots` records; `genesis` is what the first record must chain to."""

    genesis: str
    slots: int = 0
    head: str = ""
    term: int = 0
    nonce: str = ""
    owner: events.Open | None = None
    closed: bool = True
    last_time: float = 0.0
    opened: dict[int, events.Open] = field(default_factory=dict)
    opened_at: dict[int, float] = field(default_factory=dict)
    closed_at: dict[int, float] = field(default_factory=dict)
    commits: dict[str, Committed] = field(default_factory=dict)
    live: dict[str, None] = field(default_factory=dict)
    thin: set[str] = field(default_factory=set)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Checkpoints that were retired or thinned, and what can still bring them back."""
    settled: dict[tuple[str, int], str | None] = field(default_factory=dict)
    steps: dict[tuple[str, int], int] = field(default_factory=dict)
    """Of the saves that are settled."""
    missing_ranks: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    again: set[tuple[str, int]] = field(default_factory=set)
    """Saves that all ranks write once more, under the next ordinal."""
    tags: dict[str, str] = field(default_factory=dict)
    tags_ever: set[str] = field(default_factory=set)
    """Also those that were taken away."""
    touched: dict[str, int] = field(default_factory=dict)
    """Checkpoint -> the last slot that said anything of it but a tag."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    series: dict[int, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attachments: dict[str, events.Attach] = field(default_factory=dict)
    notes: list[tuple[str | None, str]] = field(default_factory=list)
    condemned: set[PackName] = field(default_factory=set)
    ever: set[PackName] = field(default_factory=set)
    """Every pack that a checkpoint or an attachment was ever said to need."""
    tip: str | None = None
    """Where the run was rewound to, until it saves again."""
    origins: list[events.Start] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    lost: int = 0
    """How many records cannot be read: each may have opened a term."""
    stranger: str = ""
    """The first record, if it does not belong to this run and nothing shows that the others do."""

    def __post_init__(self) -> None:
        self.head = self.head or self.genesis

    def copy(self) -> History:
        """Another one that says the same; what is added to it does not show here."""
        kept = {one.name: getattr(self, one.name) for one in fields(self)}
        return History(**{name: copy(value) for name, value in kept.items()})

    @property
    def latest(self) -> Committed | None:
        """The newest live checkpoint, by the log's order; after a rewind, the one that was gone back to."""
        if self.tip in self.live:
            return self.commits[self.tip]
        return self.commits[next(reversed(self.live))] if self.live else None

    @property
    def damage_behind_latest(self) -> list[int]:
        """Damaged slots newer than the newest checkpoint: one of them may have been a newer checkpoint."""
        newest = self.latest.slot if self.latest else -1
        return [slot for slot in self.damaged if slot > newest]

    def line(self, tip: str | None = None) -> list[Committed]:
        """The live checkpoints that lead to a checkpoint (the newest, if None), oldest first."""
        return [commit for commit in self.ancestry(tip) if commit.event.id in self.live]

    def ancestry(self, tip: str | None = None) -> list[Committed]:
        """All checkpoints that led to a checkpoint (the newest, if None), those that were dropped too, oldest first."""
        at = tip if tip is not None else (self.latest.event.id if self.latest else None)
        found: list[Committed] = []
        seen: set[str] = set()
        while at is not None and at in self.commits and at not in seen:
            seen.add(at)
            found.append(self.commits[at])
            at = self._parent(at)
        return found[::-1]

    def on_line(self, steps: Collection[int]) -> dict[int, Committed]:
        """Step -> its checkpoint, of these steps on the current line."""
        if self.latest is None or not steps or min(steps) > self.latest.event.step:
            return {}
        return {commit.event.step: commit for commit in self.line() if commit.event.step in steps}

    def continues(self, id: str) -> str | None:
        """The nearest live checkpoint that one continues from; None if there is none before it."""
        return self.nearest(id, self.live)

    def nearest(self, id: str, among: Container[str]) -> str | None:
        """The nearest checkpoint, of some, that one continues from; None if there is none before it."""
        at, seen = self._parent(id), {id}
        while at is not None and at in self.commits and at not in among and at not in seen:
            seen.add(at)
            at = self._parent(at)
        return at if at is not None and at in self.commits and at in among else None

    def _parent(self, id: str) -> str | None:
        commit = self.commits[id]
        parent = commit.event.parent
        if parent is None or parent in self.commits:
            return parent
        return commit.after or self._before_gap(commit.slot)

    def _before_gap(self, slot: int) -> str | None:
        """The checkpoint before the damaged record below a slot: the likeliest parent of one that was lost in it."""
        gap = max((damaged for damaged in self.damaged if damaged < slot), default=-1)
        return next((id for id, commit in reversed(self.commits.items()) if commit.slot < gap), None)

    def metrics_of(self, id: str) -> dict[str, Any]:
        """Metrics of a checkpoint: those given at the save, then later ones."""
        return {**{k: plain.decode(v) for k, v in self.commits[id].event.metrics.items()}, **self.metrics.get(id, {})}

    # the fold ------------------------------------------------------------------------------------------------------

    def lose(self, slot: int, why: str, count: int = 1) -> None:
        """Notes a slot that cannot be read, or the last one of `count`. What comes next chains to nothing: the file
        may be brought back, and then both must be whole."""
        self.damaged[slot] = why
        self.slots, self.head, self.lost = slot + 1, "", self.lost + count

    def take(self, record: events.Record) -> None:
        """Applies the next record."""
        intact_before = (record.seq - 1) not in self.damaged
        if record.seq == 1 and record.prev != self.stranger:
            self.stranger = ""  # only the first record was out of place
        if intact_before and record.prev not in ("", self.head):
            self.lose(record.seq, "does not continue the record before it")
            self.stranger = record.own if record.seq == 0 else self.stranger
            return
        self.slots, self.head, self.last_time = record.seq + 1, record.own, record.time
        if record.term > self.term and not any(isinstance(event, events.Open) for event in record.events):
            self.term, self.nonce, self.owner, self.closed = record.term, "", None, False  # its open record is damaged
        for event in record.events:
            self._apply(event, record)

    def _apply(self, event: Any, record: events.Record) -> None:
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event, record)
        else:
            self.unknown.append(event.type)

    def _open(self, event: events.Open, record: events.Record) -> None:
        if record.term > self.term:
            self.term, self.nonce, self.owner, self.closed = record.term, event.nonce, event, False
            self.opened[record.term], self.opened_at[record.term] = event, record.time

    def _close(self, event: events.Close, record: events.Record) -> None:
        if event.nonce == self.nonce:
            self.closed, self.closed_at[self.term] = True, record.time

    def _commit(self, event: events.Commit, record: events.Record) -> None:
        key = (event.nonce, event.ordinal)
        if record.term < self.term or key in self.settled or event.id in self.commits:
            self.damaged[record.seq] = "commits what a fenced process or an earlier record had settled"
            return
        self.settled[key], self.steps[key], self.tip = event.id, event.step, None
        self.ever |= unroll(event.packs)
        self.commits[event.id] = Committed(event, record.seq, record.term, record.time, record.author)
        self.live[event.id] = None
        self._touch([event.id], record)

    def _touch(self, ids: Iterable[str], record: events.Record) -> None:
        self.touched.update(dict.fromkeys(ids, record.seq))

    def _abandon(self, event: events.Abandon, record: events.Record) -> None:
        self.settled.setdefault((event.nonce, event.ordinal), event.instead)
        self.steps.setdefault((event.nonce, event.ordinal), event.step)
        self.missing_ranks[(event.nonce, event.ordinal)] = event.missing
        if event.again:
            self.again.add((event.nonce, event.ordinal))

    def _retire(self, event: events.Retire, record: events.Record) -> None:
        self._touch(event.ids, record)
        for id in event.ids:
            if id in self.live:
                del self.live[id]
                before = self.dropped.get(id)
                self.dropped[id] = Dropped(record.seq, event.reason, event.undo_seconds, id in self.thin, before)

    def _thin(self, event: events.Thin, record: events.Record) -> None:
        self._touch(event.ids, record)
        for id in event.ids:
            if id in self.live and id not in self.thin:
                self.thin.add(id)
                self.dropped[id] = Dropped(record.seq, event.reason, event.undo_seconds)

    def _restore(self, event: events.Restore, record: events.Record) -> None:
        self._touch(event.ids, record)
        for id in event.ids:
            found = self.dropped.pop(id, None)
            if found is not None and not found.was_thin:
                self.thin.discard(id)
            if found is not None and found.before is not None:
                self.dropped[id] = found.before
        again = {*self.live, *(id for id in event.ids if id in self.commits)}
        self.live = {id: None for id in self.commits if id in again}

    def _rewind(self, event: events.Rewind, record: events.Record) -> None:
        self.tip = event.id

    def _start(self, event: events.Start, record: events.Record) -> None:
        self.origins.append(event)

    def _tag(self, event: events.Tag, record: events.Record) -> None:
        if event.id is None:
            self.tags.pop(event.name, None)
        else:
            self.tags[event.name] = event.id
            self.tags_ever.add(event.name)

    def _metrics(self, event: events.Metrics, record: events.Record) -> None:
        self._touch([event.id], record)
        late = {k: plain.decode(v) for k, v in event.metrics.items()}
        self.metrics[event.id] = {**self.metrics.get(event.id, {}), **late}

    def _series(self, event: events.Series, record: events.Record) -> None:
        for name, column in event.columns.items():
            for step, value in zip(event.steps, column):
                if value is not None:
                    self.series[step] = {**self.series.get(step, {}), name: plain.decode(value)}

    def _config(self, event: events.Config, record: events.Record) -> None:
        self.config.update(event.changes)

    def _attach(self, event: events.Attach, record: events.Record) -> None:
        self.attachments[event.name] = event
        self.ever |= {PackName(page.writer, page.number) for page in event.where}

    def _note(self, event: events.Note, record: events.Record) -> None:
        self.notes.append((event.id, event.text))

    def _copy(self, event: events.Copy, record: events.Record) -> None:
        commit = self.commits.get(event.id)
        if commit is not None:
            self.commits[event.id] = replace(commit, time=event.time, author=event.author, after=event.after)

    def _rewrite(self, event: events.Rewrite, record: events.Record) -> None:
        for moved in event.moved:
            commit, dropped = self.commits.get(moved.id), self.dropped.get(moved.id)
            if commit is None:
                continue
            if moved.id not in self.live and dropped and commit.needs(thin=dropped.was_thin) & self.condemned:
                continue  # it has been freed: nothing brings it back
            places = {"root": moved.root, "packs": moved.packs, "optimizer": moved.optimizer}
            self.ever |= unroll(moved.packs)
            self.commits[moved.id] = replace(commit, event=msgspec.structs.replace(commit.event, **places))

    def _gc(self, event: events.Gc, record: events.Record) -> None:
        self.condemned |= unroll(event.condemned)


_HANDLERS: dict[type[Any], Any] = {
    events.Open: History._open,
    events.Close: History._close,
    events.Commit: History._commit,
    events.Abandon: History._abandon,
    events.Retire: History._retire,
    events.Thin: History._thin,
    events.Restore: History._restore,
    events.Rewind: History._rewind,
    events.Start: History._start,
    events.Tag: History._tag,
    events.Metrics: History._metrics,
    events.Series: History._series,
    events.Config: History._config,
    events.Attach: History._attach,
    events.Note: History._note,
    events.Copy: History._copy,
    events.Rewrite: History._rewrite,
    events.Gc: History._gc,
}


PACKS_MAX = 10_000_000


def unroll(ranges: list[events.PackRange]) -> set[PackName]:
    """
    Raises:
        Damaged: for ranges that no real repository has.
    """
    if any(not 0 <= r.first <= r.last for r in ranges) or sum(r.last - r.first + 1 for r in ranges) > PACKS_MAX:
        raise Damaged("a record names an impossible range of packs", do="run fsck")
    return {PackName(r.writer, n) for r in ranges for n in range(r.first, r.last + 1)}


def roll_up(packs: set[PackName]) -> list[events.PackRange]:
    """Packs as ranges: a record that names them stays small."""
    ranges: list[events.PackRange] = []
    for pack in sorted(packs):
        last = ranges[-1] if ranges else None
        if last is not None and last.writer == pack.writer and last.last + 1 == pack.number:
            ranges[-1] = last._replace(last=pack.number)
        else:
            ranges.append(events.PackRange(pack.writer, pack.number, pack.number))
    return ranges
