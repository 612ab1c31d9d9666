"""NumPy arrays and scalars, and the random number generators of NumPy and Python."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from everystep.errors import Damaged, Mismatch, Unsupported
from everystep.schema import Box, Composite, Described, Leaf, LoadReport, Part
from everystep.schema.dtype import name_of, parse

# C has several names for some layouts: np.longlong is not np.int64, though their arrays have one dtype.
_TWINS = {f"scalar:{char}": char for char in "iIlLqQgG"}
KINDS = ("array", "scalar", "bytes", "str", *_TWINS)
RANDOM = ("python", "numpy")
MAKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {}  # NumPy has no composites
MISFITS: tuple[type[Exception], ...] = ()
Array = np.ndarray[Any, Any]


def describe(value: Any, path: str) -> Described | Composite | None:
    if isinstance(value, Part):
        return _part(value, path)
    if isinstance(value, np.generic):
        return _scalar(value, path)
    if type(value) in (np.ndarray, np.memmap):
        return Described(name_of(value.dtype, path), value.shape, "array", value, _identity(value))
    if isinstance(value, np.ndarray):
        raise Unsupported(
            f"a {type(value).__name__} holds more than its array (a mask, a class)",
            where=path,
            do="save np.asarray(x), and the mask beside it if there is one",
        )
    return None


def _scalar(value: np.generic, path: str) -> Described | None:
    if isinstance(value, (np.bytes_, np.str_)):
        # As an array they would lose their zero characters at the end, and the empty one would have one.
        body = bytes(value) if isinstance(value, np.bytes_) else value.encode(_UTF32, "surrogatepass")
        letter, width = ("S", 1) if isinstance(value, np.bytes_) else ("U", 4)
        array: Array = np.ndarray((), f"{letter}{len(body) // width}", body)
    else:
        array = _unpadded(value) if isinstance(value, (np.longdouble, np.clongdouble)) else np.asarray(value)
    if type(value) is not array.dtype.type or array.dtype.kind == "O":
        return None
    name, twin = name_of(array.dtype, path), f"scalar:{array.dtype.char}"
    # Types that others add to NumPy reuse its letters.
    is_twin = array.dtype.isbuiltin == 1 and twin in _TWINS and np.dtype(array.dtype.str).type is not type(value)
    return Described(name, (), twin if is_twin else "scalar", array)


def _unpadded(value: np.generic) -> Array:
    """A long double scalar without what chance left behind the 80 bits of x86, which differs at each look."""
    array = np.array(value)
    size = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    if np.finfo(array.dtype).nmant == 63:
        array.reshape(-1).view(np.uint8).reshape(-1, size)[:, 10:] = 0
    return array


def _part(value: Part, path: str) -> Described:
    if isinstance(value.array, np.ndarray) and type(value.array) not in (np.ndarray, np.memmap):
        describe(value.array, path)  # refuses it
    array = np.asarray(value.array)
    shape = tuple(int(n) for n in value.shape)
    box = Box(tuple(int(n) for n in value.start), array.shape)
    if not box.fits(shape):
        raise Unsupported(
            f"a part of shape {array.shape} at {tuple(value.start)} lies outside a leaf of {shape}",
            where=path,
            do="give start and shape in global coordinates",
        )
    return Described(name_of(array.dtype, path), shape, "array", array, None, (box,))


def _identity(array: Array) -> Any:
    """Two arrays with this in common are two names of one memory; an empty one has no memory to share."""
    if array.nbytes == 0:
        return None
    return ("numpy", array.__array_interface__["data"][0], array.shape, array.strides, name_of(array.dtype))


def build(leaf: Leaf, data: Array) -> Any:
    """The object for a leaf from its bytes (a flat uint8 array that nobody else uses)."""
    if leaf.kind == "bytes":
        return data.tobytes()
    if leaf.kind == "str":
        return _text(leaf, data, "utf-8")
    array = as_array(leaf, data)
    if leaf.kind != "scalar" and leaf.kind not in _TWINS:
        return array
    if array.shape != ():
        raise Damaged(f"a scalar of shape {array.shape}", where=leaf.path)
    if array.dtype.kind == "S":
        return np.bytes_(data.tobytes())
    if array.dtype.kind == "U":
        return np.str_(_text(leaf, data, "utf-32-be" if array.dtype.byteorder == ">" else _UTF32))
    twin = np.dtype(_TWINS.get(leaf.kind, array.dtype))
    return array.view(twin)[()] if twin == array.dtype else array[()]


_UTF32 = f"utf-32-{sys.byteorder[0]}e"  # with the order in its name, no mark is put before the text


def _text(leaf: Leaf, data: Array, encoding: str) -> str:
    try:
        return data.tobytes().decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        raise Damaged("bytes that are no text", where=leaf.path) from error


def as_array(leaf: Leaf, data: Array) -> Array:
    """A leaf's bytes as an array, whatever framework it came from."""
    dtype = parse(leaf.dtype)
    try:
        # Never -1, which reshape would fill in; np.empty would make |S0 |S1.
        if not Box.whole(leaf.shape).fits(leaf.shape) or math.prod(leaf.shape) * dtype.itemsize != data.nbytes:
            raise ValueError("another size")
        if data.nbytes == 0:
            empty: Array = np.ndarray(leaf.shape, dtype, np.empty(0, np.uint8))
            return empty
        array: Array = data.view(dtype).reshape(leaf.shape)
        return array
    except (TypeError, ValueError, OverflowError) as error:
        what = f"{data.nbytes} bytes do not make an array of {len(leaf.shape)} axes of {leaf.dtype[:80]}"
        raise Damaged(what, where=leaf.path) from error


