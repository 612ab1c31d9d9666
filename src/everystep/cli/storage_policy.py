"""`everystep storage policy`: what a role may do in a bucket, as a policy ready to be set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import AccessPolicy, UsageError, access_policy
from everystep.cli import human
from everystep.cli.options import JsonOption
from everystep.cli.screen import Screen

EPILOG = """
\b
Examples:
  everystep storage policy s3://bucket/runs --role writer > writer.json
  everystep storage policy s3://bucket/runs --role reader --to arn:aws:iam::123456789012:role/notebooks
  everystep storage policy s3://bucket/runs --role collector --store ceph --to nightly
"""


def policy(
    context: typer.Context,
    place: Annotated[
        str | None, typer.Argument(help="s3://bucket/prefix; without it, that of -r.", metavar="URL")
    ] = None,
    role: Annotated[
        str, typer.Option("--role", help="writer, reader, collector or administrator.", metavar="ROLE")
    ] = "writer",
    store: Annotated[str, typer.Option("--store", help="s3 (AWS) or ceph.", metavar="STORE")] = "s3",
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="Who gets it: an ARN, or a user of Ceph; may be repeated.", metavar="NAME"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a role may do, as a policy ready to be set.

    A writer creates and never deletes; a reader reads; a collector frees packs and receipts; an administrator may do
    everything. The policy goes to stdout, what it cannot hold to stderr. Nothing is sent anywhere.
    """
    screen: Screen = context.obj
    screen.as_json = screen.as_json or as_json
    place = place or screen.place
    if place is None:
        raise UsageError("which bucket?", do="everystep storage policy s3://bucket/prefix --role writer")
    found = access_policy(place, role, store=store, to=to or ())
    document = {"place": place, "role": found.role, "store": found.store, "policy": found.document}
    if not screen.as_json:
        for note in found.notes:
            typer.echo(f"note: {human.clean(note)}", err=True)
    screen.give({**document, "notes": list(found.notes)}, lambda: _lines(found))


def _lines(found: AccessPolicy) -> Iterator[Text]:
    shown: dict[str, Any] = found.document
    for line in json.dumps(shown, indent=2).splitlines():
        yield Text(line)
