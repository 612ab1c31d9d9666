"""PyTorch's .pth files, read and written without torch: an allow-list reader, and files that torch.load takes with
weights_only=True."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np

from everystep.errors import Error, Unsupported
from everystep.formats.content import Content, Note
from everystep.formats.file import Array, Source, Target
from everystep.formats.pth_emit import Emitter
from everystep.formats.pth_objects import Objects
from everystep.formats.pth_state import Assembly
from everystep.formats.pth_stream import Machine
from everystep.formats.zipped import MAGIC, Archive, Writer

EXTENSIONS: tuple[str, ...] = (".pth", ".pt", ".ckpt", ".bin", ".tar")
_LEGACY = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
"""A pickle of 0x1950a86a20f9469cfc6c, with which files of torch before 1.6 begin."""
_LEGACY_VERSION = 1001
_GROW_MIN, _GROW_TIMES = 16 << 20, 8  # torch never compresses; who packed a file again got little for it


def owns(source: Source) -> bool:
    head = source.head()
    return bool(_LEGACY.match(head)) or (head.startswith(MAGIC) and bool(_prefix(Archive(source).names)))


def read(source: Source) -> Content:
    """The state in a .pth file, zip or of before torch 1.6.

    Tensors are views of their storages, as in torch. What a file of before 1.6 holds is not checked: it has no CRC.

    Raises:
        Damaged, Unsupported: see `everystep.formats.read`.
    """
    try:
        legacy = _LEGACY.match(source.head())
        return _read_legacy(source, legacy.end()) if legacy else _read_zip(source)
    except Error as error:
        error.where = error.where or source.name
        raise


def _read_zip(source: Source) -> Content:
    archive = Archive(source, _GROW_MIN, _GROW_TIMES)
    prefix = _prefix(archive.names)
    if f"{prefix}constants.pkl" in archive.names:
        do = "load it with torch.jit.load() and save its state_dict()"
        raise Unsupported("a TorchScript program, not a state", where=source.name, do=do)
    stream = archive.read(f"{prefix}data.pkl")
    objects = Objects(len(stream))
    value, _ = Machine(stream.data, objects, f"{source.name}:{prefix}data.pkl").load(0)
    order = b"little"
    if f"{prefix}byteorder" in archive.names:
        order = archive.read(f"{prefix}byteorder").tobytes().strip()
    if order not in (b"little", b"big"):
        raise source.damaged(f"an unknown byte order: {order[:20]!r}")
    work = Assembly(
        lambda key: archive.read(f"{prefix}data/{key}"), source.size, order.decode() != sys.byteorder, source.name
    )
    return _content(work, value, objects)


def _prefix(names: list[str]) -> str:
    """The folder that all entries of a torch file are in; empty if it is none."""
    found = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    return found[0] if len(found) == 1 else ""


def _read_legacy(source: Source, at: int) -> Content:
    """The pickles (magic, version, machine, state, keys of storages), then each storage: its length and its bytes."""
    data = source.bytes_at(0, source.size)
    objects = Objects(source.size)
    machine = Machine(data.data, objects, source.name)
    version, at = machine.load(at)
    info, at = machine.load(at)
    if version != _LEGACY_VERSION or not isinstance(info, dict):
        raise source.damaged("not the header of a torch file")
    value, at = machine.load(at)
    keys, at = machine.load(at)
    if not isinstance(keys, list) or not set(map(type, keys)) <= {str} or not set(keys) <= objects.storages.keys():
        raise source.damaged("the list of storages makes no sense")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(data[at : at + 8].tobytes(), "little") * objects.storages[key].dtype.itemsize
        places[key] = (at + 8, count)
        at += 8 + count
        if at > source.size:
            raise source.damaged(f"the file ends at {source.size}, before {at}")

    def fetch(key: str) -> Array:
        start, count = places.get(key, (0, -1))
        if count < 0:
            raise source.damaged(f"a storage is missing: {key[:80]!r}")
        return data[start : start + count].copy()  # aligned, and without the rest of the file

    swapped = info.get("little_endian", True) is not (sys.byteorder == "little")
    return _content(Assembly(fetch, source.size, swapped, source.name), value, objects)


def _content(work: Assembly, value: Any, objects: Objects) -> Content:
    state = work.state(value)
    keys = [Note("", f"{text}: in the key of a dict") for text in objects.changed_keys]
    return Content(state, "pth", tuple(work.not_understood), (*work.changed, *keys))


def write(state: Any, target: Target) -> list[Note]:
    """Arrays become CPU tensors, NumPy scalars numbers; two names of one array share one storage."""
    emitter = Emitter()
    stream = emitter.stream(state)
    archive = Writer(target)
    for name, body in (("data.pkl", stream), ("byteorder", sys.byteorder.encode()), ("version", b"3\n")):
        with archive.entry(f"archive/{name}", len(body)) as entry:
            entry.write(body)
    for key, array in enumerate(emitter.storages):
        with archive.entry(f"archive/data/{key}", array.nbytes, align=True) as entry:
            entry.write(array.reshape(-1).view(np.uint8))
    archive.close()
    return emitter.changed
