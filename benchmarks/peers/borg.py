"""borg over a folder of files: chunks cut by content, each stored once, under zstd."""

from __future__ import annotations

import os
import shutil
import subprocess

from benchmarks import timing


class Borg:
    name = "borg"
    missing = "borg is not installed: apt-get install borgbackup"

    def __init__(self, folder: str) -> None:
        self._folder = os.path.join(folder, "repository")
        self._home = os.path.join(folder, "home")
        self._count = 0
        self._call("init", "--encryption", "none", self._folder)

    @staticmethod
    def there() -> bool:
        return shutil.which("borg") is not None

    def add(self, files: str) -> None:
        """Backs a folder up; what an earlier backup holds is not stored again."""
        self._count += 1
        self._call("create", "--compression", "zstd,3", f"{self._folder}::{self._count}", ".", at=files)

    def nbytes(self) -> int:
        return timing.folder_bytes(self._folder)

    def _call(self, *arguments: str, at: str | None = None) -> None:
        """Its cache, keys and answers to its questions stay in a folder of their own."""
        environment = {
            **os.environ,
            "BORG_BASE_DIR": self._home,
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        subprocess.run(["borg", *arguments], cwd=at, env=environment, check=True)
