"""`everystep log`: the runs of a repository, or checkpoints: of a run newest first, or those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Checkpoint, Damaged, NotFound, PastRun, Repository, UsageError
from everystep.cli import human, typed
from everystep.cli.behind import NOT_YET, Behind, is_there, lag_of, sentence
from everystep.cli.checkpoints import about_checkpoint, about_sessions, graph_width, table_of, when, with_terms
from everystep.cli.completion import metrics, runs
from everystep.cli.graph import CURRENT, LEFT, draw
from everystep.cli.options import BehindOption, JsonOption, RepoOption, begin, instead, pick_run
from everystep.cli.table import Column, Table, lay_out

BEST_SHOWN = 10
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Asked:
    """Which checkpoints are wanted, and in which order."""

    number: int | None = None
    all_lines: bool = False
    best: str | None = None
    mode: str | None = None
    tag: str | None = None
    where: str | None = None

    @property
    def narrowed(self) -> bool:
        return self.best is not None or self.tag is not None or self.where is not None

    @property
    def limit(self) -> int | None:
        return BEST_SHOWN if self.number is None and self.best is not None else self.number

    def mode_among(self, known: Sequence[str]) -> str | None:
        """A metric that nobody has is not to be asked which way it is better: it gets near names."""
        return self.mode if self.best in known else "min"

    def said(self) -> str:
        """For an empty answer."""
        parts = [f"a tag like {self.tag!r}" if self.tag is not None else "", self.where or "", self.best or ""]
        return " and ".join(human.clean(part) for part in parts if part)


def log(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(help="A run; without it, all runs.", metavar="RUN", autocompletion=runs)
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("-n", "--number", min=1, help=f"At most so many; with --best {BEST_SHOWN} if not given."),
    ] = None,
    all_lines: Annotated[bool, typer.Option("--all", help="Also the lines that were left, as a graph.")] = False,
    best: Annotated[
        str | None,
        typer.Option("--best", metavar="METRIC[:MODE]", help="The best ones, best first.", autocompletion=metrics),
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="PATTERN", help="Those with such a tag: 'best_*'.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where", metavar="CONDITION", help="Those of which it is true: 'val_loss < 0.3 and step > 500'."
        ),
    ] = None,
    behind: BehindOption = None,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs, or the checkpoints of a run, newest first.

    With --best, --tag or --where and no RUN: those of all runs. METRIC:max and METRIC:min say which way is better,
    where its name does not. CONDITION compares metrics, and step, time, term, id, parent, reason, thin, raw_bytes,
    stored_bytes, stall_seconds and tag, with and, or, not.

    A line with two dashes says where a process took the run: here it was started, resumed or taken over.
    "new" is what a checkpoint added to the repository; the rest of it was there already. "thin": only its weights
    are kept. The best value of each metric is green. With --behind: which checkpoints are not yet there, and how far
    it lags; what its own rules (keep_behind=) keep away counts as not there.
    """
    screen, repository = begin(context, repo, as_json)
    far = Behind(repository, behind)
    metric, mode = typed.metric(best, "--best") if best is not None else (None, None)
    asked = Asked(number, all_lines, metric, mode, tag, where)
    if run is not None:
        past = pick_run(repository, run)
        with past.holding():
            document, parents = _of_run(repository, past, asked)
            _add_behind(document, far.about(past))
        screen.give(document, lambda: _lines(repository, document, parents, asked, screen.width))
    elif asked.narrowed:
        document = _of_all(repository, asked)
        _add_behind_each(document, {name: far.about(repository[name]) for name in repository})
        screen.give(document, lambda: _lines(repository, document, {}, asked, screen.width))
    else:
        found = [_about_run(repository[name], far) for name in repository]
        found = sorted(found, key=lambda about: -about["latest"]["time"] if about["latest"] else 0.0)[:number]
        screen.give({"repository": repository.url, "runs": found}, lambda: _runs(repository, found, screen.width))


# which checkpoints -----------------------------------------------------------------------------------------------


