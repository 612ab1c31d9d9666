"""PyTorch: tensors of every kind, modules, optimizers, generators."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from everystep.adapters import Boxed, composites, torch_memory, torch_optim, torch_sharded
from everystep.adapters.composites import Misfit, known
from everystep.adapters.torch_bytes import DISK_NAMES, NAMES, copy, fit
from everystep.adapters.torch_bytes import build as build
from everystep.adapters.torch_bytes import view as view
from everystep.adapters.torch_memory import PLAIN, memory
from everystep.adapters.torch_memory import cut as cut
from everystep.adapters.torch_memory import mark as mark
from everystep.adapters.torch_memory import standing as standing
from everystep.adapters.torch_sharded import Alike, is_sharded
from everystep.adapters.torch_sharded import piece as piece
from everystep.errors import Mismatch, Unsupported
from everystep.schema import Box, Composite, Described, Leaf, LoadReport, Roled
from everystep.schema.tree import join

KINDS = ("torch.tensor", "torch.quantized", "torch.sparse", "torch.size", "torch.device", "torch.constant")
RANDOM = ("torch", "torch.cuda", "torch.mps")
Array = np.ndarray[Any, Any]
Tensor = torch.Tensor

# What a quantised tensor stores its elements as; the two last pack several into a byte.
_QUANTIZED = {"qint8": torch.int8, "quint8": torch.uint8, "qint32": torch.int32, "quint4x2": None, "quint2x4": None}
_SPARSE = ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
_SCHEMES = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
_FORMATS = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
_CONSTANTS: dict[str, Any] = {
    name: vars(torch)[name]
    for name in (*NAMES, *_QUANTIZED, "strided", *_SPARSE, *_FORMATS, *_SCHEMES)
    if name in vars(torch)
}
_CONSTANT_NAMES = {value: name for name, value in _CONSTANTS.items()}
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "vulkan", "meta", "privateuseone")


def describe(value: Any, path: str) -> Any:
    if type(value) is Alike:
        return torch_sharded.describe_alike(value, path, _tensor)
    if isinstance(value, Tensor):
        return _tensor(value, path)
    if type(value) is torch.Size:
        return Composite("torch.size", {"sizes": list(value)})
    if type(value) is torch.device:
        return Composite("torch.device", {"type": value.type, "index": value.index})
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)):
        if value not in _CONSTANT_NAMES:
            raise Unsupported(f"{value} has no name in the format", where=path, do="save its name as a string")
        return Composite("torch.constant", {"name": _CONSTANT_NAMES[value]})
    return None


def _tensor(value: Tensor, path: str) -> Any:
    if is_sharded(value):
        return torch_sharded.describe(value, path, _tensor)
    _refuse(value, path)
    if value.is_quantized:
        return _quantized(value, path)
    if value.layout is not torch.strided:
        return _sparse(value, path)
    name = DISK_NAMES.get(value.dtype)
    if name is None:
        raise Unsupported(
            f"the dtype {value.dtype} has no name in the format",
            where=path,
            do="convert it, or save x.view(torch.uint8)",
        )
    shape, stride, count = tuple(value.shape), value.stride(), value.numel()
    if not count:
        return Described(name, shape, KINDS[0], value.detach())
    last = count - 1 if value.is_contiguous() else sum((size - 1) * step for size, step in zip(shape, stride))
    if value.untyped_storage().nbytes() < (value.storage_offset() + last + 1) * value.dtype.itemsize:
        raise Unsupported(
            "the memory of this tensor has been freed (as sharding wrappers do between steps)",
            where=path,
            do="gather the parameters before the save",
        )
    return Described(name, shape, KINDS[0], value.detach() if value.requires_grad else value, memory(value))


def _refuse(value: Tensor, path: str) -> None:
    kind = type(value)
    if value.is_nested:
        raise Unsupported("a nested tensor has no form on disk", where=path, do="save x.unbind() as a list of tensors")
    if kind not in PLAIN:
        if torch.nn.parameter.is_lazy(value):
            raise Unsupported(
                "a deferred parameter has no shape yet", where=path, do="run one forward pass before saving or loading"
            )
        raise Unsupported(
            f"a {kind.__module__}.{kind.__qualname__} holds more than the bytes of a tensor",
            where=path,
            do="save an ordinary tensor: x.as_subclass(torch.Tensor)",
        )
    if value.is_meta:
        raise Unsupported(
            "a tensor on the meta device has no data", where=path, do="give it memory: to_empty(), then fill"
        )


def _quantized(value: Tensor, path: str) -> Composite:
    name = str(value.dtype)[6:]
    try:
        scheme = str(value.qscheme())[6:]
    except RuntimeError:
        scheme = "unknown"
    if name not in _QUANTIZED or scheme not in _SCHEMES:
        raise Unsupported(f"a {name} tensor of scheme {scheme} has no form on disk", where=path, do="save x.int_repr()")
    parts: dict[str, Any] = {"dtype": name, "scheme": scheme, "shape": list(value.shape)}
    if scheme == "per_tensor_affine":
        parts |= {"scale": value.q_scale(), "zero_point": value.q_zero_point()}
    else:
        parts |= {"scale": value.q_per_channel_scales(), "zero_point": value.q_per_channel_zero_points()}
        parts["axis"] = value.q_per_channel_axis()
    element, storage = _QUANTIZED[name], value.untyped_storage()
    raw = torch.empty(0, dtype=element or torch.uint8, device=value.device)
    if element is None:
        parts["int_repr"] = raw.set_(storage)  # packed tensors cannot be views: the storage is the tensor
    else:
        parts["int_repr"] = raw.set_(storage, value.storage_offset(), value.shape, value.stride())
    return Composite("torch.quantized", parts)


def _make_quantized(parts: Mapping[str, Any]) -> Tensor:
    dtype, shape, data = _CONSTANTS[known(parts["dtype"], _QUANTIZED)], parts["shape"], parts["int_repr"].contiguous()
    if not 0 <= math.prod(shape) <= data.nbytes * 4:
        raise Misfit(f"{data.nbytes} bytes do not make {shape}")
    if known(parts["scheme"], _SCHEMES) == "per_tensor_affine":
        made = torch._empty_affine_quantized(shape, scale=parts["scale"], zero_point=parts["zero_point"], dtype=dtype)
    else:
        made = torch._empty_per_channel_affine_quantized(
            shape, scales=parts["scale"], zero_points=parts["zero_point"], axis=parts["axis"], dtype=dtype
        )
    torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage()).copy_(data.view(-1).view(torch.uint8))
    return made


def _sparse(value: Tensor, path: str) -> Composite:
    value, layout = value.detach(), str(value.layout)[6:]
    if layout not in _SPARSE:
        raise Unsupported(f"a tensor of layout {layout} has no form on disk", where=path, do="save x.to_dense()")
    parts: dict[str, Any] = {"layout": layout, "shape": list(value.shape)}
    if layout == "sparse_coo":
        parts |= {"indices": value._indices(), "values": value._values(), "coalesced": value.is_coalesced()}
    elif layout in ("sparse_csr", "sparse_bsr"):
        parts |= {"compressed": value.crow_indices(), "plain": value.col_indices(), "values": value.values()}
    else:
        parts |= {"compressed": value.ccol_indices(), "plain": value.row_indices(), "values": value.values()}
    return Composite("torch.sparse", parts)


def _make_sparse(parts: Mapping[str, Any]) -> Tensor:
    """Invariants are checked: indices outside the shape would let later code read foreign memory."""
    layout, shape, values = known(parts["layout"], _SPARSE), parts["shape"], parts["values"]
    if layout == "sparse_coo":
        made = torch.sparse_coo_tensor(parts["indices"], values, shape, check_invariants=True)
        return made._coalesced_(bool(parts["coalesced"]))
    return torch.sparse_compressed_tensor(
        parts["compressed"], parts["plain"], values, shape, layout=_CONSTANTS[layout], check_invariants=True
    )


MAKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "torch.quantized": _make_quantized,
    "torch.sparse": _make_sparse,
    "torch.size": lambda parts: torch.Size(parts["sizes"]),
    "torch.device": lambda parts: torch.device(known(parts["type"], _DEVICES), parts["index"]),
    "torch.constant": lambda parts: _CONSTANTS[known(parts["name"], _CONSTANTS)],
}
MISFITS = (*composites.MISFITS, RuntimeError)


def identity(value: Any) -> Hashable:
    """Equal for two names of one memory; an empty tensor has no memory to share."""
    return torch_sharded.identity(value) if is_sharded(value) else torch_memory.identity(value)


def owns(target: Any) -> bool:
    return isinstance(target, (torch.nn.Module, torch.optim.Optimizer, torch.Generator))


def capture(target: Any, path: str, tracked: Mapping[str, Any]) -> Any:
    if isinstance(target, torch.nn.Module):
        return _capture_module(target, path)
    if isinstance(target, torch.optim.Optimizer):
        return torch_optim.capture(target, path, tracked)
    if isinstance(target, torch.Generator):
        return Roled("rng", target.get_state())
    return None


def wanted(target: Any, sketch: Callable[[], Any], path: str, tracked: Mapping[str, Any]) -> dict[str, tuple[Box, ...]]:
    """Of the saved leaves of a target, the boxes that its DTensors hold here."""
    if isinstance(target, torch.optim.Optimizer):
        return torch_optim.wanted(target, sketch, tracked)
    if not isinstance(target, torch.nn.Module):
        return _wanted_by_other(target, sketch)
    torch_sharded.settle(target)
    if not any(map(is_sharded, (*target.parameters(), *target.buffers()))):
        return {}
    found, state = _entries(target, path), sketch()
    if found is None or not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return {}  # `apply` says what is wrong
    given = {name: state[key] for key, name in torch_optim.canonical(state).items()}
    return torch_sharded.wanted((current, given.get(name)) for name, (_, current) in found[0].items())


def apply(
    target: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport
) -> Callable[[], None] | None:
    if isinstance(target, torch.nn.Module):
        return _apply_module(target, state, path, report)
    if isinstance(target, torch.optim.Optimizer):
        return torch_optim.apply(target, state, path, tracked, report)
    if isinstance(target, torch.Generator):
        return _apply_generator(target, state, path, report)
    boxed = any(isinstance(one, Boxed) for one, _ in torch_sharded.side_by_side(state, state))
    if not boxed or not hasattr(target, "load_state_dict"):
        return None
    report.loaded.append(path)
    return lambda: _no_answer(target.load_state_dict(torch_sharded.cut_alike(target.state_dict(), state)))


def _wanted_by_other(target: Any, sketch: Callable[[], Any]) -> dict[str, tuple[Box, ...]]:
    """An object with a state_dict of its own gets DTensors back where it gave some, and is asked only then."""
    if not torch_sharded.in_use() or isinstance(target, (type, tuple)) or not hasattr(target, "load_state_dict"):
        return {}
    saved = sketch()
    if not any(isinstance(one, Leaf) and one.boxes for one, _ in torch_sharded.side_by_side(saved, saved)):
        return {}
    return torch_sharded.wanted(torch_sharded.side_by_side(target.state_dict(), saved))


def _apply_generator(target: torch.Generator, state: Any, path: str, report: LoadReport) -> Callable[[], None]:
    value = fit(target.get_state(), state)
    (report.reshaped if value is None else report.loaded).append(path)
    return lambda: None if value is None else _no_answer(target.set_state(value))


def _no_answer(_: Any) -> None:
    """Turns a call's answer into None."""


