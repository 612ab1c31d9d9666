"""What is saved: real checkpoints shown one after the other in the same memory, or a training that goes on."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import sequences
from benchmarks.peers import State, bytes_of, nested
from benchmarks.sequences import WEIGHTS, Array, Sequence
from everystep.schema.dtype import name_of, parse

ALIGNED = 64  # bytes: at such addresses every framework takes memory over without a copy
GROUPS, STACKED_MIN = 2, 8


@dataclass(frozen=True)
class Place:
    """Where a tensor of a state lies in its memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """Memory that other processes of this machine can map, and what lies where in it. Linux only."""

    pid: int
    fd: int
    size: int
    places: tuple[Place, ...]

    @staticmethod
    def make(shapes: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]) -> Memory:
        """
        Args:
            shapes: name ("model.embed.weight") -> (dtype, shape).
        """
        places, offset = [], 0
        for name, (dtype, shape) in shapes.items():
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            places.append(Place(name, name_of(dtype), shape, offset, nbytes))
            offset += -(-max(nbytes, 1) // ALIGNED) * ALIGNED
        fd = os.memfd_create("everystep-bench")
        os.ftruncate(fd, offset)
        return Memory(os.getpid(), fd, offset, tuple(places))

    def arrays(self) -> dict[str, Array]:
        """Views of the memory by name, flat bytes."""
        fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR)
        try:
            whole = np.frombuffer(mmap.mmap(fd, self.size), np.uint8)
        finally:
            os.close(fd)
        return {place.name: whole[place.offset : place.offset + place.nbytes] for place in self.places}

    def state(self) -> State:
        """Tensors in that memory, each with a storage of its own."""
        found = self.arrays()
        return nested({place.name: tensor_of(found[place.name], place.dtype, place.shape) for place in self.places})


def tensor_of(data: Array, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in the memory of flat bytes."""
    if dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).view(shape)
    return torch.from_numpy(data.view(parse(dtype)).reshape(shape))


class Replay:
    """A state that becomes one checkpoint of a sequence after the other, in place.

    A larger state is made of several copies, each multiplied with a number of its own: values and changes of real
    trainings, and no two pieces with the same bytes.
    """

    def __init__(self, sequence: Sequence, *, mb: float = 0.0, names: list[str] | None = None) -> None:
        self._sequence = sequence
        first = sequence[0]
        self._names = list(first) if names is None else names
        nbytes = sum(first[name].nbytes for name in self._names)
        self._copies = max(1, round(mb * 1e6 / nbytes))
        self._groups = GROUPS if self._copies >= STACKED_MIN else 1
        shapes = {}
        for group in range(self._groups):
            stacked = len(range(group, self._copies, self._groups))
            for name in self._names:
                value = first[name]
                shape = (stacked, *value.shape) if self._copies > 1 else value.shape
                shapes[self._path(name, group)] = value.dtype, shape
        self.memory = Memory.make(shapes)
        self._arrays = self.memory.arrays()
        self.nbytes = sum(place.nbytes for place in self.memory.places)
        self.shown = -1

    def show(self, number: int) -> None:
        """Puts the checkpoint of that number into the memory."""
        checkpoint = self._sequence[number]
        for group in range(self._groups):
            for name in self._names:
                source, target = checkpoint[name], self._arrays[self._path(name, group)]
                if self._copies == 1:
                    target[:] = bytes_of(source)
                    continue
                into = target.view(source.dtype).reshape(-1, *source.shape)
                for index, copy in enumerate(range(group, self._copies, self._groups)):
                    np.multiply(source, source.dtype.type(1 + copy / 64), out=into[index])
        self.shown = number

    def next(self) -> None:
        """One checkpoint on; after the last, backwards, and so on."""
        last = len(self._sequence) - 1
        at = (self.shown + 1) % (2 * last) if last else 0
        self.show(at if at <= last else 2 * last - at)
        self.shown = at

    def close(self) -> None:
        os.close(self.memory.fd)

    def _path(self, name: str, group: int) -> str:
        part = "model" if self._sequence.roles[name] in WEIGHTS else "optimizer"
        return f"{part}.{name}" if self._groups == 1 else f"{part}.{group}.{name}"


class Training:
    """The GPT of the sequences, on a batch that makes a step take a third of a second on two cores."""

    def __init__(self, batch: int) -> None:
        torch.set_num_threads(sequences.THREADS)
        torch.manual_seed(0)
        self._model, self._optimizer, self._loss = sequences.gpt(batch)
        self.steps = 0
        self.step()  # the optimizer makes its averages at its first step

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._loss().backward()
        self._optimizer.step()
        self.steps += 1

    def state(self) -> State:
        """The tensors themselves; those of the optimizer by the names of their parameters."""
        names = {id(value): name for name, value in self._model.named_parameters()}
        averages = {
            f"{names[id(parameter)]}.{key}": value
            for parameter, entries in self._optimizer.state.items()
            for key, value in entries.items()
            if value.dim()
        }
        return {
            "model": {name: value.detach() for name, value in self._model.named_parameters()},
            "optimizer": averages,
        }

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for part in self.state().values() for value in part.values())
