"""For the tests of JAX over several devices or processes: programs of their own, started and waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(program: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name(program)), *map(str, words)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(*processes: subprocess.Popen[str]) -> None:
    """Waits for all; of those that failed, shows what they said."""
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), "\n".join(said)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
