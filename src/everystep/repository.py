"""A place that holds runs: open it, look what is there, start or continue one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any

from everystep.checkpoint import Checkpoint
from everystep.errors import NotFound, UsageError
from everystep.importing import ImportReport, Progress, bring, look
from everystep.past import PastRun
from everystep.rehearsal.cue import cue_of, placed
from everystep.rehearsal.run import RehearsedRun
from everystep.rules import Rule, mode_of
from everystep.run import Run
from everystep.seam import REAL, Seam
from everystep.settings import DEFAULT, LIMITS, Settings
from everystep.storage import open_storage
from everystep.upkeep import CheckReport, check_repository
from everystep.vault import Place


class Repository:
    """Made by `everystep.open`. Nothing is written before the first save."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __repr__(self) -> str:
        return f"<repository {self.url}>"

    @property
    def url(self) -> str:
        return str(self._place.storage.url)

    @property
    def exists(self) -> bool:
        """Whether there is a repository yet."""
        return self._place.exists

    def runs(self) -> list[str]:
        """Names of all runs, sorted."""
        return sorted(self._place.runs()) if self.exists else []

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs())

    def __contains__(self, name: object) -> bool:
        return name in self.runs()

    def __getitem__(self, name: str) -> PastRun:
        """A run to read; it is never taken over.

        Raises:
            NotFound: naming the runs with near names.
        """
        past = PastRun(self._place, name)
        runs = self.runs()
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
        quota_bytes: int | None = None,
    ) -> Run:
        """A run to write. It is taken by `resume`, `steps`, `batches` or the first `save`, and created by the latter.

        Args:
            config: plain values kept with the run.
            keep: which checkpoints stay: last(10) | best(3, "val_loss") | every(1000). The newest and tagged ones do
                always. None keeps all.
            keep_full: which of them also keep their optimizer state; None: all.
            quota_bytes: a warning when the run holds more; what can still be undone is freed before.
            when_busy: what a save does while the one before is under way: "wait" for it, or "skip" itself.
            takeover: do not wait for an owner that may live; it is told at its next save.
            rank, ranks, launch: for several processes that save one checkpoint together; all give the same launch id.
                By default as the framework's process group says.
        """
        make = Run if cue_of(self._place.seam) is None else RehearsedRun
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


def open(place: str, *, settings: Settings | None = None, seam: Seam | None = None) -> Repository:
    """A repository in a folder or at a URL. Nothing is written before the first save.

    Args:
        place: a folder, or memory://name.
        settings: what can be tuned; see docs/settings.md.
        seam: the outside world; tests hand in another.

    Raises:
        ForeignRepository, NewerFormat, Damaged, UsageError: for what is not a repository that this everystep reads.
    """
    seam = seam or REAL
    path = place if isinstance(place, str) else place.__fspath__()
    return Repository(Place(open_storage(placed(path, seam), seam), seam, _checked(settings or DEFAULT)))


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
