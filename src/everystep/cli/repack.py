"""`everystep repack`: copy what is needed out of packs that are mostly dead, and free them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep.cli import human, typed
from everystep.cli.completion import runs
from everystep.cli.options import JsonOption, RepoOption, begin, pick_run
from everystep.cli.progress import counting


def repack(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="A run.", metavar="RUN", autocompletion=runs)],
    dead: Annotated[
        str, typer.Option("--dead", metavar="SHARE", help="Empty packs of which more than this is needed by nothing.")
    ] = "50%",
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Empty packs that are mostly dead, and free them. Safe beside a process that is saving.

    A pack is freed as a whole: a frozen leaf, or a base that a later checkpoint leans on, holds what lies beside it.
    What is needed is copied first, for which there must be room. `stats` says how many bytes are dead.
    """
    screen, repository = begin(context, repo, as_json)
    share = float(typed.share(dead, "--dead"))
    past = pick_run(repository, run)
    with counting("repacking") as told:
        progress = (lambda done, total: told(past.name, done, total)) if told is not None else None
        done = past.repack(dead=share, progress=progress)
    document = {"repository": repository.url, "run": past.name, **asdict(done)}
    screen.give(document, lambda: _repacked(document))


def _repacked(document: dict[str, Any]) -> Iterator[Text]:
    name = human.clean(document["run"])
    if not document["packs"] and not document["freed_bytes"]:
        yield Text(f"{name}: nothing to gain")
        return
    yield Text(
        f"{name}: {human.size(document['freed_bytes'])} freed, {human.size(document['written_bytes'])} of it written "
        f"anew; {document['packs']} packs emptied, {human.size(document['held_bytes'])} held"
    )