def _of_run(repository: Repository, past: PastRun, asked: Asked) -> tuple[dict[str, Any], dict[str, str | None]]:
    line, kept = past.checkpoints(), past.checkpoints(all=True)
    current = {checkpoint.id for checkpoint in line}
    found = _narrow(past, asked) if asked.narrowed else kept
    listed = [checkpoint for checkpoint in found if asked.all_lines or checkpoint.id in current]
    shown = listed[: asked.limit] if asked.best is not None else listed[::-1][: asked.limit]
    document = {
        "repository": repository.url,
        "run": past.name,
        "checkpoints": [about_checkpoint(c) | {"current": c.id in current} for c in shown],
        "more": len(listed) - len(shown),
        "on_other_lines": len(found) - sum(checkpoint.id in current for checkpoint in found),
        "rewound_to": line[-1].step if line and line[-1] != kept[-1] else None,
        "best": _bests(past, shown),
        "sessions": about_sessions(past, kept),
    }
    return document, past.parents() if asked.all_lines else {}


def _narrow(past: PastRun, asked: Asked) -> list[Checkpoint]:
    """Of every line: oldest first, or best first."""
    if asked.best is not None:
        with _mode_said(asked.best):
            found = past.ranking(asked.best, asked.mode_among(past.metric_names), limit=NO_LIMIT)
    else:
        found = past.checkpoints(all=True)
    if asked.where is not None:
        met = {checkpoint.id for checkpoint in past.query(asked.where, all=True)}
        found = [checkpoint for checkpoint in found if checkpoint.id in met]
    return _tagged(found, asked.tag)


def _mode_said(metric: str) -> Any:
    return instead(UsageError, do=f"--best {metric}:min or --best {metric}:max")


def _tagged(found: list[Checkpoint], pattern: str | None) -> list[Checkpoint]:
    if pattern is None:
        return found
    return [checkpoint for checkpoint in found if any(fnmatchcase(tag, pattern) for tag in checkpoint.tags)]


def _of_all(repository: Repository, asked: Asked) -> dict[str, Any]:
    """Of all runs: newest first, or best first."""
    line = {c.id: c for name in repository for c in repository[name].checkpoints(all=asked.all_lines)}
    if asked.best is not None:
        names = [name for run in repository for name in repository[run].metric_names]
        with _mode_said(asked.best):
            found = repository.ranking(asked.best, asked.mode_among(names), limit=NO_LIMIT)
    else:
        found = sorted(line.values(), key=lambda checkpoint: -checkpoint.time)
    if asked.where is not None:
        met = {checkpoint.id for checkpoint in repository.query(asked.where, all=True)}
        found = [checkpoint for checkpoint in found if checkpoint.id in met]
    listed = [checkpoint for checkpoint in _tagged(found, asked.tag) if checkpoint.id in line]
    shown = listed[: asked.limit]
    return {
        "repository": repository.url,
        "checkpoints": [{"run": checkpoint.run, **about_checkpoint(checkpoint)} for checkpoint in shown],
        "more": len(listed) - len(shown),
    }


def _add_behind(document: dict[str, Any], about: dict[str, Any] | None) -> None:
    """What the place behind has not got yet, and for each checkpoint that is shown whether it is there."""
    document["behind"] = about
    for one in document["checkpoints"]:
        one["is_behind"] = is_there(about, one["id"])


def _add_behind_each(document: dict[str, Any], abouts: dict[str, dict[str, Any] | None]) -> None:
    document["behind"] = abouts if any(abouts.values()) else None
    for one in document["checkpoints"]:
        one["is_behind"] = is_there(abouts[one["run"]], one["id"])


def _bests(past: PastRun, shown: Sequence[Checkpoint]) -> dict[str, str]:
    """Metric -> the best checkpoint of the current line, where it is known which way is better."""
    found = {}
    for name in dict.fromkeys(name for checkpoint in shown for name in checkpoint.metrics):
        try:
            found[name] = past.best(name).id
        except (UsageError, NotFound, Damaged):
            continue  # nobody knows which way is better, or none is a number
    return found


