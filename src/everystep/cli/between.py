"""`everystep push`, `pull` and `mirror`: checkpoints from one repository to another, or a copy of all of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

import everystep
from everystep import Carried, Repository, RunInUse, UsageError
from everystep.cli import human, typed
from everystep.cli.completion import targets
from everystep.cli.options import JsonOption, RepoOption, begin, instead
from everystep.cli.progress import counting
from everystep.cli.screen import Screen
from everystep.cli.table import Column, headed, lay_out

RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Runs, or checkpoints of them; without, all runs.", metavar="[RUN[@SPEC]]...", autocompletion=targets
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="PATH", help="That part of the state alone, as a run of its own. Repeatable."),
]
AsOption = Annotated[str | None, typer.Option("--as", metavar="NAME", help="What the run is called there.")]
LastOption = Annotated[int | None, typer.Option("--keep-last", min=1, metavar="N", help="Only the newest N.")]
BestOption = Annotated[
    list[str] | None, typer.Option("--keep-best", metavar="N:METRIC[:MODE]", help="Only the N best. Repeatable.")
]
TakeoverOption = Annotated[
    bool, typer.Option("--takeover", help="Do not wait for a process that may be writing the run there.")
]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and do nothing.")]


def push(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="The other repository: a folder or URL.", metavar="TARGET")],
    which: RunsArgument = None,
    only: OnlyOption = None,
    keep_last: LastOption = None,
    keep_best: BestOption = None,
    as_run: AsOption = None,
    dry_run: DryOption = False,
    takeover: TakeoverOption = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send checkpoints to another repository.

    What is there is not sent: checkpoints by id, chunks by hash. Every byte that is sent has been checked, and each
    checkpoint is committed there once, with its tags, notes and metrics. Cut off, it goes on when it is called again.
    The column "beside" counts tags, notes, metrics and files that are new there.
    """
    screen, repository = begin(context, repo, as_json)
    rule = _rule(keep_last, keep_best)
    with _goes_on(), _carrying("sending") as told, _said():
        found = repository.push(
            target, which or None, keep=rule, only=only or None, as_run=as_run, dry_run=dry_run, takeover=takeover,
            progress=told,
        )  # fmt: skip
    _give(screen, _about("push", repository, target, found, dry_run))


def pull(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="The other repository: a folder or URL.", metavar="SOURCE")],
    which: Annotated[
        list[str] | None,
        typer.Argument(help="Runs there, or checkpoints of them; without, all runs.", metavar="[RUN[@SPEC]]..."),
    ] = None,
    only: OnlyOption = None,
    keep_last: LastOption = None,
    keep_best: BestOption = None,
    as_run: AsOption = None,
    dry_run: DryOption = False,
    takeover: TakeoverOption = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring checkpoints from another repository, or a part of them.

    As push, from the other side: no more is read there than is brought. Makes the repository if there is none.
    """
    screen, repository = begin(context, repo, as_json, new=True)
    rule = _rule(keep_last, keep_best)
    with _goes_on(), _carrying("bringing") as told, _said():
        found = repository.pull(
            source, which or None, keep=rule, only=only or None, as_run=as_run, dry_run=dry_run, takeover=takeover,
            progress=told,
        )  # fmt: skip
    _give(screen, _about("pull", repository, source, found, dry_run))


def mirror(
    context: typer.Context,
    target: Annotated[
        str | None, typer.Argument(help="An empty place, or a mirror of this repository.", metavar="TARGET")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete packs in the mirror that nothing needs any more.")
    ] = False,
    promote: Annotated[
        bool, typer.Option("--promote", help="Make the repository of -r, a mirror, one that can be written.")
    ] = False,
    dry_run: DryOption = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a copy of the whole repository, byte for byte, in a place where nobody else writes.

    Copies what is new since the last time, checked before. Reading it is reading the original; writing is refused.
    When the original is gone, --promote makes the mirror a repository of its own.
    """
    screen, repository = begin(context, repo, as_json)
    if promote == (target is not None):
        raise UsageError("mirror needs TARGET, or --promote", do="everystep -r runs mirror s3://bucket/prefix")
    if promote or target is None:
        repository.promote()
        screen.give(
            {"repository": repository.url, "promoted": True},
            lambda: [headed(human.clean(repository.url), " can be written from now on")],
        )
        return
    with _goes_on(), counting("mirroring") as told:
        done = repository.mirror(target, prune=prune, dry_run=dry_run, progress=told)
    document = {"repository": repository.url, "target": target, "dry_run": dry_run, **asdict(done)}
    screen.give(document, lambda: _mirrored(document))


