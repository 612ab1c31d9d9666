"""A table of arrays in several files, with an index that says which is where, as Hugging Face's programs write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from everystep.errors import UsageError
from everystep.formats import named, pth, safetensors
from everystep.formats.content import Content, Note, Opaque
from everystep.formats.file import Array, Source, Target, opened
from everystep.seam import Seam

EXTENSIONS: tuple[str, ...] = (".safetensors.index.json",)
SHARD_BYTES = 5_000_000_000
INDEX_MAX = 100_000_000
_NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
_FOLDER = tuple(name for base in _NAMES for name in (base, f"{base}.index.json"))
"""What a folder of weights may be: the first of these that is there, in the order that transformers looks."""
_BEGINS = re.compile(rb'\s*\{\s*"(?:metadata|weight_map)"\s*:')
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.I)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def owns(source: Source) -> bool:
    """Whether it is an index; the shards themselves are files of other formats."""
    return _BEGINS.match(source.head()) is not None


def read(source: Source) -> Content:
    """All arrays by name; the nested state where the files were written by `write`.

    Raises:
        Damaged: for an index that makes no sense, names files outside of its folder, or does not fit its shards.
        NotFound: if a shard is missing.
        Unsupported, StorageError: see `everystep.formats.read`.
    """
    metadata, places = index_of(source)
    state: dict[str, Any] = {}
    opaque: list[Opaque] = []
    changed: list[Note] = []
    for file in dict.fromkeys(places.values()):
        content = _shard(source.beside(file))
        wanted = {name for name, place in places.items() if place == file}
        table = content.state
        if not isinstance(table, dict) or not wanted <= table.keys():
            raise source.damaged(f"the shard {file[:200]!r} has not what the index says")
        state |= {name: value for name, value in table.items() if name in wanted}
        opaque += [one for one in content.not_understood if one.path.partition("/")[0] in wanted]
        changed += [note for note in content.changed if note.path.partition("/")[0] in {*wanted, ""}]
        if len(wanted) < len(table):
            changed.append(
                Note("", f"{len(table) - len(wanted)} entries of {file} are left out: the index has not them")
            )
    state = {name: state[name] for name in places}
    table = metadata.pop(named.KEY, None)
    if table is None or opaque:
        return Content(state, "shards", tuple(opaque), tuple(changed), metadata)
    with source.told():
        return Content(named.put_together(table, state, source.name), "shards", metadata=metadata)


def _shard(source: Source) -> Content:
    if safetensors.owns(source):
        return safetensors.read(source)
    if pth.owns(source):
        return pth.read(source)
    raise source.damaged("an index names it as a shard, and it is neither .safetensors nor .bin")


def index_of(source: Source) -> tuple[dict[str, str], dict[str, str]]:
    """(text beside the arrays, name of each array -> file).

    Raises:
        Damaged: for an index that makes no sense.
    """
    if source.size > INDEX_MAX:
        raise source.damaged(f"an index of {source.size} bytes")
    try:
        top = json.loads(source.bytes_at(0, source.size).tobytes().decode(), object_pairs_hook=safetensors.unique)
    except (ValueError, RecursionError) as error:
        raise source.damaged(f"the index is not valid JSON: {str(error)[:200]}") from error
    places = top.get("weight_map") if isinstance(top, dict) else None
    metadata = top.get("metadata", {}) if isinstance(top, dict) else None
    if not isinstance(places, dict) or not isinstance(metadata, dict):
        raise source.damaged("the index has no table of arrays")
    if not all(isinstance(file, str) for file in places.values()):
        raise source.damaged("the index names files that are no text")
    texts = {key: value if isinstance(value, str) else str(value)[:1000] for key, value in metadata.items()}
    return texts, places


def files_of(source: Source) -> list[str]:
    """The names of the shards, as `index_of` finds them."""
    return list(dict.fromkeys(index_of(source)[1].values()))


def owns_folder(seam: Seam, path: str) -> bool:
    return bool(_of_folder(seam, path))


def read_folder(seam: Seam, path: str) -> Content:
    """The weights in a folder, in one file or in shards, without what lies beside them."""
    with opened(f"{path.rstrip('/')}/{_of_folder(seam, path)}", seam) as source:
        return read(source) if owns(source) else _shard(source)


def _of_folder(seam: Seam, path: str) -> str:
    there = {name for name, is_folder in seam.files.names(path) if not is_folder}
    return next((name for name in _FOLDER if name in there), "")


def needed(state: Any, max_shard_size: int | str) -> bool:
    """Whether a state is more than one shard of this size."""
    return len(_plan(safetensors.take_apart(state).arrays, bytes_of(max_shard_size))) > 1


def write(
    state: Any, target: Target, metadata: Mapping[str, str] | None = None, max_shard_size: int | str = SHARD_BYTES
) -> list[Note]:
    """Shards beside an index, filled one after the other as transformers fills them.

    Args:
        metadata: text beside the state, in the index and in each shard.
        max_shard_size: bytes, or text such as "5GB"; an array that is larger has a shard of its own.

    Raises:
        UsageError: for a size that is none.
    """
    parts = safetensors.take_apart(state)
    texts = safetensors.checked(metadata, target)
    plan = _plan(parts.arrays, bytes_of(max_shard_size))
    base = target.name.rpartition("/")[2].removesuffix(".index.json").removesuffix(".safetensors")
    places: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = f"{base}-{number:05d}-of-{len(plan):05d}.safetensors"
        safetensors.pack({name: parts.arrays[name] for name in names}, {"format": "pt", **texts}, target.beside(file))
        places |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in parts.arrays.values())
    index = {"metadata": {**texts, named.KEY: parts.table.decode(), "total_size": total}, "weight_map": places}
    target.write(json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n")
    return safetensors.notes(parts)


def _plan(arrays: Mapping[str, Array], size_max: int) -> Sequence[Sequence[str]]:
    """Names shard by shard, in their order."""
    plan: list[list[str]] = [[]]
    size = 0
    for name, array in arrays.items():
        if plan[-1] and size + array.nbytes > size_max:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += array.nbytes
    return plan


def bytes_of(size: int | str) -> int:
    """A size as a number of bytes: "5GB" are 5·10⁹, "5GiB" 5·2³⁰.

    Raises:
        UsageError: for what is no size.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is not None:
        power = _POWERS[found[2].lower()]
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if isinstance(size, (bool, str)) or not isinstance(size, (int, np.integer)) or size < 1:
        raise UsageError(f"no size of a shard: {size!r}", do='give a number of bytes, or text such as "5GB"')
    return int(size)
