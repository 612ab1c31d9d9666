"""Writes docs/cli.md from the command line's own help; `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

import everystep
from everystep.cli.app import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
INTRODUCTION = """\
# The command line

Written by `python scripts/cli_reference.py` from what `--help` says; edit that, not this page.

Which repository: `-r`, before or after the verb; else `EVERYSTEP_REPO`; else the present folder, if it is one.

Which checkpoint: `RUN@SPEC`, split at the last `@`; a run whose name is the whole text comes first. SPEC is

| SPEC | the checkpoint |
|---|---|
| `1200` | of step 1200 on the current line, or else the newest of that step on another |
| `latest` | the newest |
| `best:val_loss` | with the best value; `best:val_loss:max` where the name does not say which way is better |
| `best_model_v1` | with this tag |
| `3f9a` | whose id begins so; 4 digits or more |

A tag comes before a step, a step before an id.

**Text** is for people. On a terminal ids are cut to 8 digits, times are ages, and columns that find no room are left
out, which is said. In a pipe or file every line has everything. Colours follow `NO_COLOR` and `FORCE_COLOR`.
Warnings and errors go to stderr, one line or three, and so does the progress bar, which appears only on a terminal.
Tab completes verbs, options, runs, tags, steps and metrics, once the shell has [loaded it](#everystep-completion).

**`--json`** gives one JSON document on stdout, an object, whatever happens: the answer, or
`{"error": {"kind", "what", "where", "do"}}`. `warnings` is always in it, a list of what stderr says too. Times are
seconds since the epoch, sizes are bytes. NaN and the infinities are the strings `"NaN"`, `"Infinity"`, `"-Infinity"`,
for JSON has no numbers for them. Fields are added, not renamed.
"""


def page() -> str:
    """The page as it should be."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    helps = [_help()]
    for name, verb in group.commands.items():
        helps += [_help(name), *(_help(name, inner) for inner in getattr(verb, "commands", ()))]
    return "\n".join([INTRODUCTION, *helps, _exit_codes()])


def _help(*verb: str) -> str:
    found = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "80"})
    assert found.exit_code == 0, found.output
    lines = [line.rstrip() for line in found.stdout.rstrip().splitlines()]
    return "\n".join([f"## {' '.join(('everystep', *verb))}", "", "```text", *lines, "```", ""])


def _exit_codes() -> str:
    kinds = [getattr(everystep, name) for name in everystep.__all__]
    errors = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, everystep.Error)]
    rows = [
        f"| {kind.exit_code} | `{kind.kind}` | {(kind.__doc__ or '').strip().splitlines()[0]} |"
        for kind in sorted(errors, key=lambda kind: (kind.exit_code, kind.kind))
    ]
    head = ["## Exit codes", "", "| code | kind | |", "|--:|---|---|", "| 0 | | Fine. |"]
    rows.insert(1, "| 1 | | `diff --exit-code`: the states differ. |")
    return "\n".join([*head, *rows, "| 130 | | Interrupted. |", ""])


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else "docs/cli.md is stale: run this without --check")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
