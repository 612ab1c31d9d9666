"""Frameworks' objects as nested state, and back: one file a framework, the same verbs; and the list of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from functools import cache
from typing import Any, Protocol

import msgspec
import numpy as np

from everystep.adapters import numpy as numpy_adapter
from everystep.errors import Damaged, Unsupported, UsageError
from everystep.schema import Box, Composite, Described, Leaf, LoadReport

Place = Callable[[], None]


class Adapter(Protocol):
    """What each adapter file offers, as module-level functions."""

    KINDS: tuple[str, ...]
    """Leaf and composite kinds that this adapter builds."""
    MAKERS: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    """Composite kind -> what builds one from its parts."""
    MISFITS: tuple[type[Exception], ...]
    """What a maker raises where the parts do not fit together."""

    def describe(self, value: Any, path: str) -> Described | Composite | Any: ...
    def build(self, leaf: Leaf, data: np.ndarray[Any, Any]) -> Any: ...
    def capture(self, target: Any, path: str, tracked: Mapping[str, Any]) -> Any: ...
    def apply(
        self, target: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport
    ) -> Place | None: ...
    def view(self, payload: Any) -> np.ndarray[Any, Any] | None: ...
    def copy(self, payload: Any, target: np.ndarray[Any, Any]) -> None: ...
    def cut(self, payload: Any, start: int, stop: int) -> Any: ...
    def standing(self, targets: Iterable[Any]) -> set[Hashable]: ...
    def mark(self, payload: Any, declared: Collection[Hashable]) -> Hashable: ...
    def not_captured(self, target: Any, path: str) -> list[str]: ...
    def fence(self) -> None: ...
    def world(self) -> tuple[int, int] | None: ...
    def random_state(self) -> dict[str, Any]: ...
    def set_random_state(self, state: dict[str, Any]) -> list[str]: ...


# A framework's adapter is imported only once the program itself has imported the framework.
_FRAMEWORKS = {
    "torch": "everystep.adapters.torch",
    "tensorflow": "everystep.adapters.tensorflow",
    "jax": "everystep.adapters.jax",
    "mxnet": "everystep.adapters.mxnet",
}
RESEEDED = ("mxnet",)
"""Frameworks whose random state nobody can read; `reseed` makes it a function of the step."""


@cache
def _framework_adapter(name: str) -> Any:
    return importlib.import_module(_FRAMEWORKS[name])


def active() -> list[Any]:
    """The adapters of the frameworks that this program uses, NumPy last."""
    return [*[_framework_adapter(name) for name in _FRAMEWORKS if name in sys.modules], numpy_adapter]


def adapter_for_kind(kind: str) -> Any:
    """The adapter that builds a leaf or composite of this kind; imports its framework if it has to."""
    if kind in numpy_adapter.KINDS:
        return numpy_adapter
    framework = kind.partition(".")[0]
    if framework not in _FRAMEWORKS:
        raise Damaged(f"unknown kind of leaf {kind!r}", do="was it written by a newer everystep?")
    try:
        return _framework_adapter(framework)
    except ImportError as error:
        raise Unsupported(
            f"the checkpoint holds {framework} objects and {framework} is not installed here",
            do='load with like="numpy"',
        ) from error


class Held(msgspec.Struct, frozen=True, gc=False):
    """An array and the adapter that can copy it."""

    adapter: Any
    payload: Any


class Kept(msgspec.Struct, frozen=True, gc=False):
    """A leaf, or a box of one, as it lies in a checkpoint, for an adapter that knows better than its kind what it is to
    become."""

    leaf: Leaf
    data: np.ndarray[Any, Any]


class Boxed(msgspec.Struct, frozen=True, gc=False):
    """A leaf of which only some boxes were read, each as what the leaf was."""

    leaf: Leaf
    boxes: dict[Box, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """How an object takes what was saved of it."""

    boxes: dict[str, tuple[Box, ...]]
    """Of the leaves of which it takes only some boxes on this rank, those: they are `Boxed`."""
    kept: bool = False
    """Whether it takes leaves as `Kept`."""


class Shared(msgspec.Struct, frozen=True, gc=False):
    """What an adapter says of an array that lies on several ranks."""

    mine: Described
    """What this rank writes of it, where all of them save."""
    whole: Described | None
    """What one of them writes that saves alone; None if it has only a part."""
    ranks: int

    def among(self, ranks: int | None, path: str) -> Described:
        """What is written where so many ranks save together.

        Raises:
            Unsupported: if they are not those that it lies on.
        """
        if ranks is None or ranks == self.ranks:
            return self.mine
        if self.whole is not None:
            return self.whole
        raise Unsupported(
            f"this array lies on several of {self.ranks} processes, and this run is saved by {ranks}",
            where=path,
            do="open the run on every process, without rank= and ranks=; or save a whole array, as full_tensor() gives",
        )


def rebuild(template: Any, saved: Any) -> tuple[Any, LoadReport]:
    """A saved state, whose leaves are `Kept`, in the structure, of the types and at the places of a template.

    Raises:
        UsageError: where nothing knows the structure of the template.
    """
    report = LoadReport()
    return _adapter_of_templates(template).rebuild(template, saved, report), report


def wanted_by_template(template: Any, sketch: Any) -> dict[str, tuple[Box, ...]]:
    """Of the leaves that `rebuild` will be given, those of which only some boxes are to be read on this rank.

    Args:
        sketch: the saved state with the descriptions of leaves in place of them.

    Raises:
        UsageError: where nothing knows the structure of the template.
    """
    return _adapter_of_templates(template).wanted_by_template(template, sketch)  # type: ignore[no-any-return]


def _adapter_of_templates(template: Any) -> Any:
    if "jax" not in sys.modules:
        raise UsageError(
            f"like={type(template).__name__} is not known",
            do='like="numpy", "torch" or "saved"; or a pytree that the state is to look like, in a program of JAX',
        )
    return _framework_adapter("jax")


def describe(value: Any, path: str, ranks: int | None = None) -> Any:
    """The first adapter's answer that knows the value: see `schema.flatten`.

    Args:
        ranks: how many save together; None if it is all of them.
    """
    if isinstance(value, Kept):  # from another checkpoint, and saved as it lay there
        return Described(value.leaf.dtype, value.leaf.shape, value.leaf.kind, Held(numpy_adapter, value.data))
    if isinstance(value, Composite):
        return value
    for adapter in active():
        found = adapter.describe(value, path)
        if isinstance(found, Shared):
            found = found.among(ranks, path)
        if isinstance(found, Described):
            held = Held(adapter, found.payload)
            return Described(found.dtype, found.shape, found.kind, held, found.identity, found.boxes)
        if found is not None:
            return found
    return None


def compose(composite: Composite) -> Any:
    """What a composite stands for, built from its parts.

    Raises:
        Damaged: for one that no save makes.
    """
    adapter = adapter_for_kind(composite.kind)
    maker = adapter.MAKERS.get(composite.kind)
    if maker is None:
        raise Damaged(f"unknown composite {composite.kind[:80]!r}", do="was it written by a newer everystep?")
    try:
        return maker(composite.parts)
    except adapter.MISFITS as error:
        raise Damaged(f"the parts of a {composite.kind} do not fit together: {error}", do="run fsck") from error


def view(payload: Any) -> np.ndarray[Any, Any] | None:
    """The memory that holds one array's bytes in C order, as flat uint8; None where only `copy` can bring them."""
    if isinstance(payload, bytes):
        return np.frombuffer(payload, np.uint8)
    return payload.adapter.view(payload.payload)  # type: ignore[no-any-return]


