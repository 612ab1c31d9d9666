"""Where PyTorch's tensors lie in memory, and what vouches for it that one has not been written to."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch

Tensor = torch.Tensor
PLAIN = (torch.Tensor, torch.nn.Parameter)


def identity(value: Any) -> Hashable:
    """Equal for two names of one memory; an empty tensor has no memory to share."""
    if type(value) not in PLAIN or value.layout is not torch.strided or value.is_quantized or not value.numel():
        return None
    return memory(value)


def memory(value: Tensor) -> Hashable:
    # Not value.data_ptr(): where a storage's address is a handle (MPS), address plus offset may be another's handle.
    start = value.untyped_storage().data_ptr()
    where = value.device, start, value.storage_offset(), value.shape, value.stride()
    return ("torch", *where, value.dtype, value.is_conj(), value.is_neg()) if start else None


def cut(payload: Tensor, start: int, stop: int) -> Tensor | None:
    """The elements that lie at these bytes, in C order; None where they do not lie one behind the other."""
    size = payload.dtype.itemsize
    if not payload.is_contiguous() or payload.is_conj() or payload.is_neg() or start % size or stop % size:
        return None
    return payload.as_strided((payload.numel(),), (1,))[start // size : stop // size]


def standing(targets: Iterable[Any]) -> set[Hashable]:
    """The memory of the parameters that nothing trains: without a gradient, and not in the storage of one that has."""
    trained: set[Hashable] = set()
    found: dict[Hashable, Hashable] = {}
    for module in targets:
        for value in module.parameters() if isinstance(module, torch.nn.Module) else ():
            where = identity(value)
            if value.requires_grad or value.grad is not None:
                trained.add(_storage(value))
            elif where is not None:
                found[where] = _storage(value)
    return {where for where, storage in found.items() if storage not in trained}


def _storage(value: Tensor) -> Hashable:
    return value.device, value.untyped_storage().data_ptr() if identity(value) is not None else id(value)


def mark(payload: Tensor, declared: Iterable[Hashable]) -> Hashable:
    """Equal as long as the tensor lies where it lay, and no operation that counts has written to it; None where it is
    not among the declared, or nothing counts."""
    where = identity(payload)
    return (where, payload._version) if where in declared and not payload.is_inference() else None
