"""borg over each checkpoint as one file: chunks cut by content, each stored once, under zstd."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.peers import Flat, Peer, State


class Borg(Peer):
    name = "borg"
    needs = ("!borg=apt-get install borgbackup",)
    where = frozenset({"blocking", "restore", "whole"})
    keeps_all = True

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        self._flat = Flat(state)
        self._repository, self._files = os.path.join(folder, "repository"), os.path.join(folder, "files")
        os.mkdir(self._files)
        self._call("init", "--encryption", "none", self._repository)

    def save(self, step: int) -> None:
        self.step = step
        self._flat.write(os.path.join(self._files, "state"))
        self._call("create", "--compression", "zstd,3", f"{self._repository}::{step}", "state")

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        with timing.scratch(self.folder) as out:
            self._call("extract", f"{self._repository}::{self.step if step is None else step}", at=out)
            return self._flat.state(np.fromfile(os.path.join(out, "state"), np.uint8))

    def stored(self) -> int:
        return timing.folder_bytes(self._repository)

    def _call(self, *arguments: str, at: str | None = None) -> None:
        """Its cache, keys and answers to its questions stay in a folder of their own."""
        environment = {
            **os.environ,
            "BORG_BASE_DIR": os.path.join(self.folder, "home"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        subprocess.run(["borg", *arguments], cwd=at or self._files, env=environment, check=True)


PEERS = (Borg,)
