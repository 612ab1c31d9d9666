"""A place that holds runs: open it, look what is there, start or continue one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import Any

from everystep import between
from everystep.checkpoint import Checkpoint
from everystep.errors import NotFound, UsageError
from everystep.front import Behind, FrontPast, FrontRun
from everystep.importing import ImportReport, Progress, bring, look
from everystep.past import PastRun
from everystep.rehearsal.cue import cue_of, placed
from everystep.rehearsal.run import RehearsedRun
from everystep.rules import Rule, check_rule, mode_of
from everystep.run import Run
from everystep.seam import REAL, Seam
from everystep.settings import DEFAULT, LIMITS, Settings
from everystep.storage import open_storage
from everystep.upkeep import Carried, CheckReport, Lag, Mirrored, check_repository, mirror
from everystep.vault import Place


class Repository:
    """Made by `everystep.open`. Nothing is written before the first save."""

    def __init__(self, place: Place, behind: Behind | None = None) -> None:
        self._place, self._behind = place, behind

    def __repr__(self) -> str:
        return f"<repository {self.url}>"

    @property
    def url(self) -> str:
        return str(self._place.storage.url)

    @property
    def behind(self) -> str | None:
        """Where the place behind is; None without one."""
        return self._behind.url if self._behind is not None else None

    @property
    def exists(self) -> bool:
        """Whether there is a repository yet."""
        return self._place.exists

    def runs(self) -> list[str]:
        """Names of all runs, sorted; with a place behind, of those there, too."""
        found = set(self._place.runs()) if self.exists else set()
        if self._behind is not None:
            found.update(self._behind.runs())
        return sorted(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs())

    def __contains__(self, name: object) -> bool:
        return name in self.runs()

    def __getitem__(self, name: str) -> PastRun:
        """A run to read; it is never taken over.

        Raises:
            NotFound: naming the runs with near names.
        """
        runs = self.runs()
        past = PastRun(self._place, name) if self._behind is None else FrontPast(self._place, name, self._behind)
        if name not in runs:
            near = difflib.get_close_matches(name, runs, 3) or runs[:5]
            raise NotFound(
                f"no run {name!r}" if self.exists else "there is no repository here yet",
                where=self.url,
                do=f"runs here: {', '.join(near)}" if near else "the first save of a run makes it",
            )
        return past

    def query(self, condition: str, *, all: bool = False) -> list[Checkpoint]:
        """Checkpoints of every run that meet a condition, by run and step; see `PastRun.query`.

        Raises:
            UsageError: for what is no condition, or a metric that no run has.
        """
        found: list[Checkpoint] = []
        unknown: list[UsageError] = []
        runs = self.runs()
        for name in runs:
            try:
                found += self[name].query(condition, all=all)
            except UsageError as error:  # another run may have that metric
                unknown.append(error)
        if unknown and len(unknown) == len(runs):
            raise unknown[0]
        return found

    def ranking(self, metric: str, mode: str | None = None, *, limit: int = 10) -> list[Checkpoint]:
        """The checkpoints of all runs with the best values of a metric, best first; see `PastRun.ranking`.

        Raises:
            NotFound: if no checkpoint has the metric.
        """
        mode = mode_of(metric, mode)
        found: list[Checkpoint] = []
        for name in self.runs():
            with suppress(NotFound):  # another run may have that metric
                found += self[name].ranking(metric, mode, limit=limit)
        if not found:
            names = {known for name in self.runs() for known in self[name].metric_names}
            near = difflib.get_close_matches(metric, names, 3) or sorted(names)[:5]
            raise NotFound(
                f"no checkpoint of any run has a metric {metric!r}",
                where=self.url,
                do=f"nearest: {', '.join(near)}" if near else "the runs have none yet",
            )
        sign = 1 if mode == "min" else -1
        return sorted(found, key=lambda checkpoint: sign * checkpoint.metrics[metric])[:limit]

    def run(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        when_busy: str = "wait",
        takeover: bool = False,
        rank: int | None = None,
        ranks: int | None = None,
        launch: str | None = None,
        keep: Rule | None = None,
        keep_full: Rule | None = None,
        keep_behind: Rule | None = None,
        quota_bytes: int | None = None,
    ) -> Run:
        """A run to write. It is taken by `resume`, `steps`, `batches` or the first `save`, and created by the latter.

        Args:
            config: plain values kept with the run.
            keep: which checkpoints stay: last(10) | best(3, "val_loss") | every(1000). The newest and tagged ones do
                always. None keeps all.
            keep_full: which of them also keep their optimizer state; None: all.
            keep_behind: which stay in the place behind, where there is one; None: all. What `keep` drops here is
                dropped once it is there, or is not to be there.
            quota_bytes: a warning when the run holds more; what can still be undone is freed before.
            when_busy: what a save does while the one before is under way: "wait" for it, or "skip" itself.
            takeover: do not wait for an owner that may live; it is told at its next save.
            rank, ranks, launch: for several processes that save one checkpoint together; all give the same launch id.
                By default as the framework's process group says.
        """
        rehearsed = cue_of(self._place.seam) is not None
        make: Callable[..., Run] = RehearsedRun if rehearsed else Run
        if self._behind is not None and not rehearsed:
            rule = check_rule(keep_behind, "keep_behind=") if keep_behind is not None else None
            make = partial(FrontRun, behind=self._behind, keep_behind=rule)
        elif keep_behind is not None and not rehearsed:
            raise UsageError("there is no place behind", do='everystep.open("runs", behind="s3://bucket/prefix")')
        return make(
            self._place,
            name,
            config=dict(config or {}),
            when_busy=when_busy,
            takeover=takeover,
            rank=rank,
            ranks=ranks,
            launch=launch,
            keep=keep,
            keep_full=keep_full,
            quota_bytes=quota_bytes,
        )

    def import_from(
        self,
        path: str,
        run: str | None = None,
        *,
        dry_run: bool = False,
        takeover: bool = False,
        progress: Progress | None = None,
    ) -> ImportReport:
        """Old checkpoint files become a run: steps, epochs and metrics are recovered from contents and names.

        Nothing in a file runs, and the folder is only read. Steps that the run has already are left as they are.

        Args:
            path: a folder of files, or one file: .pth, .pt, .ckpt, .bin, .safetensors, .npz.
            run: the run's name; by default that of the folder or file.
            dry_run: only look.
            progress: told (checkpoints done, checkpoints in all, the file at hand).

        Returns:
            What came in from where, and what was left out and why.

        Raises:
            NotFound: if there is no checkpoint at all.
            RunInUse: if a process writes that run.
        """
        path = self._place.seam.files.absolute(path if isinstance(path, str) else path.__fspath__())
        seen = look(self._place, path)
        name = run or path.rstrip("/").rpartition("/")[2].partition(".")[0] or "imported"
        with self.run(name, takeover=takeover).track(rng=False) as target:
            return bring(target, self._place, path, seen, dry_run=dry_run, progress=progress)

    def in_front_of(self, behind: str) -> Repository:
        """This repository with a place behind it, as `open(behind=…)` gives it.

        Raises:
            UsageError: if both are the same place.
        """
        front = self._place
        far = open_storage(_path(behind), front.seam, front.settings)
        between.check_apart(front.storage, far)
        return Repository(front, Behind(str(far.url), lambda: Place(far, front.seam, front.settings)))

    def lag(self, run: str) -> Lag | None:
        """What the place behind has not got yet of a run that is here; None where there is no place behind.

        Raises:
            StorageError: if it cannot be reached.
        """
        return FrontPast(self._place, run, self._behind).lag if self._behind is not None else None

    def push(
        self,
        target: str | Repository,
        run: str | Sequence[str] | None = None,
        *,
        keep: Rule | None = None,
        only: str | Sequence[str] | None = None,
        as_run: str | None = None,
        dry_run: bool = False,
        takeover: bool = False,
        progress: between.Progress | None = None,
    ) -> list[Carried]:
        """Sends checkpoints to another repository, which is made if there is none; each is committed there once.

        What the other has is not sent: checkpoints by their id, chunks by their hash. Deltas stay deltas, and what they
        lean on goes with them. Every byte that is sent has been checked. Tags, notes, metrics, files and configuration
        go, too; what the other has dropped stays dropped. Cut off, it goes on from there when it is called again.

        Args:
            target: a folder, a URL, or a repository.
            run: "resnet", "resnet@best:val_loss", "resnet@1200", or several of these; None for all runs.
            keep: of these, only what a rule keeps: everystep.last(3).
            only: a path or several: that part of the state alone, as a run of its own, called "resnet.params.head".
            as_run: what the run is called there.
            dry_run: only look what there is to send.
            takeover: do not wait for a process that may be writing the run there.
            progress: told (run, checkpoints done, checkpoints in all, bytes sent).

        Returns:
            What went there, run by run.

        Raises:
            NotFound, UsageError: for what there is not.
            RunInUse: if another process writes the run there.
            Damaged: if a byte is not what was saved; what went there before stays.
            ReadOnly: if the other is a mirror.
        """
        return between.carry(
            self._place, self._place_of(target), run, keep=keep, only=only, as_run=as_run, dry_run=dry_run,
            takeover=takeover, reason="push", progress=progress,
        )  # fmt: skip

    def pull(
        self,
        source: str | Repository,
        run: str | Sequence[str] | None = None,
        *,
        keep: Rule | None = None,
        only: str | Sequence[str] | None = None,
        as_run: str | None = None,
        dry_run: bool = False,
        takeover: bool = False,
        progress: between.Progress | None = None,
    ) -> list[Carried]:
        """Brings checkpoints from another repository: `push` seen from the other side. Reads no more than it brings."""
        return between.carry(
            self._place_of(source), self._place, run, keep=keep, only=only, as_run=as_run, dry_run=dry_run,
            takeover=takeover, reason="pull", progress=progress,
        )  # fmt: skip

    def mirror(
        self,
        target: str | Repository,
        *,
        prune: bool = False,
        dry_run: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Mirrored:
        """Keeps a copy of all of this repository, byte for byte, in a place where nobody else writes.

        Copies what is new since the last time, checked before, packs before the records that need them.

        Args:
            target: an empty folder or URL, or an earlier mirror of this repository.
            prune: delete packs in the mirror that nothing needs any more. Without it, nothing is ever deleted there.
            progress: told (run, packs copied, packs in all).

        Raises:
            Conflict: if something else lies there.
            Damaged: if a byte is not what was saved; the mirror stays at what it was.
        """
        if not self.exists:
            raise NotFound("there is no repository here yet", where=self.url, do="the first save of a run makes it")
        place = self._place
        if isinstance(target, Repository):
            storage = target._place.storage
        else:
            storage = open_storage(_path(target), place.seam, place.settings)
        between.check_apart(place.storage, storage)
        return mirror(place, storage, prune=prune, dry_run=dry_run, progress=progress)

    @property
    def is_mirror(self) -> bool:
        """Whether this is the mirror of another repository: to read only."""
        return self._place.is_mirror

    def promote(self) -> None:
        """Makes a mirror a repository that can be written, for when the original is gone. `mirror` refuses it from then
        on. Do not go on writing the original as well: both have one id and one past.

        Raises:
            UsageError: if it is no mirror.
        """
        if not self.is_mirror:
            raise UsageError("this is no mirror", where=self.url, do="it can be written as it is")
        self._place.promote()

    def _place_of(self, other: str | Repository) -> Place:
        if isinstance(other, Repository):
            return other._place
        return _place_at(other, self._place.seam, self._place.settings)

    def check(
        self, *, data: bool = True, read: float | Fraction = 1, run: str | None = None, progress: Any = None
    ) -> CheckReport:
        """Checks every record, manifest and (with `data`) every byte of every checkpoint of every run, or of one.

        Args:
            read: how much of the data: Fraction(1, 10) reads a tenth of the chunks, drawn anew at each call.
            progress: told (run, checkpoints checked, checkpoints in all).

        Raises:
            UsageError: if `read` is no share.
        """
        if not 0 < read <= 1:
            raise UsageError(f"read={read} is not a share", do="above 0 and at most 1: Fraction(1, 10)")
        runs = self.runs() if run is None else [self[run].name]
        return check_repository(self._place, runs, data=data, share=float(read), progress=progress)

    def now(self) -> float:
        """Seconds since the epoch, by the clock that stamps what is saved here: ages are differences from it."""
        return self._place.seam.now()

    def local_time(self, seconds: float) -> str:
        """Seconds since the epoch as local date and time."""
        return self._place.seam.local_time(seconds)


def open(
    place: str, *, behind: str | None = None, settings: Settings | None = None, seam: Seam | None = None
) -> Repository:
    """A repository in a folder or at a URL. Nothing is written before the first save.

    Args:
        place: a folder, or a URL: s3://bucket/prefix, gs://…, az://…, hdfs://…, memory://name.
        behind: another place. What is saved is durable in the first, at its speed, and goes there in the background;
            what is not in the first any more is read from there.
        settings: what can be tuned; see docs/settings.md.
        seam: the outside world; tests hand in another.

    Raises:
        ForeignRepository, NewerFormat, Damaged, UsageError: for what is not a repository that this everystep reads.
    """
    seam = seam or REAL
    checked = _checked(settings or DEFAULT)
    front = _place_at(place, seam, checked)
    if behind is None or cue_of(seam) is not None:  # a rehearsal is about the first alone
        return Repository(front)
    return Repository(front).in_front_of(behind)


def _place_at(place: Any, seam: Seam, settings: Settings) -> Place:
    return Place(open_storage(placed(_path(place), seam), seam, settings), seam, settings)


def _path(place: Any) -> str:
    return place if isinstance(place, str) else str(place.__fspath__())


def _checked(settings: Settings) -> Settings:
    for name, (least, most) in LIMITS.items():
        value, whole = getattr(settings, name), type(getattr(DEFAULT, name)) is int
        if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
            raise UsageError(
                f"the setting {name}={value!r} is not {'a whole number' if whole else 'a number'} "
                f"between {least} and {most}",
                do="see docs/settings.md for what it does",
            )
    return settings
