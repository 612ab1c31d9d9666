"""What a foreign file gave: a neutral state, and by name all that did not come through as it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everystep.errors import Unsupported

NAMES_SHOWN = 5


class Opaque:
    """Stands where the file has an object of a class that is never built. No dataclass: a save refuses it by path."""

    __slots__ = ("class_name", "path")

    def __init__(self, class_name: str, path: str = "") -> None:
        self.class_name, self.path = class_name, path

    def __repr__(self) -> str:
        return f"<not understood: {self.class_name}{' at ' + self.path if self.path else ''}>"


@dataclass(frozen=True)
class Note:
    """Something at a path that is kept in another form than it had."""

    path: str
    text: str


@dataclass(frozen=True)
class Content:
    """What was read.

    `state` is made of dict, OrderedDict, Counter, list, tuple, plain values, NumPy arrays and NumPy scalars; two
    names of one memory are one array object; an `Opaque` stands where something was not understood.
    """

    state: Any
    format: str
    not_understood: tuple[Opaque, ...] = ()
    changed: tuple[Note, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    def understood(self) -> Any:
        """The state without what was not understood: entries of dicts are left out, items of lists become None."""
        return _without(self.state, {}) if self.not_understood else self.state

    def check(self) -> None:
        """Raises Unsupported if anything was not understood."""
        if self.not_understood:
            found = [f"{o.path or 'the whole state'} ({o.class_name})" for o in self.not_understood[:NAMES_SHOWN]]
            more = len(self.not_understood) - len(found)
            raise Unsupported(
                f"objects that could only be built by running code: {', '.join(found)}"
                + (f" and {more} more" if more else ""),
                do="read with strict=False to leave them out, or save the file again with state_dict() only",
            )


@dataclass(frozen=True)
class Written:
    """What was written: the file, its size in bytes, and what is kept there in another form."""

    path: str
    nbytes: int
    changed: tuple[Note, ...] = ()


def _without(value: Any, done: dict[int, Any]) -> Any:
    kind: Any = type(value)
    if isinstance(value, Opaque):
        return None
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            made = kind()
            made.update({k: _without(v, done) for k, v in value.items() if not isinstance(v, Opaque)})
        else:
            made = kind(_without(item, done) for item in value)
        done[id(value)] = made
    return done[id(value)]
