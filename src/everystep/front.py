"""A place in front of another: saves are durable here, and go behind in the background; reads take the nearest copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from everystep.between import HeldRun
from everystep.checkpoint import Checkpoint
from everystep.errors import Error, EverystepWarning, ReadOnly, RunTakenOver, StorageError
from everystep.keeping import Keeper
from everystep.past import PastRun
from everystep.rules import Rule
from everystep.run import Run
from everystep.save import Saved, Writer
from everystep.upkeep import (
    DROP,
    Carried,
    Carrier,
    Decision,
    Freed,
    Kept,
    Lag,
    NearestVault,
    Repacked,
    Replicator,
    RunStats,
    kept_of,
    lag_of,
    plan,
)
from everystep.vault import Committed, History, Place, RunVault


class Behind:
    """The place behind, which is connected to when it is needed: where it cannot be reached, work goes on in front."""

    def __init__(self, url: str, connect: Callable[[], Place]) -> None:
        self.url, self._connect = url, connect
        self._place: Place | None = None
        self.is_away = False
        """Whether it did not answer when it was asked for its runs."""

    @property
    def place(self) -> Place:
        """
        Raises:
            StorageError: if it cannot be reached.
        """
        if self._place is None:
            self._place = self._connect()
        return self._place

    def vault(self, name: str) -> RunVault:
        return RunVault(self.place, name)

    def runs(self) -> list[str]:
        """Names of its runs; none, and a warning, where it cannot be reached."""
        self.is_away = False
        try:
            return self.place.runs() if self.place.exists else []
        except StorageError as error:
            self.is_away = True
            text = f"{self.url} cannot be reached, so that runs which are only there are not seen: {error.what}"
            warnings.warn(text, EverystepWarning, stacklevel=3)
            return []


class Connection:
    """A run in the place behind, as one process holds it."""

    def __init__(self, behind: Behind, name: str, keep: Rule | None, *, takeover: bool) -> None:
        self.where = behind.url
        self._behind, self._name, self._keep, self._takeover = behind, name, keep, takeover
        self._vault: RunVault | None = None
        self._held: HeldRun | None = None
        self._keeper: Keeper | None = None

    def vault(self) -> RunVault:
        if self._vault is None:
            self._vault = self._behind.vault(self._name)
        return self._vault

    def terms(self) -> HeldRun:
        if self._held is None:
            self._held = HeldRun(self.vault(), takeover=self._takeover, reason="replicate")
        return self._held

    def tidy(self) -> list[str]:
        if self._keep is None:
            return []
        if self._keeper is None:
            vault = self.vault()
            self._keeper = Keeper(vault, vault.author, self.terms().check, self._keep, None, None)
        return self._keeper.after_commit()

    def close(self) -> None:
        if self._held is not None:
            self._held.close()

    def let_go(self) -> None:
        """After an error, which says more than whatever goes wrong here."""
        try:
            self.close()
        except Error:
            return


def to_send(keep: Rule | None, source: History, target: History) -> list[str]:
    """What the place behind is to have and has not, in the order of saving: not what its own rules would drop."""
    todo = [id for id in source.live if id not in target.commits]
    if keep is None or not todo:
        return todo
    new = set(todo)
    kept = [*kept_of(target), *(one for one in kept_of(source) if one.id in new)]
    dropped = {one.checkpoint.id for one in plan(kept, keep, None) if one.action == DROP}
    return [id for id in todo if id not in dropped]


class _NotBehind(Rule):
    """Keeps what is not in the place behind yet, and is to be."""

    def __init__(self, holds: Callable[[str], bool]) -> None:
        self._holds = holds

    def keeps(self, kept: Sequence[Kept]) -> dict[str, str]:
        return {one.id: "not in the place behind yet" for one in kept if self._holds(one.id)}


class _FrontKeeper(Keeper):
    """Drops nothing that is not behind yet, and has it sent there."""

    def __init__(self, replicator: Replicator, *given: Any) -> None:
        super().__init__(*given)
        self._replicator = replicator

    def after_commit(self) -> list[str]:
        self._replicator.notify()
        return [*super().after_commit(), *self._replicator.notices()]


class FrontRun(Run):
    """A run to write, in front of its copy in another place."""

    def __init__(self, place: Place, name: str, *, behind: Behind, keep_behind: Rule | None, **given: Any) -> None:
        super().__init__(place, name, **given)
        self._behind, self._keep_behind = behind, keep_behind
        self._replicator: Replicator | None = None
        self._keeper: Keeper | None = None
        self._nearest = NearestVault(place, name, lambda: behind.vault(name))

    @property
    def lag(self) -> Lag:
        """What the place behind has not got yet: checkpoints, their bytes, and for how long."""
        history = self._history()
        replicator = self._replicator
        if replicator is None:
            return _lag(self._behind, self.name, self._keep_behind, history, self._vault.seam.now())
        return lag_of(history, [id for id in history.live if replicator.holds(id)], self._vault.seam.now())

    def _open(self) -> Writer:
        if self._writer is not None or self.rank != 0 or self._vault.seam.pid() != self._pid:
            return super()._open()
        connection, keep = self._meet(), self._keep_behind
        self._replicator = Replicator(self._vault, connection, lambda source, target: to_send(keep, source, target))
        try:
            return super()._open()
        except BaseException:
            self._replicator.finish(0)
            self._replicator = None
            raise

    def _make_keeper(self, author: str, fence: Callable[[History], None]) -> Keeper:
        if self._replicator is None:
            return super()._make_keeper(author, fence)
        held = _NotBehind(self._replicator.holds)
        rules = [rule and rule | held for rule in self._rules]
        self._keeper = _FrontKeeper(self._replicator, self._vault, author, fence, *rules, self._quota_bytes)
        return self._keeper

    def _meet(self) -> Connection:
        """Takes the run behind, and brings its newest checkpoint if that is newer than what is here.

        Raises:
            RunInUse: if another process writes it.
            StorageError: if the place cannot be reached, and there is nothing here to go on from.
        """
        connection = Connection(self._behind, self.name, self._keep_behind, takeover=self._takeover)
        try:
            held = connection.terms()
            held.of(None)
            self._bring(connection.vault())
        except StorageError as error:
            connection.let_go()
            if isinstance(error, ReadOnly):
                raise
            if self._history().latest is None:
                raise StorageError(
                    f"the place behind cannot be reached, and there is no checkpoint here to go on from: {error.what}",
                    where=self._behind.url,
                    do=f"{error.do or 'try again'}; or open the repository without behind= to begin anew here",
                ) from error
            self._nearest.assume_away()
            self._warn(f"{self._behind.url} cannot be reached, so that it is not known what is there: {error.what}")
        except Error:
            connection.let_go()
            raise
        return connection

    def _bring(self, far: RunVault) -> None:
        there, here = far.history(), self._history()
        latest = there.latest
        if latest is None or latest.event.id in here.commits:
            return
        if here.latest is not None:
            if here.latest.time >= latest.time:
                self._warn(f"step {latest.event.step} in {self._behind.url} is of another line, and older than here")
                return
            self._warn(
                f"step {latest.event.step} in {self._behind.url} is newer than what is here: the run goes on there"
            )
        held = HeldRun(self._vault, takeover=self._takeover, reason="pull")
        carrier = Carrier(far, self._vault, held, follow=True)
        report = Carried(self.name, self.name)
        carrier.carry([latest.event.id], report)
        carrier.tell(report, whole=False, tip=False)
        held.close()

    def _save(self, *args: Any, **named: Any) -> Saved:
        self._raise_lost()
        saved = super()._save(*args, **named)
        if self._replicator is not None:
            saved.behind = self._replicator.wait_for
        return saved

    def _raise_lost(self) -> None:
        if self._replicator is not None and self._replicator.lost is not None:
            error = self._replicator.lost
            raise RunTakenOver(f"in {self._behind.url}: {error.what}", where=error.where, do=error.do)

    def _resume_from(self, writer: Writer, commit: Committed, strict: bool) -> int:
        """From the nearest copy. What was read from behind is not referred to by what is saved here."""
        here, self._vault = self._vault, self._nearest
        try:
            step = super()._resume_from(writer, commit, strict)
        finally:
            self._vault = here
        if commit.event.id in self._nearest.away:
            writer.known = type(writer.known)()
        return step

    def close(self) -> None:
        """Waits until all is durable here, then until it is behind, at most `behind_seconds`; and frees the run."""
        replicator, self._replicator = self._replicator, None
        keeper, self._keeper = self._keeper, None
        try:
            super().close()
        finally:
            if replicator is not None and self._vault.seam.pid() == self._pid:
                self._finish(replicator, keeper)

    def _finish(self, replicator: Replicator, keeper: Keeper | None) -> None:
        replicator.notify()
        done = replicator.finish(self._vault.settings.behind_seconds)
        if done and keeper is not None:
            for text in keeper.after_commit():  # what was only held until it was there
                self._warn(text)
        for text in replicator.notices():
            self._warn(text)
        history = self._history()
        lag = lag_of(history, [id for id in history.live if replicator.holds(id)], self._vault.seam.now())
        if replicator.lost is not None:
            self._warn(f"another process has taken the run in {self._behind.url}; not there: {lag}")
        elif not done and lag.checkpoints:
            self._warn(
                f"not yet in {self._behind.url}: {lag}. It is safe here; the next process that opens the run sends it, "
                "and so does push()"
            )


class FrontPast(PastRun):
    """A run to read, from the nearest copy of each checkpoint. What is looked after is the place in front alone."""

    def __init__(self, place: Place, name: str, behind: Behind) -> None:
        super().__init__(place, name)
        self._behind = behind
        self._front = PastRun(place, name)
        self._vault = nearest = NearestVault(place, name, lambda: behind.vault(name))
        if behind.is_away:
            nearest.assume_away()

    @property
    def lag(self) -> Lag:
        """What the place behind has not got yet: checkpoints, their bytes, and for how long."""
        return _lag(self._behind, self.name, None, self._front._history(), self._vault.seam.now())

    def forget(
        self,
        keep: Rule | None = None,
        keep_full: Rule | None = None,
        *,
        dry_run: bool = False,
        force: bool = False,
        undo_seconds: float | None = None,
    ) -> list[Decision]:
        """As `PastRun.forget`, in front; what the place behind has not got yet stays, unless `force` is given."""
        if not force:
            there = self._behind.vault(self.name).history().commits
            held = _NotBehind(lambda id: id not in there)
            keep, keep_full = (rule and rule | held for rule in (keep, keep_full))
        return self._front.forget(keep, keep_full, dry_run=dry_run, force=force, undo_seconds=undo_seconds)

    @property
    def dropped(self) -> list[Checkpoint]:
        return self._front.dropped

    def undo(self) -> list[Checkpoint]:
        return self._front.undo()

    def prune(self, *, now: bool = False, dry_run: bool = False) -> Freed:
        return self._front.prune(now=now, dry_run=dry_run)

    def repack(self, *, dead: float = 0.5, progress: Callable[[int, int], None] | None = None) -> Repacked:
        return self._front.repack(dead=dead, progress=progress)

    def stats(self, progress: Callable[[int, int], None] | None = None) -> RunStats:
        return self._front.stats(progress)

    def sessions(self) -> list[dict[str, Any]]:
        return self._front.sessions()


def _lag(behind: Behind, name: str, keep: Rule | None, source: History, now: float) -> Lag:
    return lag_of(source, to_send(keep, source, behind.vault(name).history()), now)