def copy(payload: Any, target: np.ndarray[Any, Any]) -> None:
    """One array's bytes in C order into a flat uint8 buffer of the right size."""
    source = view(payload)
    if source is not None:
        np.copyto(target, source)
    else:
        payload.adapter.copy(payload.payload, target)


def cut(payload: Any, start: int, stop: int) -> Any:
    """The part of an array that lies at these bytes, for `copy`; None where they do not lie one behind the other."""
    part = payload.adapter.cut(payload.payload, start, stop)
    return None if part is None else Held(payload.adapter, part)


def piece(payload: Any, box: Box) -> Any:
    """What lies in one of the boxes of a leaf that is held in several, for `view` and `copy`."""
    return Held(payload.adapter, payload.adapter.piece(payload.payload, box))


def standing(targets: Iterable[Any]) -> set[Hashable]:
    """What of the tracked objects nothing trains: what `mark` is asked about."""
    return {memory for adapter in active() for memory in adapter.standing(targets)}


def mark(payload: Any, declared: Collection[Hashable]) -> Hashable:
    """Equal as long as a declared array lies where it lay, and no operation that counts has written to it; None for
    one that is not declared, or that nothing vouches for."""
    return None if isinstance(payload, bytes) else payload.adapter.mark(payload.payload, declared)