def owns(target: Any) -> bool:
    return isinstance(target, (np.random.Generator, np.random.RandomState, random.Random))


def capture(target: Any, path: str, tracked: Mapping[str, Any]) -> Any:
    if isinstance(target, np.random.Generator):
        return target.bit_generator.state
    if isinstance(target, np.random.RandomState):
        return target.get_state(legacy=False)
    if isinstance(target, random.Random):
        try:
            return _pack_python(target.getstate())
        except NotImplementedError as error:
            do = "leave it out: it draws from the operating system and has no state"
            raise Unsupported(f"a {type(target).__name__} has no state", where=path, do=do) from error
    return None


def apply(
    target: Any, state: Any, path: str, tracked: Mapping[str, Any], report: LoadReport
) -> Callable[[], None] | None:
    if not owns(target):
        return None
    report.loaded.append(path)
    if isinstance(target, np.random.Generator):
        if state.get("bit_generator") != type(target.bit_generator).__name__:
            raise Mismatch(
                f"the checkpoint has the state of {state.get('bit_generator')}, this generator is another kind",
                where=path,
                do="make the generator with the same bit generator as the saving program",
            )
        return lambda: setattr(target.bit_generator, "state", state)
    if isinstance(target, np.random.RandomState):
        return lambda: target.set_state(state)
    return lambda: target.setstate(_unpack_python(state))


def view(payload: Array) -> Array | None:
    return payload.reshape(-1).view(np.uint8) if payload.nbytes and payload.flags.c_contiguous else None


def copy(payload: Array, target: Array) -> None:
    if payload.nbytes == 0:
        return
    # As void, so that padding between fields and behind long doubles is copied too and equal states have equal bytes.
    void = np.dtype((np.void, payload.dtype.itemsize))
    dtype = payload.dtype if payload.dtype.kind in "biu" and payload.dtype.names is None else void
    np.copyto(target.view(dtype).reshape(payload.shape), payload.view(dtype))


def cut(payload: Array, start: int, stop: int) -> Array | None:
    return None  # what lies one behind the other can be viewed


def standing(targets: Iterable[Any]) -> set[Hashable]:
    return set()


def mark(payload: Array, declared: Collection[Hashable]) -> Hashable:
    return None  # nothing counts what is written to an array


def not_captured(target: Any, path: str) -> list[str]:
    return []  # a generator is its state


def fence() -> None:
    """NumPy has computed when it returns."""


def world() -> tuple[int, int] | None:
    return None


def random_state() -> dict[str, Any]:
    return {"python": _pack_python(random.getstate()), "numpy": np.random.get_state(legacy=False)}


def set_random_state(state: dict[str, Any]) -> list[str]:
    if "python" in state:
        random.setstate(_unpack_python(state["python"]))
    if "numpy" in state:
        np.random.set_state(state["numpy"])
    return []


def _pack_python(state: tuple[Any, ...]) -> dict[str, Any]:
    version, words, gauss = state
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def _unpack_python(state: dict[str, Any]) -> tuple[Any, ...]:
    return state["version"], tuple(int(word) for word in state["words"]), state["gauss"]
