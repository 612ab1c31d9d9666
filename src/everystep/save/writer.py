"""The background thread of a run: one save at a time, off the training thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from everystep import adapters
from everystep.errors import Conflict, Error, RunTakenOver, SaveAbandoned, StorageError, StorageFull, UsageError
from everystep.save import commit as commits
from everystep.save.arena import Copier
from everystep.save.bases import Bases, Leaning
from everystep.save.commit import Condemned, Draft
from everystep.save.frozen import Declared, FrozenLeaves, standing
from everystep.save.memory import Memory
from everystep.save.part import Known, PartWriter, Stored
from everystep.save.snapshot import Snapshot, arena_bytes, copy_state, leave_in_place
from everystep.schema import flatten, lay_out
from everystep.vault import RunVault, Term
from everystep.vault.manifest import settle
from everystep.vault.names import PackName
from everystep.vault.record import Abandon, Attach, Cost, Metrics, Series

ATTACH_PIECE = 4 << 20


@dataclass
class Job:
    """One save, handed from the training thread to the background: nothing of a framework is in it."""

    step: int
    snapshot: Snapshot
    metrics: dict[str, Any]
    extra: list[Any]
    """Events that travel in the same record (configuration, series)."""
    attachments: dict[str, bytes]
    reason: str
    stall_seconds: float
    queued: float
    saved: Saved = field(default_factory=lambda: Saved(0, None, None))
    left: bool = False
    """Training went on while its state was read where it lies: nobody knows what was read."""


@dataclass(frozen=True)
class _Owed:
    """What travelled with a save that failed: it goes with the next."""

    saved: Saved
    step: int
    metrics: dict[str, Any]
    extra: list[Any]
    attachments: dict[str, bytes]

    def events(self) -> list[Any]:
        """All but the attachments, as events of another step's record."""
        values = {name: [value] for name, value in self.metrics.items()}
        return [*self.extra, Series([self.step], values)] if values else self.extra


@dataclass(frozen=True)
class _Doubt:
    """A save whose record may have landed although its put failed."""

    ordinal: int
    step: int
    content: str
    saved: Saved


class Saved:
    """A save under way. `wait()` answers the durable checkpoint, or raises what went wrong."""

    def __init__(self, step: int, condition: Any, finish: Callable[[str], Any] | None) -> None:
        self.step = step
        self._condition, self._finish = condition, finish
        self._id: str | None = None
        self._error: Error | None = None
        self._done = condition is None
        self.delivered = False
        self.behind: Callable[[str, int, float | None], None] | None = None
        """Waits until a checkpoint is in the place behind, where there is one."""

    @property
    def done(self) -> bool:
        return self._done

    @property
    def skipped(self) -> bool:
        """True if an earlier save was still under way and the run was told to skip then."""
        return self._condition is None

    def wait(self, timeout: float | None = None, *, where: str = "local") -> Any:
        """The durable Checkpoint; None for a skipped save.

        Args:
            where: "remote": durable in the place behind, too.

        Raises:
            SaveAbandoned: if it takes longer than `timeout` seconds.
            Error: what made the save fail.
        """
        if where not in ("local", "remote") or (where == "remote" and self.behind is None and not self.skipped):
            raise UsageError(
                f"where={where!r}: there is no such place",
                do='"local"; and on rank 0 "remote", in a repository with behind=',
            )
        if self._condition is None:
            return None
        with self._condition:
            if not self._condition.wait_for(lambda: self._done, timeout):
                raise SaveAbandoned(
                    f"step {self.step} is not durable after {timeout:g} s", do="wait longer: it is still under way"
                )
        if self._error is not None:
            self.delivered = True
            raise self._error
        if where == "remote" and self._id is not None:
            assert self.behind is not None
            self.behind(self._id, self.step, timeout)
        return self._finish(self._id) if self._finish is not None and self._id is not None else None

    def settle(self, id: str | None, error: Error | None) -> None:
        """The writer's word on what became of the save; wakes whoever waits."""
        with self._condition:
            self._id, self._error, self._done = id, error, True
            self._condition.notify_all()


class Keeper(Protocol):
    """What looks after the run's older checkpoints, in the background, after a save."""

    def after_commit(self) -> list[str]: ...

    def make_room(self, nbytes: int) -> bool: ...


