"""Where a verb says what it has to say: lines or one JSON document on stdout; warnings and errors on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from rich.text import Text

from everystep import Error, EverystepWarning, StorageError
from everystep.cli.human import clean, jsonable

if TYPE_CHECKING:
    from rich.console import Console


class Screen:
    """One call of the command line."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.place: str | None = None
        """The repository that was given before the verb, or in the environment."""
        self.warned: list[str] = []

    @property
    def width(self) -> int | None:
        """Of the terminal; None where the output goes into a pipe or file, which gets everything in full."""
        return console_of(sys.stdout).width if sys.stdout.isatty() else None

    def give(self, document: dict[str, Any], lines: Callable[[], Iterable[Text]]) -> None:
        """The answer: the document, or the lines."""
        if self.as_json:
            self._write_json({**document, "warnings": self.warned})
        else:
            self._write(sys.stdout, lines())

    def warn(self, text: str) -> None:
        """One line, said once."""
        if text not in self.warned:
            self.warned.append(text)
            self._write(sys.stderr, [Text().append("warning: ", "yellow").append(clean(text))])

    def fail(self, error: Error) -> None:
        """What, where, and what to do now."""
        if self.as_json:
            found = {"kind": error.kind, "what": error.what, "where": error.where, "do": error.do}
            with suppress(StorageError):  # then stdout takes nothing: said on stderr below
                self._write_json({"error": found, "warnings": self.warned})
                return
        lines = [Text().append("error: ", "bold red").append(clean(error.what))]
        for name, text in (("where", error.where), ("do", error.do)):
            if text:
                lines.append(Text().append(f"  {name + ':':7}", "dim").append(clean(text)))
        self._write(sys.stderr, lines)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Warnings of the door become lines of ours; others stay what they are."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", EverystepWarning)
            before = warnings.showwarning

            def show(message: Any, category: type[Warning], *args: Any, **named: Any) -> None:
                if issubclass(category, EverystepWarning):
                    self.warn(str(message))
                else:
                    before(message, category, *args, **named)

            warnings.showwarning = show
            yield

    def _write_json(self, document: dict[str, Any]) -> None:
        self._put(sys.stdout, json.dumps(jsonable(document), indent=2, allow_nan=False) + "\n")

    def _write(self, stream: TextIO, lines: Iterable[Text]) -> None:
        console = console_of(stream)
        if console.color_system is None or console.no_color:
            self._put(stream, "\n".join(line.plain for line in lines) + "\n")
            return
        with console.capture() as styled:
            console.print(Text("\n").join(lines), soft_wrap=True)
        self._put(stream, styled.get())

    def _put(self, stream: TextIO, text: str) -> None:
        """
        Raises:
            StorageError: if the output takes no more.
        """
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            with suppress(OSError):
                stream.close()  # now, or the interpreter would try once more at its end
            if isinstance(error, BrokenPipeError):
                return  # the reader has seen enough, as `head` has
            self.as_json = False  # what is wrong has to be said elsewhere
            raise StorageError(f"the output cannot be written: {error.strerror}", do="give it another place") from error


def console_of(stream: TextIO) -> Console:
    """What a stream can show: its width, whether it takes colours."""
    from rich.console import Console  # imported late: --help and --version are fast without it

    return Console(file=stream, highlight=False)
