"""The log of a run: read it, and append to it by creating the next slot, which is the decision about the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from blake3 import blake3

from everystep.errors import AlreadyExists, Damaged, ObjectMissing, RunTakenOver
from everystep.seam import Seam
from everystep.settings import Settings
from everystep.vault.history import History
from everystep.vault.names import record_key, record_slot
from everystep.vault.once import put_once
from everystep.vault.record import pack_record, unpack_record
from everystep.vault.together import together
from everystep.vault.volumes import Shelf, Volume

Decide = Callable[[History], "list[Any] | None"]
GAP_MAX = 1000
"""Missing records that are each looked for once more; a wider gap is taken as it was listed."""


class Log:
    """One run's log. Keeps its fold in memory: a commit costs one put, no list and no get."""

    def __init__(
        self,
        storage: Any,
        folder: str,
        genesis: str,
        seam: Seam,
        settings: Settings,
        may: Callable[[History, list[Any]], None] = lambda history, events: None,
        *,
        in_full: bool = False,
    ) -> None:
        """
        Args:
            may: raises if these events may not follow this history: whatever is appended was shown to it.
            in_full: every record is read by itself, also where a volume holds it.
        """
        self._may = may
        self.fence: Callable[[History], None] | None = None
        """Raises, while this process is a job that holds the run, if another one has taken it: nothing is appended."""
        self._storage, self._folder, self._seam, self._settings = storage, folder, seam, settings
        self._genesis = blake3(f"{genesis} {folder}".encode()).hexdigest()
        self._shelf = None if in_full else Shelf(storage, folder, seam, settings)
        self._lock = seam.lock()
        self._listed = False
        self._durable = 0
        self._last: tuple[int, bytes] = (-1, b"")
        self._newest: list[bytes] = []
        """The records since the last volume, from the first on; with gaps, fewer."""
        self._given = False
        self.history = History(self._genesis)

    def refresh(self) -> History:
        """Reads what was added since the last look. A slot that is missing while a later one is there is damage.

        Returns:
            The history as it is now; it stays so, whatever other threads add.
        """
        with self._lock:
            history = self._refresh()
            self._given = True
            return history

    def _refresh(self) -> History:
        if not self._listed:
            self._read_all()
            self._listed = True
        while self._read_next():
            pass
        return self._checked()

    def _to_change(self) -> History:
        """The history, to add to it: whoever was given it keeps it as it was."""
        if self._given:
            self.history, self._given = self.history.copy(), False
        return self.history

    def confirm(self) -> History:
        """Like `refresh`, and the last record is durable afterwards, whoever put it and however that ended."""
        with self._lock:
            history = self._refresh()
            slot, data = self._last
            if self._durable <= slot == history.slots - 1:
                try:
                    self._storage.put_new(record_key(self._folder, slot), data)
                except AlreadyExists:
                    pass  # as it should be
                self._durable = history.slots
            return history

    def _checked(self) -> History:
        if self.history.stranger:
            raise Damaged(
                "this log belongs to another run or repository",
                where=f"{self._storage.url}/{self._folder}",
                do="give the folder its own name and place back; runs move between repositories by push and pull",
            )
        return self.history

    def _read_all(self) -> None:
        for volume in self._shelf.believed(self.history.slots) if self._shelf is not None else ():
            self._read_slots(range(self.history.slots, volume.span.first))
            if not self._take_volume(volume):
                self._read_slots(volume.span.slots)
        self._read_listed()

    def _take_volume(self, volume: Volume) -> bool:
        """Whether the records of a volume could be taken, all of them."""
        assert self._shelf is not None
        if self.history.head not in ("", volume.prev):
            return False
        try:
            records, last = volume.unpack(self._shelf.where(volume.span))
        except Damaged:
            return False
        history = self._to_change()
        for record in records:
            history.take(record)
        self._last, self._newest = (volume.span.end - 1, last), []
        return True

    def _read_listed(self) -> None:
        """The records that a listing shows from here on, and those that are missing between them."""
        wanted, end = list[int](), self.history.slots
        after = record_key(self._folder, end - 1) if end else ""
        names = [key.rpartition("/")[2] for key in self._storage.list(f"{self._folder}log/", deep=False, after=after)]
        for slot in sorted(slot for slot in map(record_slot, names) if slot is not None):
            if slot - end > GAP_MAX:
                self._read_slots(wanted)
                self._to_change().lose(slot - 1, f"the records from {end} on are missing", count=slot - end)
                wanted, end = [], slot
            wanted += range(end, slot + 1)
            end = slot + 1
        self._read_slots(wanted)

    def _read_slots(self, slots: Sequence[int]) -> None:
        """Records that should be there, in their order: where one is not, that is damage."""
        for slot, found in zip(slots, together(self._storage, self._seam, self._fetch, slots)):
            self._absorb(slot, found)

    def _read_next(self) -> bool:
        slot = self.history.slots
        found = self._fetch(slot)
        if isinstance(found, ObjectMissing):
            return False
        self._absorb(slot, found)
        return True

    def _fetch(self, slot: int) -> bytes | ObjectMissing | Damaged:
        try:
            return bytes(self._storage.get(record_key(self._folder, slot)))
        except (ObjectMissing, Damaged) as error:
            return error

    def _absorb(self, slot: int, found: bytes | ObjectMissing | Damaged) -> None:
        if isinstance(found, ObjectMissing):
            self._to_change().lose(slot, "the record is missing")
            return
        if isinstance(found, Damaged):
            self._to_change().lose(slot, found.what)
            return
        self._last = slot, found
        self._remember(slot, found)
        try:
            record = unpack_record(found, slot, f"{self._storage.url}/{record_key(self._folder, slot)}")
            self._to_change().take(record)
        except Damaged as error:
            self._to_change().lose(slot, error.what)

    def _remember(self, slot: int, data: bytes) -> None:
        """Keeps a record for the volume that will hold it."""
        count = self._settings.volume_records
        if not count or slot % count == 0:
            self._newest = []
        if count and len(self._newest) == slot % count:
            self._newest.append(data)

    def append(self, decide: Decide, author: str) -> History:
        """Asks `decide(history)` for events until one of its decisions has become the next record.

        `decide` answers None when there is nothing to do any more, and raises to refuse. It is asked again each time
        somebody else was first.

        Raises:
            StorageError: if the place failed. The record may then still be there; the next append finds out.
        """
        with self._lock:
            if not self._listed:
                self._refresh()
            while True:
                events = decide(self._checked())
                if not events:
                    decided = self.history.slots
                    if self.confirm().slots == decided:
                        return self.history
                    continue  # that was about an older head
                if self.fence is not None:
                    self.fence(self.history)
                self._may(self.history, events)
                if self._put(events, author):
                    self._read_next_own()
                    return self.history
                self._refresh()

    def _put(self, events: list[Any], author: str) -> bool:
        """True if the record lies in the next slot, False if another one does."""
        history = self.history
        if history.unknown:
            raise RunTakenOver(
                f"the log holds events that this everystep does not know: {', '.join(sorted(set(history.unknown)))}",
                where=self._folder,
                do="update everystep before writing to this run; reading still works",
            )
        nonce = self._seam.token(16)
        term = max([history.term, *(event.term for event in events if isinstance(event, OpenTerm))])
        plain = [event.event if isinstance(event, OpenTerm) else event for event in events]
        data = pack_record(history.slots, history.head, term, nonce, self._seam.now(), author, plain)
        self._own = unpack_record(data, history.slots, self._folder), data  # what cannot be read is never written
        key = record_key(self._folder, history.slots)
        return put_once(self._storage, key, data, self._seam, self._settings)

    def _read_next_own(self) -> None:
        record, data = self._own
        self._to_change().take(record)
        self._durable = self.history.slots
        self._remember(record.seq, data)
        if self._shelf is not None:
            self._shelf.bind(self._durable, self._newest)


class OpenTerm:
    """An `open` event on its way into the log, with the term that it takes."""

    def __init__(self, event: Any, term: int) -> None:
        self.event, self.term = event, term
