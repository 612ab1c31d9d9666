"""`everystep export` and `import`: files for other programs, and runs from old files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Conflict, Damaged, RunInUse, UsageError
from everystep.cli import human
from everystep.cli.completion import checkpoints
from everystep.cli.options import JsonOption, RepoOption, begin, instead, pick_checkpoint
from everystep.cli.progress import counting, reading
from everystep.cli.table import Column, headed, lay_out


def export(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="The checkpoint.", metavar="RUN@SPEC", autocompletion=checkpoints)],
    file: Annotated[
        str,
        typer.Argument(
            help="The file to write; its ending says the format: .safetensors, .pth, .npz, .pb, .params …",
            metavar="FILE",
        ),
    ],
    only: Annotated[
        str | None, typer.Option("--only", metavar="PATH", help="That part alone: model becomes a flat state_dict.")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", metavar="NAME", help="If the ending does not say it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if there is one.")] = False,
    shard: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="Split a larger .safetensors file: 5GB, 500MB …"),
    ] = None,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a file for other programs.

    Every byte is verified on the way, and the file appears whole or not at all. What has another form in the file is
    listed.
    """  # fmt: skip
    screen, repository = begin(context, repo, as_json)
    past, checkpoint = pick_checkpoint(repository, target)
    known = form is not None or shard is not None
    ending = nullcontext() if known else instead(UsageError, do="give the file one of these endings, or --format")
    with reading(target) as told, instead(Conflict, do="give another name, or --overwrite"), ending:
        written = checkpoint.export(
            file, only=only, format=form, overwrite=overwrite, max_shard_size=shard, progress=told
        )
    changed = [{"path": note.path, "what": note.text} for note in written.changed]
    document = {
        "repository": repository.url,
        "run": past.name,
        "id": checkpoint.id,
        "step": checkpoint.step,
        "only": only,
        "file": written.path,
        "nbytes": written.nbytes,
        "changed": changed,
    }

    def lines() -> Iterator[Text]:
        part = f", {human.clean(only)} alone" if only is not None else ""
        rest = f": {human.size(written.nbytes)}, {human.clean(past.name)}@{checkpoint.step}{part}"
        yield headed(human.clean(written.path), rest)
        for one in changed:
            at = f"{human.clean(one['path'])}: " if one["path"] else ""
            yield Text(f"  {at}{human.clean(one['what'])}", "yellow")

    screen.give(document, lines)


def import_files(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="A folder of checkpoint files, or one file.", metavar="PATH")],
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="The run that they become; by default called like PATH.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come in, and do nothing.")] = False,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Do not wait for a process that may be writing the run.")
    ] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make a run of old checkpoints of PyTorch, Lightning, Transformers, Keras, TensorFlow, JAX or MXNet, in any mix.

    Steps, epochs and metrics come from what is in the files, then from their names. Nothing in a file runs, and the
    folder is only read. What is not taken is listed with the reason; steps that the run has already are left as they
    are, so an import that was cut off goes on. Makes the repository if there is none. Exit code 4 if a file is damaged.
    """
    screen, repository = begin(context, repo, as_json, new=True)
    with counting("looking") as told, instead(RunInUse, do="end it first, use another --run, or --takeover"):
        report = repository.import_from(
            path, run, dry_run=dry_run, takeover=takeover,
            progress=None if told is None else lambda done, total, file: told(file or "done", done, total),
        )  # fmt: skip
    document = {
        "repository": repository.url,
        "run": report.run,
        "dry_run": dry_run,
        "steps_from": report.steps_from,
        "brought": [asdict(one) for one in report.brought],
        "skipped": [asdict(one) for one in report.skipped],
        "file_bytes": report.file_bytes,
        "stored_bytes": report.stored_bytes,
    }
    screen.give(document, lambda: _report(document, screen.width))
    return Damaged.exit_code if any(one.kind == "damaged" for one in report.skipped) else 0


def _report(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    brought, skipped = document["brought"], document["skipped"]
    columns = [
        Column("step", right=True, style="bold"), Column("epoch", right=True), Column("size", right=True),
        Column("file", least=16, keep_end=True), Column("metrics", least=12, spare=True),
        Column("step from", style="dim", least=10, spare=True),
    ]  # fmt: skip
    rows = [
        [
            str(one["step"]), str(one["epoch"]) if one["epoch"] is not None else "", human.size(one["nbytes"]),
            human.clean(one["path"]), human.value(one["metrics"]), human.clean(one["how"]),
        ]
        for one in brought
    ]  # fmt: skip
    table = lay_out(columns, rows, width)
    if rows:
        yield table.head
        yield from table.rows
    for one in brought:
        for what in (*one["not_understood"], *one["notes"]):
            yield Text(f"{human.clean(one['path'])}: {human.clean(what)}", "yellow")
    if skipped:
        yield Text("\nnot taken" if rows else "not taken", "bold")
    for one in skipped:
        style = "red" if one["kind"] == "damaged" else ""
        yield headed(f"  {human.clean(one['path'])}: ", human.clean(one["why"]), style)
    yield _summary(document)


def _summary(document: dict[str, Any]) -> Text:
    brought, of = len(document["brought"]), human.size(document["file_bytes"])
    if not brought:
        what = "nothing came in"
    elif document["dry_run"]:
        what = f"{human.count(brought, 'checkpoint')} of {of} would come in; nothing was done"
    else:
        what = f"{human.count(brought, 'checkpoint')} came in, {human.size(document['stored_bytes'])} stored of {of}"
    return Text("\n").append_text(headed(human.clean(document["run"]), f": {what}"))