class Writer:
    """Owns the term, the arena and the thread; remembers what the last checkpoint holds."""

    def __init__(
        self, vault: RunVault, term: Term, *, rank: int, ranks: int, author: str, leaning: Leaning, keeper: Keeper
    ) -> None:
        self._vault, self.term, self._author = vault, term, author
        self.rank, self.ranks = rank, ranks
        self.parent: str | None = None
        """Id of the checkpoint that the next one continues from."""
        self.known = Known()
        """What that checkpoint holds."""
        self.notices = vault.place.cautions()
        self.durable: list[str] = []
        """Ids of the checkpoints that nobody has been told of yet."""
        self._condition = vault.seam.condition()
        self._keeper = keeper
        seam, settings = vault.seam, vault.settings
        self._memory = Memory(seam, settings, sends=vault.storage.fan_out > 1)
        # Two pools: what training waits for is not left to threads that have stepped back.
        self._copying = seam.pool(settings.workers, "everystep-copy")
        self._pool = seam.pool(settings.workers, "everystep-encode", self._step_back)
        self._copying.ready()
        self._pool.ready()
        self._bases = Bases(leaning, settings, self._memory, vault.read_chunk)
        self._copier = Copier(self._copying)
        self.frozen = FrozenLeaves(settings.frozen_check_every, self._copier)
        self._said_in_place = False
        self._job: Job | None = None
        self._failed: list[Saved] = []
        self._lost: RunTakenOver | None = None
        self._in_doubt: _Doubt | None = None
        self._owed: list[_Owed] = []
        self._ended = False
        self._last_step: int | None = None
        vault.log.fence = partial(commits.check_by_hand, term=term, vault=vault)
        self._thread = vault.seam.start(self._work, "everystep-save")

    # the training thread's side

    def snapshot(self, state: Any, declared: Declared) -> Snapshot:
        """One copy of the state: after this, training may change what it likes. Where there is no room for one, the
        state is left where it lies, and `submit` waits.

        Raises:
            Unsupported: naming the path of what cannot be saved; nothing is copied then.
        """
        settings = self._vault.settings
        adapters.fence()
        tree = flatten(state, partial(adapters.describe, ranks=self.ranks))
        layout = lay_out(tree.leaves, settings.chunk_bytes_max, settings.small_leaf_bytes)
        still = standing(tree, layout, declared, settings.small_leaf_bytes)
        nbytes = arena_bytes(layout, still)
        arena, base_stays = self._memory.choose(nbytes, self.frozen.bytes_with(still), self._bases.held)
        if not base_stays:
            self._bases.forget()
        data = arena.reserve(nbytes) if arena is not None else None
        if data is None:
            self.frozen.forget()
            self._say_in_place(layout.nbytes)
            return leave_in_place(tree, layout)
        frozen = self.frozen.take(still)
        self.notices += self.frozen.notices
        self.frozen.notices.clear()
        taken = copy_state(tree, layout, data, self._copier, frozen)
        adapters.fence()
        tree.payloads.clear()
        return taken

    def _say_in_place(self, nbytes: int) -> None:
        if not self._said_in_place:
            self._said_in_place = True
            self.notices.append(
                f"there is no room for a copy of the state ({nbytes >> 20} MiB; saving may take "
                f"{min(self._memory.limit, 1 << 60) // (1 << 20):.0f} MiB): training waits until each save is durable. "
                "To go on at once, allow more: everystep.Settings(memory_bytes_max=…)"
            )

    def _step_back(self) -> None:
        self._vault.seam.step_back(self._vault.settings.background_nice)

    @property
    def busy(self) -> bool:
        return self._job is not None

    @property
    def in_doubt(self) -> bool:
        """Whether a save that failed may have landed all the same; then it is the parent of the next."""
        return self._in_doubt is not None

    def wait(self) -> None:
        """Until nothing is under way."""
        with self._condition:
            self._condition.wait_for(lambda: self._job is None)

    def raise_failed(self) -> None:
        """Raises, once, what went wrong in a save that nobody waited for; a lost run is told every time."""
        while self._failed:
            saved = self._failed.pop(0)
            if not saved.delivered and saved._error is not None:
                raise saved._error
        if self._lost is not None:
            raise self._lost

    def owed(self) -> list[Any]:
        """Events of saves that failed, for the last record of this process."""
        return [event for owed in self._owed for event in owed.events()]

    def submit(self, job: Job, finish: Callable[[str], Any]) -> Saved:
        job.saved = Saved(job.step, self._condition, finish)
        with self._condition:
            self._job = job
            self._condition.notify_all()
        if job.snapshot.in_place:
            try:
                self.wait()
            except BaseException:
                job.left = True
                raise
        return job.saved

    def close(self) -> None:
        """Waits for what is under way and ends the threads."""
        self.wait()
        with self._condition:
            self._ended = True
            self._condition.notify_all()
        self._thread.join()
        self._vault.log.fence = None
        self._pool.close()
        self._copying.close()

    # the background's side

    def _work(self) -> None:
        self._step_back()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._job is not None or self._ended)
                job = self._job
            if job is None:
                return
            id, error = self._try(job)
            if error is not None:
                self._owed.append(_Owed(job.saved, job.step, job.metrics, job.extra, job.attachments))
            if id is not None:
                self.durable.append(id)
            job.saved.settle(id, error)
            if error is None and self.rank == 0:
                self.notices += self._keeper.after_commit()
            if error is not None:
                self._failed.append(job.saved)  # once it is settled: who looks now sees what went wrong
            with self._condition:
                self._job = None
                self._condition.notify_all()
            job = None
            self._memory.prepare(self._bases.held, lambda: self._job is not None or self._ended)

    def _try(self, job: Job) -> tuple[str | None, Error | None]:
        try:
            if self._lost is not None:
                raise self._lost
            return self._save(job), None
        except RunTakenOver as error:
            self._lost = error
            return None, error
        except Error as error:
            return None, error
        except Exception as error:  # noqa: BLE001  whatever it is, the training thread must hear of it
            wrapped = Error(f"a save failed unexpectedly: {error!r}", where=self._vault.where, do="report this")
            wrapped.__cause__ = error
            return None, wrapped

    def _save(self, job: Job) -> str:
        self._settle_doubt()
        self._pay(job)
        self.term.ordinal = commits.next_ordinal(self._vault.log.history, self.term, job.step)
        draft = Draft(
            self._vault.seam.token(8), job.step, self.parent, job.metrics, self.term.ordinal, job.reason, self.ranks
        )
        try:
            id, stored = self._write(job, draft)
        except Condemned:
            id, stored, draft = self._write_anew(job, draft)
        except StorageFull:
            if self.ranks > 1 or not self._keeper.make_room(job.snapshot.layout.nbytes):
                raise
            self._settle_doubt()  # the record itself may have landed
            draft = replace(draft, id=self._vault.seam.token(8))
            id, stored = self._write(job, draft)
        if self.rank == 0 and id != draft.id:
            return id  # it was saved before: nothing has changed
        if not stored.changed and self._last_step is not None and job.step > self._last_step:
            self.notices.append(
                f"step {job.step}: no byte changed since step {self._last_step}; is it the state that trains?"
            )
        self._last_step, self.parent, self.known = job.step, id, stored.known
        return id

    def _write_anew(self, job: Job, draft: Draft) -> tuple[str, Stored, Draft]:
        """Once more, when what it leaned on was freed: with what the parent holds by now, then leaning on nothing."""
        draft = self._without_bases(draft, self._known_now())
        try:
            return *self._write(job, draft), draft
        except Condemned:
            draft = self._without_bases(draft, Known())
            return *self._write(job, draft), draft

    def _known_now(self) -> Known:
        """What the parent holds, where it lies now: a repack may have moved it."""
        try:
            history = self._vault.history()
            whole = set() if history.damaged else history.live.keys() - history.thin
            return Known.of(self._vault.manifest(history.commits[self.parent])) if self.parent in whole else Known()
        except Error:
            return Known()  # what cannot be read is not referred to; a load of it says why

    def _without_bases(self, draft: Draft, known: Known) -> Draft:
        """The same save under another name, without bases. All ranks do so together."""
        self._bases.forget()
        self.known = known
        if self.ranks > 1:
            if self.rank == 0:
                commits.abandon(self._vault, self.term, draft, [], self._author, again=True)
            self.term.ordinal += 1
        return replace(draft, id=self._vault.seam.token(8), ordinal=self.term.ordinal)

    def _write(self, job: Job, draft: Draft) -> tuple[str, Stored]:
        try:
            return self._store(job, draft)
        except (RunTakenOver, Condemned):
            raise
        except Exception as error:
            if self.rank == 0 and self.ranks > 1:
                self._abandon(draft, error)
            raise

    def _store(self, job: Job, draft: Draft) -> tuple[str, Stored]:
        """Encode and store, then commit: alone, as the coordinator, or as one of many ranks."""
        clock = self._vault.seam.monotonic
        begun = clock()
        base = self._bases.offer(job.snapshot)
        window, uploads = self._memory.window(), self._memory.uploads
        part = PartWriter(self._vault, self.term, self.known, self._pool, window, base, self._bases.leaning, uploads)
        part.write(job.snapshot, self.rank)
        if job.left:
            raise SaveAbandoned(
                f"step {job.step} was interrupted while its state was read", do="save again; nothing was kept of it"
            )
        if self.rank != 0:
            stored = part.close(hand_over=commits.hand_over_bytes(self.ranks))
            id = commits.deliver(self._vault, self.term, draft, self.rank, stored)
            self._bases.take(job.snapshot, stored.spots, base)
            return id, stored
        others = commits.gather(self._vault, self.term, draft) if self.ranks > 1 else []
        content = "|".join([part.content, *(receipt.content for receipt in others)])
        before = self.term.steps.get(job.step)
        if before is not None and before[1] not in self._vault.log.history.live:
            before = None  # dropped since: what is asked for is not there any more
        if before is not None and before[0] != content:
            raise _saved_before(job.step, self._vault.where)
        attached = {name: _attach(part, body) for name, body in job.attachments.items()}
        stored, root, logical = commits.close_root(draft, part, others, self._vault.where)
        here = PackName(root.writer, root.number)
        events = [*job.extra, *(_settled(name, *found, here) for name, found in attached.items())]
        if before is not None:
            return self._same_again(before[1], job, events), stored
        write = part.write_seconds
        cost = Cost(
            job.stall_seconds, begun - job.queued, clock() - begun - write, write,
            stored.raw_bytes + sum(receipt.raw_bytes for receipt in others),
            stored.stored_bytes + sum(length for receipt in others for _, _, length in receipt.new),
        )  # fmt: skip
        stored.changed = stored.changed or any(receipt.changed for receipt in others)
        commit = commits.commit_event(draft, self.term, stored, others, root, logical, cost)
        doubt = _Doubt(draft.ordinal, job.step, content, job.saved)
        self._append(
            lambda history: commits.decide_commit(history, self.term, commit, events, self._vault.where), doubt
        )
        self.term.steps[job.step] = (content, draft.id)
        self._bases.hear(stored.stored_bytes, write)
        self._bases.take(job.snapshot, stored.spots, base)
        return draft.id, stored

    def _same_again(self, id: str, job: Job, events: list[Any]) -> str:
        """The same content at the same step: the checkpoint that is there, with what is new beside it."""
        late: list[Any] = [Metrics(id, job.metrics)] if job.metrics else []
        if self.ranks > 1:
            late.append(Abandon(self.term.nonce, self.term.ordinal, job.step, [], instead=id))
        if events or late:
            self._append(lambda history: self._fenced(history, [*events, *late]))
        return id

    def _fenced(self, history: Any, events: list[Any]) -> list[Any]:
        commits.check_fence(history, self.term, self._vault.where)
        return events

    def _abandon(self, draft: Draft, error: Exception) -> None:
        """Tells the other ranks that this save comes to nothing, whatever the reason: they need not wait for it."""
        missing = list(error.missing) if isinstance(error, SaveAbandoned) else []
        try:
            commits.abandon(self._vault, self.term, draft, missing, self._author)
        except StorageError as other:
            self.notices.append(f"step {draft.step}: the other ranks could not be told that it failed: {other.what}")

    def _append(self, decide: Callable[[Any], list[Any] | None], doubt: _Doubt | None = None) -> None:
        try:
            self._vault.log.append(decide, self._author)
        except StorageError:
            self._in_doubt = doubt
            raise

    def _settle_doubt(self) -> None:
        """A record whose put failed may lie there all the same: then it is the parent of what comes now, and its
        step is saved."""
        doubt = self._in_doubt
        if doubt is None:
            return
        id = self._vault.log.confirm().settled.get((self.term.nonce, doubt.ordinal))
        self._in_doubt = None
        if id is not None:
            self.parent = id
            self.term.steps[doubt.step] = (doubt.content, id)
            self._owed = [owed for owed in self._owed if owed.saved is not doubt.saved]

    def _pay(self, job: Job) -> None:
        """Lets a save carry what those before it failed to store."""
        events: list[Any] = []
        metrics: dict[str, Any] = {}
        attachments: dict[str, bytes] = {}
        for owed in self._owed:
            attachments.update(owed.attachments)
            if owed.step == job.step:
                metrics.update(owed.metrics)
            events += owed.extra if owed.step == job.step else owed.events()
        job.extra = [*events, *job.extra]
        job.metrics, job.attachments = {**metrics, **job.metrics}, {**attachments, **job.attachments}
        self._owed = []


def _saved_before(step: int, where: str) -> Conflict:
    return Conflict(
        f"step {step} is saved already, with another content",
        where=where,
        do="count a step up before you save again, or resume() first if you went back on purpose",
    )


def _attach(part: PartWriter, body: bytes) -> tuple[list[Any], int]:
    pieces = [body[at : at + ATTACH_PIECE] for at in range(0, len(body), ATTACH_PIECE)]
    return [part.page(piece) for piece in pieces], len(body)


def _settled(name: str, pages: list[Any], nbytes: int, here: PackName) -> Attach:
    return Attach(name, [settle(page, here) for page in pages], nbytes)
