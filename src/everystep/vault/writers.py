"""Who writes a run: whether its owner is this process, is gone, or may live; and who may write beside it."""

from __future__ import annotations

from typing import Any

from everystep.seam import Process, Seam
from everystep.vault.history import History
from everystep.vault.log import OpenTerm
from everystep.vault.place import Place
from everystep.vault.record import Open


def is_own(seam: Seam, owner: Open) -> bool:
    """Whether this very process opened it before: a notebook cell run again."""
    there, here = _process(owner.process), seam.process()
    return (there.boot, there.pid, there.started) == (here.boot, here.pid, here.started)


def is_gone(seam: Seam, owner: Open) -> bool:
    """Whether the owner is another process, and known to have ended."""
    return not is_own(seam, owner) and seam.is_gone(_process(owner.process))


def permit(place: Place, history: History, events: list[Any]) -> None:
    """Every record of a run passes here: where the store does not keep writers apart, there must be but one.

    Raises:
        ReadOnly: in a mirror.
        UnsafeStore: for several ranks, and beside an owner that may live.
    """
    place.refuse_mirror()
    place.look()
    if place.finding is None or place.finding.safe:
        return
    for event in events:
        if isinstance(event, OpenTerm) and event.event.ranks > 1:
            place.refuse_several(f"{event.event.ranks} ranks would write this run")
    owner = history.owner
    if owner is not None and not history.closed and not is_own(place.seam, owner) and not is_gone(place.seam, owner):
        pid, host = (owner.process.get(name, "?") for name in ("pid", "host"))
        place.refuse_several(f"process {pid} on {host} may still be writing this run")


def _process(fields: dict[str, Any]) -> Process:
    host, machine, boot, started = (str(fields.get(name, "")) for name in ("host", "machine", "boot", "started"))
    return Process(host, machine, boot, int(fields.get("pid", 0)), started)
