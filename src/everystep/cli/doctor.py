"""`everystep doctor`: what of a planned run is not captured, what its saves cost, whether the disk will hold it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

import everystep
from everystep import Examination
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
from everystep.cli.table import Column, lay_out, pairs


def doctor(
    context: typer.Context,
    script: ScriptArgument,
    args: ArgsArgument = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps to rehearse; the last three are saved.")] = 5,
    total_steps: Annotated[
        int | None, typer.Option("--total-steps", min=1, help="Steps of the planned run; else as its loop says.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps between its saves; else as its loop says.")
    ] = None,
    by_hand: ByHandOption = False,
    module: ModuleOption = False,
    timeout: TimeoutOption = 1800.0,
    scratch: ScratchOption = None,
    output: OutputOption = False,
    as_json: JsonOption = False,
) -> int:
    """Examine a training script before a long run.

    Runs SCRIPT for a few steps in a scratch folder: its own repository is neither read nor written. Says what is
    tracked and what is not captured, how long a save stops the training, and what the planned run will take up on the
    disk. Exit code 1 if the run would fail on it.
    """
    with rehearsing(context, script, args, module=module, output=output, as_json=as_json) as stage:
        found = everystep.examine(
            stage.command,
            steps=steps,
            total_steps=total_steps,
            save_every=save_every,
            by_hand=by_hand,
            scratch=scratch,
            timeout=timeout,
            told=stage.told,
            heard=stage.heard,
        )
    screen = stage.screen
    screen.give(_document(found), lambda: _lines(found, screen.width))
    return 0 if found.ok else everystep.Error.exit_code


def _document(found: Examination) -> dict[str, Any]:
    later = found.later
    planned = {name: getattr(found.planned, name) for name in found.planned.__struct_fields__}
    return {
        "ok": found.ok,
        **asdict(found),
        "planned": planned,
        "first": asdict(found.first),
        "later": asdict(later) if later is not None else None,
    }


def _lines(found: Examination, width: int | None) -> Iterator[Text]:
    about = _document(found)
    yield from pairs(
        [
            ("run", f"{human.clean(found.run)} in {human.clean(found.place)}, not touched"),
            ("loop", found.loop),
            ("step", human.duration(found.step_seconds) if found.step_seconds is not None else ""),
        ]
    )
    yield from section("state", list(_state(about["sections"], width)))
    yield from section("a save", list(_saves(about)))
    yield from section("the planned run", pairs(_plan(about), 2))
    yield from section("surroundings", pairs(_surroundings(about), 2))
    problems = [finding.text for finding in found.findings if finding.level == "problem"]
    cautions = [finding.text for finding in found.findings if finding.level != "problem"]
    yield from section("problems", points(problems, "red"))
    yield from section("to look at", points(cautions))
    yield Text()
    if problems:
        yield Text("not ready: the planned run would fail", "bold red")
    elif cautions:
        yield Text(f"ready, with {human.count(len(cautions), 'thing')} to look at", "bold yellow")
    else:
        yield Text("ready: nothing was found that is missing", "bold green")


def _state(sections: list[dict[str, Any]], width: int | None) -> Iterator[Text]:
    columns = [
        Column("name", least=8), Column("kind", style="cyan", least=8), Column("leaves", right=True),
        Column("size", right=True), Column("roles", style="dim"), Column("types", spare=True),
    ]  # fmt: skip
    rows = [
        [
            human.clean(one["name"]),
            human.clean(one["kind"]),
            str(one["leaves"]),
            human.size(one["nbytes"]),
            ", ".join(one["roles"]),
            ", ".join(human.element(dtype) for dtype in one["dtypes"]),
        ]
        for one in sections
    ]
    table = lay_out(columns, rows, width - 2 if width is not None else None)
    for line in [table.head, *table.rows]:
        yield Text("  ").append_text(line)


def _saves(about: dict[str, Any]) -> Iterator[Text]:
    titles = ("", "stops training", "in steps", "behind it", "state", "stored")
    columns = [Column(title, right=bool(title)) for title in titles]
    rows = [
        [
            name,
            human.duration(cost["stall_seconds"]),
            f"{cost['stall_seconds'] / about['step_seconds']:.2g}" if about["step_seconds"] else "",
            human.duration(cost["background_seconds"]),
            human.size(cost["raw_bytes"]),
            human.size(cost["stored_bytes"]),
        ]
        for name, cost in (("the first", about["first"]), ("later ones", about["later"]))
        if cost is not None
    ]
    table = lay_out(columns, rows, None)
    for line in [table.head, *table.rows]:
        yield Text("  ").append_text(line)


def _plan(about: dict[str, Any]) -> list[tuple[str, str]]:
    planned, later = about["planned"], about["later"] or about["first"]
    kept = ""
    if planned["drops"] and planned["kept"] is not None:
        kept = f"{planned['kept']}, {planned['full']} of them with their optimizer state"
    interval = planned["every"] * about["step_seconds"] if planned["every"] and about["step_seconds"] else None
    writer = ""
    if interval is not None:
        keeps = "keeps up" if later["background_seconds"] <= interval else "does not keep up"
        writer = f"{human.duration(later['background_seconds'])} of every {human.duration(interval)}: {keeps}"
    most = "at most " if planned["drops"] else ""
    return [
        ("steps", f"{planned['total']:,}" if planned["total"] is not None else ""),
        ("saves", f"{planned['saves']:,}, every {planned['every']:.6g} steps" if planned["saves"] is not None else ""),
        ("kept", kept),
        ("disk", f"{most}{human.size(about['disk_bytes'])}" if about["disk_bytes"] is not None else ""),
        ("free there", human.size(about["free_bytes"]) if about["free_bytes"] is not None else ""),
        ("writer", writer),
    ]


def _surroundings(about: dict[str, Any]) -> list[tuple[str, str]]:
    packages = about["environment"].get("packages", {})
    devices = about["environment"].get("devices", [])
    return [
        ("packages", human.value(packages)),
        ("devices", human.value(devices)),
        *((human.clean(name), human.value(value)) for name, value in about["surroundings"].items()),
    ]