def _rule(last: int | None, best: Sequence[str] | None) -> everystep.Rule | None:
    rules = [everystep.last(last)] if last is not None else []
    return typed.union([*rules, *(typed.best(text, "--keep-best") for text in best or ())])


@contextmanager
def _carrying(what: str) -> Iterator[Callable[[str, int, int, int], None] | None]:
    with counting(what) as told:
        if told is None:
            yield None
            return
        bar = told
        yield lambda run, done, total, nbytes: bar(f"{run} {human.size(nbytes)}", done, total)


@contextmanager
def _said() -> Iterator[None]:
    with instead(RunInUse, do="end that process first, or --takeover"):
        yield


@contextmanager
def _goes_on() -> Iterator[None]:
    """Whoever interrupts long work wants to know what became of it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: what is there is whole, and the same command goes on from there", err=True)
        raise


def _about(verb: str, repository: Repository, other: str, found: Sequence[Carried], dry_run: bool) -> dict[str, Any]:
    runs = [{**asdict(one), "sent": len(one.sent), "steps": one.sent} for one in found]
    names = ("sent", "there", "gone", "sent_bytes", "raw_bytes", "said")
    return {
        "repository": repository.url,
        "verb": verb,
        "other": other,
        "dry_run": dry_run,
        "runs": runs,
        "all": {name: sum(one[name] for one in runs) for name in names},
    }


def _give(screen: Screen, document: dict[str, Any]) -> None:
    screen.give(document, lambda: _lines(document, screen.width))


def _lines(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    runs, total, dry = document["runs"], document["all"], document["dry_run"]
    columns = [
        Column("run", style="bold", least=12), Column("to send" if dry else "sent", right=True),
        Column("there", right=True), Column("stored", right=True), Column("of", right=True, style="dim"),
        Column("beside", right=True, spare=True), Column("steps", style="dim", spare=True),
    ]  # fmt: skip
    rows = [
        [
            human.clean(one["run"] if one["run"] == one["target_run"] else f"{one['run']} as {one['target_run']}"),
            str(one["sent"]), str(one["there"]), human.size(one["sent_bytes"]), human.size(one["raw_bytes"]),
            str(one["said"]), human.steps(one["steps"]),
        ]
        for one in runs
    ]  # fmt: skip
    if runs:
        table = lay_out(columns, rows, width)
        yield table.head
        yield from table.rows
    way = "to" if document["verb"] == "push" else "from"
    what = human.count(total["sent"], "checkpoint")
    if dry:
        done = f"{what} would go {way} {human.clean(document['other'])}, about {human.size(total['sent_bytes'])}"
    else:
        done = f"{what} {way} {human.clean(document['other'])}, {human.size(total['sent_bytes'])}"
    rest = f"; {total['there']} there already" if total["there"] else ""
    gone = f"; {total['gone']} dropped meanwhile" if total["gone"] else ""
    yield Text(f"{done}{rest}{gone}")


def _mirrored(document: dict[str, Any]) -> Iterator[Text]:
    would = "would be copied" if document["dry_run"] else "copied"
    removed = f"; {human.count(document['removed'], 'pack')} removed" if document["removed"] else ""
    yield Text(
        f"{human.count(document['runs'], 'run')}: {human.count(document['records'], 'record')} and "
        f"{human.count(document['packs'], 'pack')} {would}, {human.size(document['nbytes'])}{removed}"
    )
