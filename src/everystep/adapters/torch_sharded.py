"""PyTorch's tensors on several ranks: what this one writes of a DTensor, or of what all hold alike, and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from zlib import crc32

import msgspec
import torch
from torch.nn.parallel import DistributedDataParallel

from everystep.adapters import Boxed, Shared
from everystep.adapters.torch_bytes import DTYPES, fit
from everystep.adapters.torch_memory import PLAIN
from everystep.adapters.torch_mesh import Index, Split, Untold, held_boxes, replica
from everystep.errors import Unsupported
from everystep.schema import NOTHING, Box, Described, Leaf

Tensor = torch.Tensor
Plain = Callable[[Tensor, str], Any]
Parts = tuple[tuple[Box, Index], ...]
SPLIT_BYTES_MIN = 1 << 16
"""Less than that is written by one of the ranks that hold it: every box costs a line in the manifest."""
# Of torch from 2.5 on, and before.
_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor")
# After these, the gradients of all ranks are the same.
_SYNCING_HOOKS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")


class Alike(msgspec.Struct, frozen=True, gc=False):
    """A tensor that ranks hold alike: each writes its share; the first all of it, where only its copy counts."""

    value: Tensor
    rank: int
    ranks: int
    first: bool = False


class Pieces(msgspec.Struct, frozen=True, gc=False):
    """What this rank holds of a tensor in several boxes."""

    parts: dict[Box, Tensor]


# DTensor -------------------------------------------------------------------------------------------------------------


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor. Their module is not imported for that: it takes longer than all of everystep."""
    kinds = (getattr(sys.modules.get(name), "DTensor", None) for name in _MODULES) if type(value) not in PLAIN else ()
    return any(kind is not None and isinstance(value, kind) for kind in kinds)


def in_use() -> bool:
    return any(name in sys.modules for name in _MODULES)


def local(value: Any) -> Tensor:
    """This rank's own tensor of a DTensor: the memory itself."""
    with torch.no_grad():
        return value.to_local()  # type: ignore[no-any-return]


def settle(module: torch.nn.Module) -> None:
    """After a forward pass FSDP2 may have whole parameters in place of its own, which the optimizer does not know."""
    for part in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            part.reshard()  # type: ignore[operator]


def identity(value: Any) -> Any:
    """Equal for two names of one DTensor. By the storage and not its address: an empty one has none."""
    return _identity(local(value), tuple(value.shape))


def _identity(here: Tensor, shape: tuple[int, ...]) -> Any:
    return "torch.dtensor", here.untyped_storage()._cdata, here.storage_offset(), here.stride(), here.dtype, shape


def describe(value: Any, path: str, plain: Plain) -> Described | Shared:
    """
    Args:
        plain: describes an ordinary tensor.
    """
    here, shape = local(value), tuple(value.shape)
    found = plain(here, path)
    if not isinstance(found, Described):
        do = "save an ordinary tensor: x.full_tensor() on every rank"
        raise Unsupported("shards that are quantized or sparse have no form on disk", where=path, do=do)
    whole = Described(found.dtype, shape, found.kind, found.payload, _identity(here, shape))
    if not math.prod(shape):
        return whole
    held = _held(value, path, here)
    if held is None:
        return Shared(_described(whole, []), None, torch.distributed.get_world_size())
    parts, number, count, members = held
    if members == 1:
        return whole
    mine = _share([(box, found.payload[index]) for box, index in parts], number, count, path)
    return Shared(_described(whole, mine), whole if count == members else None, torch.distributed.get_world_size())


def _splits(value: Any, path: str) -> tuple[Split, ...]:
    found: list[Split] = []
    for placement in value.placements:
        name = type(placement).__name__
        if placement.is_partial():
            do = "finish the sum first: x.redistribute(placements=[Replicate()])"
            raise Unsupported("this DTensor is a sum that the ranks have not formed yet", where=path, do=do)
        if name not in ("Replicate", "Shard", "_StridedShard"):
            do = "save x.full_tensor(), on every rank"
            raise Unsupported(f"a DTensor with the placement {name}", where=path, do=do)
        factor = getattr(placement, "split_factor", 1) if name == "_StridedShard" else 1
        found.append(None if name == "Replicate" else (int(placement.dim), int(factor)))
    return tuple(found)


def _parts(value: Any, path: str = "") -> Parts:
    """The boxes that this rank holds, each with where it lies in its own tensor."""
    held = _held(value, path, local(value))
    return () if held is None else held[0]


