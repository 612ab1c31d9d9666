"""What a process and its children use: processor seconds and memory. Linux only."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SAMPLE_SECONDS = 0.02


def burnt() -> float:
    """Processor seconds of this process, of children that ended, and of those that live."""
    ended = os.times()
    total = ended.user + ended.system + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that were resident within it, here and, beside what is shared, in children.

    The kernel keeps the peak of a process that lives; a thread looks at those that come and go.
    """
    trim()  # what is free already is no part of it
    for pid in [os.getpid(), *_children()]:
        with open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")
    lasting, found, done, most = set(_children()), [0], threading.Event(), [0]

    def look() -> None:
        while not done.wait(SAMPLE_SECONDS):
            most[0] = max(most[0], sum(_status(pid, "RssAnon") for pid in _children() if pid not in lasting))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield found
    done.set()
    thread.join()
    found[0] = _status(os.getpid(), "VmHWM") + most[0]
    for pid in lasting:
        found[0] += _status(pid, "VmHWM") - _status(pid, "RssShmem") - _status(pid, "RssFile")


def trim() -> None:
    """Gives freed memory back."""
    ctypes.CDLL(None).malloc_trim(0)


def first_to_go() -> None:
    """Should memory run out, this process ends, and no other."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("900")


def _children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def resident() -> int:
    return _status(os.getpid(), "VmRSS")


def _status(pid: int, key: str) -> int:
    """Of a process that is gone: 0."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:")), 0)
    except OSError:
        return 0
