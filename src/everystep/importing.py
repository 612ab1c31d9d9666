"""Old files become a run: what was found is saved in the order of its steps, and what was not is listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from everystep.errors import Damaged, Error, Mismatch, NotFound
from everystep.exchange import DAMAGED, SAME, UNKNOWN, UNPLACED, Found, Imported, Skipped, Survey, each, survey, why_not
from everystep.run import Run
from everystep.vault import Place

Progress = Callable[[int, int, str], None]
"""Told (checkpoints done, checkpoints in all, the file at hand)."""


@dataclass(frozen=True)
class Brought:
    """A checkpoint that was found in old files; `checkpoint` is its id, empty after a dry run."""

    path: str
    step: int
    epoch: int | None
    metrics: dict[str, float]
    how: str
    nbytes: int
    checkpoint: str = ""
    not_understood: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class ImportReport:
    """What an import did, or after a dry run, would do."""

    run: str
    steps_from: str
    brought: list[Brought] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    file_bytes: int = 0
    """Of the files that came in."""
    stored_bytes: int = 0
    """What they take in the repository."""

    @property
    def saved_bytes(self) -> int:
        return self.file_bytes - self.stored_bytes


def look(place: Place, path: str) -> Survey:
    """What there is.

    Raises:
        NotFound: if nothing in it is a checkpoint, with what was seen.
    """
    seen = survey(path, place.seam, place.settings)
    if not seen.found:
        raise nothing(path, seen.skipped)
    return seen


def bring(run: Run, place: Place, path: str, seen: Survey, *, dry_run: bool, progress: Progress | None) -> ImportReport:
    """Saves what was found. Steps that the run has already are left as they are: an import that was cut off goes on.

    Raises:
        NotFound: if nothing of it could be taken.
    """
    report = ImportReport(run.name, seen.steps_from, skipped=list(seen.skipped))
    there = {checkpoint.step for checkpoint in run.checkpoints(all=True)}
    for found in seen.found:
        if found.step in there:
            report.skipped.append(Skipped(found.path, f"step {found.step} is in the run already", SAME))
        elif found.missing:
            report.skipped.append(Skipped(found.path, f"a delta without its base: {found.missing}", UNPLACED))
            there.add(found.step)
    wanted = [found for found in seen.found if found.step not in there]
    if dry_run:
        report.brought = [_brought(found) for found in wanted]
        report.file_bytes = sum(found.nbytes for found in wanted)
        return report
    if wanted and run.latest is not None:
        run.rewind(run.latest)  # goes on from there
    attached: dict[str, bytes] = {}
    for number, (found, imported) in enumerate(each(seen, place.seam, place.settings)):
        if progress is not None:
            progress(number, len(seen.found), found.path)
        if found.step in there:
            continue
        if isinstance(imported, Error):
            kind = DAMAGED if isinstance(imported, (Damaged, Mismatch)) else UNKNOWN
            report.skipped.append(Skipped(found.path, why_not(imported), kind))
            continue
        for name, data in imported.attachments.items():
            if attached.get(name) != data:
                run.attach(name, data)
                attached[name] = data
        reason = f"imported from {found.path.rpartition('/')[2]}"
        checkpoint = run.save(found.step, state=imported.state, metrics=imported.metrics, reason=reason).wait()
        report.brought.append(_brought(found, checkpoint.id, imported))
        report.file_bytes += found.nbytes
        report.stored_bytes += int(checkpoint.cost["stored_bytes"])
    if progress is not None:
        progress(len(seen.found), len(seen.found), "")
    if not report.brought and not run.checkpoints(all=True):
        raise nothing(path, report.skipped)
    return report


def nothing(path: str, skipped: list[Skipped]) -> NotFound:
    """No checkpoint came in."""
    few = "; ".join(f"{one.path.rpartition('/')[2]}: {one.why}" for one in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    do = f"looked at {few}{more}" if few else "give a folder with checkpoint files, or one such file"
    return NotFound("no checkpoint was found there that could be taken", where=path, do=do)


def _brought(found: Found, id: str = "", imported: Imported | None = None) -> Brought:
    return Brought(
        found.path, found.step, found.epoch, imported.metrics if imported else found.metrics, found.how, found.nbytes,
        id, imported.not_understood if imported else [], imported.notes if imported else [],
    )  # fmt: skip