# runs ------------------------------------------------------------------------------------------------------------


def _about_run(past: PastRun, far: Behind) -> dict[str, Any]:
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
        "behind": far.about(past),
    }


def _runs(repository: Repository, found: Sequence[dict[str, Any]], width: int | None) -> Iterator[Text]:
    if not found:
        yield Text("no run yet in ").append(human.clean(repository.url), "bold")
        return
    columns = [
        Column("run", style="bold", least=12), Column("checkpoints", right=True),
        Column("latest", right=True, style="cyan"), Column("when"),
        Column("stored", right=True), Column("of", right=True, style="dim"),
        Column("lag", style="yellow"),
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
        when(repository, latest["time"], width) if latest else "",
        human.size(about["stored_bytes"]),
        human.size(about["raw_bytes"]),
        lag_of(about["behind"]) if about["behind"] is not None else "",
        str(about["terms"]),
        about["ended"] or ("open" if about["terms"] else ""),
    ]


# checkpoints -----------------------------------------------------------------------------------------------------


def _lines(
    repository: Repository,
    document: dict[str, Any],
    parents: Mapping[str, str | None],
    asked: Asked,
    width: int | None,
) -> Iterator[Text]:
    found: list[dict[str, Any]] = document["checkpoints"]
    sessions = document.get("sessions", []) if not asked.narrowed else []
    if not found and not sessions:
        yield _nothing(document, asked)
        yield from _notes(document, asked, None)
        return
    ids = [about["id"] for about in found]
    line = [about["id"] for about in found if about.get("current")]
    drawn = draw(ids, parents, line) if parents and asked.best is None else None
    lead: list[tuple[Column, list[str]]] = []
    if asked.best is not None:
        lead.append((Column("no.", right=True), [str(at) for at in range(1, len(found) + 1)]))
        lead.append((Column(""), [(CURRENT if about["current"] else LEFT) if parents else "" for about in found]))
    if "run" not in document:
        lead.append((Column("run", style="bold", least=8), [human.clean(about["run"]) for about in found]))
    missing = [NOT_YET if about["is_behind"] is False else "" for about in found]
    lead.append((Column("behind", style="yellow"), missing))
    wide = graph_width(drawn)
    table = table_of(
        repository, found, width - wide if width is not None else None,
        lead=lead, best=document.get("best"), first=asked.best,
    )  # fmt: skip
    if found:
        yield Text(" " * wide).append_text(table.head)
    yield from with_terms(repository, found, sessions, table.rows, drawn, width, to_the_end=not document["more"])
    yield from _notes(document, asked, table)


def _nothing(document: dict[str, Any], asked: Asked) -> Text:
    there = Text(human.clean(document["run"]), "bold") if "run" in document else Text("any run")
    if asked.narrowed:
        return Text(f"no checkpoint with {asked.said()} in ").append_text(there)
    return Text("no checkpoint yet in ").append_text(there)


def _notes(document: dict[str, Any], asked: Asked, table: Table | None) -> Iterator[Text]:
    notes = []
    if document["more"]:
        other = "more checkpoint" if asked.best is not None else "older checkpoint"
        notes.append(f"{human.count(document['more'], other)}: a larger -n")
    if document.get("on_other_lines") and not asked.all_lines:
        notes.append(f"{human.count(document['on_other_lines'], 'checkpoint')} on lines that were left: --all")
    if document.get("on_other_lines") and asked.all_lines and table is not None:
        notes.append(f"{CURRENT} the current line, {LEFT} lines that were left")
    if document.get("rewound_to") is not None:
        notes.append(f"rewound to step {document['rewound_to']}: what the run saves next continues from there")
    if "run" in document and document["behind"] is not None:
        notes.append(sentence(document["behind"]))
    if table is not None and table.left_out:
        notes.append(f"no room for {', '.join(table.left_out)}: --json, or a wider terminal")
    if notes:
        yield Text("\n" + "\n".join(f"… {note}" for note in notes), "dim")