def _held(value: Any, path: str, here: Tensor) -> tuple[Parts, int, int, int] | None:
    """(what `_parts` says, which copy of it this is, of how many, ranks in the mesh); None on a rank outside of it.

    Raises:
        Unsupported: where that cannot be told.
    """
    at = value.device_mesh.get_coordinate()
    if at is None:
        return None
    mesh, splits, shape = tuple(value.device_mesh.shape), _splits(value, path), tuple(value.shape)
    order = tuple(tuple(entry.mesh_dims) for entry in getattr(value._spec, "shard_order", None) or ())
    do = "shard it evenly, or save x.full_tensor(), on every rank"
    try:
        found = held_boxes(shape, mesh, tuple(at), splits, order)
    except Untold as error:
        raise Unsupported(f"which part of this DTensor lies here cannot be told: {error}", where=path, do=do) from error
    sizes = [max(index[axis].stop for _, index in found) for axis in range(len(shape))] if found else [0]
    if (list(here.shape) != sizes) if found else here.numel():
        what = f"this rank holds {list(here.shape)} of a DTensor of {list(shape)}, where its placements say {sizes}"
        raise Unsupported(what, where=path, do=do)
    return (found, *replica(mesh, at, splits), math.prod(mesh))


# what ranks hold alike -----------------------------------------------------------------------------------------------


def describe_alike(alike: Alike, path: str, plain: Plain) -> Any:
    found = plain(alike.value, path)
    if not isinstance(found, Described) or not alike.value.numel():
        return found
    parts = [(Box.whole(found.shape), found.payload)]
    first = parts if alike.rank == 0 else []
    mine = first if alike.first else _share(parts, alike.rank, alike.ranks, path)
    return Shared(_described(found, mine), found, alike.ranks)


