"""A look at a file or folder: which files are checkpoints, of which steps, and why the others are not."""

from __future__ import annotations

from dataclasses import replace

from everystep import formats
from everystep.errors import Damaged, Error, NotFound, StorageError, Unsupported
from everystep.exchange import order
from everystep.exchange.candidate import Candidate
from everystep.exchange.deltas import chain
from everystep.exchange.facts import Facts, facts_of, facts_of_trainer
from everystep.exchange.found import DAMAGED, DELTA, STATE, UNKNOWN, UNPLACED, Found, Piece, Skipped, Survey, why_not
from everystep.exchange.meanings import COPIES
from everystep.exchange.names import Named, parse, parse_file
from everystep.exchange.order import Placed
from everystep.exchange.peek import Stand, peek
from everystep.exchange.pieces import join
from everystep.exchange.same import settle
from everystep.exchange.sets import Sets, is_unfinished, sets_of, size_of
from everystep.exchange.take import one_object
from everystep.formats import orbax
from everystep.seam import REAL, Seam
from everystep.settings import DEFAULT, Settings

TRAINER = "trainer_state.json"
_TRAINER_BYTES_MAX = 256 << 20
DEPTH_MAX = 16


def survey(path: str, seam: Seam = REAL, settings: Settings = DEFAULT) -> Survey:
    """What there is to import in a file, or in a folder and the folders in it. Nothing runs, nothing is written.

    Of most files only what is not an array is read; those of one step are compared in full.

    Raises:
        NotFound: if there is no such file or folder.
        StorageError: if the folder cannot be listed.
    """
    path = seam.files.absolute(path)
    look = _Look(seam)
    if seam.files.is_folder(path):
        if not look.whole_folder(path, ""):
            look.folder(path, "")
    else:
        _size(path, seam)
        look.file(path, "")
    candidates, skipped = join(look.candidates())
    placed, unplaced = order.place(candidates)
    found, left = settle([_found(one) for one in sorted(placed, key=_preference)], seam)
    by_epoch = {one.how for one in found} <= {"name: epoch", "content: epoch", "name: initial"}
    skipped = sorted([*look.skipped, *skipped, *unplaced, *left], key=lambda one: one.path)
    doubled = {one.step for one in placed if one.candidate.is_delta} & {one.step for one in found if one.role == STATE}
    return Survey(chain(found, by_epoch, doubled), skipped, order.sentence([one.how for one in found]))


def _found(placed: Placed) -> Found:
    candidate = placed.candidate
    return Found(
        candidate.path, placed.step, candidate.epoch, {**candidate.metrics, **placed.beside}, placed.how,
        candidate.nbytes, DELTA if candidate.is_delta else STATE, candidate.pieces,
    )  # fmt: skip


def _preference(placed: Placed) -> tuple[int, bool, bool, int, int, str]:
    """Of files of one step, which comes first: not a copy under another name, but the one that says most."""
    candidate = placed.candidate
    copy = any(word in COPIES for word in candidate.named.words)
    return (
        placed.step,
        copy,
        candidate.facts.step is None,
        -len(candidate.facts.keys),
        -candidate.nbytes,
        candidate.path,
    )


