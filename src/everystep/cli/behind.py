"""How far the place behind lags, as JSON and in words: what `log`, `show` and `stats` say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everystep import Lag, PastRun, Repository, StorageError
from everystep.cli import human

NOT_YET = "not yet"


class Behind:
    """The place behind, where one was named; every answer is None where none was."""

    def __init__(self, repository: Repository, url: str | None) -> None:
        self._pair = repository.in_front_of(url) if url is not None else None
        self._error: str | None = None

    def about(self, past: PastRun) -> dict[str, Any] | None:
        """What JSON says of a run there. A place that does not answer is said, and no error: what is here is shown."""
        if self._pair is None:
            return None
        lag = self._lag(past.name)
        if lag is None:
            return {"place": self._pair.behind, "error": self._error}
        return {
            "place": self._pair.behind, "error": None,
            "checkpoints": lag.checkpoints, "nbytes": lag.nbytes, "seconds": lag.seconds, "missing": list(lag.missing),
        }  # fmt: skip

    def _lag(self, run: str) -> Lag | None:
        """None if it does not answer. It is not asked again: to find that out may take a minute."""
        if self._pair is not None and self._error is None:
            try:
                return self._pair.lag(run)
            except StorageError as error:
                self._error = error.what
        return None


def is_there(about: Mapping[str, Any] | None, id: str) -> bool | None:
    """Whether the place behind has what it is to have of a checkpoint; None if that is not known."""
    return None if about is None or about["error"] is not None else id not in about["missing"]


def lag_of(about: Mapping[str, Any]) -> str:
    """In a cell."""
    if about["error"] is not None:
        return "no answer"
    if not about["checkpoints"]:
        return "none"
    return f"{human.count(about['checkpoints'], 'checkpoint')}, {human.size(about['nbytes'])}, {_span(about)}"


def sentence(about: Mapping[str, Any]) -> str:
    """In a line of its own."""
    place = human.clean(about["place"])
    if about["error"] is not None:
        return f"it is not known what is in {place}: {human.clean(about['error'])}"
    if not about["checkpoints"]:
        return f"all of it is in {place}"
    what = f"{human.count(about['checkpoints'], 'checkpoint')}, {human.size(about['nbytes'])}"
    return f"not yet in {place}: {what}, the oldest saved {_span(about)} ago"


def _span(about: Mapping[str, Any]) -> str:
    return human.span(about["seconds"])
