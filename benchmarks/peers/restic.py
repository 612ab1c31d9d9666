"""restic over a folder of files: chunks cut by content, each stored once, zstd at its strongest."""

from __future__ import annotations

import os
import shutil
import subprocess

from benchmarks import timing


class Restic:
    name = "restic"
    missing = "restic is not installed: apt-get install restic"

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._call("init")

    @staticmethod
    def there() -> bool:
        return shutil.which("restic") is not None

    def add(self, files: str) -> None:
        """Backs a folder up; what an earlier backup holds is not stored again."""
        self._call("backup", "--compression", "max", ".", at=files)

    def nbytes(self) -> int:
        return timing.folder_bytes(self._folder)

    def _call(self, *arguments: str, at: str | None = None) -> None:
        environment = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": self._folder}
        subprocess.run(["restic", "--quiet", "--no-cache", *arguments], cwd=at, env=environment, check=True)