def _refuse_module(module: torch.nn.Module, path: str) -> None:
    for name, part in module.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(part).__mro__):
            raise Unsupported(
                "FullyShardedDataParallel gives its state only by talking to the other ranks",
                where=join(path, name) if name else path,
                do="shard with fully_shard (FSDP2), which is saved as it is; or give a full state_dict to save(state=)",
            )
    for members in (module.named_parameters(), module.named_buffers()):
        for name, value in members:
            if torch.nn.parameter.is_lazy(value):
                _refuse(value, join(path, name))


def _entries(module: torch.nn.Module, path: str) -> tuple[dict[str, tuple[str, Any]], Any] | None:
    """Canonical name -> (key, value) of a module's state_dict, and its versions; None if it is not made of names."""
    _refuse_module(module, path)
    state = module.state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return None
    names = torch_optim.canonical(state, torch_optim.wrapper_keys(module))
    return {name: (key, state[key]) for key, name in names.items()}, getattr(state, "_metadata", None)


def _capture_module(module: torch.nn.Module, path: str) -> dict[str, Roled] | None:
    found = _entries(module, path)
    if found is None:
        return None
    roles: dict[Hashable, str] = {}
    # By key, and by memory for what a hook renamed; parameters last, so that they win.
    for role, members in (
        ("buffer", module.named_buffers(remove_duplicate=False)),
        ("weights", module.named_parameters(remove_duplicate=False)),
    ):
        for key, value in members:
            roles[key] = roles[identity(value)] = role
    roles[None] = "other"
    shared = torch_sharded.shared_names(module)
    return {
        name: Roled(roles.get(key) or roles.get(identity(value), "other"), torch_sharded.shared(value, shared.get(key)))
        for name, (key, value) in found[0].items()
    }