class _Look:
    """Collects candidates, and what is none."""

    def __init__(self, seam: Seam) -> None:
        self._seam = seam
        self._named: list[Candidate] = []
        self._trainers: dict[str, Facts] = {}
        self.skipped: list[Skipped] = []

    def folder(self, path: str, name: str) -> None:
        """A folder of checkpoints, or one that is a checkpoint."""
        try:
            names = sorted(self._seam.files.names(path))
        except OSError as error:
            if not name:
                do = "check its owner and mode"
                raise StorageError(f"cannot list this folder: {error.strerror or error}", where=path, do=do) from error
            self.skipped.append(Skipped(path, f"cannot list this folder: {error.strerror or error}", UNKNOWN))
            return
        base = path.rstrip("/")
        sets = sets_of(base, {entry: None for entry, is_folder in names if not is_folder}, self._seam)
        for entry, is_folder in names:
            inner = f"{base}/{entry}"
            if not is_folder:
                self._one(base, entry, sets, name)
            elif is_unfinished(entry):
                self.skipped.append(
                    Skipped(inner, "a checkpoint that was not finished when its program ended", UNKNOWN)
                )
            elif self.whole_folder(inner, name):
                continue
            elif not name:
                self.folder(inner, entry)
            else:
                self.skipped.append(Skipped(inner, "a folder within a folder: import it by itself", UNKNOWN))

    def whole_folder(self, path: str, folder: str) -> bool:
        """Takes a folder that is one checkpoint, and says whether it is."""
        try:
            form = formats.folder_of(path, self._seam)
        except (Error, OSError):
            form = ""  # who lists it says what is wrong with it
        if form in ("", "shards"):
            return False
        try:
            facts = facts_of({}, orbax.facts_of_folder(self._seam, path) if form == "orbax" else {})
            nbytes = _nbytes(path, self._seam)
        except (Error, OSError) as error:
            self.skipped.append(Skipped(path, why_not(error) if isinstance(error, Error) else str(error), UNKNOWN))
            return True
        named = parse(path.rstrip("/").rpartition("/")[2])
        self._named.append(Candidate(path, folder, named, facts, nbytes, (Piece("", path),)))
        return True

    def _one(self, base: str, entry: str, sets: Sets, folder: str) -> None:
        """A file of a folder, with what belongs to it."""
        path = f"{base}/{entry}"
        if entry in sets.missing:
            gone = ", ".join(sets.missing[entry][:3])
            why = f"a part of a checkpoint whose other files are missing ({gone}): put all of them into this folder"
            self.skipped += [Skipped(f"{base}/{name}", why, UNPLACED) for name in (entry, *sets.parts.get(entry, ()))]
        elif entry not in sets.aside:
            self.file(path, folder, size_of(base, sets.parts, entry, self._seam))
        elif sets.aside[entry]:
            self.skipped.append(Skipped(path, sets.aside[entry], UNKNOWN))

    def file(self, path: str, folder: str, beside: int = 0) -> None:
        """A file by itself; `beside` are the bytes of those that belong to it."""
        name = path.rpartition("/")[2]
        try:
            nbytes = _size(path, self._seam)
            if not nbytes:
                raise Damaged("an empty file", where=path)
            if name == TRAINER and nbytes <= _TRAINER_BYTES_MAX:
                self._trainers[folder] = facts_of_trainer(self._seam.files.read_text(path))
                return
            peeked = peek(path, self._seam)
            if peeked.class_name:
                raise one_object(peeked.class_name, path)
            facts = facts_of(peeked.top, peeked.metadata)
            if not _holds_something(peeked.top):
                self.skipped.append(Skipped(path, "it holds no array, number or text: nothing to keep", UNKNOWN))
                return
        except (Error, OSError, ValueError, RecursionError) as error:
            kind = DAMAGED if isinstance(error, (Damaged, ValueError, RecursionError)) else UNKNOWN
            self.skipped.append(Skipped(path, why_not(error) if isinstance(error, Error) else str(error), kind))
            return
        self._named.append(Candidate(path, folder, parse_file(name), facts, nbytes + beside, (Piece("", path),)))

    def candidates(self) -> list[Candidate]:
        """With what the folders' names and trainers say; numbers at the end of names count where they change."""
        ends: dict[tuple[str, str], set[int | None]] = {}
        for candidate in self._named:
            ends.setdefault((candidate.folder, candidate.named.label), set()).add(candidate.named.step)
        made = []
        for candidate in self._named:
            named = candidate.named
            if len(ends[candidate.folder, named.label]) < 2:
                named = named.without_weak()
            named = named.within(parse(candidate.folder) if candidate.folder else Named())
            made.append(replace(candidate, named=named, facts=self._told(candidate)))
        return made

    def _told(self, candidate: Candidate) -> Facts:
        """What the trainer's own file says of the state beside it."""
        told, own = self._trainers.get(candidate.folder), candidate.facts
        if told is None or told.step is None:
            return own
        key = f"{TRAINER}: {told.step_key}"
        return replace(
            own, step=told.step, step_key=key, total=True, epoch=told.epoch, metrics={**own.metrics, **told.metrics}
        )


def _holds_something(top: object) -> bool:
    return top is not None and top is not Stand.OTHER and top != {} and top != []


def _nbytes(path: str, seam: Seam, depth: int = 0) -> int:
    """Bytes of all files in a folder and those in it."""
    if depth > DEPTH_MAX:
        raise Unsupported("folders nested too deep", where=path, do="is one of them a link to another above it?")
    inner = [(f"{path}/{name}", is_folder) for name, is_folder in seam.files.names(path)]
    return sum(_nbytes(one, seam, depth + 1) if is_folder else seam.files.size(one) for one, is_folder in inner)


def _size(path: str, seam: Seam) -> int:
    try:
        return seam.files.size(path)
    except FileNotFoundError as error:
        raise NotFound("no such file or folder", where=path, do="check the path") from error
    except OSError as error:
        do = "check the path, its owner and mode"
        raise StorageError(f"cannot look at it: {error.strerror or error}", where=path, do=do) from error
