"""A network of two: this process, and programs in a namespace that can be cut off. As root, with iproute2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


class Network:
    """`enter` is what a command is started with; packets are dropped in both directions between `cut` and `mend`."""

    def __init__(self, number: int) -> None:
        self._name, self._here, self._there = f"everystep-{number}", f"es{number}a", f"es{number}b"
        subnet = f"10.213.{number % 200}"
        self.host, self._other = f"{subnet}.1", f"{subnet}.2"
        self.enter = ["ip", "netns", "exec", self._name]

    def make(self) -> None:
        self._ip("netns", "add", self._name)
        self._ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self._name)
        self._ip("addr", "add", f"{self.host}/24", "dev", self._here)
        self._ip("link", "set", self._here, "up")
        self._ip("-n", self._name, "addr", "add", f"{self._other}/24", "dev", self._there)
        self._ip("-n", self._name, "link", "set", self._there, "up")
        self._ip("-n", self._name, "link", "set", "lo", "up")

    def cut(self) -> None:
        self._ip("link", "set", self._here, "down")

    def mend(self) -> None:
        self._ip("link", "set", self._here, "up")

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self._name], check=False)  # and the pair of links with it
        subprocess.run(["ip", "link", "del", self._here], check=False, capture_output=True)

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}; this needs root and iproute2")


@contextmanager
def network() -> Iterator[Network]:
    made = Network(os.getpid() % 50_000)
    try:
        made.make()
        yield made
    finally:
        made.remove()
