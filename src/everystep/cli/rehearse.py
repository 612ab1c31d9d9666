"""What verify-resume and doctor have in common: which script, what is shown while it runs, and how it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import RehearsalFailed
from everystep.cli import human
from everystep.cli.screen import Screen

# What stands behind SCRIPT is the script's own, its options too.
SETTINGS = {"allow_interspersed_args": False}

ScriptArgument = Annotated[str, typer.Argument(help="The training script: a Python file.", metavar="SCRIPT")]
ArgsArgument = Annotated[
    list[str] | None, typer.Argument(help="Its own arguments and options, as they are.", metavar="ARGS")
]
ModuleOption = Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module, as in python -m.")]
ByHandOption = Annotated[
    bool, typer.Option("--by-hand", help="Loops save nothing by themselves; only what SCRIPT saves by hand counts.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for each time the script runs.")]
ScratchOption = Annotated[
    str | None,
    typer.Option("--scratch", help="A folder for the rehearsal's checkpoints; they are removed at the end."),
]
OutputOption = Annotated[bool, typer.Option("--output", help="Show on stderr what the script prints.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, an error too.")]


@dataclass(frozen=True)
class Rehearsing:
    """How a script is started, and who is told what goes on."""

    screen: Screen
    command: list[str]
    told: Callable[[str], None]
    heard: Callable[[str], None]


@contextmanager
def rehearsing(
    context: typer.Context, script: str, args: list[str] | None, *, module: bool, output: bool, as_json: bool
) -> Iterator[Rehearsing]:
    """Shows what is done on stderr, and, of a script that fails, what it printed last."""
    screen: Screen = context.obj
    before: dict[str, Any] = context.parent.params if context.parent is not None else {}
    screen.as_json = as_json or bool(before.get("as_json"))  # a --json behind SCRIPT is the script's own
    command = [sys.executable, *(["-m"] if module else []), script, *(args or [])]
    watched = sys.stderr.isatty()

    def told(text: str) -> None:
        if watched or output:
            typer.secho(human.clean(text), dim=True, err=True)

    def heard(text: str) -> None:
        if output and text:
            shown = "\n".join(human.clean(line) for line in text.split("\n"))
            typer.secho(shown, dim=True, err=True, nl=False)

    try:
        yield Rehearsing(screen, command, told, heard)
    except RehearsalFailed as error:
        for line in error.output if not output else ():
            typer.secho(f"  {human.clean(line)}", dim=True, err=True)
        raise


def section(title: str, lines: list[Text]) -> Iterator[Text]:
    """Lines below a title, if there are any."""
    if lines:
        yield Text(f"\n{title}", "bold")
        yield from lines


def points(texts: list[str], style: str = "") -> list[Text]:
    """Sentences, one below the other."""
    return [Text("  - ").append(human.clean(text), style) for text in texts]
