"""A run to write: track what trains, save it, resume it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

from everystep import adapters, rules
from everystep.checkpoint import LOOP, RNG, Checkpoint
from everystep.config import RunConfig
from everystep.environment import differences, find_place, fingerprint
from everystep.errors import Damaged, Error, UsageError
from everystep.forecast import Outlook
from everystep.keeping import Keeper
from everystep.lineage import check_alone, check_whole, chosen, find_origin, write_rewind
from everystep.loop import Batches, Loop, Steps
from everystep.metrics import Recorded, series
from everystep.restore import STATE, open_checkpoint, place_tracked
from everystep.save import Saved, Writer, take_run
from everystep.save.bases import Leaning
from everystep.save.commit import check_fence
from everystep.save.owner import join_run
from everystep.save.part import Known
from everystep.save.writer import Job
from everystep.schema import LoadReport
from everystep.schema.plain import check_text
from everystep.telling import TellingRun
from everystep.tracking import Tracking
from everystep.vault import Committed, History, Place, Term
from everystep.vault.record import Close, Config, Metrics, Start


class Run(TellingRun):
    """Writes checkpoints of one run. Also a context manager: leaving it waits until all is durable."""

    def __init__(
        self,
        place: Place,
        name: str,
        *,
        config: dict[str, Any],
        when_busy: str,
        takeover: bool,
        rank: int | None,
        ranks: int | None,
        launch: str | None,
        keep: rules.Rule | None,
        keep_full: rules.Rule | None,
        quota_bytes: int | None,
    ) -> None:
        super().__init__(place, name)
        self._rules = [
            rules.check_rule(r, n) if r is not None else None for r, n in ((keep, "keep="), (keep_full, "keep_full="))
        ]
        self._quota_bytes = quota_bytes
        if when_busy not in ("wait", "skip"):
            raise UsageError(f"when_busy={when_busy!r} is not known", do='"wait" or "skip"')
        self._asked = (rank, ranks, launch)
        self.rank, self.ranks, self._launch = find_place(place.seam, self._asked, when_busy)
        self.report: LoadReport | None = None
        """What the last resume did."""
        self.stopped: str | None = None
        """Why the loop ended before its time: a signal's name, or "stop"; None otherwise."""
        self._when_busy, self._takeover = when_busy, takeover
        self._tracking = Tracking(place.seam)
        self._new_config: dict[str, Any] = {}
        RunConfig({}, self._new_config).update(config)
        self._new_attachments: dict[str, bytes] = {}
        self._recorded = Recorded(place.settings.series_steps_max)
        self._step: int | None = None
        self._active: Loop | None = None
        self._position: Callable[[], dict[str, Any]] = dict
        self._restored_position: dict[str, Any] = {}
        self._writer: Writer | None = None
        self._pid = place.seam.pid()
        self._left: str | None = None
        self._origin: Start | None = None
        self._outlook = Outlook(self._rules, quota_bytes)
        self._forget_exit: Callable[[], None] = lambda: None

    # what belongs to the run ---------------------------------------------------------------------------------------

    def track(self, *, rng: bool = True, frozen: str | Collection[str] | None = None, **objects: Any) -> Run:
        """Names the objects whose state makes the run: modules, optimizers, anything with state_dict, generators,
        or (getter, setter) pairs. The random state of Python, NumPy and the framework comes along, unless `rng=False`.

        Args:
            frozen: "trusted": parameters that need no gradient are not copied while their pointer and version stand
                still, and are compared in full every `frozen_check_every` saves. Or the names that these must lie
                below: ("model.encoder",).

        Raises:
            Unsupported: for bare arrays, pytrees and numbers, which callers rebind.
        """
        new = self._tracking.add(objects, rng=rng, frozen=frozen)
        if self.report is not None and new:
            self._warn(f"{', '.join(new)}: tracked after the run was resumed, and left as it is; track before that")
        left = [text for name in new for text in adapters.not_captured(objects[name], name)]
        if left:
            self._warn(
                f"not part of the checkpoints: {'; '.join(left)}. Fine if your program makes it again; else register "
                "it so that it is in the state_dict, or track it by itself"
            )
        return self

    @property
    def _tracked(self) -> dict[str, Any]:
        return self._tracking.objects

    @property
    def config(self) -> RunConfig:
        """The run's configuration: a dict of plain values; what is set travels with the next save."""
        return RunConfig(super().config, self._new_config)

    def attach(self, name: str, data: bytes) -> Run:
        """Keeps a file with the run (an architecture, a tokenizer); it travels with the next save."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise UsageError(f"the attachment {name!r} is not bytes", do="read the file first: open(path, 'rb').read()")
        self._new_attachments[check_text(name, "the name of an attachment")] = bytes(data)
        return self

    def record(self, *, step: int | None = None, worker: bool = False, **metrics: Any) -> None:
        """Metrics of this step (or of `step`); kept at once, converted to numbers at the next save.
        With `worker=True` of this process alone (its loss, its step time), kept by rank with the next checkpoint."""
        if worker:
            self._tracking.worker.add(step, metrics)
        elif self._recorded.add(step if step is not None else self._step, metrics):
            limit = self._vault.settings.series_steps_max
            self._warn(f"metrics of more than {limit} steps without a save: the oldest are dropped from here on")

    @property
    def step(self) -> int | None:
        """The step that the loop is at; None outside of one."""
        return self._step

    # save ----------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        state: Any = None,
        metrics: Mapping[str, Any] | None = None,
        reason: str = "by hand",
    ) -> Saved:
        """Copies the state and returns; a background thread encodes, writes and commits it.

        Args:
            step: completed updates.
            state: an explicit nested state of arrays and plain values, beside what is tracked.
            metrics: of exactly this step.

        Returns:
            A handle; `wait()` gives the durable Checkpoint.

        Raises:
            Unsupported: naming the path of what cannot be saved.
            Error: what made an earlier save fail that nobody waited for.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise UsageError(f"a step is a count of completed updates, not {step!r}", do="save(1200)")
        if state is None and not self._tracked:
            raise UsageError(
                "there is nothing to save", do="run.track(model=…, optimizer=…) first, or save(step, state=…)"
            )
        return self._save(step, state, metrics or {}, reason, may_skip=self._when_busy == "skip")

    def _save(self, step: int, state: Any, metrics: Mapping[str, Any], reason: str, *, may_skip: bool) -> Saved:
        begun = self._vault.seam.monotonic()
        writer = self._open()
        writer.raise_failed()
        self._say_notices(writer)
        if writer.busy:
            if may_skip:
                return Saved(step, None, None)
            writer.wait()
            writer.raise_failed()
        self._warn_of_new_line(writer, step)
        tracking = self._tracking
        taken = writer.snapshot(tracking.state(step, state, self._position()), tracking.declared())
        self._say_notices(writer)
        said = self._outlook.say(self._vault, self._active, taken.layout, taken.tree.leaves, self.rank, self.ranks)
        if said is not None:
            self._warn(said)
        own, extra = self._take_metrics(step, metrics)
        if self._new_config:
            extra.append(Config(dict(self._new_config)))
            self._new_config.clear()
        if self._origin is not None:
            extra.append(self._origin)
            self._origin = None
        attachments, self._new_attachments = self._new_attachments, {}
        if self._active is not None:
            self._active.note_saved(step)
        now = self._vault.seam.monotonic()
        return writer.submit(Job(step, taken, own, extra, attachments, reason, now - begun, now), self._by_id)

    def _warn_of_new_line(self, writer: Writer, step: int) -> None:
        latest = self._vault.log.history.latest
        if writer.parent is None and latest is not None and not writer.in_doubt:
            self._warn(
                f"it goes up to step {latest.event.step}, and step {step} continues none of it: a new line begins "
                "(resume() first, to go on from there)"
            )

    def _take_metrics(self, step: int | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """Metrics of the step itself; and events for other steps: of checkpoints that are there, or of none."""
        own, rows = self._recorded.take(step, given)
        late = self._vault.log.history.on_line(rows)  # as far as this process has read it
        events: list[Any] = [Metrics(commit.event.id, rows.pop(at)) for at, commit in late.items()]
        return own, [*events, series(rows)] if rows else events

    def _by_id(self, id: str) -> Checkpoint:
        known = self._vault.log.history.commits.get(id)  # most often this process has read it, or written it
        return self._checkpoint(known if known is not None else self._history().commits[id])

    # resume --------------------------------------------------------------------------------------------------------

    def resume(self, *, strict: bool = True) -> int:
        """Takes the run, puts the newest durable checkpoint into what is tracked, and answers its step; 0 if none.

        A damaged newest checkpoint is left out with a warning, and the one before it used; of several ranks none does
        so alone, and that is an error. `report` says what came in
        and whether the continuation is exact.

        Raises:
            RunInUse: if another living process writes it.
            Mismatch: if the checkpoint does not fit; nothing was changed.
            Damaged: if no checkpoint of the line is whole.
        """
        writer = self._open()
        writer.wait()
        writer.raise_failed()
        history = self._history()
        if history.damage_behind_latest:
            self._warn_damaged(
                f"records {history.damage_behind_latest} of the log cannot be read; a newer checkpoint may be lost"
            )
        line = [commit for commit in history.line() if commit.event.id not in history.thin]
        for commit in reversed(line):
            try:
                return self._resume_from(writer, commit, strict)
            except Damaged as error:
                check_alone(self.rank, self.ranks, commit.event.step, error)
                self._warn_damaged(f"the checkpoint of step {commit.event.step} is damaged, going back: {error}")
        if line or history.damaged:
            raise Damaged(
                "no checkpoint of this run is whole",
                where=self._vault.where,
                do="run fsck for the details; to start over, give the run another name",
            )
        return 0

    def rewind(self, to: int | str | Checkpoint, *, strict: bool = True) -> int:
        """Takes the run and goes back on purpose: what is saved next continues from there. The line that is left
        stays, listed with `checkpoints(all=True)` and loadable.

        Args:
            to: a step, what stands behind the @ of a command line ("best:val_loss", a tag), or a checkpoint.

        Returns:
            Its step. What is tracked holds its state, random states and place in the data included.

        Raises:
            NotFound, CheckpointRetired, Mismatch: accordingly; nothing was changed.
        """
        writer = self._open()
        writer.wait()
        writer.raise_failed()
        found = to if isinstance(to, Checkpoint) else self.find(str(to))
        commit = check_whole(self._history(), found, self._vault.where)
        if self._tracked:
            self._resume_from(writer, commit, strict)
        write_rewind(self._vault, writer.term, commit, self._vault.author, first=self.rank == 0)
        writer.parent = commit.event.id
        self._tracking.worker.forget()
        writer.term.steps.clear()
        return commit.event.step

    def start_from(
        self, source: str | Checkpoint, *, only: str | Collection[str] | None = None, strict: bool = True
    ) -> LoadReport | None:
        """Begins with the state of another run's checkpoint; the first save records where it came from.

        Args:
            source: "other@best", "other@1200", a checkpoint of any repository.
            only: names of what is tracked, if not all of it: only="model" leaves the optimizer fresh.
            strict: a misfit is an error and changes nothing.

        Returns:
            What came in. None if this run has a checkpoint already: a restart goes on from that, and nothing happens.

        Raises:
            NotFound, Mismatch, UsageError: accordingly.
        """
        targets = chosen(self._tracked, only)
        if self._history().latest is not None:
            return None
        origin = find_origin(self._vault.place, source)
        report = origin.load(into=targets, strict=strict)
        self._origin = Start(origin.run, origin.id, origin.step, [] if only is None else list(targets))
        return cast(LoadReport, report)

    def _resume_from(self, writer: Writer, commit: Committed, strict: bool) -> int:
        opened = open_checkpoint(self._vault, commit)
        where = f"{self.name}@{commit.event.step}"
        names = opened.names()
        mine = opened.of_rank(self.rank) or opened
        position = mine.build(LOOP, like="saved") if LOOP in names else {}
        random = mine.build(RNG, like="saved") if RNG in names and self._tracking.with_rng else {}
        report = place_tracked(opened, self._tracked, strict=strict, whole=STATE not in names, where=where)
        if not self._tracking.with_rng or RNG not in names:
            report.inexact.append("random states are not tracked (rng=False)")
        self.report, self._restored_position = report, position
        self._say_inexact([*adapters.set_random_state(random), *self._surroundings(commit)])
        # A log with damage may hide what was condemned: then nothing is referenced.
        writer.parent = commit.event.id
        writer.frozen.forget()
        self._tracking.resumed(random)
        writer.term.steps.clear()  # from here on, steps that were saved before may come out different
        writer.known = Known() if self._history().damaged else Known.of(opened.manifest)
        return commit.event.step

    def _surroundings(self, commit: Committed) -> list[str]:
        """What is not as it was when a checkpoint was saved, and can change bits."""
        saved = commit.event.ranks
        changed = [f"saved by {saved} ranks, resumed by {self.ranks}"] if saved != self.ranks else []
        then = self._history().opened.get(commit.term)
        return [*changed, *(differences(then.environment, fingerprint(self._vault.seam)) if then is not None else [])]

    def _open(self) -> Writer:
        """Takes the run, once."""
        if self._vault.seam.pid() != self._pid:
            raise UsageError(
                "this run was made by the process that forked this one, and is written by it",
                where=self._vault.where,
                do="save there; or open the repository anew here, and use another run",
            )
        if self._writer is not None:
            return self._writer
        self.rank, self.ranks, self._launch = find_place(self._vault.seam, self._asked, self._when_busy)
        term = self._take_term()
        keep, keep_full = self._rules
        author = self._vault.author
        leaning = Leaning.of(self._vault.settings, drops=keep is not None, thins=keep_full is not None)

        def fence(history: History) -> None:
            check_fence(history, term, self._vault.where)

        self._writer = Writer(
            self._vault, term, rank=self.rank, ranks=self.ranks, author=author, leaning=leaning,
            keeper=self._make_keeper(author, fence),
        )  # fmt: skip
        self._writer.parent = self._left
        self._forget_exit = self._vault.seam.at_exit(self._at_exit)
        return self._writer

    def _make_keeper(self, author: str, fence: Callable[[History], None]) -> Keeper:
        keep, keep_full = self._rules
        return Keeper(self._vault, author, fence, keep, keep_full, self._quota_bytes)

    def _take_term(self) -> Term:
        if self.rank != 0:
            return join_run(self._vault, self._launch, self.rank, self.ranks)
        history = self._history()
        return take_run(
            self._vault,
            takeover=self._takeover,
            launch=self._launch,
            ranks=self.ranks,
            environment=fingerprint(self._vault.seam),
            continues=history.latest.event.id if history.latest else None,
            reason="takeover" if self._takeover else "start",
            author=self._vault.author,
        )

    # loops ---------------------------------------------------------------------------------------------------------

    def steps(
        self,
        total: int | None = None,
        *,
        save_every: int | None = None,
        save_on: rules.Rule | None = None,
        strict: bool = True,
    ) -> Steps:
        """Resumes, and yields the steps that are left up to `total`; saves at the loop's top when due, and at the last.
        Where nothing is tracked, save behind the loop what a signal has ended: if run.stopped: run.save(step, state=…).

        Args:
            total: the last step; None for no end.
            save_every: steps between saves.
            save_on: a rule: everystep.every(…) | everystep.best("val_loss") | everystep.when(f).
        """
        return Steps(self, total, rules.union(save_every, save_on), strict)

    def batches(
        self,
        loader: Iterable[Any],
        *,
        epochs: int,
        save_every: int | None = None,
        save_on: rules.Rule | None = None,
        strict: bool = True,
    ) -> Batches:
        """Resumes, and yields the batches that are left of `epochs` passes over a loader; each batch is one step.

        Args:
            loader: an ordinary DataLoader, shuffled or not, or any iterable that can be iterated again.
            save_every: epochs between saves. Also in mid-epoch: save_on=everystep.every(100).
        """
        return Batches(self, loader, epochs, rules.union(save_every, save_on, epochs=True), strict)

    def _enter(self, loop: Loop | None) -> None:
        """One loop at a time: the one before gives its signals back."""
        if self._active is not None:
            self._active.leave()
            self._active.tell_lost()
        self._active, self._position = loop, dict
        if loop is not None:
            self._position, self.stopped = loop._position, None

    def _say_inexact(self, reasons: list[str]) -> None:
        """Why the run that goes on may not be the one that was never interrupted."""
        if reasons and self.report is not None:
            self.report.inexact += reasons
            self._warn(f"this continuation is not exact: {'; '.join(reasons)}")

    def stop(self, why: str = "stop") -> None:
        """Ends the loop at its next top, after a save."""
        self.stopped = why

    # the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits until all is durable and frees the run.

        Raises:
            Error: what made a save fail that nobody waited for.
            RunTakenOver: if another process has taken the run, and metrics of this one are lost.
        """
        self._enter(None)
        self._forget_exit()
        writer, self._writer = self._writer, None
        if writer is None or self._vault.seam.pid() != self._pid:
            return
        writer.close()
        self._left = writer.parent
        try:
            writer.raise_failed()
        finally:
            lost = self._leave(writer)
        self._say_notices(writer)
        if lost:
            self._warn(f"given after the last save, and not kept: {', '.join(lost)}")

    def _leave(self, writer: Writer) -> list[str]:
        """Writes what still waits and frees the run, if it is this process's; answers what could not be kept."""
        stepless, events = self._take_metrics(None, {})
        lost = [f"metric {name!r} of no step" for name in stepless]
        lost += [*(f"attachment {name!r}" for name in self._new_attachments), *self._tracking.worker.left()]
        if self.rank != 0:
            return lost
        events += [Config(dict(self._new_config))] if self._new_config else []
        events += writer.owed()

        def decide(history: History) -> list[Any] | None:
            if history.term == writer.term.number:
                return [*events, Close(writer.term.nonce)]
            if events:
                check_fence(history, writer.term, self._vault.where)
            return None

        self._append(decide)
        return lost

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Error as other:  # the error that is on its way says more
            self._vault.seam.tell(f"everystep: {other}")

    def _at_exit(self) -> None:
        if self._vault.seam.pid() != self._pid:
            return  # a forked child has no threads of its own
        try:
            self.close()
        except Error as error:
            self._vault.seam.tell(f"everystep: {error}")
