"""`everystep rewind`: go back on purpose, so that the run continues from there."""

from __future__ import annotations

from typing import Annotated

import typer

from everystep import RunInUse
from everystep.cli import human
from everystep.cli.completion import checkpoints
from everystep.cli.options import JsonOption, RepoOption, begin, instead, pick_checkpoint
from everystep.cli.table import headed


def rewind(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="The checkpoint to go back to.", metavar="RUN@SPEC", autocompletion=checkpoints)
    ],
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Do not wait for a process that may be writing; it is told at its save.")
    ] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go back to a checkpoint, to continue from there.

    What the run saves next continues from it. The line that is left stays: log --all shows it, RUN@SPEC loads from it,
    and rewind goes forward again. Takes the run over; it waits for a process that may still be writing it.
    """
    screen, repository = begin(context, repo, as_json)
    past, checkpoint = pick_checkpoint(repository, target)
    line = past.checkpoints()
    moved = not line or line[-1] != checkpoint
    if moved:
        with (
            instead(RunInUse, do="end it first, or --takeover"),
            repository.run(past.name, takeover=takeover) as run,
        ):
            run.rewind(checkpoint)
    now = past.checkpoints()
    left = [one.step for one in line if one not in now]
    document = {
        "repository": repository.url,
        "run": past.name,
        "id": checkpoint.id,
        "step": checkpoint.step,
        "moved": moved,
        "left": left,
    }
    note = f"; {human.count(len(left), 'checkpoint')} left on another line: log --all" if left else ""
    went = f" continues from step {checkpoint.step}, {checkpoint.id}{note}"
    rest = went if moved else f" is at step {checkpoint.step} already"
    screen.give(document, lambda: [headed(human.clean(past.name), rest)])
