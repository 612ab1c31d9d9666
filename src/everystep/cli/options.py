"""What all verbs have in common: which repository, which run, which checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

import everystep
from everystep import Checkpoint, Damaged, ForeignRepository, NewerFormat, NotFound, PastRun, Repository, UsageError
from everystep.cli.screen import Screen

RepoOption = Annotated[
    str | None,
    typer.Option(
        "-r", "--repo", help="The repository: a folder or URL. Without it EVERYSTEP_REPO, or the folder here."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, an error too.")]


def begin(context: typer.Context, repo: str | None, as_json: bool) -> tuple[Screen, Repository]:
    """The screen of this call, and the repository it is about.

    Raises:
        NotFound, UsageError: if there is no repository, or it was not said which.
    """
    screen: Screen = context.obj
    screen.as_json = screen.as_json or as_json
    place = repo or screen.place
    if place is None:
        return screen, _here()
    repository = everystep.open(place)
    if not repository.exists:
        raise NotFound(
            "there is no repository here",
            where=repository.url,
            do="check -r and EVERYSTEP_REPO; a repository is made by the first save of a run",
        )
    return screen, repository


def _here() -> Repository:
    """The present folder, if it is a repository.

    Raises:
        UsageError: if not; naming the folder "runs" in it, where that is one.
    """
    try:
        repository = everystep.open(".")
        if repository.exists:
            return repository
    except NewerFormat:
        raise
    except ForeignRepository:
        pass  # the usual folder of a project
    except Damaged:
        if not _is_repository("runs"):
            raise
    found = "here: everystep -r runs …" if _is_repository("runs") else "everystep -r FOLDER …"
    raise UsageError("which repository?", do=f"{found}, or set EVERYSTEP_REPO")


def _is_repository(place: str) -> bool:
    try:
        return everystep.open(place).exists
    except everystep.Error:
        return False  # only asked in order to say something helpful


def pick(repository: Repository, target: str) -> tuple[PastRun, Checkpoint | None]:
    """The run, and the checkpoint, of RUN or RUN@SPEC. A run whose name is the whole text comes first.

    Raises:
        NotFound, UsageError: accordingly.
    """
    name, at, spec = target.rpartition("@")
    if not at or target in repository:
        return repository[target], None
    if not name:
        raise UsageError(f"{target!r} names no run", do="RUN@SPEC, such as resnet@1200 or resnet@latest")
    run = repository[name]
    return run, run.find(spec)
