"""The log of a run: read it, and append to it by creating the next slot, which is the decision about the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blake3 import blake3

from everystep.errors import AlreadyExists, Damaged, ObjectMissing, RunTakenOver
from everystep.seam import Seam
from everystep.settings import Settings
from everystep.vault.history import History
from everystep.vault.names import record_key, record_slot
from everystep.vault.once import put_once
from everystep.vault.record import pack_record, unpack_record

Decide = Callable[[History], "list[Any] | None"]
GAP_MAX = 1000
"""Missing records that are each looked for once more; a wider gap is taken as it was listed."""


class Log:
    """One run's log. Keeps its fold in memory: a commit costs one put, no list and no get."""

    def __init__(self, storage: Any, folder: str, genesis: str, seam: Seam, settings: Settings) -> None:
        self._storage, self._folder, self._seam, self._settings = storage, folder, seam, settings
        self._genesis = blake3(f"{genesis} {folder}".encode()).hexdigest()
        self._lock = seam.lock()
        self._listed = False
        self._durable = 0
        self._last: tuple[int, bytes] = (-1, b"")
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

    def forget(self) -> None:
        """Starts over with an empty fold, as a new process would."""
        with self._lock:
            self.history, self._listed = History(self._genesis), False

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
        names = [key.rpartition("/")[2] for key in self._storage.list(f"{self._folder}log/", deep=False)]
        for slot in sorted(slot for slot in map(record_slot, names) if slot is not None):
            if slot - self.history.slots > GAP_MAX:
                first = self.history.slots
                self._to_change().lose(slot - 1, f"the records from {first} on are missing", count=slot - first)
            while self.history.slots <= slot:
                if not self._read_next():
                    self._to_change().lose(self.history.slots, "the record is missing")

    def _read_next(self) -> bool:
        slot = self.history.slots
        key = record_key(self._folder, slot)
        try:
            data = self._storage.get(key)
        except ObjectMissing:
            return False
        except Damaged as error:
            self._to_change().lose(slot, error.what)
            return True
        self._last = slot, bytes(data)
        try:
            record = unpack_record(data, slot, f"{self._storage.url}/{key}")
            self._to_change().take(record)
        except Damaged as error:
            self._to_change().lose(slot, error.what)
        return True

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
        self._own = unpack_record(data, history.slots, self._folder)  # what cannot be read is never written
        key = record_key(self._folder, history.slots)
        return put_once(self._storage, key, data, self._seam, self._settings)

    def _read_next_own(self) -> None:
        self._to_change().take(self._own)
        self._durable = self.history.slots


class OpenTerm:
    """An `open` event on its way into the log, with the term that it takes."""

    def __init__(self, event: Any, term: int) -> None:
        self.event, self.term = event, term
