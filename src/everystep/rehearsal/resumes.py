"""Is a resumed run the run that was never interrupted? Asked of a script, and answered leaf by leaf."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from everystep.checkpoint import Checkpoint
from everystep.difference import Side, compare
from everystep.errors import RehearsalFailed, UsageError
from everystep.rehearsal.cue import About, Cue, Noted
from everystep.rehearsal.sight import Sight
from everystep.rehearsal.stage import Stage, Take, Told, leave_at
from everystep.seam import REAL, Seam

EXACT, DIFFERS, UNSTEADY, STARTS_OVER = "exact", "differs", "not deterministic", "starts over"
_ROLES = ("weights", "optimizer", "buffer", "other", "rng", "value")


@dataclass(frozen=True)
class Differing:
    """A leaf or a plain value that is not the same. Shares and differences are None for what has no numbers."""

    path: str
    role: str
    """Of a leaf; "value" for a plain value."""
    kind: str
    """"changed", "added", "removed" or "reshaped", seen from the run that was not interrupted."""
    share: float | None = None
    """Share of elements of which any bit differs."""
    largest: float | None = None
    """Largest absolute difference of an element."""
    before: Any = None
    after: Any = None


@dataclass(frozen=True)
class ResumeReport:
    """What came of a rehearsed interruption."""

    verdict: str
    """"exact"; "differs"; "not deterministic", where the same script differs from itself without an interruption
    between, or from the same checkpoint; "starts over", where it does not go on from its checkpoint."""
    run: str
    place: str
    """Where the script keeps it; neither read nor written."""
    interrupted_at: int
    compared_at: int
    leaves: int
    nbytes: int
    """Of the state that was compared."""
    compared: tuple[str, str]
    """What `differing` is between."""
    differing: list[Differing] = field(default_factory=list)
    untracked: list[str] = field(default_factory=list)
    """What the script holds and does not track; a few steps need not show it."""
    causes: list[str] = field(default_factory=list)
    """What may be behind it, the likeliest first."""
    warnings: list[str] = field(default_factory=list)
    """What everystep said on the way."""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return self.verdict == EXACT


def verify_resume(
    script: str | Sequence[str],
    *,
    after: int = 2,
    steps: int = 2,
    ignore: Sequence[str] = (),
    by_hand: bool = False,
    scratch: str | None = None,
    timeout: float = 1800.0,
    told: Told = lambda text: None,
    heard: Told = lambda text: None,
    seam: Seam | None = None,
) -> ResumeReport:
    """Runs a training script in a scratch folder, once through and once interrupted, and compares all that is saved.

    Args:
        script: a Python file, or a whole command.
        after: steps before the interruption. A script that saves by hand: its first save from there on.
        steps: steps after it, until both are compared.
        ignore: paths that may differ, with * and ?, such as "state/started_at".
        by_hand: loops save nothing by themselves; what counts is what the script saves by hand in them.
        scratch: a folder for the checkpoints of the rehearsal, about four states; removed at the end.
        timeout: seconds for each time that the script runs.
        told: is told what is done now.
        heard: is told what the script prints.

    Raises:
        RehearsalFailed: if the script fails, takes too long, or saves nothing that can be compared.
    """
    if after < 1 or steps < 1:
        raise UsageError("a rehearsal needs steps before the interruption and after it", do="--after 2 --steps 2")
    seam = seam or REAL
    command = [sys.executable, script] if isinstance(script, str) else list(script)
    with seam.scratch_folder(scratch) as folder:
        stage = Stage(command, folder, seam, timeout, told, heard)
        return _Trial(stage, after, steps, tuple(ignore), by_hand).judge()


class _Trial:
    """One script: as many takes as its verdict needs."""

    def __init__(self, stage: Stage, after: int, steps: int, ignore: tuple[str, ...], by_hand: bool) -> None:
        self._stage, self._after, self._steps, self._ignore, self._by_hand = stage, after, steps, ignore, by_hand
        self._begun = stage.seam.monotonic()

    def judge(self) -> ResumeReport:
        """Uninterrupted, then resumed from what the first take had left at the interruption: so the two need not begin
        alike. Only where they end differently, further takes tell whether the script differs from itself."""
        whole = self._whole("1. without an interruption", "whole")
        point, end = self._points(whole)
        resumed = self._resume("2. resumed in a new process", "resumed", whole, point, end)
        final, other = _of_step(whole.own(point), end), _of_step(resumed.own(point), end)
        story = _Story(whole, resumed, point, self._seconds)
        if final is None:
            raise RehearsalFailed(f"the checkpoint of step {end} is not there any more", where=point.run)
        if other is None or _starts_over(resumed, point):
            return story.starts_over(final)
        found = self._differing(final, other)
        names = ("uninterrupted", "resumed")
        if not found:
            return story.report(EXACT, final, names, [])
        again = self._resume("3. resumed once more", "again", whole, point, end)
        third = _of_step(again.own(point), end)
        if third is not None and not self._differing(other, third):
            return story.report(DIFFERS, final, names, found)
        # Two resumed runs differ. Where two uninterrupted ones do not, it is the resume that brings chance in. What
        # they differ in beside that, as in a generator that nobody seeds or uses, says nothing.
        paths = {one.path for one in found}
        second = self._whole("4. without an interruption, once more", "second")
        for step in (point.step, end):
            one, two = _of_step(whole.own(point), step), _of_step(second.own(point), step)
            apart = self._differing(one, two) if one is not None and two is not None else []
            apart = [difference for difference in apart if difference.path in paths]
            if apart:
                return story.report(UNSTEADY, final, ("uninterrupted", f"again, both at step {step}"), apart)
        return story.report(DIFFERS, final, names, found)

    def _seconds(self) -> float:
        return self._stage.seam.monotonic() - self._begun

    def _whole(self, title: str, name: str) -> Take:
        last = self._after + self._steps
        cue = Cue(self._stage.new_folder(name), [self._after, last], by_hand=self._by_hand)
        return self._stage.take(f"{title}, to step {last}", cue)

    def _resume(self, title: str, name: str, whole: Take, point: Noted, end: int) -> Take:
        folder = self._stage.new_folder(name)
        term = leave_at(whole, point, folder)
        cue = Cue(folder, [end], by_hand=self._by_hand)
        return self._stage.take(f"{title}, from step {point.step} to {end}", cue, term)

    def _points(self, whole: Take) -> tuple[Noted, int]:
        """The save to resume from, and the last step.

        Raises:
            RehearsalFailed: if there are not two saves.
        """
        if not whole.points:
            raise RehearsalFailed(
                f"the script ends at step {whole.saves[-1].step}, before the interruption at step {self._after}",
                do="interrupt it earlier, with --after; or let it make more steps",
            )
        point = whole.points[0]
        end = max(note.step for note in whole.saves if (note.folder, note.run) == (point.folder, point.run))
        if end <= point.step:
            raise RehearsalFailed(
                f"the script ends with its save at step {end}: nothing comes after it that could be compared",
                do="interrupt it earlier, with --after; or let it make more steps",
            )
        return point, end

    def _differing(self, one: Checkpoint, other: Checkpoint) -> list[Differing]:
        """All that is not the same, weights first, but what may differ."""
        sides = [Side(checkpoint._open(), "", {}, {}, {}) for checkpoint in (one, other)]
        base = sides[0].opened.base
        difference = compare(*sides, only=None, progress=None)
        roles = {leaf.path: leaf.role for side in reversed(sides) for leaf in side.opened.leaves()}
        found = [
            Differing(leaf.path, roles[leaf.path], leaf.kind, leaf.changed, leaf.largest, leaf.before, leaf.after)
            for leaf in difference.changed
        ]
        found += [
            Differing(value.path, "value", value.kind, None, None, value.before, value.after)
            for value in difference.values
        ]
        shown = [replace(one, path=one.path.removeprefix(f"{base}/") if base else one.path) for one in found]
        kept = [one for one in shown if not any(fnmatchcase(one.path, pattern) for pattern in self._ignore)]
        return sorted(kept, key=lambda one: _ROLES.index(one.role))


def _of_step(checkpoints: Sequence[Checkpoint], step: int) -> Checkpoint | None:
    """The newest of a step; or else the newest of all."""
    return next((one for one in reversed(checkpoints) if one.step == step), checkpoints[-1] if checkpoints else None)


def _starts_over(resumed: Take, point: Noted) -> bool:
    """Whether it saves steps again that were saved. A script that loads the checkpoint by itself need not say so."""
    return not resumed.has_resumed(point.run) and min(one.step for one in resumed.own(point)) <= point.step


@dataclass(frozen=True)
class _Story:
    """What happened in the first two takes, as a report tells it."""

    whole: Take
    resumed: Take
    point: Noted
    seconds: Callable[[], float]

    def report(
        self, verdict: str, final: Checkpoint, compared: tuple[str, str], differing: list[Differing]
    ) -> ResumeReport:
        leaves = final._open().leaves()
        place = self.whole.place_of(self.point.folder)
        said = ["the repository is in memory: nothing is there to resume from"] if place.startswith("memory://") else []
        return ResumeReport(
            verdict=verdict,
            run=self.point.run,
            place=place,
            interrupted_at=self.point.step,
            compared_at=final.step,
            leaves=len(leaves),
            nbytes=sum(leaf.nbytes for leaf in leaves),
            compared=compared,
            differing=differing,
            untracked=self._untracked(),
            causes=list(self._causes(verdict, differing)) if verdict != EXACT else [],
            warnings=list(dict.fromkeys([*said, *self.whole.warnings, *self.resumed.warnings])),
            seconds=self.seconds(),
        )

    def starts_over(self, final: Checkpoint) -> ResumeReport:
        report = self.report(STARTS_OVER, final, ("uninterrupted", "resumed"), [])
        place = report.place
        for note in self.resumed.saves:
            there = self.resumed.place_of(note.folder)
            if note.run != self.point.run:
                cause = f"it wrote run {note.run!r}, and {self.point.run!r} before: is a time or a chance in the name?"
            elif there != place:
                cause = f"it opened {there}, and {place} before: is a time or a chance in the name?"
            else:
                cause = f"it saved step {note.step} again: run.resume() comes before the first step of a loop by hand"
            return replace(report, causes=[cause])
        return report

    def _untracked(self) -> list[str]:
        about = self.whole.about(self.point.run)
        return untracked(about) if about is not None else []

    def _causes(self, verdict: str, differing: Sequence[Differing]) -> Iterator[str]:
        about, later = self.whole.about(self.point.run), self.resumed.about(self.point.run)
        yield from later.misfits if later is not None else []
        yield from self._untracked()
        roles = {one.role for one in differing}
        if roles == {"value"}:
            yield "only plain values differ: a clock or a counter in the state? If it may differ, --ignore its path"
        elif verdict == DIFFERS and "rng" in roles:
            yield "random numbers were drawn another number of times: who draws before the loop, or behind its back?"
        elif verdict == DIFFERS and about is not None and about.loop != "batches" and not about.sights:
            yield "the data: does what a step works on depend on anything but what is tracked and the step's number?"
        if verdict == UNSTEADY:
            yield from _chances(about.surroundings if about is not None else {})


def untracked(about: About) -> list[str]:
    """What the script holds and does not track, as sentences."""
    return [_sentence(sight, bool(about.tracked)) for sight in about.sights]


def _sentence(sight: Sight, tracks: bool) -> str:
    name = re.sub(r"\W+", "_", sight.name).strip("_")
    if sight.what == "loader":
        return (
            f"{sight.name} ({sight.kind}) begins anew in a resumed run: go through it with run.batches({sight.name}, …)"
        )
    what = "random numbers come from" if sight.what == "generator" else "there is state in"
    do = f"run.track({name}={sight.name})" if tracks else "is its state in what save(state=…) is given?"
    return f"{what} {sight.name} ({sight.kind}), which is not tracked: {do}"


def _chances(surroundings: dict[str, Any]) -> Iterator[str]:
    """What may make a program differ from itself."""
    yield "seeds: whatever draws before the run begins has to be seeded for two starts to be alike"
    if surroundings.get("PYTHONHASHSEED") == "random":
        yield "the order of sets of strings is another in each process: sort them, or set PYTHONHASHSEED=0"
    if "CUBLAS_WORKSPACE_CONFIG" in surroundings and not surroundings.get("torch deterministic algorithms"):
        yield "torch may choose kernels that add in any order: torch.use_deterministic_algorithms(True)"
    yield "clocks, threads, and what the operating system or another program decides"
