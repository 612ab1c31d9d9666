"""Positions in TensorFlow's data sets: the state of an iterator, and epochs of a data set from any batch on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from everystep.adapters.loader import Apart, IterableSource, Stream
from everystep.errors import Mismatch, Unsupported

State = list[bytes]
_FAIL = 2  # tf.data.experimental.ExternalStatePolicy, as the operation numbers them
_DEPTH_MAX = 1000
_KEY = "tf.data"
_EPOCH_SEEDS = b"epoch_num_random_samples"  # as the state of a shuffle's iterator calls them


def is_iterator(value: Any) -> bool:
    return isinstance(value, tf.data.Iterator) or _inner(value) is not value


def _inner(value: Any) -> Any:
    """The iterator below one that gives NumPy arrays."""
    below = getattr(value, "_iterator", None)
    return below if isinstance(below, tf.data.Iterator) else value


def iterator_state(iterator: Any, path: str) -> State:
    """Where an iterator stands, with what it has read ahead.

    Raises:
        Unsupported: if its data set computes with state of its own that cannot be kept.
    """
    inner = _inner(iterator)
    policy = _policy(inner)
    try:
        return _serialize(inner, _FAIL if policy is None else policy)
    except tf.errors.OpError as error:
        raise Unsupported(
            f"the position of this iterator cannot be kept: {error.message}",
            where=path,
            do="use stateless operations in map() (tf.random.stateless_…) and no from_generator() or py_function(); "
            "or leave the iterator out and go through the data set with run.batches(dataset, epochs=…)",
        ) from error


def _serialize(iterator: Any, policy: int) -> State:
    parts = tf.raw_ops.SerializeIterator(resource_handle=iterator._iterator_resource, external_state_policy=policy)
    return [bytes(tf.io.serialize_tensor(part).numpy()) for part in tf.unstack(parts)]


def _policy(root: Any) -> int | None:
    """What the program says about state outside of the data set."""
    dataset = getattr(root, "_dataset", root)
    policy = dataset.options().experimental_external_state_policy if isinstance(dataset, tf.data.Dataset) else None
    return None if policy is None else int(policy.value)


def forgets(root: Any, state: State) -> bool:
    """Whether a state lacks the seeds of a shuffle's next epoch: TensorFlow keeps them with the shuffle's iterator, and
    that is gone once all has been read ahead, or not there yet behind another that reads later."""
    datasets = _datasets(getattr(_inner(root), "_dataset", root))
    shuffles = sum(bool(getattr(dataset, "_reshuffle_each_iteration", False)) for dataset in datasets)
    return sum(part.count(_EPOCH_SEEDS) for part in state) < shuffles


def is_state(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(part, bytes) for part in value)


def set_iterator(iterator: Any, state: State, path: str) -> None:
    """Puts an iterator where another one of the same data set stood.

    Raises:
        Mismatch: if it is not of the same data set.
    """
    try:
        parts = tf.stack([tf.io.parse_tensor(part, tf.variant) for part in state])
        tf.raw_ops.DeserializeIterator(resource_handle=_inner(iterator)._iterator_resource, serialized=parts)
    except tf.errors.OpError as error:
        raise Mismatch(
            f"the position does not fit this iterator: {error.message}",
            where=path,
            do="make the data set by the same steps as the program that saved it",
        ) from error


def left_out(root: Any, path: str) -> list[str]:
    """What of the order of the data no checkpoint can hold, as sentences."""
    found = []
    if _policy(root) is not None and _policy(root) != _FAIL:
        found.append(f"{path}: state of operations in its functions, which its options say to leave out")
    if any(_is_unseeded(dataset) for dataset in _datasets(getattr(root, "_dataset", root))):
        found.append(f"{path}: the seed of a shuffle() that was given none (seed=…, or tf.random.set_seed first)")
    return found


def _datasets(root: Any) -> Iterator[Any]:
    """A data set and all that it reads from."""
    waiting, seen = [root], set[int]()
    while waiting and len(seen) < _DEPTH_MAX:
        dataset = waiting.pop()
        if id(dataset) not in seen and isinstance(dataset, tf.data.Dataset):
            seen.add(id(dataset))
            yield dataset
            waiting += dataset._inputs()


def _is_unseeded(dataset: Any) -> bool:
    seeds = [getattr(dataset, name, None) for name in ("_seed", "_seed2")]
    return all(isinstance(seed, tf.Tensor) and seed.dtype == tf.int64 and int(seed) == 0 for seed in seeds)


class DatasetSource(IterableSource):
    """A tf.data.Dataset, or one that a strategy distributes.

    Each epoch begins with the state of its iterator before the first batch, which is small: nothing has been read
    ahead. A resumed epoch begins with it again and drops the batches that were consumed. Where the state cannot be
    had, as many iterators are made as there were epochs before, since each takes the next numbers of the shuffles.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        super().__init__(batches)
        self._fresh: Any = None
        """The iterator of the next epoch, made already."""
        self._next: State | None = None
        """Where the next epoch begins, as another process would have begun it."""
        self._made = 0
        self._forgets = False

    def begin(self) -> dict[str, Any]:
        begun = super().begin()
        return {**begun, "iterator": self._begin_next()}

    def start(self, begun: Mapping[str, Any], epoch: int, skip: int) -> Iterator[Any]:
        self._set_epoch(epoch)
        self.set_generators(begun["generators"])
        fresh, self._fresh = self._fresh, None
        state = begun.get("iterator")
        if state is None:
            while self._made <= epoch:
                fresh = self._make()
        elif fresh is None:
            fresh = self._make()
            set_iterator(fresh, state, "loader")
        # What Python computes of the data (from_generator) draws from numbers of its own.
        batches = fresh if state is not None else Apart(fresh, Stream(begun["seeds"]))
        for _ in range(skip):
            next(batches, None)
        return batches

    def state(self, consumed: int) -> dict[str, Any]:
        found = {**super().state(consumed), "forgets": self._forgets}
        if not consumed:
            found["generators"][_KEY] = self._begin_next()
        return found

    def set_generators(self, states: Mapping[str, Any]) -> None:
        self._next = states.get(_KEY)
        super().set_generators({name: state for name, state in states.items() if name != _KEY})

    def compare(self, state: Mapping[str, Any]) -> list[str]:
        lost = ["the order that a shuffle() within the data set has in the next epoch is not kept by TensorFlow"]
        forgets = lost if state.get("forgets") else []
        return [*super().compare(state), *left_out(self._batches, "the data"), *forgets]

    def _make(self) -> Any:
        self._made += 1
        return iter(self._batches)

    def _begin_next(self) -> State | None:
        """Where the next epoch begins; its iterator is made for that, once."""
        if self._fresh is None:
            self._fresh = self._make()
            if self._next is not None:
                set_iterator(self._fresh, self._next, "loader")
                self._next = None
        if not isinstance(self._fresh, tf.data.Iterator):
            return None
        policy = _policy(self._fresh)
        try:
            state = _serialize(self._fresh, _FAIL if policy is None else policy)
        except tf.errors.OpError:
            return None
        self._forgets = forgets(self._fresh, state)
        return state


def source(loader: Iterable[Any]) -> DatasetSource | None:
    """The source for TensorFlow's data sets; None for anything else."""
    kinds = (tf.data.Dataset, tf.distribute.DistributedDataset)
    return DatasetSource(loader) if isinstance(loader, kinds) else None
