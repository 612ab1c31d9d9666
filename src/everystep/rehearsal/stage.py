"""The stage: runs a script under a cue in a scratch folder, and reads what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from everystep.checkpoint import Checkpoint
from everystep.errors import NotFound, RehearsalFailed
from everystep.past import PastRun
from everystep.rehearsal.cue import VARIABLE, About, Cue, Note, Noted, Opened, Resumed, Warned, read_notes
from everystep.repository import open as open_repository
from everystep.seam import Seam
from everystep.storage.local import TEMPORARY
from everystep.vault import Committed
from everystep.vault.names import record_slot, run_folder

LINES_KEPT = 20
Told = Callable[[str], None]


@dataclass(frozen=True)
class Take:
    """One performance of the script, and what it left."""

    folder: str
    seconds: float
    notes: list[Note]
    seam: Seam
    began_with: int = 0
    """The run's term that it found; what has a higher one is its own."""

    @cached_property
    def saves(self) -> list[Noted]:
        return [note for note in self.notes if isinstance(note, Noted)]

    @property
    def points(self) -> list[Noted]:
        """The saves that the cue asked for, of the run that the first of them is of."""
        found = [note for note in self.saves if note.point]
        return [note for note in found if (note.folder, note.run) == (found[0].folder, found[0].run)]

    def has_resumed(self, run: str) -> bool:
        return any(isinstance(note, Resumed) and note.run == run for note in self.notes)

    @property
    def warnings(self) -> list[str]:
        """What everystep warned of, each once."""
        return list(dict.fromkeys(note.text for note in self.notes if isinstance(note, Warned)))

    def about(self, run: str) -> About | None:
        """What the run's process noted down last; None if it came to no point."""
        return next((note for note in reversed(self.notes) if isinstance(note, About) and note.run == run), None)

    def place_of(self, folder: str) -> str:
        """The place that the script asked for when it got this folder."""
        return next(
            note.place for note in self.notes if isinstance(note, Opened) and _name(note.folder) == _name(folder)
        )

    def past(self, point: Noted) -> PastRun:
        """The run that a save is of, as this take left it."""
        return open_repository(f"{self.folder}/{_name(point.folder)}", seam=self.seam)[point.run]

    def own(self, point: Noted) -> list[Checkpoint]:
        """The checkpoints of a point's run that this take has saved itself, in the order of saving."""
        try:
            kept = self.past(point).checkpoints(all=True)
        except NotFound:
            return []
        return [checkpoint for checkpoint in kept if checkpoint.term > self.began_with]


@dataclass(frozen=True)
class Stage:
    """Where takes of one script are made."""

    command: Sequence[str]
    folder: str
    seam: Seam
    timeout: float
    told: Told
    heard: Told

    def take(self, title: str, cue: Cue, began_with: int = 0) -> Take:
        """Runs the script in the cue's folder to its end.

        Raises:
            RehearsalFailed: if it fails, takes too long, or never opens a repository.
        """
        self.told(title)
        begun = self.seam.monotonic()
        output = f"{cue.folder}/output"
        environment = {VARIABLE: msgspec.json.encode(cue).decode()}
        try:
            code = self.seam.run_script(self.command, environment, output, self.timeout, self.heard)
        except OSError as error:
            raise RehearsalFailed(
                f"the script cannot be started: {error.strerror}", where=" ".join(self.command), do="check its name"
            ) from error
        seconds = self.seam.monotonic() - begun
        take = Take(cue.folder, seconds, read_notes(cue.folder, self.seam), self.seam, began_with)
        self._check(code, take, title, output)
        return take

    def new_folder(self, name: str) -> str:
        folder = f"{self.folder}/{name}"
        self.seam.files.mkdir(folder)
        return folder

    def _check(self, code: int | None, take: Take, title: str, output: str) -> None:
        lines = [line for line in self.seam.files.read_text(output).splitlines() if line.strip()]
        failed: RehearsalFailed | None = None
        if code is None:
            saved = (
                f"it saved {len(take.saves)} times, up to step {take.saves[-1].step}" if take.saves else "no save yet"
            )
            failed = RehearsalFailed(
                f"the script was ended after {self.timeout:g} s: {saved}",
                do="give it more time with --timeout; a script that saves by hand ends only with the saves asked for",
            )
        elif code != 0:
            said = next((f": {line}" for line in reversed(lines) if not line[0].isspace()), "")
            failed = RehearsalFailed(
                f"the script ended with exit code {code}{said}",
                do="run it by itself; in a rehearsal its repository is empty at first. If its loop saves by hand, "
                "with state= that it needs again: --by-hand",
            )
        elif not any(isinstance(note, Opened) for note in take.notes):
            failed = RehearsalFailed(
                "the script never opens a repository", do="everystep.open(…) in it; see docs/rehearsal.md"
            )
        elif not take.saves:
            failed = RehearsalFailed(
                "the script never saves",
                do="run.track(model=…) and for step in run.steps(…, save_every=…), or run.save(step, state=…)",
            )
        if failed is not None:
            failed.where, failed.output = f"{' '.join(self.command)} ({title})", tuple(lines[-LINES_KEPT:])
            raise failed


def leave_at(take: Take, point: Noted, target: str) -> int:
    """Links into a folder what a take would have left if it had been killed when this save had become durable; answers
    the term of then.

    What lies on disk is never changed, only added to: a repository without its last records is the one of that time.
    """
    moment = _committed(take, point)
    for folder in sorted({_name(note.folder) for note in take.saves}):
        source = f"{take.folder}/{folder}"
        repository = open_repository(source, seam=take.seam)
        last: dict[str, int] = {}
        for name in repository.runs():
            slots = [commit.slot for commit in _commits(repository[name]) if commit.time <= moment.time]
            last[run_folder(name)] = max(slots, default=-1)
        if folder == _name(point.folder):
            last[run_folder(point.run)] = moment.slot
        _link(take.seam, source, f"{target}/{folder}", last, "")
    return moment.term


def _commits(past: PastRun) -> list[Committed]:
    return list(past._history().commits.values())


def _committed(take: Take, point: Noted) -> Committed:
    """
    Raises:
        RehearsalFailed: if the script itself has dropped it.
    """
    found = [commit for commit in _commits(take.past(point)) if commit.event.step == point.step]
    if not found:
        raise RehearsalFailed(f"the checkpoint of step {point.step} is not there any more", where=point.run)
    return found[-1]


def _name(folder: str) -> str:
    return folder.rpartition("/")[2]


def _link(seam: Seam, source: str, target: str, last: dict[str, int], key: str) -> None:
    """Links a folder, the records of each run's log up to its last one."""
    seam.files.mkdir(target)
    for name, is_folder in seam.files.names(source):
        if name.startswith(TEMPORARY):
            continue
        inner = f"{key}{name}"
        if is_folder:
            if last.get(f"{inner}/", 0) >= 0:
                _link(seam, f"{source}/{name}", f"{target}/{name}", last, f"{inner}/")
            continue
        slot = record_slot(name) if key.endswith("/log/") else None
        if slot is None or slot <= last.get(key.removesuffix("log/"), slot):
            seam.files.link(f"{source}/{name}", f"{target}/{name}")
