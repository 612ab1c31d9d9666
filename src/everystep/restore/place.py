"""Put a loaded state into live objects: match everything first, then place it, so that a misfit changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from everystep import adapters
from everystep.errors import Mismatch
from everystep.restore.fetch import Progress
from everystep.restore.load import SECTIONS_OF_OURS, Opened
from everystep.schema import LoadReport, join


def place_tracked(
    opened: Opened,
    tracked: Mapping[str, Any],
    *,
    strict: bool,
    whole: bool,
    where: str,
    base: str = "",
    progress: Progress | None = None,
) -> LoadReport:
    """Fills the tracked objects from the checkpoint's sections of the same names.

    Args:
        base: the path below which the sections are.
        strict: anything missing, unexpected or of another shape is an error, and then nothing is changed.
        whole: sections of the checkpoint that nobody asked for are unexpected, too.

    Raises:
        Mismatch: with the report's text.
    """
    report = LoadReport()
    names = [name for name in opened.names(base) if base or name not in SECTIONS_OF_OURS]
    report.missing += [join("", name) for name in tracked if join("", name) not in names]
    if whole:
        report.unexpected += [name for name in names if name not in {join("", key) for key in tracked}]
    inside = {join("", name): f"{base}/{join('', name)}" if base else join("", name) for name in tracked}
    paths = [inside[path] for path in inside if path in names]
    wanted = {
        inside[path]: adapters.wanted(target, partial(opened.sketch, inside[path]), path, tracked)
        for path, target in ((join("", name), target) for name, target in tracked.items())
        if path in names
    }
    states = opened.build_all(
        paths,
        like="saved",
        progress=progress,
        boxes={path: one.boxes for path, one in wanted.items()},
        kept=[path for path, one in wanted.items() if one.kept],
    )
    places = []
    for name, target in tracked.items():
        path = join("", name)
        if path in names:
            places.append(adapters.apply(target, states.pop(inside[path]), path, tracked, report))
    if strict and not report.complete:
        raise Mismatch(
            f"the checkpoint does not fit what it is loaded into; nothing was changed\n{report}",
            where=where,
            do="load into objects of the same shapes, or pass strict=False and read the report",
        )
    for place in places:
        place()
    return report
