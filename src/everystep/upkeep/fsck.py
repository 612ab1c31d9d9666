"""Check a repository: records, the chain between them, manifests, and every byte of every chunk, or of a share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everystep.errors import Damaged, Error, NewerFormat, ObjectMissing, StorageError, Unreachable
from everystep.seam import Pool
from everystep.vault import Committed, PartView, Place, RunVault
from everystep.vault.names import Span
from everystep.vault.volumes import Shelf

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
    """Plain bytes of the chunks that were read; a chunk that checkpoints share counts once."""
    bytes_there: int = 0
    """Plain bytes of all chunks, read or not."""
    checked: list[Checked] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def checkpoints(self) -> int:
        return len(self.checked)

    @property
    def ok(self) -> bool:
        return not self.findings


class _Chunks:
    """Which chunks are read: of all that there are, each once, the share that is drawn; again, where that failed."""

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.nbytes = 0
        self._random = np.random.default_rng(seed)
        self._settled: set[Any] = set()
        self._waiting: set[Any] = set()

    def choose(self, view: PartView, *, thin: bool) -> dict[int, Any]:
        """The chunks of a part that are to be read now -> where each lies."""
        chosen = {}
        for index in view.there(thin=thin):
            spot = view.spot(index)
            place = (spot.pack, spot.offset, spot.hash)
            if place not in self._settled and place not in self._waiting:
                self.nbytes += view.layout.chunks[index].nbytes
                drawn = self.share >= 1 or self._random.random() < self.share
                (self._waiting if drawn else self._settled).add(place)
            if place in self._waiting:
                chosen[index] = place
        return chosen

    def settle(self, place: Any) -> None:
        """A chunk has been read, and is what was saved."""
        self._waiting.discard(place)
        self._settled.add(place)


class _Readable:
    """A storage of which what cannot be read is damaged: the log goes on behind such a record."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.url, self.fan_out = inner, inner.url, inner.fan_out

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        try:
            return self._inner.get(key, start, stop)  # type: ignore[no-any-return]
        except (ObjectMissing, Unreachable):  # what cannot be asked may be whole
            raise
        except StorageError as error:
            raise Damaged(error.what, where=error.where, do=error.do) from error

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Iterator[str]:
        return self._inner.list(prefix, deep, after)  # type: ignore[no-any-return]


def check_repository(
    place: Place, runs: list[str], *, data: bool, share: float = 1.0, progress: Progress | None
) -> CheckReport:
    """
    Args:
        runs: names of the runs to check.
        data: also read chunks, not only manifests and records.
        share: of the chunks, which are drawn at random, how many are read.
        progress: told (run, checkpoints checked, checkpoints in all).
    """
    report = CheckReport()
    seed = int(place.seam.token(8), 16)
    for name in runs:
        vault = RunVault(place, name)
        vault.storage, vault.log_in_full = _Readable(vault.storage), True
        _check_run(vault, report, _Chunks(share, seed) if data else None, progress)
    return report


def _check_run(vault: RunVault, report: CheckReport, chunks: _Chunks | None, progress: Progress | None) -> None:
    report.runs += 1
    try:
        history = vault.history()
    except (Damaged, StorageError) as error:
        report.findings.append(Finding(vault.name, error.what, error.where))
        return
    report.records += history.slots
    whole = _check_volumes(vault, report)
    for slot, why in sorted(history.damaged.items()):
        copies = [f"; volume {span.first:020d}-{span.length} holds it" for span in whole if slot in span.slots]
        report.findings.append(
            Finding(vault.name, f"record {slot}: {why}{''.join(copies[:1])}", f"{vault.where}/log/{slot:020d}")
        )
    pool = vault.seam.pool(vault.settings.workers, "everystep-fsck")
    try:
        for count, id in enumerate(live := list(history.live), 1):
            _check_checkpoint(vault, history.commits[id], report, chunks, pool)
            if progress is not None:
                progress(vault.name, count, len(live))
    finally:
        pool.close()
    report.bytes_there += chunks.nbytes if chunks is not None else 0
    for name in list(history.attachments):
        _check_attachment(vault, name, report)


def _check_volumes(vault: RunVault, report: CheckReport) -> list[Span]:
    """Those that say what the log says, which has been read without them."""
    shelf = Shelf(vault.storage, vault.folder, vault.seam, vault.settings)
    whole = []
    for span in sorted(shelf.spans()):
        try:
            shelf.check(span)
            whole.append(span)
        except NewerFormat:
            continue  # nothing is read from it here
        except (Damaged, StorageError) as error:
            report.findings.append(Finding(vault.name, error.what, shelf.where(span)))
    return whole


def _check_attachment(vault: RunVault, name: str, report: CheckReport) -> None:
    while True:
        attached = vault.history().attachments[name]
        try:
            vault.read_pages(attached.where, vault.where)
            return
        except (Damaged, StorageError) as error:
            if vault.history().attachments[name] == attached:  # else it has been moved, or replaced
                report.findings.append(Finding(vault.name, f"attachment {name}: {error.what}", error.where))
                return


def _check_checkpoint(
    vault: RunVault, commit: Committed, report: CheckReport, chunks: _Chunks | None, pool: Pool
) -> None:
    event, found = commit.event, None
    while True:
        thin = event.id in vault.history().thin
        try:
            _read(vault, commit, report, chunks, pool, thin=thin)
        except (Damaged, StorageError) as error:
            found = error
        now = vault.history()
        if event.id not in now.live:
            return  # its run has dropped it since: then nothing of it need be there
        moved = now.commits[event.id]
        if found is None or (moved == commit and (event.id in now.thin) == thin):
            break
        found, commit = None, moved
    if found is not None:
        report.findings.append(_finding(vault, commit, found))
    report.checked.append(Checked(vault.name, event.id, event.step, found is None))


def _finding(vault: RunVault, commit: Committed, error: Error) -> Finding:
    event = commit.event
    return Finding(vault.name, f"step {event.step}: {error.what}", error.where, event.id, event.step)


def _read(
    vault: RunVault, commit: Committed, report: CheckReport, chunks: _Chunks | None, pool: Pool, *, thin: bool
) -> None:
    for view in vault.manifest(commit).views:
        chosen = chunks.choose(view, thin=thin) if chunks is not None else {}
        for done in vault.read_chunks(view, list(chosen), pool, every_link=True):
            for index in done:
                report.bytes_read += view.layout.chunks[index].nbytes
                assert chunks is not None
                chunks.settle(chosen[index])
