"""Writes a state as the pickle stream of a .pth file, with the opcodes that torch.load(weights_only=True) takes."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.errors import Unsupported
from everystep.formats.content import Note
from everystep.formats.file import Array
from everystep.formats.pth_objects import DTYPES, STORAGES
from everystep.schema import Fields, join
from everystep.schema.tree import DEPTH_MAX

_STORAGE_OF = {DTYPES[name]: kind for kind, name in STORAGES.items() if kind[0] != "Q" and kind != "UntypedStorage"}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class Emitter:
    """One stream. `storages` are the contiguous arrays that belong beside it, by their number."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._memo: dict[str, int] = {}
        self._known: dict[Any, int] = {}
        self.storages: list[Array] = []
        self.changed: list[Note] = []

    def stream(self, state: Any) -> bytes:
        """The bytes of the pickle.

        Raises:
            Unsupported: naming the path of what torch has no form for.
        """
        self._out += b"\x80\x02"
        self._value(state, "", 0)
        return bytes(self._out + b".")

    def _value(self, value: Any, path: str, depth: int) -> None:
        if depth > DEPTH_MAX:
            raise Unsupported(f"state nested deeper than {DEPTH_MAX} levels", where=path, do="does it contain itself?")
        kind: type = type(value)
        plain = _PLAIN.get(kind)
        if plain is not None:
            plain(self, value, path)
        elif kind in (dict, OrderedDict, Counter, Fields):
            self._dict(value, kind, path, depth)
        elif kind is list:
            self._out += b"]("
            self._items(value, path, depth)
            self._out += b"e"
        elif kind is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
            if kind is not tuple:
                self.changed.append(Note(path, f"a {kind.__name__} is a tuple here"))
            self._out += b"("
            self._items(value, path, depth)
            self._out += b"t"
        elif kind in (np.ndarray, np.memmap):
            self._array(value, path)
        elif isinstance(value, np.generic) and (value.dtype.kind in "biufcSU" or value.dtype in _NAME_OF):
            self.changed.append(Note(path, f"a NumPy {value.dtype} is a number or text of Python here"))
            self._scalar(value.item(), path)
        else:
            raise _refused(f"a {kind.__module__}.{kind.__qualname__}", path)

    def _scalar(self, value: Any, path: str) -> None:
        plain = _PLAIN.get(type(value))
        if plain is None:  # a long double stays what it is
            raise _refused(f"a {type(value).__name__}", path)
        plain(self, value, path)

    def _items(self, items: Any, path: str, depth: int) -> None:
        for i, item in enumerate(items):
            self._value(item, join(path, i), depth + 1)

    def _dict(self, value: dict[Any, Any], kind: type, path: str, depth: int) -> None:
        if kind is Fields:
            self.changed.append(Note(path, "a record is an OrderedDict here"))
        if kind is dict:
            self._out += b"}"
        elif kind is Counter:
            self._global("collections", "Counter")
            self._out += b"}"
        else:
            self._global("collections", "OrderedDict")
            self._out += b")R"
        self._out += b"("
        for key, item in value.items():
            self._key(key, path)
            self._value(item, join(path, key), depth + 1)
        self._out += b"u\x85R" if kind is Counter else b"u"

    def _key(self, key: Any, path: str) -> None:
        if type(key) not in _PLAIN and type(key) is not tuple:
            raise _refused(f"a key of type {type(key).__name__}", path)
        self._value(key, path, DEPTH_MAX - 4)

    def _array(self, array: Array, path: str) -> None:
        name = _NAME_OF.get(array.dtype.newbyteorder("="))
        if name is None:
            raise _refused(f"an array of {array.dtype}", path)
        identity = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str, name)
        key = self._known.get(identity)
        if key is None:
            key = len(self.storages)
            self.storages.append(np.asarray(array, array.dtype.newbyteorder("="), order="C"))
            if array.nbytes:
                self._known[identity] = key
        array = self.storages[key]
        storage = _STORAGE_OF.get(array.dtype)
        self._global("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3")
        self._out += b"(("
        self._once("storage")
        self._global("torch", storage) if storage else self._global("torch.storage", "UntypedStorage")
        self._text(str(key), path)
        self._once("cpu")
        self._int(array.size if storage else array.nbytes, path)
        self._out += b"tQK\x00"
        for sizes in (array.shape, _strides(array.shape)):
            self._out += b"("
            for n in sizes:
                self._int(n, path)
            self._out += b"t"
        self._out += b"\x89"
        self._global("collections", "OrderedDict")
        self._out += b")R"
        if not storage:
            self._global("torch", name)
        self._out += b"tR"

    def _global(self, module: str, name: str) -> None:
        self._remembered(f"{module}\n{name}\n", lambda text: b"c" + text.encode())

    def _once(self, text: str) -> None:
        self._remembered(text, lambda text: b"X" + struct.pack("<I", len(text)) + text.encode())

    def _remembered(self, text: str, spell: Callable[[str], bytes]) -> None:
        """Names are written once; later the stream points to them."""
        number = self._memo.get(text)
        if number is None:
            number = self._memo[text] = len(self._memo)
            self._out += spell(text) + b"q" + bytes([number])
        else:
            self._out += b"h" + bytes([number])

    def _none(self, value: None, path: str) -> None:
        self._out += b"N"

    def _bool(self, value: bool, path: str) -> None:
        self._out += b"\x88" if value else b"\x89"

    def _int(self, value: int, path: str) -> None:
        if 0 <= value < 1 << 8:
            self._out += b"K" + struct.pack("<B", value)
        elif -1 << 31 <= value < 1 << 31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            body = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(body) > 255:
                raise _refused("an integer of more than 2,000 bits", path)
            self._out += b"\x8a" + bytes([len(body)]) + body

    def _float(self, value: float, path: str) -> None:
        self._out += b"G" + struct.pack(">d", value)

    def _complex(self, value: complex, path: str) -> None:
        self._global("__builtin__", "complex")
        self._float(value.real, path)
        self._float(value.imag, path)
        self._out += b"\x86R"

    def _text(self, value: str, path: str) -> None:
        body = value.encode("utf-8", "surrogatepass")
        if len(body) >= 1 << 32:
            raise _refused("text of more than 4 GiB", path)
        self._out += b"X" + struct.pack("<I", len(body)) + body

    def _bytes(self, value: bytes, path: str) -> None:
        """As protocol 2 spells them: there is no opcode for bytes."""
        self._global("_codecs", "encode")
        self._text(value.decode("latin1"), path)
        self._once("latin1")
        self._out += b"\x86R"


_PLAIN: dict[type, Callable[[Emitter, Any, str], None]] = {
    type(None): Emitter._none,
    bool: Emitter._bool,
    int: Emitter._int,
    float: Emitter._float,
    complex: Emitter._complex,
    str: Emitter._text,
    bytes: Emitter._bytes,
}


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous tensor, in elements; axes of no length count as one, as in torch."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    return strides


def _refused(what: str, path: str) -> Unsupported:
    do = "give arrays of torch's dtypes and plain values (tensors: load them as NumPy arrays), or leave it out"
    return Unsupported(f"{what} has no form in a .pth file", where=path or "the state itself", do=do)
