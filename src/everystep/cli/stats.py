"""`everystep stats`: what runs take up, as they were saved and as they lie there, by role and by codec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import PastRun, RunStats
from everystep.cli import human
from everystep.cli.behind import Behind, sentence
from everystep.cli.completion import runs
from everystep.cli.options import BehindOption, JsonOption, RepoOption, begin, pick_run
from everystep.cli.progress import counting
from everystep.cli.table import Column, lay_out

_COUNTS = ("checkpoints", "thin", "undoable")
_BYTES = ("logical_bytes", "total_bytes", "chunk_bytes", "other_bytes", "manifest_bytes", "log_bytes")


def stats(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(help="A run; without it, all runs.", metavar="RUN", autocompletion=runs)
    ] = None,
    behind: BehindOption = None,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what runs take up, by role and by codec.

    "logical" counts every checkpoint by itself, "stored" what lies there for all of them, "ratio" one by the other.
    "other" is held by what undo can bring back, by attachments, a save under way, or dead parts of packs. Reads
    manifests, and no data.
    """
    screen, repository = begin(context, repo, as_json)
    names = repository.runs() if run is None else [pick_run(repository, run).name]
    far = Behind(repository, behind)
    abouts = [_about(_measure(repository[name])) | {"behind": far.about(repository[name])} for name in names]
    document = {"repository": repository.url, "runs": abouts, "all": _sum(abouts)}
    screen.give(document, lambda: _lines(document, screen.width))


def _measure(past: PastRun) -> RunStats:
    with counting(past.name) as told:
        if told is None:
            return past.stats()
        return past.stats(lambda done, total: told(past.name, done, total))


def _about(found: RunStats) -> dict[str, Any]:
    return {**asdict(found), "total_bytes": found.total_bytes, "ratio": found.ratio}


def _sum(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(about[name] for about in abouts) for name in (*_COUNTS, *_BYTES)}
    for kind in ("roles", "codecs"):
        total[kind] = {}
        for about in abouts:
            for name, share in about[kind].items():
                into = total[kind].setdefault(name, {"logical_bytes": 0, "stored_bytes": 0})
                for part, nbytes in share.items():
                    into[part] += nbytes
    total["ratio"] = total["total_bytes"] / total["logical_bytes"] if total["logical_bytes"] else 0.0
    return total


def _percent(stored: int, logical: int) -> str:
    return f"{100 * stored / logical:.3g} %" if logical else ""


def _lines(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    abouts = document["runs"]
    if not abouts:
        yield Text("no run yet in ").append(human.clean(document["repository"]), "bold")
        return
    columns = [
        Column("run", style="bold", least=12),
        Column("checkpoints", right=True), Column("thin", right=True, spare=True),
        Column("logical", right=True), Column("stored", right=True), Column("ratio", right=True, style="green"),
        Column("chunks", right=True, spare=True), Column("other", right=True, spare=True),
        Column("manifests", right=True, spare=True), Column("log", right=True, spare=True),
    ]  # fmt: skip
    every = [*abouts, {**document["all"], "run": "all"}] if len(abouts) > 1 else abouts
    rows = [
        [
            human.clean(about["run"]),
            str(about["checkpoints"]),
            str(about["thin"]) if document["all"]["thin"] else "",
            human.size(about["logical_bytes"]),
            human.size(about["total_bytes"]),
            _percent(about["total_bytes"], about["logical_bytes"]),
            *(human.size(about[name]) for name in _BYTES[2:]),
        ]
        for about in every
    ]
    table = lay_out(columns, rows, width)
    yield table.head
    yield from table.rows
    for kind in ("roles", "codecs"):
        yield Text("")
        yield from _shares(kind.removesuffix("s"), document["all"][kind])
    notes = []
    if document["all"]["undoable"]:
        notes.append(
            f"{human.count(document['all']['undoable'], 'checkpoint')} dropped or thinned can be brought back: undo"
        )
    for about in abouts:
        if about["behind"] is not None:
            run = f"{human.clean(about['run'])}: " if len(abouts) > 1 else ""
            notes.append(run + sentence(about["behind"]))
    if table.left_out:
        notes.append(f"no room for {', '.join(table.left_out)}: --json, or a wider terminal")
    if notes:
        yield Text("\n" + "\n".join(f"… {note}" for note in notes), "dim")


def _shares(title: str, shares: dict[str, dict[str, int]]) -> Iterator[Text]:
    """Largest first. A role's logical bytes count once a checkpoint, a codec's once a stored chunk."""
    columns = [Column(title), Column("logical", right=True), Column("stored", right=True), Column("ratio", right=True)]
    ordered = sorted(shares.items(), key=lambda item: -item[1]["stored_bytes"])
    rows = [
        [
            human.clean(name), human.size(share["logical_bytes"]), human.size(share["stored_bytes"]),
            _percent(share["stored_bytes"], share["logical_bytes"]),
        ]
        for name, share in ordered
    ]  # fmt: skip
    table = lay_out(columns, rows, None)
    yield table.head
    yield from table.rows
