"""A contestant in a process of its own: what it allocates and burns is its own, and where it dies, the others go on."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import peers, timing, usage
from benchmarks.peers import Peer
from benchmarks.timing import Stopwatch
from benchmarks.work import Memory

ANSWER_SECONDS_MAX = 600.0
END_SECONDS_MAX = 20.0
LOG_BYTES = 2000
LARGE_BYTES = 1_000_000_000


class Failed(Exception):
    """What the contestant died of."""


class Apart:
    """A peer behind a pipe. Its state is the memory that the parent writes to between saves."""

    def __init__(self, peer: type[Peer], memory: Memory, folder: str, log: str = "") -> None:
        self.peer, self.name, self._log = peer, peer.name, log or f"{folder}.log"
        os.makedirs(folder)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # or each contestant would import torch for itself
        self._pipe, other = context.Pipe()
        arguments = (other, list(peers.__path__), peer.__module__, peer.__name__, memory, folder, self._log)
        self._process = context.Process(target=_serve, args=arguments, name=peer.name)
        self._process.start()
        other.close()
        self.call("ready")

    def call(self, verb: str, *arguments: Any) -> Any:
        """
        Raises:
            Failed: if it could not, or is gone.
        """
        try:
            self._pipe.send((verb, arguments))
            if not self._pipe.poll(ANSWER_SECONDS_MAX):
                raise Failed(f"no answer to {verb} within {ANSWER_SECONDS_MAX:.0f} s")
            found, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(END_SECONDS_MAX)
            self._say_log()
            raise Failed(f"its process ended in {verb} (exit code {self._process.exitcode})") from None
        if error is not None:
            self._say_log()
            raise Failed(error)
        return found

    def _say_log(self) -> None:
        with open(self._log, errors="replace") as file:
            timing.say(file.read()[-LOG_BYTES:])

    def close(self) -> None:
        if self._process.is_alive():
            try:
                self.call("close")
            except Failed as error:
                timing.say(f"{self.name} could not be closed: {error}")
            self._process.join(END_SECONDS_MAX)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def start(
    chosen: Sequence[type[Peer]], memory: Memory, folder: str, logs: str = ""
) -> tuple[dict[str, Apart], dict[str, str]]:
    """(the contestants by name, those that could not be started and why).

    Args:
        logs: a folder for what they have to say; by default beside theirs.
    """
    made, failed = {}, {}
    for peer in chosen:
        try:
            slug = peers.slug(peer.name)
            log = os.path.join(logs or folder, f"{slug}.log")
            made[peer.name] = Apart(peer, memory, os.path.join(folder, slug), log)
            timing.say(f"  {peer.name} is ready")
        except Failed as error:
            failed[peer.name] = str(error)
            timing.say(f"{peer.name} failed and is left out: {error}")
    return made, failed


# the other side ------------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, path: list[str], module: str, name: str, memory: Memory, folder: str, log: str) -> None:
    peers.__path__[:] = path
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    usage.first_to_go()
    for stream in (1, 2):
        os.dup2(fd, stream)  # what a peer has to say is shown where it fails
    answer(pipe, lambda: _Contestant(getattr(importlib.import_module(module), name), memory, folder))


def answer(pipe: Connection, make: Callable[[], Any]) -> None:
    """Does what the parent asks of an object that is made at its first question, until it is closed or the parent is
    gone."""
    made: Any = None
    while True:
        try:
            verb, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if made is None:
                made = make()
            found, error = getattr(made, verb)(*arguments), None
        except BaseException as caught:  # noqa: BLE001  told to the parent, which goes on without it
            traceback.print_exc()
            found, error = None, timing.described(caught)
        pipe.send((found, error))
        if verb == "close":
            return


class _Contestant:
    def __init__(self, peer: type[Peer], memory: Memory, folder: str) -> None:
        self._state, self._folder = memory.state(), folder
        self._nbytes = sum(place.nbytes for place in memory.places)
        peers.touch(self._state)  # so that its pages count as here already
        self._peer = peer(self._state, folder)
        self._base = usage.resident()

    def ready(self) -> None:
        """Made, that is."""

    def save(self, step: int, spare: bool = True) -> dict[str, float]:
        """Blocking, durable and processor seconds.

        Args:
            spare: leave as many free pages behind as a save takes, before.
        """
        self._peer.clear()
        self._peer.wake()
        if spare:
            timing.free_pages(os.path.dirname(self._folder), self._nbytes)
        burnt, watch = usage.burnt(), Stopwatch()
        self._peer.save(step)
        blocking = watch.seconds()
        self._peer.finish()
        durable = watch.seconds()
        found = {"blocking": blocking, "cpu": usage.burnt() - burnt}
        self._rest()
        return found if self._peer.floor else {**found, "durable": durable}

    def _rest(self) -> None:
        """Of a large state: what no peer means to keep goes back, or the contestants would not fit into memory."""
        gc.collect()  # each contestant pays for its own garbage only
        if self._nbytes > LARGE_BYTES:
            self._peer.rest()
            usage.trim()

    def keep(self, step: int) -> int:
        """Saves beside the earlier ones; the bytes that are stored then."""
        self._peer.save(step)
        self._peer.finish()
        return self._peer.stored()

    def stored(self) -> int:
        return self._peer.stored()

    def load(self, step: int | None = None) -> dict[str, float]:
        """Seconds until every byte has been looked at."""
        burnt, watch = usage.burnt(), Stopwatch()
        held = self._peer.load(step)
        peers.touch(held)
        seconds = watch.seconds()
        found = {"load": seconds, "load_cpu": usage.burnt() - burnt}
        del held
        self._rest()
        return found

    def memory(self, step: int) -> dict[str, float]:
        """The most that a save takes beside the state, kept buffers included, and a load beside what it answers."""
        self._peer.clear()
        self._peer.wake()
        with usage.peak() as save:
            self._peer.save(step)
            self._peer.finish()
        self._rest()
        before = usage.resident()
        with usage.peak() as load:
            held = self._peer.load()
            peers.touch(held)
        del held
        self._rest()
        return {
            "extra": max(0, save[0] - self._base) / self._nbytes,
            "load_extra": max(0, load[0] - before - self._nbytes) / self._nbytes,
        }

    def check(self, step: int | None = None) -> tuple[int, int]:
        """(elements with other bits than the state has now, elements); a whole checkpoint unless meant otherwise."""
        wrong = elements = 0
        loaded = self._peer.load(step)
        whole = self._peer.full(self._peer.step if step is None else step)
        for part, values in self._state.items():
            for name, value in values.items():
                if not whole and part != "model":
                    continue
                bits = f"u{value.element_size()}"
                one, other = (peers.bytes_of(each).view(bits) for each in (value, loaded[part][name]))
                wrong += int((one != other).sum()) if one.size == other.size else one.size
                elements += one.size
        del loaded, one, other
        self._rest()
        return wrong, elements

    def close(self) -> None:
        self._peer.close()
