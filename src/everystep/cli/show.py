"""`everystep show`: one run, or one checkpoint with its leaves and, if asked for, what is in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Checkpoint, PastRun, Repository, UsageError
from everystep.cli import human
from everystep.cli.behind import NOT_YET, Behind, is_there, sentence
from everystep.cli.checkpoints import about_checkpoint, about_sessions, continued, who
from everystep.cli.completion import targets
from everystep.cli.leaves import LINES_SHOWN, lines_of
from everystep.cli.options import BehindOption, JsonOption, RepoOption, begin, pick
from everystep.cli.progress import reading
from everystep.cli.table import Column, lay_out, pairs
from everystep.cli.workers import spread_lines, spreads, worker_lines

_STAGES = ("stall", "queue", "encode", "write")


def show(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(help="A run, or a checkpoint of it: RUN@SPEC.", metavar="RUN[@SPEC]", autocompletion=targets),
    ],
    leaves: Annotated[
        int | None,
        typer.Option("--leaves", min=0, help=f"At most so many lines of leaves; {LINES_SHOWN} if not given."),
    ] = None,
    all_leaves: Annotated[bool, typer.Option("--all-leaves", help="Show every leaf.")] = False,
    norms: Annotated[
        bool, typer.Option("--norms", help="Read the leaves: norm, mean, range, and how many are not finite.")
    ] = False,
    behind: BehindOption = None,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run, or one checkpoint with its leaves.

    SPEC is a step, latest, best:METRIC, best:METRIC:max, a tag, or the beginning of an id.

    Where there are many leaves, parts of the tree are summed up in one line; with --norms as if they were one leaf.
    A path is what stands in a line behind what stands above it: load(only="model/fc.weight"). What workers recorded of
    themselves is listed by rank, and for each metric the least, the median and the most: who holds the others up.
    """
    screen, repository = begin(context, repo, as_json)
    past, checkpoint = pick(repository, target)
    far = Behind(repository, behind).about(past)
    if checkpoint is None:
        if norms:
            raise UsageError("--norms is about the leaves of a checkpoint", do=f"show {past.name}@latest --norms")
        about = {**_about_run(repository, past), "behind": far}
        screen.give(about, lambda: _run(repository, about, screen.width))
        return
    document = {**_about_checkpoint(repository, past, checkpoint), "behind": far}
    every: list[dict[str, Any]] = document["leaves"]
    if norms:
        _add_norms(checkpoint, every)
    lines = leaves if leaves is not None else None if all_leaves else LINES_SHOWN
    listed = every if leaves is None else every[:leaves]
    screen.give(
        {**document, "leaves": listed, "more": len(every) - len(listed)},
        lambda: _checkpoint(repository, past, document, lines, screen.width),
    )


def _add_norms(checkpoint: Checkpoint, leaves: Sequence[dict[str, Any]]) -> None:
    with reading(f"{checkpoint.run}@{checkpoint.step}", sum(leaf["nbytes"] for leaf in leaves)) as told:
        found = checkpoint.summarize(progress=told)
    for leaf in leaves:
        summary = found[leaf["path"]]
        leaf["summary"] = asdict(summary) if summary is not None else None


def _about_run(repository: Repository, past: PastRun) -> dict[str, Any]:
    line, kept = past.checkpoints(), past.checkpoints(all=True)
    return {
        "repository": repository.url,
        "run": past.name,
        "checkpoints": len(kept),
        "steps": [checkpoint.step for checkpoint in line],
        "latest": about_checkpoint(line[-1]) if line else None,
        "stored_bytes": int(sum(checkpoint.cost["stored_bytes"] for checkpoint in kept)),
        "raw_bytes": int(sum(checkpoint.cost["raw_bytes"] for checkpoint in kept)),
        "tags": {name: {"id": tagged.id, "step": tagged.step} for name, tagged in past.tags.items()},
        "metrics": past.metric_names,
        "config": past.config,
        "attachments": past.attachments,
        "notes": past.notes,
        "origins": past.origins,
        "undoable": [checkpoint.step for checkpoint in past.dropped],
        "sessions": about_sessions(past, kept),
    }


def _about_checkpoint(repository: Repository, past: PastRun, checkpoint: Checkpoint) -> dict[str, Any]:
    roles: dict[str, dict[str, int]] = {}
    leaves: list[dict[str, Any]] = [
        {
            "path": leaf.path, "dtype": leaf.dtype, "shape": list(leaf.shape), "role": leaf.role, "kind": leaf.kind,
            "nbytes": leaf.nbytes,
        }
        for leaf in checkpoint.leaves()
    ]  # fmt: skip
    for leaf in leaves:
        total = roles.setdefault(leaf["role"], {"leaves": 0, "nbytes": 0})
        total["leaves"] += 1
        total["nbytes"] += leaf["nbytes"]
    workers = checkpoint.workers
    parents = [other.step for other in past.checkpoints(all=True) if other.id == checkpoint.parent]
    return {
        "repository": repository.url,
        "run": past.name,
        "checkpoint": {
            **about_checkpoint(checkpoint),
            "parent_step": parents[0] if parents else None,
            "notes": checkpoint.notes,
            "environment": checkpoint.environment,
        },
        "roles": roles,
        "leaves": leaves,
        "workers": workers,
        "spreads": spreads(workers),
    }


def _moment(repository: Repository, time: float) -> str:
    date = repository.local_time(time)
    ago = human.age(repository.now() - time, date)
    return date if date.startswith(ago) else f"{date} ({ago})"


def _section(title: str, lines: Sequence[Text]) -> Iterator[Text]:
    if lines:
        yield Text(f"\n{title}", "bold")
        yield from lines


