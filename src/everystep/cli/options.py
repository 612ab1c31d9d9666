"""What all verbs have in common: which repository, which run, which checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

import everystep
from everystep import (
    Checkpoint,
    Damaged,
    Error,
    ForeignRepository,
    NewerFormat,
    NotFound,
    PastRun,
    Repository,
    UsageError,
)
from everystep.cli.screen import Screen

RepoOption = Annotated[
    str | None,
    typer.Option(
        "-r", "--repo", help="The repository: a folder or URL. Without it EVERYSTEP_REPO, or the folder here."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, an error too.")]


BehindOption = Annotated[
    str | None,
    typer.Option("--behind", metavar="URL", help="The place behind, as open(behind=…) has it: what is not there yet."),
]


def begin(context: typer.Context, repo: str | None, as_json: bool, *, new: bool = False) -> tuple[Screen, Repository]:
    """The screen of this call, and the repository it is about.

    Args:
        new: there need not be one yet.

    Raises:
        NotFound, UsageError: if there is no repository, or it was not said which.
    """
    screen: Screen = context.obj
    screen.as_json = screen.as_json or as_json
    place = repo or screen.place
    if place is None:
        return screen, _here()
    repository = everystep.open(place)
    if not repository.exists and not new:
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


def pick_run(repository: Repository, name: str) -> PastRun:
    """The run of that name.

    Raises:
        UsageError: if it names a checkpoint instead.
        NotFound: naming near ones.
    """
    run, at, _ = name.rpartition("@")
    if at and run in repository and name not in repository:
        raise UsageError(f"{name!r} names a checkpoint, and this is about a whole run", do=f"the run is {run}")
    return repository[name]


def pick_checkpoint(repository: Repository, target: str) -> tuple[PastRun, Checkpoint]:
    """The run and the checkpoint of RUN@SPEC.

    Raises:
        UsageError: if it names a run, and no checkpoint of it.
        NotFound: accordingly.
    """
    past, checkpoint = pick(repository, target)
    if checkpoint is None:
        name = past.name
        raise UsageError(
            f"{name!r} names a run: which checkpoint of it?", do=f"{name}@latest, {name}@1200, {name}@best:val_loss"
        )
    return past, checkpoint


@contextmanager
def instead(*kinds: type[Error], do: str) -> Iterator[None]:
    """Errors of these kinds say what to type, where the door says what to call."""
    try:
        yield
    except kinds as error:
        raise type(error)(error.what, where=error.where, do=do) from error
