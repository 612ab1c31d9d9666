"""`everystep verify-resume`: is the resumed run the run that was never interrupted, and if not, what differs?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

import everystep
from everystep.cli import human
from everystep.cli.rehearse import (
    ArgsArgument,
    ByHandOption,
    JsonOption,
    ModuleOption,
    OutputOption,
    ScratchOption,
    ScriptArgument,
    TimeoutOption,
    points,
    rehearsing,
    section,
)
from everystep.cli.table import Column, cut, lay_out, pairs

SHOWN = 20
VALUE_SHOWN = 40
_VERDICTS = {
    "differs": "the resumed run is not the run that was never interrupted",
    "not deterministic": "the script differs from itself, so that nothing can be said of its resume",
    "starts over": "the script does not go on from its checkpoint, but starts over",
}


def verify_resume(
    context: typer.Context,
    script: ScriptArgument,
    args: ArgsArgument = None,
    after: Annotated[
        int,
        typer.Option("--after", min=1, help="Steps before the interruption; of saves by hand, the first from there."),
    ] = 2,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps behind it, until both are compared.")] = 2,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="A path that may differ, * and ? allowed; can be repeated.")
    ] = None,
    by_hand: ByHandOption = False,
    module: ModuleOption = False,
    timeout: TimeoutOption = 1800.0,
    scratch: ScratchOption = None,
    output: OutputOption = False,
    as_json: JsonOption = False,
) -> int:
    """Interrupt a training script, resume it, and compare.

    Runs SCRIPT for a few steps, once through and once interrupted, in a scratch folder: its own repository is neither
    read nor written. Compares weights, optimizer, random states, place in the data and plain values bit by bit. Exit
    code 1 if anything differs.
    """
    with rehearsing(context, script, args, module=module, output=output, as_json=as_json) as stage:
        report = everystep.verify_resume(
            stage.command,
            after=after,
            steps=steps,
            ignore=ignore or (),
            by_hand=by_hand,
            scratch=scratch,
            timeout=timeout,
            told=stage.told,
            heard=stage.heard,
        )
    document = {"exact": report.exact, **asdict(report)}
    screen = stage.screen
    screen.give(document, lambda: _lines(document, screen.width))
    return 0 if report.exact else everystep.Error.exit_code


def _lines(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    yield from pairs(
        [
            ("run", f"{human.clean(document['run'])} in {human.clean(document['place'])}, not touched"),
            ("interrupted", f"after step {document['interrupted_at']}"),
            ("compared", f"after step {document['compared_at']}: {_extent(document)}"),
        ]
    )
    yield from section(f"{' and '.join(document['compared'])} differ", list(_table(document["differing"], width)))
    yield from section("what may be behind it", points(document["causes"]))
    left = [text for text in document["untracked"] if text not in document["causes"]]
    yield from section("not tracked, though it made no difference here", points(left))
    yield from section("everystep warned", points(document["warnings"]))
    yield Text()
    if document["exact"]:
        yield Text("the resumed run is the run that was never interrupted", "bold green")
    else:
        yield Text(_VERDICTS[document["verdict"]], "bold red")


def _extent(document: dict[str, Any]) -> str:
    return f"{human.count(document['leaves'], 'leaf')}, {human.size(document['nbytes'])}"


def _table(differing: list[dict[str, Any]], width: int | None) -> Iterator[Text]:
    columns = [
        Column("path", least=16, keep_end=True), Column("role", style="dim"), Column("elements", right=True),
        Column("largest", right=True), Column("uninterrupted", least=8), Column("then", least=8),
    ]  # fmt: skip
    rows = [_row(one) for one in differing[:SHOWN]]
    table = lay_out(columns, rows, width - 2 if width is not None else None)
    for line in [table.head, *table.rows] if rows else []:
        yield Text("  ").append_text(line)
    if len(differing) > SHOWN:
        yield Text(f"  … {len(differing) - SHOWN} more: --json", "dim")


def _row(one: dict[str, Any]) -> list[str]:
    leaf = one["role"] != "value"
    same_form = leaf and one["kind"] == "changed"
    return [
        human.clean(one["path"]),
        one["role"],
        f"{one['share']:.1%}" if same_form else one["kind"] if leaf else "",
        f"{one['largest']:.3g}" if same_form and one["largest"] is not None else "",
        "" if same_form else cut(human.value(one["before"]), VALUE_SHOWN),
        "" if same_form else cut(human.value(one["after"]), VALUE_SHOWN),
    ]
