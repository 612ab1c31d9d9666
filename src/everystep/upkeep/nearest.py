"""Read a run from the nearest copy: here, and from the place behind what is not here any more, or damaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from everystep.errors import Damaged, DamageWarning, Error, EverystepWarning, ObjectMissing, StorageError
from everystep.seam import Pool
from everystep.vault import Committed, History, Manifest, PartView, Place, RunVault
from everystep.vault.reader import Sink
from everystep.vault.record import Where
from everystep.vault.share import HostShare

LOOK_SECONDS = 30.0
"""The log of the place behind is looked at again after so long."""


@dataclass(frozen=True)
class _View(PartView):
    """A part, and which copy of which checkpoint it belongs to."""

    checkpoint: str = ""
    is_behind: bool = False


class NearestVault(RunVault):
    """To read only; what is written goes to the place in front.

    Args:
        behind: the run in the place behind; it may raise.
    """

    def __init__(self, place: Place, name: str, behind: Callable[[], RunVault]) -> None:
        super().__init__(place, name)
        self._behind = behind
        self._far: RunVault | None = None
        self._looked: float | None = None
        self._seen: History | None = None
        self._merged: tuple[tuple[Any, ...], History] | None = None
        self.away: set[str] = set()
        """Checkpoints of which something was read from behind though they should be here."""

    def history(self) -> History:
        """What both logs say: checkpoints that are live here as they are here, others as they are behind."""
        if self._held is not None:
            return self._held
        near, far = super().history(), self._look()
        if far is None:
            return near
        key = (near.genesis, near.slots, far.slots, len(self.away))
        if self._merged is None or self._merged[0] != key:
            self._merged = key, merge(near, far, self.away)
        return self._merged[1]

    def manifest(self, commit: Committed) -> Manifest:
        id = commit.event.id
        near = super().history()
        if id in near.live and id not in self.away:
            try:
                return _marked(super().manifest(near.commits[id]), id, is_behind=False)
            except (Damaged, StorageError) as error:
                if self._commit_behind(id) is None:
                    raise
                self._say_away(id, error)
        found = self._commit_behind(id)
        if found is None or self._far is None:
            return super().manifest(commit)
        return _marked(self._far.manifest(found), id, is_behind=True)

    def read_chunks(
        self,
        view: PartView,
        indices: Sequence[int],
        pool: Pool,
        sink: Sink | None = None,
        *,
        every_link: bool = False,
        share: HostShare | None = None,
    ) -> Iterator[list[int]]:
        mine = view if isinstance(view, _View) else None
        if mine is not None and mine.is_behind and self._far is not None:
            yield from self._far.read_chunks(view, indices, pool, sink, every_link=every_link)
            return
        left = dict.fromkeys(indices)
        try:
            for done in super().read_chunks(view, indices, pool, sink, every_link=every_link, share=share):
                for index in done:
                    del left[index]
                yield done
            return
        except (Damaged, StorageError) as error:
            found = self._commit_behind(mine.checkpoint) if mine is not None else None
            if mine is None or found is None or self._far is None:
                raise
            self._say_away(mine.checkpoint, error)
            other = next(one for one in self._far.manifest(found).views if one.rank == view.rank)
        yield from self._far.read_chunks(other, list(left), pool, sink, every_link=every_link)

    def read_pages(self, pages: Sequence[Where], where: str) -> bytes:
        try:
            return super().read_pages(pages, where)
        except ObjectMissing:
            if self._look() is None or self._far is None:
                raise
            return self._far.read_pages(pages, where)

    # the place behind

    def assume_away(self) -> None:
        """It has just been asked, and did not answer."""
        self._looked, self._seen = self.seam.monotonic(), None

    def _look(self) -> History | None:
        """Its log, as it was not long ago; None where it has none, or cannot be asked."""
        now = self.seam.monotonic()
        if self._looked is None or now - self._looked > LOOK_SECONDS:
            self._looked = now
            try:
                self._far = self._far or self._behind()
                self._seen = self._far.history()
            except StorageError as error:
                self._seen = None
                text = f"the place behind cannot be asked, so only what is here is seen: {error.what}"
                warnings.warn(f"run {self.name!r}: {text}", EverystepWarning, stacklevel=4)
        return self._seen

    def _commit_behind(self, id: str) -> Committed | None:
        """As it lies there now, if it does."""
        if self._look() is None or self._far is None:
            return None
        history = self._seen = self._far.history()
        return history.commits[id] if id in history.live else None

    def _say_away(self, id: str, error: Error) -> None:
        if id not in self.away:
            self.away.add(id)
            text = f"run {self.name!r}: checkpoint {id} is read from the place behind, for here: {error.what}; run fsck"
            warnings.warn(text, DamageWarning, stacklevel=4)


def _marked(manifest: Manifest, id: str, *, is_behind: bool) -> Manifest:
    views = []
    for view in manifest.views:
        same = {one.name: getattr(view, one.name) for one in fields(PartView)}
        views.append(_View(**same, checkpoint=id, is_behind=is_behind))
    return replace(manifest, views=tuple(views))


def merge(near: History, far: History, away: set[str]) -> History:
    """A history to read: the near one, and what only the far one still has."""
    both = near.copy()
    kept = {id for id in far.live if id not in near.live or id in away}
    old = [id for id in far.commits if id not in near.commits and id in far.live]
    both.commits = {id: _from_behind(far.commits[id], None) for id in old}
    for id, commit in near.commits.items():
        both.commits[id] = _from_behind(far.commits[id], commit.after) if id in kept else commit
    for term in {-both.commits[id].term for id in kept}:
        if term in far.opened:
            both.opened[-term] = far.opened[term]
    if old and near.commits:
        both.commits = dict(sorted(both.commits.items(), key=lambda item: item[1].time))
    both.live = {id: None for id in both.commits if id in near.live or id in kept}
    both.thin = {id for id in near.thin if id not in kept} | (far.thin & kept)
    both.tags = {**{name: id for name, id in far.tags.items() if name not in near.tags_ever}, **near.tags}
    both.tags_ever = near.tags_ever | far.tags_ever
    both.metrics = {**far.metrics, **{id: {**far.metrics.get(id, {}), **row} for id, row in near.metrics.items()}}
    both.series = {**far.series, **near.series}
    both.config = {**far.config, **near.config}
    both.attachments = {**far.attachments, **near.attachments}
    both.notes = [*near.notes, *(note for note in far.notes if note not in near.notes)]
    both.origins = [*near.origins, *(origin for origin in far.origins if origin not in near.origins)]
    if near.latest is None:
        both.tip = far.tip
    both.head = f"{near.head} {far.head}"  # a catalog of one of the two alone is stale
    return both


def _from_behind(commit: Committed, after: str | None) -> Committed:
    """A checkpoint of the far log. Its term counts below zero, for the near log has terms of the same numbers."""
    return replace(commit, term=-commit.term, after=after or commit.after)
