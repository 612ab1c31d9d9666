"""The contestants: one file each, all with the same verbs. A new file in this folder takes part in every benchmark.

Such a file names its classes in `PEERS`. What it needs (packages, programs) is imported when one is made, and named in
`needs`, so that a peer that is not installed is reported, and the others go on.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from benchmarks import timing

State = Mapping[str, Mapping[str, torch.Tensor]]
"""Parts such as model and optimizer, each with its tensors by name."""
Array = np.ndarray[Any, Any]
BENCHMARKS = frozenset({"blocking", "training", "restore", "whole", "link"})


class Peer:
    """One way to keep checkpoints of a state that lies in the same memory at every save.

    A peer whose arrays are of another framework makes them once, from the memory that it is handed. Checkpoints of
    earlier steps stay until `clear`.
    """

    name = ""
    needs: tuple[str, ...] = ()
    """Packages and programs, each as "package", "package=how to get it" or "!program=how to get it"."""
    where: frozenset[str] = BENCHMARKS
    """The benchmarks that it takes part in unless others are asked for."""
    refers = False
    """Holds on to the arrays until `finish`, since its framework never changes one in place."""
    hungry = False
    """Keeps and takes more memory than a large state leaves to it."""
    kept, most = 0.0, 1.5
    """About how much memory it keeps between two saves, and takes for one, in times of the state."""
    syncs = True
    """Makes a checkpoint durable by itself, or says in its name that fsync comes on top."""
    keeps_all = False
    """A checkpoint may need the ones before it, so that `clear` leaves them."""
    plain = False
    """Every checkpoint takes about as much, so that how many bytes n of them take is told by one history."""
    exact = True
    floor = False
    """No saver, but what a save is measured against."""

    def __init__(self, state: State, folder: str) -> None:
        self.state, self.folder, self.step = state, folder, -1

    @classmethod
    def missing(cls) -> str | None:
        """What is not installed, and how to get it."""
        for need in cls.needs:
            what, _, how = need.partition("=")
            there = shutil.which(what[1:]) if what.startswith("!") else find_spec(what)
            if there is None:
                return f"{what.lstrip('!')} is not installed: {how or f'pip install {what}'}"
        return None

    def wake(self) -> None:
        """Makes buffers that a save needs, with their pages; no part of any time."""

    def rest(self) -> None:
        """Frees them: the other contestants want the memory of a large state."""

    def save(self, step: int) -> None:
        """Until the training may change the state again."""
        raise NotImplementedError

    def finish(self) -> None:
        """Until that checkpoint is durable: data and folder synced, by the peer or, where it does not, here."""
        sync(self.folder)

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        """A whole checkpoint, the last if no step is given, in fresh memory; arrays by part and name."""
        raise NotImplementedError

    def clear(self) -> None:
        """Deletes what it has kept, unless a later checkpoint needs that."""
        if not self.keeps_all:
            empty(self.folder)

    def stored(self) -> int:
        """Bytes on disk."""
        return timing.folder_bytes(self.folder)

    def full(self, step: int) -> bool:
        """Whether the checkpoint of that step is meant to be whole; weights always are."""
        return True

    def close(self) -> None:
        """Frees threads, processes and memory."""

    def path(self, step: int | None) -> str:
        """Where the checkpoint of a step lies, for peers with one file or folder for each."""
        return os.path.join(self.folder, f"{self.step if step is None else step:05}")


# files ---------------------------------------------------------------------------------------------------------------


def sync(path: str) -> None:
    """fsync of a file, or of a folder and all in it."""
    if os.path.isdir(path):
        for entry in os.scandir(path):
            sync(entry.path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def empty(folder: str) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


# arrays --------------------------------------------------------------------------------------------------------------


def flat_names(state: State) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}


def nested(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `flat_names`."""
    out: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        part, _, rest = name.partition(".")
        out.setdefault(part, {})[rest] = value
    return out


