"""Between two places: which checkpoints go, under which term they are committed there, and what came of it."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from everystep.checkpoint import Checkpoint
from everystep.environment import fingerprint
from everystep.errors import Error, EverystepWarning, NotFound, UsageError
from everystep.past import PastRun
from everystep.restore import KEPT
from everystep.rules import Rule, check_rule
from everystep.run import Run
from everystep.save import take_run
from everystep.save.commit import check_fence
from everystep.schema import Roled
from everystep.upkeep import Carried, Carrier, kept_of, waiting
from everystep.vault import History, Place, RunVault, Term
from everystep.vault.record import Close, Open, Start

Progress = Callable[[str, int, int, int], None]
"""Told (run, checkpoints done, checkpoints in all, bytes sent)."""


class HeldRun:
    """A run of another repository, held while checkpoints are committed there: a term for each environment that they
    were saved in, so that a resume there still says what has changed."""

    def __init__(self, vault: RunVault, *, takeover: bool, reason: str) -> None:
        self._vault, self._takeover, self._reason = vault, takeover, reason
        self._environment: dict[str, Any] = {}
        self.term: Term | None = None

    def of(self, opened: Open | None) -> Term:
        environment = opened.environment if opened is not None else fingerprint(self._vault.seam)
        if self.term is None:
            latest = self._vault.history().latest
            self.term = take_run(
                self._vault, takeover=self._takeover, launch=self._vault.seam.token(8), ranks=1,
                environment=environment, continues=latest.event.id if latest else None, reason=self._reason,
                author=self._vault.author,
            )  # fmt: skip
        elif environment != self._environment:
            self.term = self._vault.open_term(lambda history: self._again(history, environment), self._vault.author)
        self._environment = environment
        return self.term

    def _again(self, history: History, environment: dict[str, Any]) -> Open:
        self.check(history)  # who has been superseded takes nothing back
        assert history.owner is not None
        before, latest = history.owner, history.latest
        return Open(
            self._vault.seam.token(16), before.launch, 1, before.process, environment,
            latest.event.id if latest else None, self._reason,
        )  # fmt: skip

    def check(self, history: History) -> None:
        """
        Raises:
            RunTakenOver: if another process has taken the run.
        """
        if self.term is not None:
            check_fence(history, self.term, self._vault.where)

    def close(self) -> None:
        """Frees the run, if it is still held."""
        term, self.term = self.term, None
        if term is not None:
            self._vault.log.append(
                lambda history: [Close(term.nonce)] if history.term == term.number and not history.closed else None,
                self._vault.author,
            )


def carry(
    source: Place,
    target: Place,
    which: str | Sequence[str] | None,
    *,
    keep: Rule | None = None,
    only: str | Sequence[str] | None = None,
    as_run: str | None = None,
    dry_run: bool = False,
    takeover: bool = False,
    reason: str,
    progress: Progress | None = None,
) -> list[Carried]:
    """Commits in the target what it lacks of the source's checkpoints; one report for each run.

    Raises:
        NotFound: for a run or checkpoint that the source has not.
        UsageError: if both are one place, or several runs are to get one name.
    """
    check_apart(source.storage, target.storage)
    rule = check_rule(keep, "keep=") if keep is not None else None
    wanted = _wanted(source, which)
    if as_run is not None and len(wanted) != 1:
        raise UsageError(f"{len(wanted)} runs cannot all be called {as_run!r}", do="name one run beside as_run=")
    found = []
    for name, specs in wanted.items():
        past = PastRun(source, name)
        ids = _chosen(past, specs, rule)
        told = _telling(name, progress)
        if only is not None:
            part = _Part([only] if isinstance(only, str) else list(only), as_run, reason, takeover)
            found.append(part.carry(past, ids, target, dry_run=dry_run, told=told))
            continue
        report = Carried(name, as_run or name)
        vault, whole = RunVault(target, report.target_run), specs is None and rule is None
        if dry_run:
            waiting(past._vault.history(), vault.history(), ids, report, whole=whole)
        else:
            held = HeldRun(vault, takeover=takeover, reason=reason)
            _carry(past, vault, held, ids, report, whole=whole, told=told)
        if report.apart and report.sent:
            _warn_apart(report, vault.where, dry_run=dry_run)
        found.append(report)
    return found


def check_apart(one: Any, other: Any) -> None:
    """
    Raises:
        UsageError: if both are one place.
    """
    named = not str(one.url).startswith("memory://")  # of these, several may have no name
    if one is other or (named and one.url == other.url):
        raise UsageError("both are the same place", where=str(one.url), do="give another folder or URL")


def _warn_apart(report: Carried, where: str, *, dry_run: bool) -> None:
    verb = "would go" if dry_run else "went"
    text = (
        f"{where} shares no checkpoint with run {report.run!r}: what {verb} there is a line beside its current one. "
        f"If that is another run, give this one another name there (as_run=, --as)"
    )
    warnings.warn(text, EverystepWarning, stacklevel=4)


def _carry(
    past: PastRun, vault: RunVault, held: HeldRun, ids: list[str], report: Carried, *, whole: bool, told: Any
) -> None:
    carrier = Carrier(past._vault, vault, held, progress=told)
    try:
        carrier.carry(ids, report)
        carrier.tell(report, whole=whole)
    except BaseException:
        _let_go(held)
        raise
    held.close()


def _let_go(held: HeldRun) -> None:
    """After an error, which says more than whatever goes wrong here."""
    try:
        held.close()
    except Error:
        return


def _telling(name: str, progress: Progress | None) -> Callable[[int, int, int], None] | None:
    return None if progress is None else lambda done, total, nbytes: progress(name, done, total, nbytes)


def _wanted(source: Place, which: str | Sequence[str] | None) -> dict[str, list[str] | None]:
    """Run -> what stands behind the @ of those that are asked for; None for all its checkpoints."""
    runs = sorted(source.runs()) if source.exists else []
    if not source.exists:
        raise NotFound("there is no repository here", where=str(source.storage.url), do="check the folder or URL")
    found: dict[str, list[str] | None] = {}
    for text in runs if which is None else [which] if isinstance(which, str) else which:
        name, at, spec = text.rpartition("@") if text not in runs else (text, "", "")
        name = name if at else text
        if name not in runs:
            near = difflib.get_close_matches(name, runs, 3) or runs[:5]
            do = f"runs there: {', '.join(near)}" if near else "it has none yet"
            raise NotFound(f"no run {name!r}", where=str(source.storage.url), do=do)
        specs = found.setdefault(name, [])
        if not at:
            found[name] = None
        elif specs is not None:
            specs.append(spec)
    return found


def _chosen(past: PastRun, specs: list[str] | None, keep: Rule | None) -> list[str]:
    """Ids, in the order of saving."""
    history = past._vault.history()
    chosen = set(history.live) if specs is None else {past.find(spec).id for spec in specs}
    if keep is not None:
        chosen &= keep.keeps(kept_of(history)).keys()
    return [id for id in history.live if id in chosen]


class _Part:
    """Part of the state of checkpoints, as a run of its own: loaded, which reads that part alone, and saved there."""

    def __init__(self, only: list[str], as_run: str | None, reason: str, takeover: bool) -> None:
        self._only, self._as_run, self._reason, self._takeover = sorted(set(only)), as_run, reason, takeover

    def carry(self, past: PastRun, ids: list[str], target: Place, *, dry_run: bool, told: Any) -> Carried:
        name = self._as_run or f"{past.name}.{'+'.join(path.replace('/', '.') for path in self._only)}"
        report = Carried(past.name, name)
        there = PastRun(target, name)._vault.history().origins
        todo = []
        for id in ids:
            checkpoint = past._checkpoint(past._history().commits[id])
            if self._origin(checkpoint) in there:
                report.there += 1
            else:
                todo.append(checkpoint)
        if dry_run:
            report.sent = [checkpoint.step for checkpoint in todo]
        elif todo:
            self._save(target, name, todo, report, told or (lambda done, total, nbytes: None))
        return report

    def _origin(self, checkpoint: Checkpoint) -> Start:
        return Start(checkpoint.run, checkpoint.id, checkpoint.step, self._only)

    def _save(self, target: Place, name: str, todo: list[Checkpoint], report: Carried, told: Any) -> None:
        run = Run(
            target, name, config={}, when_busy="wait", takeover=self._takeover, rank=0, ranks=1, launch=None,
            keep=None, keep_full=None, quota_bytes=None,
        )  # fmt: skip
        latest = run._history().latest
        run._left = latest.event.id if latest is not None else None  # they continue each other
        with run.track(rng=False):
            for number, checkpoint in enumerate(todo):
                told(number, len(todo), report.sent_bytes)
                state = self._state(checkpoint)
                run._origin = self._origin(checkpoint)
                run._open().term.steps.clear()  # after a rewind there, two may have one step
                done = run.save(checkpoint.step, state=state, metrics=checkpoint.metrics, reason=self._reason).wait()
                report.sent.append(done.step)
                report.sent_bytes += int(done.cost["stored_bytes"])
                report.raw_bytes += int(done.cost["raw_bytes"])
            told(len(todo), len(todo), report.sent_bytes)

    def _state(self, checkpoint: Checkpoint) -> dict[Any, Any]:
        """The parts, each at its own path, with the role that its leaves have."""
        loaded: Mapping[str, Any] = checkpoint.load(only=self._only, like=KEPT)
        leaves = checkpoint.leaves()
        whole: dict[Any, Any] = {}
        for path, value in loaded.items():
            roles = {leaf.role for leaf in leaves if f"{leaf.path}/".startswith(f"{path}/")}
            *above, last = [_key(part) for part in path.split("/")]
            inner = whole
            for key in above:
                inner = inner.setdefault(key, {})
            inner[last] = Roled(roles.pop(), value) if len(roles) == 1 else value
        return whole


def _key(part: str) -> Any:
    """The key that a part of a path stands for; the text itself, where that is not one of text or of a number."""
    if part == "%":
        return ""
    if part.startswith("[") and part[1:-1].isdigit():
        return int(part[1:-1])
    return part if part.startswith("[") else unquote(part)