def capture(target: Any, path: str, tracked: Mapping[str, Any]) -> Any:
    """The nested state of a tracked object.

    Raises:
        Unsupported: for an object that no adapter knows and that has no state_dict.
    """
    for adapter in active():
        state = adapter.capture(target, path, tracked)
        if state is not None:
            return state
    if is_pair(target):
        return target[0]()
    if has_state(target):
        return target.state_dict()
    raise untrackable(target, path)


def wanted(target: Any, sketch: Callable[[], Any], path: str, tracked: Mapping[str, Any]) -> Wanted:
    """How a tracked object on this rank takes the leaves that `apply` will be given.

    Args:
        sketch: gives the saved state with the descriptions of leaves in place of them.
    """
    boxes = _framework_adapter("jax").wanted(target, sketch) if "jax" in sys.modules else None
    if boxes is not None:
        return Wanted(boxes, kept=True)
    return Wanted(_framework_adapter("torch").wanted(target, sketch, path, tracked) if "torch" in sys.modules else {})


def apply(target: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport) -> Place:
    """Matches a nested state with a tracked object, notes what fits in the report; the answer puts it in place."""
    for adapter in active():
        place = adapter.apply(target, state, path, tracked, report)
        if place is not None:
            return place  # type: ignore[no-any-return]
    report.loaded.append(path)
    if is_pair(target):
        return lambda: target[1](state)
    return lambda: target.load_state_dict(state)


def has_state(target: Any) -> bool:
    methods = (getattr(target, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(target, type) and all(callable(method) for method in methods)


def is_pair(target: Any) -> bool:
    return isinstance(target, tuple) and len(target) == 2 and callable(target[0]) and callable(target[1])


def untrackable(target: Any, path: str) -> Unsupported:
    kind = type(target)
    return Unsupported(
        f"cannot track a {kind.__module__}.{kind.__qualname__}: it has no state that lives in it",
        where=path,
        do="track a module, an optimizer, anything with state_dict and load_state_dict, or a (getter, setter) pair; "
        "give arrays, numbers and pytrees, which your program rebinds, to save(state=…)",
    )


def check_trackable(target: Any, path: str) -> None:
    """Raises Unsupported at once for what `capture` would refuse later."""
    if not (is_pair(target) or has_state(target) or any(adapter.owns(target) for adapter in active())):
        raise untrackable(target, path)


def not_captured(target: Any, path: str) -> list[str]:
    """What of a tracked object a save leaves out, as sentences."""
    for adapter in active():
        if adapter.owns(target):
            try:
                return list(adapter.not_captured(target, path))
            except Unsupported:
                return []  # not built yet; the save will say so
    return []


def fence() -> None:
    """Waits until no device writes to the arrays any more."""
    for adapter in active():
        adapter.fence()


def world() -> tuple[int, int]:
    """(rank, number of ranks) as the framework says; (0, 1) for one process."""
    for adapter in active():
        found = adapter.world()
        if found is not None:
            return found  # type: ignore[no-any-return]
    return 0, 1


def random_state() -> dict[str, Any]:
    """The state of every global random number generator of this process."""
    state: dict[str, Any] = {}
    for adapter in active():
        state.update(adapter.random_state())
    return state


def reseed(step: int, seeds: dict[str, Any]) -> None:
    """A step is complete: the generators that cannot be read out go on from what their seed makes of this step. So does
    a run that is resumed here, whenever it was saved.

    Args:
        seeds: the run's own, by framework; filled in where there are none yet.
    """
    for name in RESEEDED:
        if name in sys.modules:
            _framework_adapter(name).reseed(step, seeds)


def set_random_state(state: dict[str, Any]) -> list[str]:
    """Puts the generators back; answers what could not be put back."""
    left: list[str] = []
    for adapter in active():
        left += adapter.set_random_state(state)
    known = {name for adapter in active() for name in adapter.RANDOM}
    left += [f"random state of {name}: not used by this program yet" for name in state if name not in known]
    return left
