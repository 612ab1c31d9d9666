"""`everystep fsck`: is everything as it was written, and if not, what is hurt and what is whole?"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any

import typer
from rich.text import Text

from everystep import Damaged, UsageError
from everystep.cli import human, typed
from everystep.cli.completion import runs
from everystep.cli.options import JsonOption, RepoOption, begin, pick_run
from everystep.cli.progress import counting
from everystep.cli.table import Column, lay_out


def fsck(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(help="A run; without it, all runs.", metavar="RUN", autocompletion=runs)
    ] = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Records and manifests only; reads no chunk.")] = False,
    read: Annotated[
        str | None,
        typer.Option("--read", metavar="SHARE", help="Read a part of the data, drawn at random: 1/10, 10% or 0.1."),
    ] = None,
    repo: RepoOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check every record, every manifest and every byte.

    Says which checkpoints are hurt and which are whole, and goes on behind what cannot be read. Changes nothing. Exit
    code 4 if anything is not as it was written. --read 1/10 draws other chunks each time: ten such checks read about
    two thirds of the data.
    """
    screen, repository = begin(context, repo, as_json)
    if no_data and read is not None:
        raise UsageError("--no-data reads no data, and --read says how much", do="one of the two")
    share = typed.share(read, "--read") if read is not None else Fraction(1)
    name = pick_run(repository, run).name if run is not None else None
    with counting("reading the logs") as told:
        report = repository.check(data=not no_data, read=share, run=name, progress=told)
    document = {
        "repository": repository.url,
        "ok": report.ok,
        "data": not no_data,
        "read": 0.0 if no_data else float(share),
        "runs": [name] if name is not None else repository.runs(),
        "records": report.records,
        "bytes_read": report.bytes_read,
        "bytes_there": report.bytes_there if not no_data else None,
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
    partly = document["data"] and document["read"] < 1
    if document["data"]:
        of = f" of {human.size(document['bytes_there'])}" if partly else ""
        looked.append(f"{human.size(document['bytes_read'])}{of} of data")
    line = Text("\n" if any_run else "").append(f"{', '.join(looked)}: ")
    if document["ok"]:
        whole = "all that was read is whole" if partly else "all is whole"
        return line.append(whole if document["data"] else "the structure is whole; data not read", "bold green")
    hurting = f"{human.count(hurt, 'checkpoint')} hurt, {len(total) - hurt} whole" if total else "damaged"
    return line.append(f"{human.count(len(document['findings']), 'finding')}; {hurting}", "bold red")
