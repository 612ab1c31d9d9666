"""Carry checkpoints of a run into the run of another repository: committed there once each, under a term of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from everystep.errors import Conflict, Damaged, ObjectMissing
from everystep.upkeep.beside import Beside, files
from everystep.upkeep.sending import SPANS, Sender, Sent
from everystep.vault import Committed, History, RunVault, Term
from everystep.vault.history import roll_up, unroll
from everystep.vault.record import Attach, Copy, Gc, Open, Thin

Progress = Callable[[int, int, int], None]
ATTEMPTS = 3


class Terms(Protocol):
    """Who holds the target's run."""

    def of(self, opened: Open | None) -> Term:
        """The term to commit under what was saved by a process that had opened a run so; takes the run if need be."""

    def check(self, history: History) -> None:
        """Raises RunTakenOver if another process has taken the run since."""


@dataclass
class Carried:
    """What a push or pull did with one run; after a dry run, what it would do."""

    run: str
    target_run: str
    """What it is called in the repository that it went to."""
    sent: list[int] = field(default_factory=list)
    """Steps of the checkpoints that went there, in the order of saving."""
    there: int = 0
    """Checkpoints that were chosen and had been there before."""
    gone: int = 0
    """Checkpoints that were dropped while this was under way."""
    sent_bytes: int = 0
    """Newly stored there, attached files too; after a dry run, what they stored newly in the source."""
    raw_bytes: int = 0
    """Of their states."""
    said: int = 0
    """Tags, notes, metrics, files and other things beside checkpoints that are new there."""
    apart: bool = False
    """The run of that name there has none of this one's checkpoints: it may be another run altogether."""


def waiting(source: History, target: History, ids: Sequence[str], report: Carried, *, whole: bool) -> None:
    """What there is to carry, as far as the logs say."""
    report.apart = _is_apart(source, target)
    todo = [source.commits[id].event for id in ids if id not in target.commits]
    report.there += len(ids) - len(todo)
    report.sent += [event.step for event in todo]
    report.sent_bytes += sum(event.cost.stored_bytes for event in todo)
    report.raw_bytes += sum(event.cost.raw_bytes for event in todo)
    report.said += len(files(source, target)) + len(
        Beside(lambda: ("", ""), follow=False).of_run(source, target, whole=whole)
    )


def _is_apart(source: History, target: History) -> bool:
    return bool(target.commits) and source.commits.keys().isdisjoint(target.commits)


class Condemned(Exception):
    """A pack that the target had was freed meanwhile: nothing may refer to it."""