def _run(repository: Repository, about: dict[str, Any], width: int | None) -> Iterator[Text]:
    yield Text().append("run ", "dim").append(human.clean(about["run"]), "bold")
    latest = about["latest"]
    stored = f"{human.size(about['stored_bytes'])} stored of {human.size(about['raw_bytes'])}"
    left = about["checkpoints"] - len(about["steps"])
    yield from pairs([
        ("repository", human.clean(about["repository"])),
        ("latest", f"step {latest['step']}, {latest['id']}" if latest else "no checkpoint yet"),
        ("saved", _moment(repository, latest["time"]) if latest else ""),
        ("steps", human.steps(about["steps"])),
        ("other lines", human.count(left, "checkpoint") if left else ""),
        ("dropped", f"{human.steps(about['undoable'])}; undo brings them back" if about["undoable"] else ""),
        ("behind", sentence(about["behind"]) if about["behind"] is not None else ""),
        ("began with", "; ".join(map(_origin, about["origins"]))),
        ("size", stored if latest else ""),
        ("metrics", human.value(about["metrics"])),
        ("attachments", human.value(about["attachments"])),
    ])  # fmt: skip
    tags = [(human.clean(name), f"step {tagged['step']}, {tagged['id']}") for name, tagged in about["tags"].items()]
    yield from _section("tags", pairs(tags, 2))
    config = [(human.clean(name), human.value(found)) for name, found in about["config"].items()]
    yield from _section("config", pairs(config, 2))
    yield from _section("notes", [Text("  ").append(human.clean(note)) for note in about["notes"]])
    yield from _section("terms", list(_sessions(repository, about["sessions"], width)))
    if about["sessions"]:
        last = about["sessions"][-1]
        yield from _section(f"environment of term {last['term']}", _environment(last["environment"]))


def _origin(origin: dict[str, Any]) -> str:
    only = f", only {human.value(origin['only'])}" if origin["only"] else ""
    return f"{human.clean(origin['run'])}@{origin['step']} ({origin['id']}){only}"


def _sessions(repository: Repository, sessions: Sequence[dict[str, Any]], width: int | None) -> Iterator[Text]:
    columns = [
        Column("term", right=True), Column("opened"), Column("process", least=8), Column("from", least=8),
        Column("ended", least=8),
    ]  # fmt: skip
    rows = [
        [
            str(session["term"]),
            repository.local_time(session["opened"]),
            who(session),
            continued(session) if session["continues"] else "the beginning",
            " ".join([
                session["ended"] or "still open",
                repository.local_time(session["closed"]) if session["closed"] is not None else "",
            ]),
        ]
        for session in sessions
    ]  # fmt: skip
    table = lay_out(columns, rows, width - 2 if width is not None else None)
    for line in [table.head, *table.rows]:
        yield Text("  ").append_text(line)


def _environment(environment: dict[str, Any]) -> list[Text]:
    return pairs([(human.clean(name), human.value(found)) for name, found in environment.items()], 2)


def _checkpoint(
    repository: Repository, past: PastRun, document: dict[str, Any], lines: int | None, width: int | None
) -> Iterator[Text]:
    about = document["checkpoint"]
    cost = about["cost"]
    yield Text().append("checkpoint ", "dim").append(f"{human.clean(past.name)}@{about['step']}", "bold")
    parent = f"{about['parent']}, step {about['parent_step']}" if about["parent_step"] is not None else about["parent"]
    ranks = f", {about['ranks']} ranks" if about["ranks"] > 1 else ""
    spent = [f"{stage} {human.duration(cost[f'{stage}_seconds'])}" for stage in _STAGES]
    yield from pairs([
        ("id", about["id"]),
        ("parent", parent or "none"),
        ("saved", _moment(repository, about["time"])),
        ("reason", human.clean(about["reason"])),
        ("term", f"{about['term']}{ranks}"),
        ("tags", human.value(about["tags"])),
        ("behind", _behind(document["behind"], about["id"])),
        ("thin", "its optimizer state has been dropped" if about["thin"] else ""),
        ("size", f"{human.size(cost['raw_bytes'])}, {human.size(cost['stored_bytes'])} of it new in the repository"),
        ("time", ", ".join(spent)),
    ])  # fmt: skip
    metrics = [(human.clean(name), human.value(found)) for name, found in about["metrics"].items()]
    yield from _section("metrics", pairs(metrics, 2))
    yield from _section("workers", list(worker_lines(document["workers"], width)))
    yield from _section("over workers", list(spread_lines(document["spreads"], width)))
    yield from _section("notes", [Text("  ").append(human.clean(note)) for note in about["notes"]])
    yield from _section("environment", _environment(about["environment"]))
    yield from _section("leaves", list(lines_of(document["leaves"], lines, width)))
    yield from _section("roles", list(_roles(document["roles"])))


def _behind(about: dict[str, Any] | None, id: str) -> str:
    if about is None or about["error"] is not None:
        return sentence(about) if about is not None else ""
    return f"{'' if is_there(about, id) else f'{NOT_YET} '}in {human.clean(about['place'])}"


def _roles(roles: dict[str, dict[str, int]]) -> Iterator[Text]:
    columns = [Column("role"), Column("leaves", right=True), Column("size", right=True)]
    rows = [[human.clean(role), str(total["leaves"]), human.size(total["nbytes"])] for role, total in roles.items()]
    whole = [sum(total[name] for total in roles.values()) for name in ("leaves", "nbytes")]
    table = lay_out(columns, [*rows, ["all", str(whole[0]), human.size(whole[1])]], None)
    for line in [table.head, *table.rows]:
        yield Text("  ").append_text(line)
