"""A repository's place: its format file, its identity, its runs."""

from __future__ import annotations

from typing import Any

import msgspec

from everystep.errors import Damaged, ForeignRepository, NewerFormat, ObjectMissing
from everystep.seam import Seam
from everystep.settings import FORMAT, Settings
from everystep.vault.lines import pack_lines, unpack_lines
from everystep.vault.names import FORMAT_KEY, is_run_folder, record_slot, run_name
from everystep.vault.once import put_once


class _Format(msgspec.Struct, frozen=True):
    format: str
    version: int
    features: list[str]
    id: str


class Place:
    """A storage that holds a repository, or will with the first save."""

    def __init__(self, storage: Any, seam: Seam, settings: Settings) -> None:
        self.storage, self.seam, self.settings = storage, seam, settings
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
            body = pack_lines(_Format("everystep", FORMAT, [], self.seam.token(16)))
            put_once(self.storage, FORMAT_KEY, body, self.seam, self.settings)
            self._id = self._read()  # somebody else may have made it: what lies there now is the truth
        if self._id is None:
            raise Damaged("the repository's format file vanished while it was made", where=self.storage.url)
        return self._id

    def runs(self) -> list[str]:
        """Names of all runs."""
        return [run_name(key) for key in self.storage.list("runs/", deep=False) if is_run_folder(key)]

    def _read(self) -> str | None:
        where = f"{self.storage.url}/{FORMAT_KEY}"
        try:
            data = self.storage.get(FORMAT_KEY)
        except ObjectMissing:
            self._refuse_foreign()
            return None
        found = unpack_lines(data, _Format, where)
        if found.format != "everystep":
            raise ForeignRepository("this is not an everystep repository", where=where, do="give another folder")
        if found.version > FORMAT or found.features:
            raise NewerFormat(
                f"written in format {found.version} {found.features or ''}; this everystep reads up to {FORMAT}",
                where=where,
                do="update everystep: pip install -U everystep",
            )
        return found.id

    def _has_records(self) -> bool:
        """Whether there is a run of ours: others, too, keep what they write in a folder "runs"."""
        for run in self.storage.list("runs/", deep=False):
            for key in self.storage.list(f"{run}log/", deep=False) if run.endswith("/") else ():
                if record_slot(key.rpartition("/")[2]) is not None:
                    return True
        return False

    def _refuse_foreign(self) -> None:
        inside = list(self.storage.list("", deep=False))
        if not inside:
            return
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
