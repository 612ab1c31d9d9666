"""Check a repository: records, the chain between them, manifests, and every byte of every chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from everystep.errors import Damaged, StorageError
from everystep.vault import Committed, Place, RunVault

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written."""

    run: str
    what: str
    where: str
    checkpoint: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class Checked:
    """A checkpoint that was looked at, and whether all that was looked at is whole."""

    run: str
    checkpoint: str
    step: int
    whole: bool


@dataclass
class CheckReport:
    """What a check saw: counts, and findings (none: all is whole)."""

    runs: int = 0
    records: int = 0
    bytes_read: int = 0
    checked: list[Checked] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def checkpoints(self) -> int:
        return len(self.checked)

    @property
    def ok(self) -> bool:
        return not self.findings


def check_repository(place: Place, runs: list[str], *, data: bool, progress: Progress | None) -> CheckReport:
    """
    Args:
        runs: names of the runs to check.
        data: also read every chunk, not only manifests and records.
        progress: told (run, checkpoints checked, checkpoints in all).
    """
    report = CheckReport()
    for name in runs:
        _check_run(RunVault(place, name), report, data, progress)
    return report


def _check_run(vault: RunVault, report: CheckReport, data: bool, progress: Progress | None) -> None:
    report.runs += 1
    try:
        history = vault.history()
    except Damaged as error:
        report.findings.append(Finding(vault.name, error.what, error.where))
        return
    report.records += history.slots
    for slot, why in sorted(history.damaged.items()):
        report.findings.append(Finding(vault.name, f"record {slot}: {why}", f"{vault.where}/log/{slot:020d}"))
    checked: set[Any] = set()
    pool = vault.seam.pool(vault.settings.workers, "everystep-fsck")
    try:
        for count, id in enumerate(history.live, 1):
            _check_checkpoint(vault, history.commits[id], report, checked if data else None, pool, id in history.thin)
            if progress is not None:
                progress(vault.name, count, len(history.live))
    finally:
        pool.close()
    for name, attached in history.attachments.items():
        try:
            vault.read_pages(attached.where, vault.where)
        except (Damaged, StorageError) as error:
            report.findings.append(Finding(vault.name, f"attachment {name}: {error.what}", error.where))


def _check_checkpoint(
    vault: RunVault, commit: Committed, report: CheckReport, checked: set[Any] | None, pool: object, thin: bool
) -> None:
    """`checked` holds the places that were read for an earlier checkpoint: a shared chunk is read once."""
    event = commit.event
    findings = len(report.findings)
    try:
        manifest = vault.manifest(commit)
        for view in manifest.views if checked is not None else ():
            assert checked is not None
            there = view.there(thin=thin)
            places = [(spot.pack, spot.offset, spot.hash) for spot in map(view.spot, there)]
            new = [i for i, place in zip(there, places) if place not in checked]
            for group in vault.read_chunks(view, new, pool):  # type: ignore[arg-type]
                report.bytes_read += sum(chunk.nbytes for _, chunk in group)
            checked.update(places)
    except (Damaged, StorageError) as error:
        report.findings.append(
            Finding(vault.name, f"step {event.step}: {error.what}", error.where, event.id, event.step)
        )
    report.checked.append(Checked(vault.name, event.id, event.step, len(report.findings) == findings))