def _apply_module(module: torch.nn.Module, state: Any, path: str, report: LoadReport) -> Callable[[], None] | None:
    found = _entries(module, path)
    if found is None:
        return None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise Mismatch(
            "the checkpoint has no module here", where=path, do="load it into what was saved under this name"
        )
    own, versions = found
    given = {name: state[key] for key, name in torch_optim.canonical(state).items()}
    fitting: dict[str, Any] = OrderedDict()
    seen: dict[Hashable, Any] = {}
    saved: dict[int, tuple[str, Hashable]] = {}
    for name, (key, current) in own.items():
        if name not in given:
            report.missing.append(join(path, name))
            continue
        value = _fit(current, given[name]) if isinstance(current, Tensor) else given[name]
        tied = seen.setdefault(identity(current), value) if identity(current) else value
        if (value is None and isinstance(current, Tensor)) or not _same(tied, value):
            report.reshaped.append(join(path, name))
        else:
            report.loaded.append(join(path, name))
            fitting[key] = value
            first, place = saved.setdefault(id(given[name]), (name, identity(current)))
            if isinstance(value, Tensor) and place != identity(current):
                report.inexact.append(f"{join(path, name)} was one tensor with {join(path, first)}, and is not here")
    report.unexpected += [join(path, name) for name in given if name not in own]
    fitting._metadata = versions  # type: ignore[attr-defined]
    return lambda: _place_module(module, fitting, path)


