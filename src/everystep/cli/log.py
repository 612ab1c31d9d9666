"""`everystep log`: the runs of a repository, or the checkpoints of a run, newest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Checkpoint, PastRun, Repository
from everystep.cli import human
from everystep.cli.options import JsonOption, RepoOption, begin
from everystep.cli.table import Column, cut, lay_out

SHORT_ID = 8


def log(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(help="A run; without it, all runs.", metavar="RUN")] = None,
    number: Annotated[int | None, typer.Option("-n", "--number", min=1, help="At most so many, the newest.")] = None,
    all_lines: Annotated[bool, typer.Option("--all", help="Also the lines that were left.")] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs, or the checkpoints of a run, newest first.

    A line with two dashes says where a process took the run: here it was started, resumed or taken over.
    "new" is what a checkpoint added to the repository; the rest of it was there already.
    """
    screen, repository = begin(context, repo, as_json)
    if run is None:
        found = [_about_run(repository[name]) for name in repository]
        found = sorted(found, key=lambda about: -about["latest"]["time"] if about["latest"] else 0.0)[:number]
        screen.give({"repository": repository.url, "runs": found}, lambda: _runs(repository, found, screen.width))
        return
    past = repository[run]
    line = past.checkpoints()
    kept = past.checkpoints(all=True)
    listed = kept if all_lines else line
    shown = listed[-number:] if number is not None else listed
    current = {checkpoint.id for checkpoint in line}
    document = {
        "repository": repository.url,
        "run": past.name,
        "checkpoints": [about_checkpoint(c) | {"current": c.id in current} for c in reversed(shown)],
        "more": len(listed) - len(shown),
        "on_other_lines": len(kept) - len(line),
        "sessions": about_sessions(past, kept),
    }
    screen.give(document, lambda: _checkpoints(repository, document, all_lines, screen.width))


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
        "cost": checkpoint.cost,
    }


def about_sessions(past: PastRun, kept: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """What JSON says of the processes that wrote a run; the checkpoint that each continued from with its step."""
    steps = {checkpoint.id: checkpoint.step for checkpoint in kept}
    return [{**session, "continues_step": steps.get(session["continues"])} for session in past.sessions()]


def _about_run(past: PastRun) -> dict[str, Any]:
    line, kept, sessions = past.checkpoints(), past.checkpoints(all=True), past.sessions()
    costs = [checkpoint.cost for checkpoint in kept]
    latest = line[-1] if line else None
    return {
        "run": past.name,
        "checkpoints": len(kept),
        "latest": {"id": latest.id, "step": latest.step, "time": latest.time} if latest else None,
        "stored_bytes": int(sum(cost["stored_bytes"] for cost in costs)),
        "raw_bytes": int(sum(cost["raw_bytes"] for cost in costs)),
        "terms": len(sessions),
        "ended": sessions[-1]["ended"] if sessions else None,
    }


def _when(repository: Repository, time: float, width: int | None) -> str:
    """An age for the eye, a date for a pipe."""
    date = repository.local_time(time)
    return date if width is None else human.age(repository.now() - time, date)


def _runs(repository: Repository, found: Sequence[dict[str, Any]], width: int | None) -> Iterator[Text]:
    if not found:
        yield Text("no run yet in ").append(human.clean(repository.url), "bold")
        return
    columns = [
        Column("run", style="bold", least=12), Column("checkpoints", right=True),
        Column("latest", right=True, style="cyan"), Column("when"),
        Column("stored", right=True), Column("of", right=True, style="dim"),
        Column("terms", right=True, spare=True), Column("writer", spare=True, style="dim"),
    ]  # fmt: skip
    rows = [_run_row(repository, about, width) for about in found]
    table = lay_out(columns, rows, width)
    yield table.head
    yield from table.rows
    if len(found) > 1:
        stored, raw = (sum(about[name] for about in found) for name in ("stored_bytes", "raw_bytes"))
        checkpoints = human.count(sum(about["checkpoints"] for about in found), "checkpoint")
        yield Text(f"\n{len(found)} runs, {checkpoints}, {human.size(stored)} stored of {human.size(raw)}", "dim")


def _run_row(repository: Repository, about: dict[str, Any], width: int | None) -> list[str]:
    latest = about["latest"]
    return [
        human.clean(about["run"]),
        str(about["checkpoints"]),
        str(latest["step"]) if latest else "",
        _when(repository, latest["time"], width) if latest else "",
        human.size(about["stored_bytes"]),
        human.size(about["raw_bytes"]),
        str(about["terms"]),
        about["ended"] or ("open" if about["terms"] else ""),
    ]


def _checkpoints(
    repository: Repository, document: dict[str, Any], all_lines: bool, width: int | None
) -> Iterator[Text]:
    found: list[dict[str, Any]] = document["checkpoints"]
    sessions: list[dict[str, Any]] = document["sessions"]
    if not found and not sessions:
        yield Text("no checkpoint yet in ").append(human.clean(document["run"]), "bold")
        return
    names = list(dict.fromkeys(name for about in found for name in about["metrics"]))
    columns = [
        Column("step", right=True, style="bold"), Column(""), Column("id", style="cyan"), Column("when"),
        Column("size", right=True), Column("new", right=True),
        *(Column(human.clean(name), right=True, spare=True) for name in names),
        Column("tags", style="yellow", least=8), Column("reason", style="dim", least=10, spare=True),
    ]  # fmt: skip
    table = lay_out(columns, _rows(repository, found, names, all_lines, width), width)
    if found:
        yield table.head
    yield from _with_markers(repository, document, table.rows, width)
    notes = [f"{human.count(document['more'], 'older checkpoint')}: a larger -n"] if document["more"] else []
    if document["on_other_lines"] and not all_lines:
        notes.append(f"{human.count(document['on_other_lines'], 'checkpoint')} on lines that were left: --all")
    if table.left_out:
        notes.append(f"no room for {', '.join(table.left_out)}: --json, or a wider terminal")
    if notes:
        yield Text("\n" + "\n".join(f"… {note}" for note in notes), "dim")


def _rows(
    repository: Repository, found: Sequence[dict[str, Any]], names: Sequence[str], all_lines: bool, width: int | None
) -> list[list[str]]:
    metrics = [human.numbers([about["metrics"].get(name) for about in found]) for name in names]
    return [
        [
            str(about["step"]),
            "" if not all_lines else "●" if about["current"] else "○",
            about["id"] if width is None else about["id"][:SHORT_ID],
            _when(repository, about["time"], width),
            human.size(about["cost"]["raw_bytes"]),
            human.size(about["cost"]["stored_bytes"]),
            *(column[at] for column in metrics),
            human.clean(", ".join(about["tags"])),
            human.clean(about["reason"]),
        ]
        for at, about in enumerate(found)
    ]


def _with_markers(
    repository: Repository, document: dict[str, Any], rows: Iterable[Text], width: int | None
) -> Iterator[Text]:
    """The rows, and below the oldest of each term a line that says who began to write there."""
    waiting = sorted(document["sessions"], key=lambda session: -session["term"])
    for about, row in zip(document["checkpoints"], rows):
        while waiting and waiting[0]["term"] > about["term"]:
            yield _marker(repository, waiting.pop(0), width)
        yield row
    while waiting and not document["more"]:
        yield _marker(repository, waiting.pop(0), width)


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
