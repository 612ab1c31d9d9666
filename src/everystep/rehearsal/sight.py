"""What a training script holds in its variables that decides how it goes on, and that its run does not track."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import msgspec

from everystep import adapters
from everystep.adapters import loader as loaders
from everystep.seam import Seam

DEPTH_MAX = 3
ITEMS_MAX = 64
_LIBRARIES = {"everystep", "torch", "numpy", "runpy", "threading", "importlib"}
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)
_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None), type, ModuleType, *_FUNCTIONS)


class Sight(msgspec.Struct, frozen=True):
    """An object that is not tracked, by the name of the variable: `what` is "generator", "state" or "loader"."""

    name: str
    what: str
    kind: str


def in_sight(tracked: Iterable[Any], loader: Iterable[Any] | None) -> list[Sight]:
    """Generators, loaders and objects with a state_dict that the functions under way can reach by name.

    Args:
        tracked: by any run of the process.
        loader: what the run's own loop goes through; other loaders are of no concern then.
    """
    own = list(loaders.generators(loader).values()) if loader is not None else []
    known = {id(part) for part in (loader, *own, *_parts_of_all(tracked))}
    found: dict[int, Sight] = {}
    there = [pair for name, value in _variables() for pair in _look(value, name, 0, set())]
    for path, part in sorted(there, key=lambda pair: pair[0].count(".") + pair[0].count("[")):  # the plainest name
        what = _what(part)
        if what is None or id(part) in known or (what == "loader" and loader is not None) or _is_made_of(part, known):
            continue
        known |= {id(part), *map(id, _parts_of(part))}
        found[id(part)] = Sight(path, what, type(part).__name__)
    return list(found.values())


def _variables() -> Iterator[tuple[str, Any]]:
    """Names and values of the functions under way and of their modules, libraries left out."""
    frame: FrameType | None = sys._getframe(1)
    seen: set[int] = set()
    while frame is not None:
        library = str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES
        for space in () if library else (frame.f_locals, frame.f_globals):
            if id(space) not in seen:
                seen.add(id(space))
                yield from [(name, value) for name, value in list(space.items()) if not name.startswith("__")]
        frame = frame.f_back


def _look(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """An object and what lies in it, as far as users' own containers and classes go."""
    if isinstance(value, _PLAIN) or id(value) in seen or depth > DEPTH_MAX:
        return
    seen.add(id(value))
    yield path, value
    for name, part in _inside(value):
        yield from _look(part, f"{path}{name}", depth + 1, seen)


def _inside(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in list(value.items())[:ITEMS_MAX]]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", part) for index, part in enumerate(value[:ITEMS_MAX])]
    if _is_module(value):  # its tensors are captured or warned about; a generator in it is neither
        return [
            (f".{name}.{key}" if name else f".{key}", part)
            for name, module in value.named_modules()
            for key, part in vars(module).items()
            if _is_generator(part)
        ]
    if type(value).__module__.partition(".")[0] in _LIBRARIES:
        return [("._schedulers", getattr(value, "_schedulers", None))]  # schedulers made of schedulers
    return [(f".{name}", part) for name, part in list(getattr(value, "__dict__", {}).items())]


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _is_generator(value: Any) -> bool:
    if not any(adapter.owns(value) for adapter in adapters.active()) or adapters.has_state(value):
        return False
    torch = sys.modules.get("torch")
    return type(value).__name__ != "SystemRandom" and (torch is None or value is not torch.default_generator)


def _what(value: Any) -> str | None:
    data = sys.modules.get("torch.utils.data")
    if data is not None and isinstance(value, data.DataLoader):
        return "loader"
    if not adapters.has_state(value):
        return "generator" if _is_generator(value) else None
    if _is_module(value):
        return "state" if _parts_of(value) else None
    enabled = getattr(value, "is_enabled", None)  # a GradScaler that is switched off has no state
    return None if callable(enabled) and not enabled() else "state"


def _parts_of(value: Any) -> list[Any]:
    """The tensors and modules that a module is made of; none for one without tensors."""
    if not _is_module(value):
        return []
    tensors = [*value.parameters(), *value.buffers()]
    return [*tensors, *value.modules()] if tensors else []


def _is_made_of(value: Any, known: set[int]) -> bool:
    """Whether a module only wraps what is known, as compiled and distributed ones do."""
    return _is_module(value) and all(id(part) in known for part in (*value.parameters(), *value.buffers()))


def _parts_of_all(tracked: Iterable[Any]) -> Iterator[Any]:
    """What comes along with the tracked objects."""
    for target in tracked:
        pair = adapters.is_pair(target)
        for held in (*_held_by(target[0]), *_held_by(target[1])) if pair else (target,):
            inside = (part for _, part in _look(held, "", 0, set()))
            for part in inside if not _is_module(held) else (held,):
                yield part
                yield from _parts_of(part)


def _held_by(function: Any) -> list[Any]:
    """What a getter or setter can reach: the object it is a method of, what it closes over, globals that it names."""
    owner, code = getattr(function, "__self__", None), getattr(function, "__code__", None)
    if owner is not None and not isinstance(owner, ModuleType):
        return [owner]
    if code is None:
        return []
    space = function.__globals__
    return [*map(_content, function.__closure__ or ()), *(space[name] for name in code.co_names if name in space)]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def surroundings(seam: Seam) -> dict[str, Any]:
    """Switches that decide whether the same program computes the same bits."""
    found: dict[str, Any] = {"PYTHONHASHSEED": seam.environ("PYTHONHASHSEED") or "random"}
    torch = sys.modules.get("torch")
    if torch is None:
        return found
    found["torch threads"] = torch.get_num_threads()
    found["torch deterministic algorithms"] = bool(torch.are_deterministic_algorithms_enabled())
    if torch.cuda.is_available():
        found["cuDNN deterministic"] = bool(torch.backends.cudnn.deterministic)
        found["cuDNN benchmark"] = bool(torch.backends.cudnn.benchmark)
        found["CUBLAS_WORKSPACE_CONFIG"] = seam.environ("CUBLAS_WORKSPACE_CONFIG") or "not set"
    return found
