"""Bars for long work: on stderr, and only while somebody looks at it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from everystep.cli import human
from everystep.cli.screen import console_of
from everystep.cli.table import cut

NAME_SHOWN = 40


@contextmanager
def counting(what: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Things that are done one after the other; the answer is what to tell: (name, done, in all)."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console_of(sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def tell(name: str, done: int, total: int) -> None:
            bar.update(task, description=cut(human.clean(name), NAME_SHOWN, True), completed=done, total=total)

        yield tell


@contextmanager
def reading(what: str, nbytes: int | None = None) -> Iterator[Callable[[int], None] | None]:
    """Bytes as they come in; the answer is what to tell: how many more.

    Args:
        nbytes: in all; None where that is not known before.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console_of(sys.stderr), transient=True) as bar:
        task = bar.add_task(human.clean(what), total=nbytes)

        def tell(more: int) -> None:
            bar.advance(task, more)

        yield tell