def bytes_of(value: Any) -> Array:
    """The bytes of an array of any framework, flat, without a copy where it lies in one piece."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().view(-1)
        return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy().view(np.uint8)
    return np.ascontiguousarray(np.asarray(value)).reshape(-1).view(np.uint8)


def touch(loaded: Mapping[str, Mapping[str, Any]]) -> int:
    """Reads every byte of what was loaded: what is only mapped, or promised, has to come now."""
    total = 0
    for values in loaded.values():
        for value in values.values():
            data = bytes_of(value)
            words = data[: data.size - data.size % 8].view(np.uint64)
            total += int(words.sum(dtype=np.uint64)) + int(data[words.nbytes :].sum())
    return total


class Flat:
    """A state as one row of bytes, tensor after tensor, in a buffer that is kept."""

    def __init__(self, state: State) -> None:
        self._sources = flat_names(state)
        self._ends = np.cumsum([value.nbytes for value in self._sources.values()]).tolist()
        self.dtype = max(self._sources.values(), key=lambda value: value.nbytes).dtype
        self.nbytes = self._ends[-1]
        self.buffer: Array | None = None

    def make(self) -> Array:
        """A buffer, its pages there already."""
        return np.frombuffer(bytearray(b"\1") * self.nbytes, np.uint8)

    def wake(self) -> None:
        if self.buffer is None:
            self.buffer = self.make()

    def rest(self) -> None:
        self.buffer = None

    def fill(self) -> Array:
        """The buffer, with the state's bytes."""
        self.wake()
        assert self.buffer is not None
        for part, value in zip(self.split(self.buffer), self._sources.values()):
            part[:] = bytes_of(value)
        return self.buffer

    def write(self, path: str) -> None:
        """As a file."""
        with open(path, "wb") as file:
            for value in self._sources.values():
                file.write(memoryview(bytes_of(value)))

    def split(self, data: Array) -> Iterator[Array]:
        """The bytes of each tensor."""
        start = 0
        for end in self._ends:
            yield data[start:end]
            start = end

    def state(self, data: Array) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors in the memory of `data`."""
        parts = zip(self._sources.items(), self.split(data))
        return nested(
            {name: torch.from_numpy(part).view(value.dtype).view(value.shape) for (name, value), part in parts}
        )


class Coded(Peer):
    """One file of coded bytes for each checkpoint; where `leans`, against the checkpoint before, back to the first."""

    syncs = False
    leans = False

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        self.flat = Flat(state)
        self._base = self.flat.make() if self.leans else None
        self._steps: list[int] = []
        self.keeps_all = self.leans

    def wake(self) -> None:
        self.flat.wake()

    def rest(self) -> None:
        self.flat.rest()

    def encode(self, data: Array, base: Array | None) -> Iterable[Any]:
        """Pieces of bytes for flat uint8, which may be spoiled unless the peer leans; base None for the first."""
        raise NotImplementedError

    def decode(self, stored: bytes, base: Array | None) -> Array:
        """Flat uint8 in fresh memory that can be written to."""
        raise NotImplementedError

    def save(self, step: int) -> None:
        self.step = step
        data = self.flat.fill()
        with open(self.path(step), "wb") as file:
            for piece in self.encode(data, self._base if self._steps else None):
                file.write(piece)
        if self._base is not None:
            self.flat.buffer, self._base = self._base, data
        self._steps.append(step)

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        step = self.step if step is None else step
        data: Array | None = None
        for each in self._steps[: self._steps.index(step) + 1] if self.leans else [step]:
            with open(self.path(each), "rb") as file:
                data = self.decode(file.read(), data)
        assert data is not None
        return self.flat.state(data)


# the list ------------------------------------------------------------------------------------------------------------


def all_peers() -> Iterator[type[Peer]]:
    """Every class that a file of this folder names, ours first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    for name in sorted(names, key=lambda name: name != "everystep"):
        yield from importlib.import_module(f"{__name__}.{name}").PEERS


def remarks(names: Iterable[str]) -> list[str]:
    """What has to be known of some contestants, to read a table."""
    shown = [peer for peer in all_peers() if peer.name in set(names)]
    unsynced = [peer.name for peer in shown if not peer.syncs]
    refer = [peer.name for peer in shown if peer.refers]
    out = [f"do not sync all that they write, so that this is done for them: {'; '.join(unsynced)}"] if unsynced else []
    if refer:
        out.append(
            f"refer to the arrays until all is written, since their frameworks change none in place, where the others "
            f"copy: {'; '.join(refer)}"
        )
    return out


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def choose(asked: str | None, benchmark: str, always: Iterable[str] = ()) -> tuple[list[type[Peer]], dict[str, str]]:
    """(the contestants of a benchmark, those of them that are not installed and why).

    Args:
        asked: names of files or of peers ("dcp,torch-save-fsync"), None for all that take part in the benchmark.
        always: slugs of those that the others are compared with.

    Raises:
        SystemExit: for a name that is not known.
    """
    found, missing = [], {}
    wanted = None if asked is None else {each.strip() for each in asked.split(",") if each.strip()}
    seen: set[str] = set()
    for peer in all_peers():
        names = {slug(peer.name), peer.__module__.rpartition(".")[2]}
        if wanted is not None and names & wanted:
            seen |= names & wanted
        elif slug(peer.name) not in always and (wanted is not None or benchmark not in peer.where):
            continue
        reason = peer.missing()
        if reason is None:
            found.append(peer)
        else:
            missing[peer.name] = reason
            timing.say(f"{peer.name} is left out: {reason}")
    if wanted is not None and wanted - seen - {"none"}:
        known = ", ".join(slug(peer.name) for peer in all_peers())
        raise SystemExit(f"not known: {', '.join(sorted(wanted - seen))}; there are {known}")
    return found, missing
