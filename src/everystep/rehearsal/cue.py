"""The cue: what a script is told in a rehearsal through its environment, and the notes that come back in a file."""

from __future__ import annotations

from typing import Any

import msgspec
from blake3 import blake3

from everystep.errors import UsageError
from everystep.forecast import Planned
from everystep.rehearsal.sight import Sight
from everystep.seam import Seam

VARIABLE = "EVERYSTEP_REHEARSAL"


class Cue(msgspec.Struct, frozen=True):
    """What a rehearsal asks of a script."""

    folder: str
    """Where its repositories lie instead of their own places."""
    save_at: list[int]
    """Steps at which its loop saves. A script that saves by hand: its first save at or behind each of them. The
    process ends behind the last."""
    total: int | None = None
    save_every: int | None = None
    """Steps of the planned run and between its saves, where the script does not say."""
    by_hand: bool = False
    """Loops save nothing by themselves: only what the script saves by hand counts."""


class Opened(msgspec.Struct, tag="opened", frozen=True):
    """A repository was asked for at a place, and opened in a folder."""

    place: str
    folder: str


class Resumed(msgspec.Struct, tag="resumed", frozen=True):
    run: str
    step: int


class Warned(msgspec.Struct, tag="warned", frozen=True):
    run: str
    text: str


class Noted(msgspec.Struct, tag="saved", frozen=True):
    """A save; `point` if it is one that the cue asks for."""

    folder: str
    run: str
    step: int
    point: bool


class About(msgspec.Struct, tag="about", frozen=True):
    """What a run is, as far as its process can see."""

    run: str
    loop: str
    tracked: dict[str, str]
    """Name -> kind."""
    rng: bool
    step_seconds: float | None
    """Median time of a step, its saves not counted."""
    planned: Planned
    misfits: list[str]
    """What of the state did not come in when the run was resumed."""
    sights: list[Sight]
    surroundings: dict[str, Any]


Note = Opened | Resumed | Warned | Noted | About


def cue_of(seam: Seam) -> Cue | None:
    """The rehearsal that this process is part of; None outside of one.

    Raises:
        UsageError: if the variable holds no cue, or one of a rehearsal that is over.
    """
    text = seam.environ(VARIABLE)
    if not text:
        return None
    try:
        cue = msgspec.json.decode(text, type=Cue)
    except msgspec.DecodeError as error:
        raise UsageError(f"{VARIABLE} holds no cue: {error}", do=f"unset {VARIABLE}; only rehearsals set it") from error
    if not cue.save_at or not seam.files.is_folder(cue.folder):
        raise UsageError(f"the rehearsal in {VARIABLE} is over", where=cue.folder, do=f"unset {VARIABLE}")
    return cue


def placed(place: str, seam: Seam) -> str:
    """Where a repository is opened: in a rehearsal in its scratch folder, so that the place itself is not touched."""
    cue = cue_of(seam)
    if cue is None:
        return place
    url = place if "://" in place else seam.files.absolute(place)
    folder = f"{cue.folder}/{blake3(url.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    seam.tell(f"everystep: a rehearsal; what is at {place} is neither read nor written")
    note(cue, seam, Opened(url.encode("utf-8", "replace").decode(), folder))
    return folder


def note(cue: Cue, seam: Seam, what: Note) -> None:
    seam.add_line(notes_path(cue.folder), msgspec.json.encode(what).decode())


def notes_path(folder: str) -> str:
    return f"{folder}/notes"


def read_notes(folder: str, seam: Seam) -> list[Note]:
    """What a script noted down, oldest first."""
    try:
        lines = seam.files.read_text(notes_path(folder)).splitlines()
    except FileNotFoundError:
        return []
    return [msgspec.json.decode(line, type=Note) for line in lines]
