"""Before a long run: what of it is not captured, what a save costs it, and whether the disk will hold it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from everystep.checkpoint import Checkpoint
from everystep.errors import RehearsalFailed, UsageError
from everystep.forecast import Planned, free_bytes
from everystep.rehearsal.cue import About, Cue
from everystep.rehearsal.resumes import untracked
from everystep.rehearsal.stage import Stage, Take, Told
from everystep.schema import Leaf
from everystep.seam import REAL, Seam

PROBLEM, CAUTION = "problem", "caution"
STALL_SHARE_MAX = 0.05
"""Training that stands still for more than this share of its time is worth a word."""
NEARLY_FULL = 0.8


@dataclass(frozen=True)
class Section:
    """One section of the state: an object that is tracked, or what comes along."""

    name: str
    kind: str
    leaves: int
    nbytes: int
    roles: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class SaveCost:
    """What one save took: seconds that training stood still, and that the writer worked behind it; bytes."""

    step: int
    stall_seconds: float
    background_seconds: float
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class Finding:
    """Something to look at: a "problem", which the run will fail on, or a "caution"."""

    level: str
    text: str


@dataclass(frozen=True)
class Examination:
    """What a rehearsal of a few steps says of the planned run. None where it cannot be known."""

    run: str
    place: str
    """Where the script keeps it; neither read nor written."""
    loop: str
    sections: list[Section]
    saves: list[SaveCost]
    step_seconds: float | None
    """Median time of a step, saves not counted."""
    planned: Planned
    disk_bytes: int | None
    """What the checkpoints of the planned run will take up; with rules that drop, the most."""
    free_bytes: int | None
    """At the place."""
    environment: dict[str, Any]
    surroundings: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing was found that the run will fail on."""
        return all(finding.level != PROBLEM for finding in self.findings)

    @property
    def first(self) -> SaveCost:
        """The first save of a process: nothing is there yet that it could lean on."""
        return self.saves[0]

    @property
    def later(self) -> SaveCost | None:
        """A later one: the median of what was measured."""
        rest = self.saves[1:]
        if not rest:
            return None
        return SaveCost(
            rest[-1].step,
            median(save.stall_seconds for save in rest),
            median(save.background_seconds for save in rest),
            round(median(save.raw_bytes for save in rest)),
            round(median(save.stored_bytes for save in rest)),
        )


