"""`everystep fsck`: is everything as it was written, and if not, what is hurt and what is whole?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Damaged
from everystep.cli import human
from everystep.cli.options import JsonOption, RepoOption, begin
from everystep.cli.screen import console_of
from everystep.cli.table import Column, lay_out


def fsck(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(help="A run; without it, all runs.", metavar="RUN")] = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Records and manifests only; reads no chunk.")] = False,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check every record, every manifest and every byte.

    Says which checkpoints are hurt and which are whole. Changes nothing. Exit code 4 if anything is not as it was
    written.
    """
    screen, repository = begin(context, repo, as_json)
    with _progress() as told:
        report = repository.check(data=not no_data, run=run, progress=told)
    document = {
        "repository": repository.url,
        "ok": report.ok,
        "data": not no_data,
        "runs": [run] if run is not None else repository.runs(),
        "records": report.records,
        "bytes_read": report.bytes_read,
        "checkpoints": [
            {"run": c.run, "id": c.checkpoint, "step": c.step, "whole": c.whole} for c in report.checked
        ],
        "findings": [
            {"run": f.run, "id": f.checkpoint, "step": f.step, "what": f.what, "where": f.where}
            for f in report.findings
        ],
    }  # fmt: skip
    screen.give(document, lambda: _lines(document, screen.width))
    return 0 if report.ok else Damaged.exit_code


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr while it lasts, where somebody looks; the answer is what to tell it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console_of(sys.stderr), transient=True) as bar:
        task = bar.add_task("reading the logs", total=None)

        def tell(run: str, done: int, total: int) -> None:
            bar.update(task, description=human.clean(run), completed=done, total=total)

        yield tell


def _lines(document: dict[str, Any], width: int | None) -> Iterator[Text]:
    rows, styles = [], []
    for run in document["runs"]:
        checkpoints = [c for c in document["checkpoints"] if c["run"] == run]
        hurt = [c["step"] for c in checkpoints if not c["whole"]]
        whole = [c["step"] for c in checkpoints if c["whole"]]
        others = [f for f in document["findings"] if f["run"] == run and f["id"] is None]
        verdict = "hurt" if hurt else "damaged log" if others else "whole"
        rows.append([human.clean(run), verdict, human.steps(hurt), human.steps(whole) or "none"])
        styles.append("" if verdict == "whole" else "red")
    columns = [Column("run", style="bold"), Column(""), Column("hurt", least=12), Column("whole", least=12)]
    table = lay_out(columns, rows, width)
    if rows:
        yield table.head
    for line, style in zip(table.rows, styles):
        line.stylize(style)
        yield line
    for finding in document["findings"]:
        yield Text(f"\n{human.clean(finding['run'])}: {human.clean(finding['what'])}", "red")
        yield Text(f"  {human.clean(finding['where'])}", "dim")
    yield _verdict(document, bool(rows))


def _verdict(document: dict[str, Any], any_run: bool) -> Text:
    total = document["checkpoints"]
    hurt = sum(not checkpoint["whole"] for checkpoint in total)
    looked = [human.count(len(document["runs"]), "run"), human.count(document["records"], "record")]
    looked.append(human.count(len(total), "checkpoint"))
    if document["data"]:
        looked.append(f"{human.size(document['bytes_read'])} of data")
    line = Text("\n" if any_run else "").append(f"{', '.join(looked)}: ")
    if document["ok"]:
        return line.append(
            "all is whole" if document["data"] else "the structure is whole; data not read", "bold green"
        )
    hurting = f"{human.count(hurt, 'checkpoint')} hurt, {len(total) - hurt} whole" if total else "damaged"
    return line.append(f"{human.count(len(document['findings']), 'finding')}; {hurting}", "bold red")
