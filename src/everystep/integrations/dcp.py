"""torch.distributed.checkpoint: a StorageWriter and a StorageReader whose storage is a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import everystep

try:
    import ml_dtypes
    import torch
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner
    from torch.distributed.checkpoint.planner import WriteItemType as Kind
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
    from torch.futures import Future
except ImportError as error:
    raise everystep.Unsupported("torch is not installed here", do='pip install "everystep[torch]"') from error

TABLE = "dcp"
"""Beside the state: of each of DCP's names, the keys that lead to it, its element type ("" for bytes), its shape."""
READ_BYTES = 1 << 28
"""So much is read at once."""


class EverystepWriter(StorageWriter):
    """`dcp.save(state_dict, storage_writer=EverystepWriter(run, step))`: one checkpoint, of all ranks or not at all.

    The checkpoint holds the state dict as it is nested, tensors as leaves at global coordinates: whatever else reads
    the run reads it. What is no tensor comes from DCP as bytes that it pickled, and is kept as such.

    Args:
        run: each rank opens its own, with the same launch id; see `Repository.run`.
        step: completed updates.
        metrics: of exactly this step.
    """

    def __init__(self, run: everystep.Run, step: int, *, metrics: dict[str, Any] | None = None) -> None:
        self.run, self.step, self.metrics = run, step, metrics
        self.saved: everystep.Saved | None = None
        """The last save; `dcp.save` has waited for it on the coordinator."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """A new save; a `checkpoint_id` is its step."""
        if checkpoint_id is not None:
            self.step = int(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Saves this rank's part; what it was given may change once this returns."""
        state: dict[Any, Any] = {}
        table: dict[str, Any] = {}
        results = []
        for item in plan.items:
            name = item.index.fqn
            keys = (plan.planner_data or {}).get(name, (name,))
            if name in table:
                raise everystep.Unsupported(f"several pieces of {name} on one rank", do="one shard of a tensor a rank")
            data: Any = planner.resolve_data(item)
            if item.type == Kind.BYTE_IO:
                value: Any = data.getvalue()
                table[name] = [list(keys), "", []]
            else:
                tensor = data.detach()
                about: Any = item.tensor_data
                whole = item.type == Kind.TENSOR or about.chunk.sizes == about.size
                value = tensor if whole else everystep.Part(_array(tensor), tuple(about.chunk.offsets), about.size)
                table[name] = [list(keys), str(tensor.dtype).removeprefix("torch."), list(about.size)]
            _put(state, keys, value)
            results.append(WriteResult(item.index, _bytes_of(value), None))
        if TABLE in state:
            raise everystep.Unsupported(f"the name {TABLE!r} is taken by everystep", do="give that entry another name")
        state[TABLE] = table
        self.saved = self.run.save(self.step, state=state, metrics=self.metrics, reason="dcp.save")
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on the coordinator once all ranks have handed their part over: waits until it is durable."""
        if self.saved is not None:
            self.saved.wait()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return str(checkpoint_id).isdigit()


class EverystepReader(StorageReader):
    """`dcp.load(state_dict, storage_reader=EverystepReader(run))`: into whatever sharding the state dict has.

    Args:
        source: a run (`repo["name"]`), or one checkpoint.
        step: of the run; its newest checkpoint by default.
    """

    def __init__(self, source: everystep.PastRun | everystep.Checkpoint, step: int | None = None) -> None:
        self._source = source
        self._spec = "latest" if step is None else str(step)
        self._checkpoint: everystep.Checkpoint | None = None
        self._table: dict[str, Any] = {}
        self._base: tuple[str, ...] = ()

    def reset(self, checkpoint_id: Any = None) -> None:
        """A new load; a `checkpoint_id` is a step, "latest", "best:val_loss" or a tag."""
        self._checkpoint = None
        if checkpoint_id is not None:
            self._spec = str(checkpoint_id)

    @property
    def checkpoint(self) -> everystep.Checkpoint:
        """What is read."""
        if self._checkpoint is None:
            found = self._source
            self._checkpoint = found if isinstance(found, everystep.Checkpoint) else found.find(self._spec)
        return self._checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What there is: every tensor as one piece, whatever the ranks that saved it."""
        try:
            self._base, self._table = (), self._load([(TABLE,)])[0]
        except everystep.NotFound:
            self._base = ("state",)  # of a run that tracks objects, too
            self._table = self._load([(TABLE,)])[0]
        found: dict[str, Any] = {}
        for name, (_, dtype, shape) in self._table.items():
            if dtype:
                chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
                properties = TensorProperties(_dtype(dtype))
                found[name] = TensorStorageMetadata(properties, torch.Size(shape), [chunk])
            else:
                found[name] = BytesStorageMetadata()
        return Metadata(found, planner_data={name: tuple(keys) for name, (keys, *_) in self._table.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills what the planner asks for; every byte is verified. Only DCP's own planner unpickles what it pickled."""
        wanted: dict[str, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index.fqn, []).append(item)
        for names in self._batches(list(wanted)):
            for name, value in zip(names, self._load([self._table[name][0] for name in names])):
                for item in wanted[name]:
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, _Bytes(value))  # type: ignore[arg-type]
                        continue
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_cut(value, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        return _done(None)

    def _batches(self, names: list[str]) -> Iterator[list[str]]:
        """Names whose leaves are read together."""
        batch: list[str] = []
        held = 0
        for name in names:
            _, dtype, shape = self._table[name]
            size = math.prod(shape) * _dtype(dtype).itemsize if dtype else 0
            if batch and held + size > READ_BYTES:
                yield batch
                batch, held = [], 0
            batch, held = [*batch, name], held + size
        if batch:
            yield batch

    def _load(self, paths: Sequence[Sequence[Any]]) -> list[Any]:
        """What lies under these keys of the state dict."""
        texts = [everystep.path_to(*self._base, *keys) for keys in paths]
        found = self.checkpoint.load(only=texts, like="torch")
        return [found[text] for text in texts]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, (str, int))


class _Bytes:
    """Bytes as the file that torch.load reads."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def read(self, size: int | None = -1) -> bytes:
        stop = len(self._data) if size is None or size < 0 else self._at + size
        found = bytes(self._data[self._at : stop])
        self._at += len(found)
        return found

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        found = self._data[self._at : self._at + len(view)]
        view[: len(found)] = found
        self._at += len(found)
        return len(found)

    def readline(self) -> bytes:
        found = self.read().partition(b"\n")
        line = found[0] + found[1]
        self._at += len(line) - sum(map(len, found))
        return line

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._data))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True


def _put(state: dict[Any, Any], keys: Sequence[Any], value: Any) -> None:
    """Lists of the state dict become dicts by their index."""
    for key in keys[:-1]:
        state = state.setdefault(key, {})
    state[keys[-1]] = value


def _array(tensor: torch.Tensor) -> Any:
    """A shard as an array; of types that NumPy lacks, through their bits."""
    tensor = tensor.cpu().contiguous()
    kind = getattr(ml_dtypes, str(tensor.dtype).removeprefix("torch."), None)
    if kind is None:
        return tensor.numpy()
    words = {1: torch.uint8, 2: torch.int16}[tensor.dtype.itemsize]
    return tensor.view(words).numpy().view(kind)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise everystep.Damaged(f"torch has no dtype {name!r}", do="was it saved by a newer torch?")
    return found


def _cut(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(offsets, lengths)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _bytes_of(value: Any) -> int:
    if isinstance(value, bytes):
        return len(value)
    return int(value.array.nbytes if isinstance(value, everystep.Part) else value.nbytes)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
