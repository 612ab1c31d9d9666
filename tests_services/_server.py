"""What all servers have in common: a free port, a process that dies with this one, and words when it does not start."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 90


@dataclass
class Place:
    """Buckets that a server keeps, and how a program comes to them."""

    name: str
    scheme: str
    endpoint: str
    environment: Mapping[str, str]
    create: Callable[[str], None]
    """Makes a bucket."""
    secrets: tuple[str, ...]
    """What must not be in any message."""
    _count: int = field(default=0, repr=False)

    def new(self, prefix: str = "") -> str:
        """The URL of a bucket that nobody used before."""
        self._count += 1
        bucket = f"bucket-{self._count}"
        self.create(bucket)
        return f"{self.scheme}://{bucket}/{prefix}".rstrip("/")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, of this machine alone."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Process:
    """A server as a process of its own; the kernel ends it if this process is killed."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
        self.command, self.log = list(command), log
        if shutil.which(command[0]) is None:
            raise RuntimeError(f"{command[0]} is not installed; see CONTRIBUTING.md for what the tests here need")
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), cwd=folder,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()

    def wait_for(self, ready: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Until it answers.

        Raises:
            RuntimeError: with the end of its log, if it ends or takes too long.
        """
        until = time.monotonic() + seconds
        while not ready():
            if self.ended or time.monotonic() > until:
                tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                how = f"ended with {self._process.returncode}" if self.ended else f"did not answer within {seconds} s"
                raise RuntimeError(f"{self.command[0]} {how}:\n{tail}")
            time.sleep(0.05)


class WebServer:
    """A server that is one process, speaks HTTP at a port, and needs nothing to end well."""

    def __init__(self, command: Sequence[str], log: Path, port: int) -> None:
        self.port = port
        self.process = Process(command, log, os.environ, log.parent)
        try:
            self.process.wait_for(lambda: answers(port))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.process.kill()


def answers(port: int) -> bool:
    """Whether something speaks HTTP there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
