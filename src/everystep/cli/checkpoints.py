"""Checkpoints, and the processes that wrote them, as JSON and as rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from everystep import Checkpoint, PastRun, Repository
from everystep.cli import human
from everystep.cli.graph import Drawn
from everystep.cli.table import Column, Table, cut, headed, lay_out

SHORT_ID = 8
BEST = "bold green"


def about_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What JSON says of a checkpoint."""
    return {
        "id": checkpoint.id,
        "step": checkpoint.step,
        "parent": checkpoint.parent,
        "term": checkpoint.term,
        "ranks": checkpoint.ranks,
        "time": checkpoint.time,
        "reason": checkpoint.reason,
        "metrics": checkpoint.metrics,
        "tags": checkpoint.tags,
        "thin": checkpoint.thin,
        "cost": checkpoint.cost,
    }


def about_sessions(past: PastRun, kept: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """What JSON says of the processes that wrote a run; the checkpoint that each continued from with its step."""
    steps = {checkpoint.id: checkpoint.step for checkpoint in kept}
    return [{**session, "continues_step": steps.get(session["continues"])} for session in past.sessions()]


def when(repository: Repository, time: float, width: int | None) -> str:
    """An age for the eye, a date for a pipe."""
    date = repository.local_time(time)
    return date if width is None else human.age(repository.now() - time, date)


def table_of(
    repository: Repository,
    found: Sequence[Mapping[str, Any]],
    width: int | None,
    *,
    lead: Sequence[tuple[Column, Sequence[str]]] = (),
    best: Mapping[str, str] | None = None,
    first: str | None = None,
) -> Table:
    """One row for each checkpoint, as `about_checkpoint` says it.

    Args:
        lead: columns before the others, with their cells.
        best: metric -> id of the checkpoint that has the best value.
        first: the metric that comes before the others, and never goes.
    """
    names = list(dict.fromkeys(name for about in found for name in about["metrics"]))
    names.sort(key=lambda name: name != first)
    columns = [
        *(column for column, _ in lead),
        Column("step", right=True, style="bold"), Column("id", style="cyan"), Column("when"),
        Column("size", right=True), Column("new", right=True, spare=first is not None),
        *(Column(human.clean(name), right=True, spare=name != first) for name in names),
        Column("tags", style="yellow", least=8), Column("", style="magenta"),
        Column("reason", style="dim", least=10, spare=True),
    ]  # fmt: skip
    metrics = [human.numbers([about["metrics"].get(name) for about in found]) for name in names]
    rows = [
        [
            *(cells[at] for _, cells in lead),
            str(about["step"]),
            about["id"] if width is None else about["id"][:SHORT_ID],
            when(repository, about["time"], width),
            human.size(about["cost"]["raw_bytes"]),
            human.size(about["cost"]["stored_bytes"]),
            *(column[at] for column in metrics),
            human.clean(", ".join(about["tags"])),
            "thin" if about["thin"] else "",
            human.clean(about["reason"]),
        ]
        for at, about in enumerate(found)
    ]
    marked = {
        (at, len(lead) + 5 + n): BEST
        for n, name in enumerate(names)
        for at, about in enumerate(found)
        if best is not None and best.get(name) == about["id"]
    }
    return lay_out(columns, rows, width, marked)


def with_terms(
    repository: Repository,
    found: Sequence[Mapping[str, Any]],
    sessions: Sequence[dict[str, Any]],
    rows: Iterable[Text],
    drawn: Sequence[Drawn] | None,
    width: int | None,
    *,
    to_the_end: bool,
) -> Iterator[Text]:
    """The rows behind their part of the graph, and below the oldest of each term a line that says who began there."""
    waiting = sorted(sessions, key=lambda session: -session["term"])
    wide = graph_width(drawn)
    through = ""

    def before(signs: str) -> Text:
        return headed(signs.ljust(wide), "", "blue")

    def mark(session: dict[str, Any]) -> Text:
        return before(through).append_text(_marker(repository, session, width - wide if width is not None else None))

    for at, (about, row) in enumerate(zip(found, rows)):
        while waiting and waiting[0]["term"] > about["term"]:
            yield mark(waiting.pop(0))
        if drawn is not None:
            if drawn[at].joins:
                yield Text(drawn[at].joins, "blue")
            through = drawn[at].through
        yield before(drawn[at].node if drawn is not None else "").append_text(row)
    while waiting and to_the_end:
        yield mark(waiting.pop(0))


def graph_width(drawn: Sequence[Drawn] | None) -> int:
    """Cells that a graph takes, with the gap behind it."""
    return max((max(len(one.node), len(one.through)) for one in drawn or ()), default=-2) + 2


def _marker(repository: Repository, session: dict[str, Any], width: int | None) -> Text:
    after = f" after {continued(session)}" if session["continues"] else ""
    parts = [
        f"term {session['term']}{after}",
        repository.local_time(session["opened"]),
        f"process {who(session)}",
        session["ended"] or "open",
    ]
    return Text(cut(f"── {' · '.join(parts)}", width), "yellow" if session["ended"] == "died" else "magenta")


def continued(session: dict[str, Any]) -> str:
    """The checkpoint that a session continued from; its id, where that is not there any more."""
    step = session["continues_step"]
    return f"step {step}" if step is not None else f"checkpoint {human.clean(session['continues'])}"


def who(session: dict[str, Any]) -> str:
    """The process of a session."""
    host = human.clean(session.get("host", "?"))
    ranks = f", {session['ranks']} ranks" if session["ranks"] > 1 else ""
    return f"{human.clean(session.get('pid', '?'))} on {host}{ranks}"
