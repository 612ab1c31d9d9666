"""TensorFlow's variables, plain and of every strategy: what a checkpoint keeps of one, and how it is put back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import values as distributed
from tensorflow.python.eager import context

from everystep.errors import Unsupported
from everystep.schema import LoadReport

Array = np.ndarray[Any, Any]
Place = Callable[[], None]
World = tuple[int, int]
"""(rank, ranks)"""
PER_REPLICA, PER_WORKER, AGGREGATION = "per_replica", "per_worker", "aggregation"
# Read when a strategy adds a variable's replicas up: SUM and MEAN are what TensorFlow's own checkpoint would hold.
_AGGREGATIONS = {"SUM": "sum", "MEAN": "mean"}
NOTHING: Any = object()
"""In place of a value: another rank saves it."""


def keras() -> Any | None:
    """Keras, if this program uses it on TensorFlow."""
    module = sys.modules.get("keras")
    if module is None or not hasattr(module, "Layer") or module.backend.backend() != "tensorflow":
        return None
    return module


def is_variable(value: Any) -> bool:
    module = keras()
    return isinstance(value, tf.Variable) or (module is not None and isinstance(value, module.Variable))


def unwrap(variable: Any, path: str = "") -> Any:
    """TensorFlow's variable in one of Keras; any other as it is.

    Raises:
        Unsupported: if it has no value yet.
    """
    if isinstance(variable, tf.Variable):
        return variable
    if variable._value is None:
        raise unbuilt(f"the variable {variable.path}", path, "call the model once, or its build()")
    return variable._value


def unbuilt(what: str, path: str, how: str) -> Unsupported:
    return Unsupported(f"{what} is not built yet and has no values", where=path, do=f"{how}, before saving or loading")


def world() -> World | None:
    """Of a multi-worker strategy: as its collective operations were set up, else as TF_CONFIG says."""
    server = context.context()._collective_ops_server_def
    if server is not None and server.cluster.job:
        jobs = {job.name: len(job.tasks) for job in server.cluster.job}
        return _place(jobs, server.job_name, server.task_index)
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        jobs = {name: len(tasks) for name, tasks in resolver.cluster_spec().as_dict().items()}
    except (ValueError, TypeError):  # what TF_CONFIG holds is not a cluster
        return None
    return _place(jobs, resolver.task_type, resolver.task_id) if jobs else None


def _place(jobs: Mapping[str, int], job: str | None, task: int | None) -> World | None:
    """Chief first, then the workers. With parameter servers one coordinator trains: it is alone."""
    trains = ("chief", "worker")
    ranks = sum(jobs.get(name, 0) for name in trains)
    if "ps" in jobs or job not in trains or ranks < 2:
        return None
    return (task or 0) + (jobs.get("chief", 0) if job == "worker" else 0), ranks


def components(variable: Any) -> tuple[Any, ...]:
    """The plain variables that one variable is made of in this process, one for each of its replicas."""
    return tuple(variable.values) if isinstance(variable, distributed.DistributedVariable) else (variable,)


def aggregation(variable: Any, role: str) -> str | None:
    """How the values of replicas become one, for a variable whose replicas may differ; None for one that is the same
    on each.

    A mirrored variable without an aggregation is written by each replica for itself (moving averages, seeds), unless
    an optimizer updates it, which does so on all of them alike.
    """
    if not isinstance(variable, distributed.DistributedVariable):
        return None
    how = variable.aggregation.name
    if not variable._is_mirrored():
        return _AGGREGATIONS.get(how, "first")
    return "first" if how == "NONE" and not variable.trainable and role != "optimizer" else None


def read(variable: Any, role: str, path: str, here: World) -> Any:
    """What this rank keeps of a variable: plain variables, and for one that is divided, who has which."""
    variable = unwrap(variable, path)
    check(variable, path)
    parts, how = components(variable), aggregation(variable, role)
    rank, ranks = here
    if how is not None:
        return {AGGREGATION: how, PER_REPLICA: {str(rank * len(parts) + i): part for i, part in enumerate(parts)}}
    if isinstance(variable, distributed.DistributedVariable):
        return parts[0] if rank == 0 or not _spans(variable) else NOTHING
    return {PER_WORKER: {str(rank): variable}} if ranks > 1 else variable


def _spans(variable: Any) -> bool:
    """Whether the variable is one on all workers."""
    return bool(getattr(variable.distribute_strategy.extended, "_in_multi_worker_mode", bool)())


def check(variable: Any, path: str) -> None:
    """
    Raises:
        Unsupported: for variables of strategies that keep them in other processes.
    """
    if isinstance(variable, distributed.DistributedVariable) or hasattr(variable, "handle"):
        return
    raise Unsupported(
        f"a {type(variable).__name__} lives on parameter servers",
        where=path,
        do="use MirroredStrategy or MultiWorkerMirroredStrategy; or save(state=…) of what the coordinator reads",
    )


def fit(variable: Any, role: str, value: Any, path: str, here: World, report: LoadReport) -> Place | None:
    """Matches a saved value, in any of the forms of `read`, with a variable; the answer puts it in place."""
    variable = unwrap(variable, path)
    check(variable, path)
    parts, how = components(variable), aggregation(variable, role)
    rank, ranks = here
    if isinstance(value, Mapping) and PER_WORKER in value:
        value = of_worker(value[PER_WORKER], rank, path, report)
    if isinstance(value, Mapping) and PER_REPLICA in value:
        saved = {int(number): one for number, one in value[PER_REPLICA].items()}
        mine = [rank * len(parts) + i for i in range(len(parts))]
        whole = len(saved) == len(parts) * (ranks if isinstance(variable, distributed.DistributedVariable) else 1)
        if how is not None and whole and all(number in saved for number in mine):
            return _assign(parts, [saved[number] for number in mine], variable)
        report.inexact.append(f"{path} was kept by {len(saved)} replicas, is by {max(len(parts), ranks)}")
        value = _aggregate(str(value.get(AGGREGATION)), saved, variable)
    if how == "sum" and len(parts) * ranks > 1 and (tensor := as_tensor(value, variable)) is not None:
        value = tf.cast(tensor / (len(parts) * ranks), variable.dtype)  # as TensorFlow's own restore: the sum stays
    return _assign(parts, [value] * len(parts), variable)


def of_worker(saved: Mapping[str, Any], rank: int, path: str, report: LoadReport) -> Any:
    """This worker's own; the first one's, where there was no such worker."""
    if str(rank) in saved:
        return saved[str(rank)]
    report.inexact.append(f"{path} was kept by {len(saved)} workers, and none was worker {rank}")
    return saved[min(saved, key=int)]


def _aggregate(how: str, saved: Mapping[int, Any], variable: Any) -> Any:
    """One value of many, as TensorFlow's own checkpoint would hold it; what does not fit is left to be refused."""
    tensors = [as_tensor(saved[number], variable) for number in sorted(saved)]
    if any(tensor is None for tensor in tensors) or how not in ("sum", "mean"):
        return saved[min(saved)]
    total = tf.add_n(tensors)
    return total if how == "sum" else tf.cast(total / len(tensors), variable.dtype)