def _share(parts: list[tuple[Box, Tensor]], number: int, count: int, path: str) -> list[tuple[Box, Tensor]]:
    """What the copy of this number writes, of so many."""
    if count == 1:
        return parts
    if sum(tensor.nbytes for _, tensor in parts) < SPLIT_BYTES_MIN:
        return parts if crc32(path.encode("utf-8", "surrogatepass")) % count == number else []
    mine = []
    for box, tensor in parts:
        axes = range(len(box.shape))
        axis = next((i for i in axes if box.shape[i] >= count), max(axes, key=box.shape.__getitem__))
        start, stop = (box.shape[axis] * at // count for at in (number, number + 1))
        if start < stop:
            begin = (*box.start[:axis], box.start[axis] + start, *box.start[axis + 1 :])
            shape = (*box.shape[:axis], stop - start, *box.shape[axis + 1 :])
            mine.append((Box(begin, shape), tensor.narrow(axis, start, stop - start)))
    return mine


def _described(whole: Described, parts: list[tuple[Box, Tensor]]) -> Described:
    boxes = tuple(box for box, _ in parts) or (NOTHING,)
    payload: Any = parts[0][1] if len(parts) == 1 else Pieces(dict(parts))
    if not parts:
        payload = torch.empty(0, dtype=torch.uint8)
    if boxes == (Box.whole(whole.shape),):
        boxes = ()
    return Described(whole.dtype, whole.shape, whole.kind, payload, whole.identity, boxes)


def _synced(module: torch.nn.Module) -> Iterator[tuple[str, DistributedDataParallel, int, int]]:
    """(full name, itself, this rank, number of ranks) of each DDP in a module that keeps all ranks alike."""
    for name, part in module.named_modules():
        if isinstance(part, DistributedDataParallel):
            rank, ranks = torch.distributed.get_rank(part.process_group), part.process_group.size()
            known = all(getattr(hook, "__name__", "") in _SYNCING_HOOKS for hook, _ in getattr(part, "_comm_hooks", ()))
            if known and 1 < ranks == torch.distributed.get_world_size():
                yield f"{name}.module" if name else "module", part, rank, ranks


def shared_names(module: torch.nn.Module) -> dict[str, tuple[int, int, bool]]:
    """(rank, ranks, whether only the first rank's counts) of what DDP keeps alike, by its full name."""
    found: dict[str, tuple[int, int, bool]] = {}
    for name, part, rank, ranks in _synced(module):
        for first, members in (
            (False, part.module.named_parameters(remove_duplicate=False)),
            (True, part.module.named_buffers(remove_duplicate=False)),
        ):
            names = (key for key, _ in members if key not in part.parameters_to_ignore)
            found.update({f"{name}.{key}": (rank, ranks, first) for key in names})
    return found


def shared_params(targets: Iterable[Any]) -> dict[int, tuple[int, int, bool]]:
    """The same of the parameters alone, by id."""
    found: dict[int, tuple[int, int, bool]] = {}
    for module in targets:
        for _, part, rank, ranks in _synced(module) if isinstance(module, torch.nn.Module) else ():
            for key, param in part.module.named_parameters():
                if key not in part.parameters_to_ignore:
                    found[id(param)] = rank, ranks, False
    return found


def lost_buffers(module: torch.nn.Module, path: str) -> list[str]:
    """Buffers that each rank has for itself, of which only the first rank's are kept; as sentences."""
    return [
        f"{path}: the buffers of every rank but the first (DistributedDataParallel does not broadcast them)"
        for _, part, rank, _ in _synced(module)
        if rank and any(True for _ in part.module.buffers())
        if not getattr(part, "forward_sync_buffers", getattr(part, "broadcast_buffers", True))
    ]


# back ----------------------------------------------------------------------------------------------------------------


def wanted(pairs: Iterable[tuple[Any, Any]]) -> dict[str, tuple[Box, ...]]:
    """Of each (tensor here, saved leaf), the boxes that a DTensor takes; not of leaves that others take whole."""
    boxes: dict[str, dict[Box, None]] = {}
    whole: set[str] = set()
    for current, leaf in pairs:
        if not isinstance(leaf, Leaf):
            continue
        if is_sharded(current) and tuple(current.shape) == leaf.shape:
            mine = [box for box, _ in _parts(current, leaf.path)] or [NOTHING]
            boxes.setdefault(leaf.path, {}).update(dict.fromkeys(mine))
        else:
            whole.add(leaf.path)
    return {path: tuple(found) for path, found in boxes.items() if path not in whole}


def template(current: Any, param: Any, value: Any) -> Any:
    """The DTensor whose cut a saved value takes that belongs to a parameter; None if it stays an ordinary tensor."""
    one: Any
    for one in (current, param if not isinstance(current, Tensor) else None):
        if is_sharded(one) and tuple(one.shape) == tuple(value.shape):
            return one
    return None


def element_type(value: Any) -> torch.dtype | None:
    return DTYPES.get(value.leaf.dtype) if isinstance(value, Boxed) else getattr(value, "dtype", None)


def made(like: Any, value: Any, dtype: torch.dtype | None = None) -> Any:
    """A DTensor cut as another one is, with the saved value in it; None if that has another shape or type."""
    if tuple(getattr(value, "shape", ())) != tuple(like.shape):
        return None
    with torch.no_grad():
        target = torch.empty_like(like, dtype=dtype or like.dtype, requires_grad=False)
    return target if fill(target, value) else None


def fill(target: Any, value: Any) -> bool:
    """Puts what this rank holds of a saved value into a DTensor; False, and nothing done, if its type is another."""
    here = local(target)
    pairs = []
    for box, index in _parts(target):
        pairs.append((here[index], value.boxes.get(box) if isinstance(value, Boxed) else value[box.index()]))
    if not pairs:
        nothing = value.boxes.get(NOTHING) if isinstance(value, Boxed) else value.reshape(-1)[:0]
        pairs = [(here.reshape(-1)[:0], nothing)]
    fitting = [(place, fit(place, part)) for place, part in pairs]
    if any(part is None for _, part in fitting):
        return False
    with torch.no_grad():
        for place, part in fitting:
            assert part is not None
            place.copy_(part)
    return True


def side_by_side(current: Any, saved: Any) -> Iterator[tuple[Any, Any]]:
    """(value here, value there) of two nested states, wherever both have one."""
    if isinstance(current, Mapping) and isinstance(saved, Mapping):
        for key in current:
            if key in saved:
                yield from side_by_side(current[key], saved[key])
    elif isinstance(current, (list, tuple)) and isinstance(saved, (list, tuple)):
        for one, other in zip(current, saved):
            yield from side_by_side(one, other)
    else:
        yield current, saved


def cut_alike(current: Any, saved: Any) -> Any:
    """A saved state in which what is a DTensor here is one, too, cut in the same way."""
    if isinstance(current, Mapping) and isinstance(saved, Mapping):
        return {key: cut_alike(current.get(key), value) for key, value in saved.items()}
    if isinstance(current, (list, tuple)) and type(saved) in (list, tuple) and len(current) == len(saved):
        return type(saved)(cut_alike(one, other) for one, other in zip(current, saved))
    found = made(current, saved, element_type(saved)) if is_sharded(current) else None
    return saved if found is None else found


def piece(payload: Pieces, box: Box) -> Tensor:
    return payload.parts[box]


def shared(value: Any, share: tuple[int, int, bool] | None) -> Any:
    """A tensor as what ranks hold alike, if they do: (this rank, how many, whether only the first one's counts)."""
    return Alike(value, *share) if share is not None and isinstance(value, Tensor) and not is_sharded(value) else value
