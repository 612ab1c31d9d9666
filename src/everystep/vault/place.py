"""A repository's place: its format file, its identity, what is known of its store, its runs."""

from __future__ import annotations

from typing import Any

import msgspec

from everystep.errors import (
    Damaged,
    ForeignRepository,
    NewerFormat,
    ObjectMissing,
    ReadOnly,
    StorageError,
    UnsafeStore,
)
from everystep.seam import Seam
from everystep.settings import FORMAT, VERSION, Settings
from everystep.storage.alone import AloneStorage
from everystep.storage.probe import Finding, is_probe, probe
from everystep.vault.lines import pack_lines, unpack_lines
from everystep.vault.names import FORMAT_KEY, MIRROR_KEY, PLACE_KEY, is_run_folder, record_slot, run_name
from everystep.vault.once import put_once


class _Format(msgspec.Struct, frozen=True):
    format: str
    version: int
    features: list[str]
    id: str


class _Known(msgspec.Struct, frozen=True):
    """place.json: what a probe found, of which place."""

    format: str
    place: str
    finding: Finding
    time: float
    version: str


class Mirror(msgspec.Struct, frozen=True):
    """mirror.json: this place is a copy of the repository with this id, and nobody writes here but who mirrors it."""

    format: str
    id: str


class Place:
    """A storage that holds a repository, or will with the first save."""

    def __init__(self, storage: Any, seam: Seam, settings: Settings) -> None:
        self.storage, self.seam, self.settings = storage, seam, settings
        self.finding: Finding | None = None
        """What is known of the store; None before somebody has written here."""
        self._bare = storage
        self._kept: _Known | None = None
        self._replace = False
        self._probed = False
        self._is_mirror: bool | None = None
        self._id = self._read()

    @property
    def exists(self) -> bool:
        """Whether there is a repository by now."""
        if self._id is None:
            self._id = self._read()
        return self._id is not None

    def identity(self) -> str:
        """The repository's id; creates the repository if there is none."""
        if not self.exists:
            if self.finding is None:
                self._probe()
            body = pack_lines(_Format("everystep", FORMAT, [], self.seam.token(16)))
            put_once(self.storage, FORMAT_KEY, body, self.seam, self.settings)
            self._id = self._read()  # somebody else may have made it: what lies there now is the truth
            self._keep()
        if self._id is None:
            raise Damaged("the repository's format file vanished while it was made", where=self.storage.url)
        return self._id

    def prepare(self) -> None:
        """To be called before the first write: there is a repository afterwards, and it is known what the store does
        with several writers. A store that did not keep them apart is tried again: it may have been mended."""
        self.refuse_mirror()
        if self.finding is None or not self.finding.safe:
            self._probe()
        self.identity()
        self._keep()

    def look(self) -> None:
        """Reads what others have found out of the store, unless that is known."""
        if self.finding is None and self.exists:
            self._recall()

    def refuse_several(self, who: str) -> None:
        """
        Args:
            who: would write beside another.

        Raises:
            UnsafeStore: if the store is known not to keep several writers apart.
        """
        if self.finding is not None and not self.finding.safe:
            raise UnsafeStore(
                f"{who}, and this store does not keep several writers apart: {self.finding.why}",
                where=str(self.storage.url),
                do="take a store with a create-only put (see: everystep storage check URL); here one process may "
                "write, with no other beside it. To go on from a run whose owner may live, give a new run its state: "
                'repo.run("new").start_from("old@latest")',
            )

    @property
    def is_mirror(self) -> bool:
        """Whether it is a copy that only who mirrors the original writes."""
        if self._is_mirror is None:
            self._is_mirror = read_mirror(self.storage) is not None
        return self._is_mirror

    def refuse_mirror(self) -> None:
        """
        Raises:
            ReadOnly: if it is one.
        """
        if self.is_mirror:
            raise ReadOnly(
                "this is the mirror of another repository, and only `mirror` writes here",
                where=str(self.storage.url),
                do="write to the original, or pull what you need into a repository of your own; if the original is "
                "gone, promote() makes this one a repository that can be written: everystep mirror --promote",
            )

    def promote(self) -> None:
        """Makes a mirror a repository that can be written."""
        self.storage.delete(MIRROR_KEY)
        self._is_mirror = None

    def cautions(self) -> list[str]:
        """What who writes here, alone, has to know of the store."""
        if self.finding is None or self.finding.safe:
            return []
        return [
            f"this store does not keep several writers apart: {self.finding.why}. One process may write here; a second "
            "one beside it would overwrite its records, and nobody would notice"
        ]

    def sweep(self) -> None:
        """Removes what probes left behind that were killed, or that might not delete."""
        for key in list(self.storage.list("", deep=False)):
            if is_probe(key):
                self.storage.delete(key)

    def _probe(self) -> None:
        """At most once in a process."""
        if self._probed:
            return
        self._use(probe(self._bare, self.seam, self.settings))
        self._probed = True

    def _use(self, finding: Finding) -> None:
        self.finding = finding
        self.storage = self._bare if finding.safe else AloneStorage(self._bare)

    def _recall(self) -> None:
        """What place.json says, if it is about this place."""
        try:
            found = unpack_lines(self.storage.get(PLACE_KEY), _Known, f"{self.storage.url}/{PLACE_KEY}")
        except ObjectMissing:
            return
        except (Damaged, StorageError):  # whoever reads needs nothing of it, and whoever writes finds it out again
            self._replace = True
            return
        if found.place != self._name:
            self._replace = True
            return
        self._kept = found
        if self.finding is None or not found.finding.safe:
            self._use(found.finding)

    def _keep(self) -> None:
        """Writes place.json, unless it says so already."""
        if self.finding is None or (self._kept is not None and self._kept.finding == self.finding):
            return
        known = _Known("everystep place", self._name, self.finding, self.seam.now(), VERSION)
        if self._replace or self._kept is not None:
            try:
                self.storage.delete(PLACE_KEY)
            except StorageError:  # who may not delete finds it out again each time
                self._kept = known
                return
        put_once(self.storage, PLACE_KEY, pack_lines(known), self.seam, self.settings)
        self._kept, self._replace = known, False

    @property
    def _name(self) -> str:
        """The store's identity: no credential, and another one for a copy elsewhere."""
        name = str(getattr(self._bare, "identity", self._bare.url))
        return name.encode("utf-8", "backslashreplace").decode()  # a folder's name need not be text

    def runs(self) -> list[str]:
        """Names of all runs."""
        return [run_name(key) for key in self.storage.list("runs/", deep=False) if is_run_folder(key)]

    def _read(self, *, again: bool = False) -> str | None:
        where = f"{self.storage.url}/{FORMAT_KEY}"
        try:
            data = self.storage.get(FORMAT_KEY)
        except ObjectMissing:
            if not self._refuse_foreign(again=again):
                return None
            return self._read(again=True)
        if bytes(data[:1]) == b"<":
            what = "a page of the web is there, and no repository: perhaps what answers is no store"
            raise ForeignRepository(what, where=where, do="check the URL, and the endpoint: its host and port")
        found = unpack_lines(data, _Format, where)
        if found.format != "everystep":
            raise ForeignRepository("this is not an everystep repository", where=where, do="give another folder")
        if found.version > FORMAT or found.features:
            raise NewerFormat(
                f"written in format {found.version} {found.features or ''}; this everystep reads up to {FORMAT}",
                where=where,
                do="update everystep: pip install -U everystep",
            )
        if self._kept is None:
            self._recall()
        return found.id

    def _has_records(self) -> bool:
        """Whether there is a run of ours: others, too, keep what they write in a folder "runs"."""
        for run in self.storage.list("runs/", deep=False):
            for key in self.storage.list(f"{run}log/", deep=False) if run.endswith("/") else ():
                if record_slot(key.rpartition("/")[2]) is not None:
                    return True
        return False

    def _refuse_foreign(self, *, again: bool) -> bool:
        """Whether a repository has appeared since its format file was looked for. `again`: then it must be there."""
        inside = [key for key in self.storage.list("", deep=False) if not is_probe(key)]
        if not inside or (FORMAT_KEY in inside and not again):
            return bool(inside)
        if "runs/" in inside and self._has_records():
            raise Damaged(
                "the repository has lost its format.json",
                where=self.storage.url,
                do="bring format.json back from a copy of this repository",
            )
        raise ForeignRepository(
            f"the folder holds other things ({', '.join(inside[:3])}) and no everystep repository",
            where=self.storage.url,
            do="give an empty or new folder",
        )


def read_mirror(storage: Any) -> Mirror | None:
    """What a place is the mirror of; None if it is none."""
    try:
        return unpack_lines(storage.get(MIRROR_KEY), Mirror, f"{storage.url}/{MIRROR_KEY}")
    except ObjectMissing:
        return None
