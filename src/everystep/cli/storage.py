"""`everystep storage check`: does a store do what checkpoints need?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import UnsafeStore, UsageError, check_storage
from everystep.cli import human
from everystep.cli.options import JsonOption
from everystep.cli.progress import counting
from everystep.cli.screen import Screen
from everystep.cli.storage_policy import EPILOG as POLICY
from everystep.cli.storage_policy import policy
from everystep.cli.table import Column, lay_out

storage = typer.Typer(
    add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
    help="Try a store, and say what may be done in it.",
    epilog="""
    \b
    Examples:
      everystep storage check s3://bucket/prefix
      everystep storage check s3://bucket/prefix --json
      everystep storage policy s3://bucket/prefix --role reader
    """,
)  # fmt: skip


@storage.command(
    epilog="""
    \b
    Examples:
      everystep storage check s3://bucket/prefix
      everystep storage check hdfs://namenode:8020/user/me --json
      everystep storage check /mnt/shared
    """
)
def check(
    context: typer.Context,
    place: Annotated[str | None, typer.Argument(help="A folder or URL; without it, that of -r.", metavar="URL")] = None,
    as_json: JsonOption = False,
) -> int:
    """Try whether a store does what checkpoints need.

    Writes about 2,000 small objects and one of 64 MiB, in a folder of its own below the URL, and deletes them again.
    What else lies there is left alone. Exit code 12 if something that everystep needs does not hold.
    """
    screen: Screen = context.obj
    screen.as_json = screen.as_json or as_json
    place = place or screen.place
    if place is None:
        raise UsageError("which store?", do="everystep storage check s3://bucket/prefix")
    with counting("checking the store") as told:
        report = check_storage(place, progress=told)
    document = {
        "url": report.url, "ok": report.ok, "left": report.left, "folder": report.folder,
        "checks": [asdict(each) for each in report.checks],
    }  # fmt: skip
    screen.give(document, lambda: _lines(document, screen.width))
    return 0 if report.ok else UnsafeStore.exit_code


def _lines(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    rows, marked = [], {}
    for at, each in enumerate(document["checks"]):
        verdict = "ok" if each["ok"] else "FAILED" if each["needed"] else "not there"
        marked[at, 1] = "green" if each["ok"] else "bold red" if each["needed"] else "yellow"
        rows.append([each["name"], verdict, human.clean(each["found"]), human.duration(each["seconds"])])
    columns = [Column("check", style="bold"), Column(""), Column("seen", least=20)]
    columns.append(Column("took", right=True, spare=True))
    table = lay_out(columns, rows, width, marked)
    yield table.head
    yield from table.rows
    for each in document["checks"]:
        if not each["ok"]:
            yield Text(f"\n{each['name']}: {human.clean(each['found'])}", "red" if each["needed"] else "yellow")
            yield Text(f"  it should be that {each['proves']}; without it, {each['without']}", "dim")
    if document["left"]:
        left = f"{human.clean(document['folder'])} could not be emptied: {human.clean(document['left'])}"
        yield Text(f"\n{left}", "yellow")
    yield _verdict(document)


def _verdict(document: dict[str, Any]) -> Text:
    checks = document["checks"]
    failed = sum(each["needed"] and not each["ok"] for each in checks)
    line = Text(f"\n{human.clean(document['url'])}: {human.count(len(checks), 'check')}: ")
    if failed:
        return line.append(f"{failed} failed; do not save here with several writers", "bold red")
    return line.append("all that everystep needs is there", "bold green")


storage.command(epilog=POLICY)(policy)
