"""`everystep tag` and `everystep note`: names for checkpoints, and what somebody wants to remember."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Conflict, PastRun, Repository, UsageError
from everystep.cli import human
from everystep.cli.checkpoints import SHORT_ID, when
from everystep.cli.completion import tags, targets
from everystep.cli.options import JsonOption, RepoOption, begin, instead, pick, pick_checkpoint
from everystep.cli.screen import Screen
from everystep.cli.table import Column, headed, lay_out


def tag(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            help="The checkpoint; or a run, to list its tags. Without it, those of all runs.",
            metavar="RUN[@SPEC]",
            autocompletion=targets,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="The tag; without it, tags are listed.", metavar="NAME", autocompletion=tags)
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="The next version of NAME: best_model_v1, then best_model_v2 …")
    ] = False,
    move: Annotated[bool, typer.Option("--move", help="Take the tag from the checkpoint that has it.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag away: RUN NAME --delete.")] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Name a checkpoint, or list the names.

    A tag holds its checkpoint: no rule drops it. RUN@NAME loads it, and RUN@best_model its newest version. A number is
    never used twice. Tagging does not disturb a process that is saving.
    """  # fmt: skip
    screen, repository = begin(context, repo, as_json)
    if sum((version, move, delete)) > 1:
        raise UsageError("--version, --move and --delete exclude each other", do="one of them at a time")
    if target is None or name is None:
        if version or move or delete:
            raise UsageError("which tag?", do="everystep tag RUN@SPEC NAME, or RUN NAME --delete")
        _list(screen, repository, target)
    elif delete:
        _delete(screen, repository, target, name)
    else:
        _add(screen, repository, target, name, version=version, move=move)


def _add(screen: Screen, repository: Repository, target: str, name: str, *, version: bool, move: bool) -> None:
    past, checkpoint = pick_checkpoint(repository, target)
    holder = past.tags.get(name)
    with instead(Conflict, do="choose another name, --move to move it here, or --version for numbered names"):
        given = checkpoint.tag_version(name) if version else name
        if not version:
            checkpoint.tag(name, move=move)
    moved = holder if holder is not None and holder != checkpoint and not version else None
    document = {
        "repository": repository.url,
        "run": past.name,
        "tag": given,
        "id": checkpoint.id,
        "step": checkpoint.step,
        "moved_from": {"id": moved.id, "step": moved.step} if moved is not None else None,
    }
    was = f"; it was step {moved.step}, {moved.id}" if moved is not None else ""
    rest = f" is step {checkpoint.step} of {human.clean(past.name)}, {checkpoint.id}{was}"
    screen.give(document, lambda: [headed(human.clean(given), rest, "bold yellow")])


def _delete(screen: Screen, repository: Repository, target: str, name: str) -> None:
    past, checkpoint = pick(repository, target)
    holder = past.tagged(name)
    if name not in past.tags:
        raise UsageError(f"{name!r} is the name of versions, and no tag", do=f"one of them: {', '.join(holder.tags)}")
    if checkpoint is not None and checkpoint != holder:
        raise Conflict(
            f"the tag {name!r} is on step {holder.step}, not on step {checkpoint.step}",
            where=past.name,
            do=f"everystep tag {past.name} {name} --delete",
        )
    past.untag(name)
    document = {"repository": repository.url, "run": past.name, "deleted": name, "id": holder.id, "step": holder.step}
    rest = f" is no tag any more; it was step {holder.step}, {holder.id}"
    screen.give(document, lambda: [headed(human.clean(name), rest)])


def _list(screen: Screen, repository: Repository, target: str | None) -> None:
    checkpoint = None
    if target is not None:
        past, checkpoint = pick(repository, target)
        names = [past.name]
    else:
        names = repository.runs()
    found = [
        {"run": run, "tag": given, "id": tagged.id, "step": tagged.step, "time": tagged.time, "metrics": tagged.metrics}
        for run in names
        for given, tagged in repository[run].tags.items()
        if checkpoint is None or tagged == checkpoint
    ]
    screen.give({"repository": repository.url, "tags": found}, lambda: _table(repository, found, target, screen.width))


def _table(
    repository: Repository, found: list[dict[str, Any]], target: str | None, width: int | None
) -> Iterator[Text]:
    if not found:
        yield Text("no tag yet").append(f" in {human.clean(target)}" if target is not None else "")
        return
    columns = [
        Column("run", style="bold", least=8), Column("tag", style="yellow", least=12), Column("step", right=True),
        Column("id", style="cyan"), Column("when", spare=True), Column("metrics", style="dim", least=16, spare=True),
    ]  # fmt: skip
    rows = [
        [
            human.clean(about["run"]), human.clean(about["tag"]), str(about["step"]),
            about["id"] if width is None else about["id"][:SHORT_ID],
            when(repository, about["time"], width), human.value(about["metrics"]),
        ]
        for about in found
    ]  # fmt: skip
    table = lay_out(columns, rows, width)
    yield table.head
    yield from table.rows


def note(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="A run, or a checkpoint of it.", metavar="RUN[@SPEC]", autocompletion=targets)
    ],
    text: Annotated[
        list[str] | None, typer.Argument(help="What to note; without it, notes are listed.", metavar="TEXT")
    ] = None,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a note to a run or to a checkpoint, or list the notes.

    A note stays. Adding one does not disturb a process that is saving.
    """
    screen, repository = begin(context, repo, as_json)
    past, checkpoint = pick(repository, target)
    said = " ".join(text or [])
    if text is not None and not said.strip():
        raise UsageError("the note is empty", do='everystep note resnet "the learning rate was too high"')
    if said:
        (past if checkpoint is None else checkpoint).note(said)
    about = {
        "repository": repository.url,
        "run": past.name,
        "id": checkpoint.id if checkpoint is not None else None,
        "step": checkpoint.step if checkpoint is not None else None,
    }
    if said:
        of = Text(human.clean(past.name), "bold").append(f"@{checkpoint.step}" if checkpoint is not None else "")
        screen.give({**about, "note": said}, lambda: [Text("noted in ").append_text(of)])
        return
    found = (
        _notes(past)
        if checkpoint is None
        else [{"step": checkpoint.step, "id": checkpoint.id, "text": one} for one in checkpoint.notes]
    )
    screen.give({**about, "notes": found}, lambda: _note_lines(past, target, found))


def _notes(past: PastRun) -> list[dict[str, Any]]:
    """Of the run, and of all its checkpoints."""
    found: list[dict[str, Any]] = [{"step": None, "id": None, "text": one} for one in past.notes]
    for checkpoint in past.checkpoints(all=True):
        found += [{"step": checkpoint.step, "id": checkpoint.id, "text": one} for one in checkpoint.notes]
    return found


def _note_lines(past: PastRun, target: str, found: list[dict[str, Any]]) -> Iterator[Text]:
    if not found:
        yield Text("no note yet in ").append(human.clean(target), "bold")
    for one in found:
        of = f"@{one['step']}" if one["step"] is not None else ""
        yield headed(f"{human.clean(past.name)}{of}", f"  {human.clean(one['text'])}")
