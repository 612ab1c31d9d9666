"""restic over each checkpoint as one file: chunks cut by content, each stored once, under zstd."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.peers import Flat, Peer, State


class Restic(Peer):
    name = "restic"
    needs = ("!restic=apt-get install restic",)
    where = frozenset({"blocking", "restore", "whole"})
    keeps_all = True
    level = "auto"

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        self._flat = Flat(state)
        self._repository, self._files = os.path.join(folder, "repository"), os.path.join(folder, "files")
        os.mkdir(self._files)
        self._call("init")

    def save(self, step: int) -> None:
        self.step = step
        self._flat.write(os.path.join(self._files, "state"))
        self._call("backup", "--compression", self.level, "--tag", str(step), ".")

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        with timing.scratch(self.folder) as out:
            tag = str(self.step if step is None else step)
            self._call("restore", "latest", "--tag", tag, "--target", out)
            found = [os.path.join(path, name) for path, _, names in os.walk(out) for name in names]
            return self._flat.state(np.fromfile(found[0], np.uint8))

    def stored(self) -> int:
        return timing.folder_bytes(self._repository)

    def _call(self, *arguments: str) -> None:
        """The password is restic's wish; the repository holds nothing that is secret."""
        environment = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": self._repository}
        command = ["restic", "--quiet", "--no-cache", *arguments]
        subprocess.run(command, cwd=self._files, env=environment, check=True, stdout=subprocess.DEVNULL)


class ResticMax(Restic):
    name = "restic, max"
    where = frozenset()  # a percent smaller, several times as slow: only where it is asked for
    level = "max"


PEERS = (Restic, ResticMax)