def examine(
    script: str | Sequence[str],
    *,
    steps: int = 5,
    total_steps: int | None = None,
    save_every: int | None = None,
    by_hand: bool = False,
    scratch: str | None = None,
    timeout: float = 1800.0,
    told: Told = lambda text: None,
    heard: Told = lambda text: None,
    seam: Seam | None = None,
) -> Examination:
    """Runs a training script for a few steps in a scratch folder, and says what the planned run will need.

    Args:
        script: a Python file, or a whole command.
        steps: how many; the last three are saved.
        total_steps, save_every: of the planned run, in steps; by default as the script's loop says.
        by_hand: loops save nothing by themselves; what counts is what the script saves by hand in them.
        scratch: a folder for the checkpoints of the rehearsal, on the disk whose speed is to be measured; removed at
            the end.
        timeout: seconds for the script.
        told: is told what is done now.
        heard: is told what the script prints.

    Raises:
        RehearsalFailed: if the script fails, takes too long, or saves nothing.
    """
    for name, value, least in (
        ("--steps", steps, 2),
        ("--total-steps", total_steps, 1),
        ("--save-every", save_every, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is too few", do=f"{name} {least} or more")
    seam = seam or REAL
    command = [sys.executable, script] if isinstance(script, str) else list(script)
    with seam.scratch_folder(scratch) as folder:
        stage = Stage(command, folder, seam, timeout, told, heard)
        points = [step for step in (steps - 2, steps - 1, steps) if step > 0]
        cue = Cue(stage.new_folder("whole"), points, total_steps, save_every, by_hand)
        take = stage.take(f"a rehearsal of {steps} steps", cue)
        return _examined(take, seam)


def _examined(take: Take, seam: Seam) -> Examination:
    point = take.points[0] if take.points else None
    about = take.about(point.run) if point is not None else None
    if point is None or about is None:
        raise RehearsalFailed(
            f"the script ends at step {take.saves[-1].step}, before the rehearsal was over",
            do="rehearse fewer steps, with --steps; or let it make more",
        )
    own = take.own(point)
    place = take.place_of(point.folder)
    saves = [_cost(checkpoint) for checkpoint in own]
    found = Examination(
        run=point.run,
        place=place,
        loop=about.loop,
        sections=_sections(own[-1], about),
        saves=saves,
        step_seconds=about.step_seconds,
        planned=about.planned,
        disk_bytes=None,
        free_bytes=free_bytes(place, seam),
        environment=own[-1].environment,
        surroundings=about.surroundings,
        seconds=take.seconds,
    )
    found = replace(found, disk_bytes=_disk(found, own[-1]))
    found.findings.extend(_findings(found, about, take))
    return found


def _cost(checkpoint: Checkpoint) -> SaveCost:
    cost = checkpoint.cost
    return SaveCost(
        checkpoint.step,
        cost["stall_seconds"],
        cost["encode_seconds"] + cost["write_seconds"],
        int(cost["raw_bytes"]),
        int(cost["stored_bytes"]),
    )


def _sections(checkpoint: Checkpoint, about: About) -> list[Section]:
    """The sections of the state, largest first."""
    by_name: dict[str, list[Leaf]] = {name: [] for name in about.tracked}
    for leaf in checkpoint._open().leaves():
        by_name.setdefault(leaf.path.partition("/")[0], []).append(leaf)
    found = [
        Section(
            name,
            about.tracked.get(name, ""),
            len(leaves),
            sum(leaf.nbytes for leaf in leaves),
            tuple(dict.fromkeys(leaf.role for leaf in leaves)),
            tuple(dict.fromkeys(leaf.dtype for leaf in leaves)),
        )
        for name, leaves in by_name.items()
    ]
    return sorted(found, key=lambda section: -section.nbytes)


def _disk(found: Examination, last: Checkpoint) -> int | None:
    """Where all is kept, each save costs what it stored. Where rules drop, what is kept may have to stand alone, and
    one more is there while it is written."""
    planned, later = found.planned, found.later or found.first
    if planned.saves is None:
        return None
    if not planned.drops:
        return found.first.stored_bytes + (planned.saves - 1) * later.stored_bytes
    if planned.kept is None or planned.full is None:
        return None
    leaves = last._open().leaves()
    whole = sum(leaf.nbytes for leaf in leaves)
    lasting = sum(leaf.nbytes for leaf in leaves if leaf.role != "optimizer") / whole if whole else 1.0
    largest = max(save.stored_bytes for save in found.saves)
    return round(largest * (planned.full + 1 + (planned.kept - planned.full) * lasting))


def _findings(found: Examination, about: About, take: Take) -> Iterator[Finding]:
    if found.disk_bytes is not None and found.free_bytes is not None:
        if found.disk_bytes > found.free_bytes:
            yield Finding(PROBLEM, "the disk is too small for the planned run: give it keep= rules, or save less often")
        elif found.disk_bytes > NEARLY_FULL * found.free_bytes:
            yield Finding(CAUTION, "the planned run nearly fills the disk")
    if found.place.startswith("memory://"):
        yield Finding(CAUTION, "the repository is in memory: it ends with the process")
    for text in untracked(about):
        yield Finding(CAUTION, text)
    for text in take.warnings:
        yield Finding(CAUTION, text)
    yield from _pace(found)
    yield from _plan(found.planned)


def _pace(found: Examination) -> Iterator[Finding]:
    """Whether training waits for saves."""
    cost, step, every = found.later or found.first, found.step_seconds, found.planned.every
    if not step or not every:
        return
    interval = every * step
    if cost.background_seconds > interval:
        least = int(cost.background_seconds / step) + 1
        yield Finding(
            CAUTION,
            f"the writer needs {cost.background_seconds:.3g} s for a save and gets {interval:.3g} s: training waits, "
            f'or leaves saves out with when_busy="skip"; save every {least} steps or less often',
        )
    if cost.stall_seconds > STALL_SHARE_MAX * interval:
        share = cost.stall_seconds / (cost.stall_seconds + interval)
        yield Finding(CAUTION, f"saves stop training for {share:.0%} of its time; save less often")


def _plan(planned: Planned) -> Iterator[Finding]:
    if planned.saves == 1:
        yield Finding(CAUTION, "only the last step will be saved: save_every=… or save_on=… in the loop")
    if planned.total is None:
        yield Finding(CAUTION, "how long the run will be is not known: --total-steps foretells the disk it needs")
    elif planned.saves is None:
        yield Finding(CAUTION, "how often it will save is not known: --save-every foretells the disk it needs")
    for rule in planned.unforeseen:
        yield Finding(CAUTION, f"what the rule {rule} saves is not counted: it depends on how the training goes")
