"""The state of what was found, read whole, as a run can save it. Nothing runs and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from everystep import formats
from everystep.errors import Damaged, Error, NotFound, Unsupported, UsageError
from everystep.exchange.deltas import add, is_table
from everystep.exchange.found import DELTA, Found, Imported, Piece, Survey
from everystep.formats import Opaque
from everystep.schema import join
from everystep.seam import REAL, Seam
from everystep.settings import DEFAULT, Settings

WHOLE = "model"
"""The entry that weights alone become where pieces lie beside them."""
_KNOWN_TEXT = ("format", "step", "metrics", "total_size", "total_parameters")


def read(found: Found, before: Any = None, seam: Seam = REAL, settings: Settings = DEFAULT) -> Imported:
    """The state of one of `Survey.found`.

    Args:
        before: of a delta: the state of the file `found.base`, or better the `Imported` of it, whose path is checked.

    Raises:
        Damaged, Unsupported, NotFound, StorageError: see `formats.read`.
        NotFound: for a delta whose base is not there.
        UsageError: for a delta without `before`, or with that of another file.
        Mismatch: for a delta that does not fit its base.
    """
    if found.role != DELTA:
        return contents(found, seam)
    base = _base(found, before)
    delta = contents(found, seam)
    delta.notes.append("the state: a sum of deltas, whose last bits may be others than those that were trained")
    return replace(delta, state=add(base, delta.state, found.path))


def contents(found: Found, seam: Seam) -> Imported:
    """What the files hold; of a delta, the differences.

    Raises:
        Damaged, Unsupported, NotFound, StorageError: see `formats.read`.
    """
    not_understood: list[str] = []
    notes: list[str] = []
    parts: dict[str, Any] = {}
    attachments: dict[str, bytes] = {}
    for piece in found.pieces or (Piece("", found.path),):
        content = formats.read(piece.path, seam=seam)
        if isinstance(content.state, Opaque):
            raise one_object(content.state.class_name, piece.path)
        not_understood += [
            f"{_within(piece, o.path, 'the whole state')}: {o.class_name}" for o in content.not_understood
        ]
        notes += [f"{_within(piece, note.path, 'the state')}: {note.text}" for note in content.changed]
        ours = formats.ATTACHMENTS.get(content.format, ())
        attachments |= {key: text.encode() for key, text in content.metadata.items() if key in ours}
        beside = [key for key in content.metadata if key not in (*_KNOWN_TEXT, *ours)]
        if beside:
            notes.append(f"{_within(piece, '', 'the state')}: text beside it is left out: {', '.join(beside)}")
        _add(parts, piece, content.understood())
        del content
    state = _assemble(parts, found.path)
    return Imported(state, dict(found.metrics), not_understood, notes, found.path, attachments)


def each(survey: Survey, seam: Seam = REAL, settings: Settings = DEFAULT) -> Iterator[tuple[Found, Imported | Error]]:
    """Every checkpoint that was found, in order, with what is in it, or with the error that says why it is not to be
    had. One state is held, and for deltas the one before it."""
    before: Imported | None = None
    for at, found in enumerate(survey.found):
        later = survey.found[at + 1] if at + 1 < len(survey.found) else None
        answer: Imported | Error
        try:
            answer = read(found, before, seam, settings)
        except Error as error:
            answer = error
        needed = later is not None and later.base == found.path and isinstance(answer, Imported)
        before = answer if needed and isinstance(answer, Imported) else None
        yield found, answer
        del answer


def one_object(class_name: str, path: str) -> Unsupported:
    """The error for a file that is a pickled object as a whole."""
    what = f"the file is one object of the class {class_name[:200]}, which only its program can build"
    return Unsupported(what, where=path, do="save its state_dict() there, and import that")


def _base(found: Found, before: Any) -> Any:
    if not found.base:
        raise NotFound(
            f"a delta without what it is added to: {found.missing or 'the file before it'} is missing",
            where=found.path,
            do="put it beside the deltas; or weights of a later epoch: sums go on from there",
        )
    if before is None or (isinstance(before, Imported) and before.path != found.base):
        raise UsageError(
            "a delta is added to the state before it, which was not read",
            where=found.path,
            do=f"read {found.base} first, and hand in what it gave",
        )
    return before.state if isinstance(before, Imported) else before


def _within(piece: Piece, path: str, otherwise: str) -> str:
    """A path in a piece's file as a path in the state."""
    name = join("", piece.name) if piece.name else ""
    return f"{name}/{path}" if name and path else name or path or otherwise


def _add(parts: dict[str, Any], piece: Piece, part: Any) -> None:
    """One file more; the arrays of shards go into one table."""
    if not piece.shard:
        parts[piece.name] = part
        return
    table = parts.setdefault(piece.name, {})
    if not isinstance(part, dict) or set(table) & set(part):
        what = "a shard that does not fit to the others: it is no table of arrays, or has one that another has too"
        raise Damaged(what, where=piece.path, do="get all shards again from where they came from")
    table.update(part)


def _assemble(parts: dict[str, Any], where: str) -> Any:
    """The state of all files together: the whole one's entries and those of the pieces, each under its name."""
    if "" not in parts or len(parts) == 1:
        return parts.get("", parts)
    whole = parts.pop("")
    entries = {WHOLE: whole} if is_table(whole) else whole
    if not isinstance(entries, dict) or set(entries) & set(parts):
        taken = sorted(set(entries) & set(parts)) if isinstance(entries, dict) else []
        what = f"files that do not fit beside each other: {', '.join(taken) or 'the whole one is no dict'}"
        raise Unsupported(what, where=where, do="import this file by itself, into a run of its own")
    return {**entries, **parts}
