"""What each worker recorded of itself: its loss, its step time; kept by rank with the checkpoint that comes next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everystep.errors import UsageError
from everystep.metrics import hold, number
from everystep.restore import WORKER, Opened
from everystep.schema.plain import check_text
from everystep.schema.tree import TEXT_MAX
from everystep.seam import Seam

RANK, HOST, METRICS = "rank", "host", "metrics"


class Worker:
    """The numbers of this process alone, until a save takes them along."""

    def __init__(self, seam: Seam) -> None:
        self._seam = seam
        self._given: dict[str, Any] = {}
        self._taken: tuple[int, dict[str, Any]] | None = None

    def add(self, step: int | None, metrics: Mapping[str, Any]) -> None:
        """
        Raises:
            UsageError: for what is not one number, for a name that says something else, and for a step.
        """
        if step is not None:
            do = "leave out step=, or leave out worker=True"
            raise UsageError("numbers of a worker belong to the next checkpoint, step= to another", do=do)
        held = {check_text(name, "the name of a metric"): hold(name, value) for name, value in metrics.items()}
        for name, value in held.items():
            if name in (RANK, HOST) or (isinstance(value, str) and len(value) > TEXT_MAX):
                what = "is said of every worker already" if name in (RANK, HOST) else "is a long text"
                raise UsageError(f"the metric {name!r} {what}", do="give it another name, or a number")
        self._given.update(held)

    def section(self, step: int) -> dict[str, Any] | None:
        """What the checkpoint of a step keeps of this process; the same, however often that step is saved."""
        if self._taken is None or self._taken[0] != step:
            self._taken = step, {name: number(name, value) for name, value in self._given.items()}
            self._given = {}
        found = self._taken[1]
        return {HOST: self._seam.process().host, METRICS: dict(found)} if found else None

    def forget(self) -> None:
        """From here on, steps that were saved before may come out different."""
        self._taken = None

    def left(self) -> list[str]:
        """What no save has taken along, in words."""
        return [f"metric {name!r} of this worker" for name in self._given]


def workers_of(opened: Opened) -> list[dict[str, Any]]:
    """What the workers recorded of themselves, by rank. Reads the manifest only."""
    found = []
    for view in opened.manifest.views:
        mine = opened.of_rank(view.rank) if WORKER in view.paths else None
        own = mine.outline(WORKER) if mine is not None else None
        # What was tracked by this name, before it meant something, is another thing.
        if type(own) is dict and own.keys() == {HOST, METRICS} and type(own[METRICS]) is dict:
            found.append({RANK: view.rank, HOST: own[HOST], **own[METRICS]})
    return found