class Carrier:
    """Carries checkpoints from run to run, one after the other; what it has done stays done, whenever it ends.

    Args:
        follow: the target is this run's own copy; see `Beside`.
        progress: told (checkpoints done, checkpoints in all, bytes sent).
    """

    def __init__(
        self,
        source: RunVault,
        target: RunVault,
        terms: Terms,
        *,
        follow: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._source, self._target, self._terms, self._progress = source, target, terms, progress
        self._sender = Sender(source, target, self._sent)
        self._beside = Beside(self._origin, follow=follow)
        self._done = (0, 0)
        self._bytes = 0

    def carry(self, ids: Sequence[str], report: Carried) -> None:
        """Commits checkpoints in the target that it has not had.

        Raises:
            RunTakenOver: if another process takes the run there.
            Damaged: if a byte of one is not what was saved; those before it are there.
        """
        there = self._target.history()
        self._check_readable(there)
        report.apart = _is_apart(self._source.log.history, there)
        todo = [id for id in ids if id not in there.commits]
        report.there += len(ids) - len(todo)
        for number, id in enumerate(todo):
            self._done = number, len(todo)
            self._sent(0)
            sent = self.carry_one(id)
            if sent is None:
                report.gone += 1
                continue
            report.sent.append(sent.event.step)
            report.sent_bytes += sent.nbytes
            report.raw_bytes += sent.event.cost.raw_bytes
        self._done = len(todo), len(todo)
        self._sent(0)

    def tell(self, report: Carried, *, whole: bool, tip: bool = True) -> None:
        """Brings over what the source's log says beside checkpoints.

        Args:
            whole: all that the source has kept was carried.
            tip: also which checkpoint is the newest.
        """
        source, target = self._source.history(), self._target.history()
        sent = self._send_files(files(source, target))
        report.sent_bytes += sum(page.length for event in sent for page in event.where)
        if sent or self._beside.of_run(source, target, whole=whole, tip=tip):
            report.said += self._say(source, sent, whole=whole, tip=tip)
        self._beside.said(source)

    def _say(self, source: History, sent: Sequence[Attach], *, whole: bool, tip: bool) -> int:
        """How many events the target's log gained. The term keeps what was just written from being freed."""
        count = [0]

        def decide(history: History) -> list[Any] | None:
            self._terms.check(history)
            due = {event.name for event in files(source, history)}
            events = [event for event in sent if event.name in due]
            events += self._beside.of_run(source, history, whole=whole, tip=tip)
            count[0] = len(events)
            return events or None

        self._target.log.append(decide, self._target.author)
        return count[0]

    def _send_files(self, events: list[Attach]) -> list[Attach]:
        if not events:
            return []
        history = self._source.history()
        term = self._terms.of(history.owner)
        return [self._send_file(event, term) for event in events]

    def _send_file(self, event: Attach, term: Term) -> Attach:
        while True:
            try:
                return self._sender.send_file(event, term)
            except ObjectMissing:
                now = self._source.history().attachments.get(event.name)
                if now is None or now == event:
                    raise
                event = now

    def _sent(self, nbytes: int) -> None:
        self._bytes += nbytes
        if self._progress is not None:
            self._progress(*self._done, self._bytes)

    # one checkpoint

    def carry_one(self, id: str) -> Sent | None:
        """Commits one checkpoint; None if it has been dropped meanwhile, or came there by another way."""
        for _ in range(ATTEMPTS):
            history = self._source.history()
            if id not in history.live:
                return None
            commit, thin = history.commits[id], id in history.thin
            term = self._terms.of(history.opened.get(commit.term))
            try:
                sent = self._sender.send(commit, term, self._near(history, id), thin=thin)
                if not self._commit(history, commit, sent, thin=thin):
                    return None
                self._sender.committed(sent)
                return sent
            except Condemned as error:
                self._sender.forget()
                last: Exception = error
            except ObjectMissing as error:
                last = error
                if not self._has_changed(commit, thin=thin):
                    raise Damaged("a pack that is needed is missing", where=error.where, do="run fsck") from error
        raise Conflict(
            f"what step {commit.event.step} needs was freed while it was sent, {ATTEMPTS} times",
            where=self._target.where,
            do="do it again when nobody prunes or repacks these runs",
        ) from last

    def _has_changed(self, commit: Committed, *, thin: bool) -> bool:
        """Whether a checkpoint was dropped, thinned or moved since."""
        now, id = self._source.history(), commit.event.id
        return id not in now.live or (id in now.thin) != thin or now.commits[id].event.root != commit.event.root

    def _origin(self) -> tuple[str, str]:
        return self._source.place.identity(), self._source.name

    def _check_readable(self, there: History) -> None:
        """
        Raises:
            Damaged: if the target's log cannot be read: it may hold what would be committed a second time.
        """
        if there.damaged:
            raise Damaged(
                "part of the log cannot be read, and it is not known what is there",
                where=self._target.where,
                do="run fsck, and bring the damaged records back from a copy; or take another place",
            )

    def _near(self, history: History, id: str) -> Iterator[tuple[Committed, bool]]:
        """Checkpoints of the target that one continues from, the nearest first."""
        there = self._target.log.history
        at: str | None = id
        for _ in range(SPANS):
            at = history.nearest(at, there.live) if at is not None else None
            if at is not None:
                yield there.commits[at], at in there.thin

    def _commit(self, history: History, commit: Committed, sent: Sent, *, thin: bool) -> bool:
        """Whether this is what made it a checkpoint there."""
        event = sent.event
        needs = unroll(event.packs) - {sent.lost}
        done: list[bool] = []

        def decide(there: History) -> list[Any] | None:
            self._terms.check(there)
            self._check_readable(there)
            done[:] = [event.id not in there.commits]
            if not done[0]:
                return None
            if needs & there.condemned:
                raise Condemned
            after = None if event.parent in there.commits else history.nearest(event.id, there.commits)
            copy = Copy(event.id, *self._origin(), commit.time, commit.author, after)
            events = [event, copy, *([Thin([event.id], "thin in its own repository")] if thin else [])]
            events += [Gc(roll_up({sent.lost}))] if sent.lost is not None else []
            return [*events, *self._beside.of_checkpoint(history, there, event.id)]

        self._target.log.append(decide, self._target.author)
        return done[0]
