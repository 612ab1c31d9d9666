"""Send each checkpoint of a run to the place behind, in the background, in order; what is missing there is the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from everystep.errors import Error, RunTakenOver, SaveAbandoned, StorageError
from everystep.upkeep.transfer import Carried, Carrier, Terms
from everystep.vault import History, RunVault

PAUSE_SECONDS_MAX = 300.0
Wanted = Callable[[History, History], "list[str]"]


@dataclass(frozen=True)
class Lag:
    """How far the place behind is from having all that it is to have; all 0: it has."""

    checkpoints: int = 0
    nbytes: int = 0
    """What they took newly here."""
    seconds: float = 0.0
    """Since the oldest of them was saved, by the writer's clock."""
    missing: tuple[str, ...] = field(default=(), repr=False)
    """Their ids, in the order of saving."""

    def __str__(self) -> str:
        plural = "" if self.checkpoints == 1 else "s"
        return f"{self.checkpoints} checkpoint{plural}, {self.nbytes / 1e6:.1f} MB, {self.seconds:.0f} s"


class Connection(Protocol):
    """The run in the place behind. What it does may fail; then it is asked again."""

    where: str

    def vault(self) -> RunVault: ...
    def terms(self) -> Terms: ...
    def tidy(self) -> list[str]:
        """Drops there what rules do not keep; what somebody should know."""

    def close(self) -> None: ...


class Replicator:
    """A thread that brings over what the target's log lacks. Nothing else says what has been done, so that after a kill
    the next process goes on.

    Args:
        wanted: of (the source, the target), what is to be there and is not, in the order of saving.
    """

    def __init__(self, source: RunVault, connection: Connection, wanted: Wanted) -> None:
        self._source, self._connection, self._wanted = source, connection, wanted
        self._seam, self._settings = source.seam, source.settings
        self._condition = self._seam.condition()
        self._carrier: Carrier | None = None
        self.there: set[str] | None = None
        """Ids that are there, or need not be; None before it was asked."""
        self.lost: RunTakenOver | None = None
        """Another process has taken the run there."""
        self._notices: list[str] = []
        self._complaint = ""
        self._asked, self._done = 1, 0
        self._ended = False
        self._thread = self._seam.start(self._work, "everystep-behind")

    def notify(self) -> None:
        """Something is new."""
        with self._condition:
            self._asked += 1
            self._condition.notify_all()

    def holds(self, id: str) -> bool:
        """Whether a checkpoint is not there yet, and is to be."""
        return self.there is None or id not in self.there

    def notices(self) -> list[str]:
        """What somebody should know, once."""
        with self._condition:
            said, self._notices = self._notices, []
        return said

    def wait_for(self, id: str, step: int, timeout: float | None) -> None:
        """Until a checkpoint is there.

        Raises:
            SaveAbandoned: if it takes longer than `timeout` seconds, or nobody sends it any more.
            RunTakenOver: if another process has taken the run there.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self.holds(id) or self.lost is not None or self._ended, timeout)
            if not self.holds(id):
                return
            if self.lost is not None:
                raise self.lost
        why = f": {self._complaint}" if self._complaint else ""
        raise SaveAbandoned(
            f"step {step} is durable here, and not yet in the place behind{why}",
            where=self._connection.where,
            do="wait longer: it is tried again; or the next process that opens the run sends it",
        )

    def finish(self, seconds: float) -> bool:
        """Waits until all is there, at most so long; whether it is. The thread ends either way."""
        with self._condition:
            self._condition.wait_for(lambda: self._done == self._asked or self.lost is not None or self._ended, seconds)
            done = self._done == self._asked
            self._ended = True
            self._condition.notify_all()
        if done or self.lost is not None:
            self._thread.join(max(seconds, 1.0))  # it only frees the run there
        return done

    # the background

    def _work(self) -> None:
        self._seam.step_back(self._settings.background_nice)
        pause = self._settings.retry_seconds
        while not self._ended and self.lost is None:
            with self._condition:
                self._condition.wait_for(lambda: self._asked > self._done or self._ended)
                asked = self._asked
            if self._ended or self._try(asked):
                pause = self._settings.retry_seconds
                continue
            with self._condition:
                self._condition.wait_for(lambda: self._ended, pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)
        self._leave()

    def _try(self, asked: int) -> bool:
        """Whether all that was asked for is done."""
        try:
            if not self._bring():
                return False
        except RunTakenOver as error:
            with self._condition:
                self.lost = error
                self._condition.notify_all()
            return False
        except RuntimeError as error:  # no thread can be started any more: the interpreter is ending
            self._complain(str(error))
            with self._condition:
                self._ended = True
                self._condition.notify_all()
            return False
        except Exception as error:  # noqa: BLE001  the thread must live, and somebody must hear of it
            self._complain(error.what if isinstance(error, Error) else repr(error))
            return False
        with self._condition:
            self._done, self._complaint = asked, ""
            self._condition.notify_all()
        return True

    def _complain(self, what: str) -> None:
        """Said once for each thing that goes wrong."""
        with self._condition:
            if what != self._complaint:
                self._complaint = what
                self._notices.append(
                    f"checkpoints are safe here, and do not get to {self._connection.where}: {what}; it is tried again"
                )

    def _bring(self) -> bool:
        """False if it was broken off."""
        vault = self._connection.vault()
        if self._carrier is None:
            self._carrier = Carrier(self._source, vault, self._connection.terms(), follow=True)
        source, target = self._source.history(), vault.history()
        todo = self._wanted(source, target)
        there = {*source.live, *target.commits}.difference(todo)
        with self._condition:
            self.there = there
            self._condition.notify_all()
        for id in todo:
            if self._ended:
                return False
            self._carrier.carry_one(id)
            with self._condition:
                there.add(id)
                self._condition.notify_all()
        self._carrier.tell(Carried(self._source.name, vault.name), whole=True)
        said = self._connection.tidy()
        with self._condition:
            self._notices += said
        return True

    def _leave(self) -> None:
        try:
            self._connection.close()
        except StorageError as error:
            self._complain(error.what)  # who opens it next sees that this process is gone
        except Error:
            return  # another has it


def lag_of(source: History, todo: list[str], now: float) -> Lag:
    """Of what is still to be sent."""
    commits = [source.commits[id] for id in todo]
    nbytes = sum(commit.event.cost.stored_bytes for commit in commits)
    return Lag(len(commits), nbytes, max((now - commit.time for commit in commits), default=0.0), tuple(todo))