def _fit(current: Tensor, value: Any) -> Any:
    return torch_sharded.made(current, value) if is_sharded(current) else fit(current, value)


def _same(first: Any, second: Any) -> bool:
    """Whether two values of one memory agree bit for bit (a tied tensor cannot take two values)."""
    if first is second or not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return first is second
    return np.array_equal(_bytes(first), _bytes(second))


def _bytes(value: Tensor) -> Array:
    value = torch_sharded.local(value) if is_sharded(value) else value
    data = np.empty(value.numel() * value.dtype.itemsize, np.uint8)
    copy(value.detach(), data)
    return data


def _place_module(module: torch.nn.Module, fitting: dict[str, Any], path: str) -> None:
    """torch's own load_state_dict fills the tensors in place, and runs the hooks that modules rely on."""
    accepted = inspect.signature(module.load_state_dict).parameters
    takes_strict = "strict" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    try:
        answer = module.load_state_dict(fitting, **({"strict": False} if takes_strict else {}))
    except RuntimeError as error:
        raise Mismatch(
            f"load_state_dict refused the state: {error}", where=path, do="make the model as it was"
        ) from error
    left = list(getattr(answer, "unexpected_keys", ()))
    if left:
        raise Mismatch(f"load_state_dict left out {', '.join(left[:5])}", where=path, do="make the model as it was")


def not_captured(target: Any, path: str) -> list[str]:
    """What of a tracked object a save leaves out, as sentences."""
    if isinstance(target, torch.optim.Optimizer):
        return torch_optim.not_captured(target, path)
    found = _entries(target, path) if isinstance(target, torch.nn.Module) else None
    if found is None:
        return []
    kept = {key for key, _ in found[0].values()} | {identity(value) for _, value in found[0].values()}
    return torch_sharded.lost_buffers(target, path) + [
        f"{path}.{name}: {what}"
        for members, what in (
            (target.named_buffers(remove_duplicate=False), "non-persistent buffer"),
            (target.named_parameters(remove_duplicate=False), "parameter that is not in the state_dict"),
        )
        for name, value in members
        if name not in kept and (identity(value) is None or identity(value) not in kept)
    ]


def fence() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):  # to wait for an unused device would take memory on it
                torch.cuda.synchronize(device)
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def world() -> tuple[int, int] | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None


def random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["torch.cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["torch.mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> list[str]:
    left: list[str] = []
    if "torch" in state:
        left += _set_random("torch", torch.set_rng_state, state["torch"])
    if "torch.cuda" in state:
        saved, here = state["torch.cuda"], torch.cuda.device_count() if torch.cuda.is_available() else 0
        if len(saved) != here:
            left.append(f"random state of torch.cuda: saved with {len(saved)} GPUs, {here} here")
        for device, one in enumerate(saved[:here]):
            left += _set_random(f"torch.cuda:{device}", partial(torch.cuda.set_rng_state, device=device), one)
    if "torch.mps" in state:
        if torch.backends.mps.is_available():
            left += _set_random("torch.mps", torch.mps.set_rng_state, state["torch.mps"])
        else:
            left.append("random state of torch.mps: there is no such device here")
    return left


def _set_random(name: str, put: Callable[[Tensor], None], state: Any) -> list[str]:
    try:
        put(torch.as_tensor(state, dtype=torch.uint8))
    except (RuntimeError, TypeError, ValueError) as error:
        return [f"random state of {name}: {error}"]
    return []