def as_tensor(value: Any, variable: Any) -> Any | None:
    """The value as a tensor of just the variable's type and shape, or None."""
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            value = tf.convert_to_tensor(np.asarray(value))
        except (TypeError, ValueError):
            return None
    if not isinstance(value, tf.Tensor) or value.dtype != variable.dtype:
        return None
    return value if variable.shape.is_compatible_with(value.shape) else None


def _assign(parts: Sequence[Any], values: Sequence[Any], variable: Any) -> Place | None:
    tensors = [as_tensor(value, variable) for value in values]
    if any(tensor is None for tensor in tensors):
        return None

    def place() -> None:
        for part, tensor in zip(parts, tensors):
            with tf.device(part.device):
                part.assign(tensor, read_value=False)

    return place


class Cell:
    """A plain variable, read when it is copied. While `witness` is held, a write makes new memory and does not change
    what is there: so an address that stays the same says that nothing was written."""

    __slots__ = ("variable", "witness")

    def __init__(self, variable: Any) -> None:
        self.variable, self.witness = variable, None

    @property
    def key(self) -> tuple[str, int]:
        return "tensorflow", id(self.variable)

    def read(self) -> Any:
        try:
            return self.variable.value()
        except tf.errors.FailedPreconditionError as error:
            raise unbuilt(f"the variable {self.variable.name}", "", "initialize it") from error

    def address(self) -> int | None:
        """Where its value lies; None where that says nothing."""
        tensor = self.witness = self.read()
        if "CPU" not in tensor.device:
            return None
        return int(as_array(tensor).__array_interface__["data"][0])


def as_array(tensor: Any) -> Array:
    """A tensor's value, its own memory where that lies in the host's."""
    return np.asarray(tensor._numpy())
