"""Keep a copy of a repository elsewhere, byte for byte: packs first, then the records that need them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from everystep.errors import Conflict, Damaged, ObjectMissing
from everystep.seam import Pool, Seam
from everystep.upkeep.collect import check_readable, packs_of, size_of
from everystep.upkeep.usage import held
from everystep.vault import History, PackName, Place, RunVault
from everystep.vault.lines import pack_lines
from everystep.vault.names import (
    FORMAT_KEY,
    MIRROR_KEY,
    pack_key,
    record_key,
    record_slot,
    volume_span,
    volumes_folder,
)
from everystep.vault.once import put_once
from everystep.vault.place import Mirror, read_mirror
from everystep.vault.record import unpack_record
from everystep.vault.together import together

Progress = Callable[[str, int, int], None]
ATTEMPTS = 3
HELD_BYTES = 256 << 20
"""Packs that were checked are held up to this, until they are copied."""


@dataclass
class Mirrored:
    """What was copied; after a dry run, what would be."""

    runs: int = 0
    """Looked at."""
    records: int = 0
    packs: int = 0
    nbytes: int = 0
    """Of the packs."""
    removed: int = 0
    """Packs that nothing needs any more, which were deleted in the mirror."""


def mirror(source: Place, target: Any, *, prune: bool, dry_run: bool, progress: Progress | None = None) -> Mirrored:
    """Brings a mirror up to date, or begins one in an empty place.

    Args:
        target: a storage.
        prune: delete packs there that nothing needs any more.
        progress: told (run, packs copied, packs in all).

    Raises:
        Conflict: if the place is no mirror of this repository.
        Damaged: if a byte of what would be copied is not what was saved. No record that needs it is copied then.
    """
    _begin(source, target, dry_run=dry_run)
    found = Mirrored()
    for name in sorted(source.runs()):
        found.runs += 1
        _Run(source, name, target, found, progress).bring_up(prune=prune, dry_run=dry_run)
    return found


def _begin(source: Place, target: Any, *, dry_run: bool) -> None:
    """Marks the place as a mirror before anything else lies there: nobody takes it for a repository to write."""
    mark, id = read_mirror(target), source.identity()
    where = str(target.url)
    if mark is not None and mark.id != id:
        raise Conflict("this is the mirror of another repository", where=where, do="give each its own place")
    if mark is None:
        inside = list(target.list("", deep=False))
        if inside:
            raise Conflict(
                f"the place holds {', '.join(inside[:3])} and is no mirror of this repository",
                where=where,
                do="give an empty place; push adds checkpoints to a repository that has its own",
            )
        if not dry_run:
            put_once(target, MIRROR_KEY, pack_lines(Mirror("everystep mirror", id)), source.seam, source.settings)
    if not dry_run:
        _put(target, FORMAT_KEY, bytes(source.storage.get(FORMAT_KEY)), source)


def _put(target: Any, key: str, data: bytes, source: Place) -> None:
    if not put_once(target, key, data, source.seam, source.settings):
        raise Conflict(
            f"{key} is another one here than in the original",
            where=f"{target.url}/{key}",
            do="one of the two was written after a copy of it was brought back; begin a new mirror elsewhere",
        )


class _Run:
    """One run on its way."""

    def __init__(self, source: Place, name: str, target: Any, found: Mirrored, progress: Progress | None) -> None:
        self._place, self._target, self._found, self._progress = source, target, found, progress
        self._vault = RunVault(source, name)
        self._bare = self._vault.storage

    def bring_up(self, *, prune: bool, dry_run: bool) -> None:
        for attempt in range(ATTEMPTS):
            history = self._vault.history()
            check_readable(history, self._vault.where)
            missing = self._missing(history)
            try:
                self._copy_packs(history, dry_run=dry_run)
                break
            except ObjectMissing as error:
                if self._vault.history().slots == history.slots or attempt + 1 == ATTEMPTS:
                    what = "a pack that is needed is missing"
                    raise Damaged(what, where=error.where, do="run fsck on the original") from error
        self._found.records += len(missing)
        if dry_run:
            return
        self._copy_records(missing)
        self._copy_volumes(history)
        if prune:
            self._prune(history)

    # what is missing

    def _missing(self, history: History) -> list[int]:
        """Records that are not there yet.

        Raises:
            Conflict: if there are others than in the original.
        """
        folder = self._vault.folder
        names = [key.rpartition("/")[2] for key in self._target.list(f"{folder}log/", deep=False)]
        there = {slot for slot in map(record_slot, names) if slot is not None}
        newest = max(there, default=-1)
        key = record_key(folder, newest)
        if there and self._original(key) != bytes(self._target.get(key)):
            raise Conflict(
                f"the mirror has a record {newest} of this run that the original has not",
                where=f"{self._target.url}/{key}",
                do="the original was set back: bring it up from the mirror by pull, or begin a new mirror elsewhere",
            )
        return [slot for slot in range(history.slots) if slot not in there]

    def _original(self, key: str) -> bytes | None:
        """A record as it is now: another process may have mirrored one that was not there when the log was read."""
        try:
            return bytes(self._bare.get(key))
        except ObjectMissing:
            return None

    def _packs_there(self) -> set[PackName]:
        keys = (key.rsplit("/", 2) for key in self._target.list(f"{self._vault.folder}packs/"))
        return {PackName(writer, int(number)) for _, writer, number in keys if number.isdigit()}

    # packs

    def _copy_packs(self, history: History, *, dry_run: bool) -> None:
        present = packs_of(self._vault)
        new = ((history.ever - history.condemned) & present) - self._packs_there()
        if dry_run:
            self._found.packs += len(new)
            self._found.nbytes += sum(size_of(self._vault, pack) for pack in new)
            return
        whole = _Whole(self._bare, {pack_key(self._vault.folder, pack) for pack in new}, self._vault.seam)
        checking = RunVault(self._place, self._vault.name)
        checking.storage = whole
        left = set(new)
        with closing(self._vault.seam.pool(self._vault.settings.workers, "everystep-mirror")) as pool:
            for packs in _checked(checking, history, present, new, pool):
                self._copy_all(whole, packs & left, len(new) - len(left), len(new))
                left -= packs
        self._copy_all(whole, left, len(new) - len(left), len(new))

    def _copy_all(self, whole: _Whole, packs: set[PackName], done: int, total: int) -> None:
        def copy(pack: PackName) -> int:
            key = pack_key(self._vault.folder, pack)
            body = whole.get(key)
            self._target.put(key, [body])
            return len(body)

        for count, nbytes in enumerate(self._side_by_side(copy, sorted(packs)), 1):
            self._found.packs += 1
            self._found.nbytes += nbytes
            if self._progress is not None:
                self._progress(self._vault.name, done + count, total)

    def _side_by_side(self, copy: Callable[[PackName], int], packs: list[PackName]) -> Iterator[int]:
        """As many at once as the place is worth, and memory is: each is held until it has arrived."""
        width = min(self._target.fan_out, self._vault.settings.uploads, len(packs))
        if width <= 1:
            yield from map(copy, packs)
            return
        with closing(self._vault.seam.pool(width, "everystep-upload")) as pool:
            yield from pool.map(copy, packs, width)

    # records, volumes

    def _copy_records(self, slots: list[int]) -> None:
        """One after the other: a record before which one is missing is damage to whoever reads."""

        def read(slot: int) -> tuple[str, bytes]:
            key = record_key(self._vault.folder, slot)
            data = bytes(self._bare.get(key))
            unpack_record(data, slot, f"{self._bare.url}/{key}")  # what is damaged is not copied
            return key, data

        for key, data in together(self._bare, self._vault.seam, read, slots):
            _put(self._target, key, data, self._place)

    def _copy_volumes(self, history: History) -> None:
        folder = volumes_folder(self._vault.folder)
        there = set(self._target.list(folder, deep=False))
        for key in self._bare.list(folder, deep=False):
            span = volume_span(key.rpartition("/")[2])
            if span is not None and span.end <= history.slots and key not in there:
                _put(self._target, key, bytes(self._bare.get(key)), self._place)

    def _prune(self, history: History) -> None:
        for pack in sorted(self._packs_there() & history.condemned):
            self._target.delete(pack_key(self._vault.folder, pack))
            self._found.removed += 1


def _checked(
    vault: RunVault, history: History, present: set[PackName], new: set[PackName], pool: Pool
) -> Iterator[set[PackName]]:
    """The packs of one checkpoint after the other, once every byte of it that lies in new ones was checked."""
    seen: set[tuple[PackName, int]] = set()
    for id, thin in held(vault, history).items():
        needs = history.commits[id].needs(thin=thin)
        if needs - present - history.condemned:
            key = pack_key(vault.folder, min(needs - present - history.condemned))
            raise ObjectMissing("no such pack", where=f"{vault.storage.url}/{key}")
        if not needs & new:
            continue
        for view in vault.manifest(history.commits[id]).views:
            wanted = []
            for index in view.there(thin=thin):
                links = [(link.pack, link.offset) for link in view.spot(index).links() if link.pack in new]
                if not seen.issuperset(links):
                    seen.update(links)
                    wanted.append(index)
            for _ in vault.read_chunks(view, wanted, pool, every_link=True):
                pass
        yield needs
    for event in list(history.attachments.values()):
        vault.read_pages(event.where, f"{vault.where} attachment {event.name}")


class _Whole:
    """A storage of which new packs are read whole, and held for a while: what was checked is what is copied."""

    def __init__(self, inner: Any, keys: set[str], seam: Seam) -> None:
        self._inner, self._keys = inner, keys
        self.url, self.fan_out = inner.url, inner.fan_out
        self._held: OrderedDict[str, memoryview] = OrderedDict()
        self._lock = seam.lock()

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        if key not in self._keys:
            return self._inner.get(key, start, stop)  # type: ignore[no-any-return]
        body = self._body(key)
        if stop is not None and stop > len(body):
            raise Damaged(f"the object ends at {len(body)}, before {stop}", where=f"{self.url}/{key}", do="run fsck")
        return body[start:stop]

    def _body(self, key: str) -> memoryview:
        with self._lock:
            body = self._held.get(key)
        if body is None:
            body = memoryview(self._inner.get(key)).cast("B")
        with self._lock:
            self._held[key] = body
            self._held.move_to_end(key)
            while len(self._held) > 1 and sum(map(len, self._held.values())) > HELD_BYTES:
                self._held.popitem(last=False)
        return body

    def list(self, prefix: str, deep: bool = True, after: str = "") -> Any:
        return self._inner.list(prefix, deep, after)

    def stat(self, key: str) -> Any:
        return self._inner.stat(key)
