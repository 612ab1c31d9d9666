"""A run in a rehearsal: saves where the cue says, drops nothing, notes down what it sees, and ends the process."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any
from weakref import WeakSet

from everystep import rules
from everystep.checkpoint import Checkpoint
from everystep.errors import NotFound, UsageError
from everystep.forecast import Planned, by_hand, foresee
from everystep.loop import Batches, Loop, Steps
from everystep.rehearsal.cue import VARIABLE, About, Cue, Note, Noted, Resumed, Warned, cue_of, note
from everystep.rehearsal.sight import in_sight, surroundings
from everystep.run import Run
from everystep.save import Saved, Writer
from everystep.schema import LoadReport
from everystep.vault import Committed, Place

_RUNS: WeakSet[RehearsedRun] = WeakSet()
"""Those of this process: what one of them tracks is captured."""


class RehearsedRun(Run):
    """Made instead of a Run where the environment holds a cue."""

    def __init__(self, place: Place, name: str, **given: Any) -> None:
        super().__init__(place, name, **given)
        self._cue = _required(cue_of(place.seam))
        self._ahead = sorted(set(self._cue.save_at))
        self._began = 0
        self._loop: Loop | None = None
        self._rule = rules.AnyOf([])
        self._top: int | None = None
        self._clock: float | None = None
        self._paces: list[float] = []
        self._saved: int | None = None
        self._by_hand: list[int] = []
        _RUNS.add(self)
        self._loader: Iterable[Any] | None = None

    def steps(
        self,
        total: int | None = None,
        *,
        save_every: int | None = None,
        save_on: rules.Rule | None = None,
        strict: bool = True,
    ) -> Steps:
        self._rule = rules.union(save_every, save_on)
        loop = super().steps(total, save_on=self._watched(), strict=strict)
        self._loop = loop
        return loop

    def batches(
        self,
        loader: Iterable[Any],
        *,
        epochs: int,
        save_every: int | None = None,
        save_on: rules.Rule | None = None,
        strict: bool = True,
    ) -> Batches:
        self._rule, self._loader = rules.union(save_every, save_on, epochs=True), loader
        loop = super().batches(loader, epochs=epochs, save_on=self._watched(), strict=strict)
        self._loop = loop
        return loop

    def start_from(
        self, source: str | Checkpoint, *, only: str | Collection[str] | None = None, strict: bool = True
    ) -> LoadReport | None:
        try:
            return super().start_from(source, only=only, strict=strict)
        except NotFound:  # other runs are not touched either, so none is there
            self._warn(f"start_from({source!r}) is left out in a rehearsal: it begins with what the script made")
            return None

    def _watched(self) -> rules.Rule:
        """The script's rule, and one that is asked at every top of the loop. A loop that has nothing to save is left
        alone: what counts then is what the script saves by hand."""
        return rules.AnyOf([*self._rule.rules, _Watch(self)]) if self._tracked else self._rule

    def _at_top(self, step: int) -> str | None:
        """Takes the time of the step; answers why it should be saved."""
        now = self._vault.seam.monotonic()
        if self._clock is not None:
            self._paces.append(now - self._clock)
        self._clock, self._top = now, step
        return "a rehearsal" if self._is_point(step) and not self._cue.by_hand else None

    def _is_point(self, step: int) -> bool:
        return bool(self._ahead) and step >= self._ahead[0] and step > self._began

    def _open(self) -> Writer:
        first = self._writer is None
        writer = super()._open()
        if first:
            writer._keeper = _KeepsAll()
        return writer

    def _save(self, step: int, state: Any, metrics: Mapping[str, Any], reason: str, *, may_skip: bool) -> Saved:
        begun = self._vault.seam.monotonic()
        saved = super()._save(step, state, metrics, reason, may_skip=False)
        self._open().wait()  # so that what a save costs is measured alone, and not what two at once do
        self._take_time(step, begun)
        point = self._is_point(step)
        if point:
            del self._ahead[0]
            self._note(self._about())
        self._note(Noted(self._vault.storage.url, self.name, step, point))
        if point and not self._ahead:
            self.close()
            sys.exit(0)
        return saved

    def _take_time(self, step: int, begun: float) -> None:
        """Keeps the clock of steps free of saves; without a loop, steps are timed between saves."""
        now, clock = self._vault.seam.monotonic(), self._clock
        self._clock = now
        if step != self._top:
            self._by_hand.append(step)
        if clock is not None and self._top is None and self._saved is not None and step > self._saved:
            self._paces.append((begun - clock) / (step - self._saved))
        if clock is not None and self._top is not None and step != self._top:
            self._clock = clock + now - begun  # in the middle of a step, which goes on
        self._saved = step

    def _resume_from(self, writer: Writer, commit: Committed, strict: bool) -> int:
        self._began = super()._resume_from(writer, commit, strict)
        self._note(Resumed(self.name, self._began))
        return self._began

    def _warn(self, text: str) -> None:
        self._note(Warned(self.name, text))
        super()._warn(text)

    def _note(self, what: Note) -> None:
        if self.rank == 0:
            note(self._cue, self._vault.seam, what)

    def _about(self) -> About:
        report = self.report
        misfits = ("missing", "unexpected", "reshaped") if report is not None else ()
        pace = median(self._paces) if self._paces else None
        return About(
            run=self.name,
            loop={Steps: "steps", Batches: "batches"}.get(type(self._loop), "by hand"),
            tracked={name: type(target).__name__ for name, target in self._tracked.items()},
            rng=self._tracking.with_rng,
            step_seconds=pace,
            planned=self._planned(pace),
            misfits=[f"{title}: {path}" for title in misfits for path in getattr(report, title)],
            sights=in_sight([target for run in _RUNS for target in run._tracked.values()], self._loader),
            surroundings=surroundings(self._vault.seam),
        )

    def _planned(self, pace: float | None) -> Planned:
        total, epoch = self._loop.extent() if self._loop is not None else (None, None)
        rule: rules.Rule = self._rule
        if self._cue.save_every is not None or not self._rule.rules:
            rule = by_hand(self._by_hand, self._cue.save_every)
        return foresee(rule, self._cue.total or total, epoch, pace, *self._rules)


class _Watch(rules.Rule):
    """Asked at each top of a loop."""

    def __init__(self, run: RehearsedRun) -> None:
        self._run = run

    def due(self, moment: rules.Moment) -> str | None:
        return self._run._at_top(moment.step)


class _KeepsAll:
    """A rehearsal compares and measures every checkpoint, so no rule drops one."""

    def after_commit(self) -> list[str]:
        return []

    def make_room(self, nbytes: int) -> bool:
        return False


def _required(cue: Cue | None) -> Cue:
    if cue is None:
        raise UsageError("this is no rehearsal", do=f"only a process with {VARIABLE} is part of one")
    return cue
