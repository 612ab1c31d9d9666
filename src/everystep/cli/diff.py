"""`everystep diff`: what changed from one checkpoint to another, of the same run or of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Checkpoint, Difference, Repository, UsageError
from everystep.cli import human
from everystep.cli.completion import checkpoints
from everystep.cli.options import JsonOption, RepoOption, begin, pick_checkpoint
from everystep.cli.progress import reading
from everystep.cli.table import Column, lay_out

LEAVES_SHOWN = 30
DIFFERENT = 1
_STYLES = {"added": "green", "removed": "red", "reshaped": "yellow", "same": "dim"}
_BESIDE = ("values", "config", "environment", "metrics")


def diff(
    context: typer.Context,
    before: Annotated[
        str, typer.Argument(help="The one to start from: RUN@SPEC.", metavar="RUN@SPEC", autocompletion=checkpoints)
    ],
    after: Annotated[
        str,
        typer.Argument(
            help="The other one: RUN@SPEC, or @SPEC of the same run.", metavar="[RUN]@SPEC", autocompletion=checkpoints
        ),
    ],
    only: Annotated[
        str | None, typer.Option("--only", metavar="PATH", help="That part of the state alone: model, model/fc.weight.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the leaves that are the same.")] = False,
    number: Annotated[
        int | None, typer.Option("-n", "--number", min=0, help=f"At most so many leaves; on a terminal {LEAVES_SHOWN}.")
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help=f"Exit with {DIFFERENT} if the states differ, with 0 if not.")
    ] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> int:
    """Say what changed from one checkpoint to another.

    Every leaf, plain values, metrics, configuration and environment are compared.

    "changed" is the share of elements of which any bit differs, "distance" the norm of the difference over the norm
    before, "largest" its largest element. The leaves that went farthest come first. Leaves whose hashes are equal are
    not read.
    """
    screen, repository = begin(context, repo, as_json)
    past, one = pick_checkpoint(repository, before)
    if not after.startswith("@") and "@" not in after and after not in repository:
        raise UsageError(f"{after!r} names no checkpoint", do=f"@{after} for one of {past.name}, or RUN@SPEC")
    _, other = pick_checkpoint(repository, f"{past.name}{after}" if after.startswith("@") else after)
    with reading(f"{before} {after}") as told:
        found = one.diff(other, only=only, progress=told)
    document = _document(repository, one, other, found, only)
    every: list[dict[str, Any]] = document["leaves"] if everything else document["leaves"][: len(found.changed)]
    limit = number if number is not None or screen.width is None or screen.as_json else LEAVES_SHOWN
    document |= {"leaves": every[:limit], "more": len(every) - len(every[:limit])}
    screen.give(document, lambda: _lines(document, screen.width))
    return DIFFERENT if exit_code and not found.same else 0


def _document(
    repository: Repository, one: Checkpoint, other: Checkpoint, found: Difference, only: str | None
) -> dict[str, Any]:
    changed = sorted(found.changed, key=lambda leaf: (leaf.distance is not None, -(leaf.distance or 0), -leaf.changed))
    same = [leaf for leaf in found.leaves if leaf.kind == "same"]
    kinds = [leaf.kind for leaf in found.leaves]
    return {
        "repository": repository.url,
        "before": {"run": one.run, "id": one.id, "step": one.step},
        "after": {"run": other.run, "id": other.id, "step": other.step},
        "only": only,
        "same": found.same,
        "counts": {kind: kinds.count(kind) for kind in ("changed", "added", "removed", "reshaped", "same")},
        "leaves": [asdict(leaf) for leaf in (*changed, *same)],
        **{name: [asdict(change) for change in getattr(found, name)] for name in _BESIDE},
    }


def _lines(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    one, other = document["before"], document["after"]
    head = Text()
    for side in (one, other):
        head.append(" → " if head else "").append(f"{human.clean(side['run'])}@{side['step']}", "bold")
    yield head
    counts = document["counts"]
    parts = [f"{number} {kind if kind != 'same' else 'the same'}" for kind, number in counts.items() if number]
    if document["same"]:
        yield Text("the same state", "bold green")
    else:
        yield Text(f"leaves: {', '.join(parts) or 'none'}")
    if document["leaves"]:
        yield from _leaves(document["leaves"], width)
    if document["more"]:
        yield Text(f"  … {human.count(document['more'], 'leaf')} more: a larger -n", "dim")
    for name, title in zip(_BESIDE, ("plain values", "config", "environment", "metrics")):
        if document[name]:
            yield Text(f"\n{title}", "bold")
            yield from _values(document[name], width)


def _leaves(leaves: Sequence[dict[str, Any]], width: int | None) -> Iterator[Text]:
    columns = [
        Column("path", least=16, keep_end=True), Column("changed", right=True), Column("distance", right=True),
        Column("largest", right=True), Column("leaf", style="dim", least=10),
    ]  # fmt: skip
    rows = [
        [
            human.clean(leaf["path"]),
            human.share(leaf["changed"]) if leaf["kind"] in ("changed", "same") else leaf["kind"],
            *(f"{leaf[name]:.3g}" if leaf[name] is not None else "" for name in ("distance", "largest")),
            leaf["after"]
            if leaf["before"] in ("", leaf["after"])
            else " → ".join(filter(None, (leaf["before"], leaf["after"]))),
        ]
        for leaf in leaves
    ]
    marked = {(at, 1): _STYLES[leaf["kind"]] for at, leaf in enumerate(leaves) if leaf["kind"] in _STYLES}
    table = lay_out(columns, rows, width - 2 if width is not None else None, marked)
    for line in (table.head, *table.rows):
        yield Text("  ").append_text(line)


def _values(changes: Sequence[dict[str, Any]], width: int | None) -> Iterator[Text]:
    columns = [Column("", least=12, keep_end=True), Column("before", least=12), Column("after", least=12), Column("")]
    rows = [
        [
            human.clean(change["path"]),
            human.value(change["before"]) if change["kind"] != "added" else "—",
            human.value(change["after"]) if change["kind"] != "removed" else "—",
            _step(change["before"], change["after"]),
        ]
        for change in changes
    ]
    table = lay_out(columns, rows, width - 2 if width is not None else None)
    for line in (table.head, *table.rows):
        yield Text("  ").append_text(line)


def _step(before: Any, after: Any) -> str:
    """How far a number went."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (before, after))
    return f"{after - before:+.4g}" if numbers else ""
