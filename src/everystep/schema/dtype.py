"""Names of element types: a closed table, so that nothing on disk can choose more than a known layout of bytes."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from everystep.errors import Damaged, Unsupported
from everystep.schema import plain

# Names that are their own `np.dtype(name).str`; which of them this machine has, NumPy decides.
_BUILTIN = re.compile(
    r"\|(?:b1|[iu]1|[SV]\d{1,10})"
    r"|[<>](?:[iu][248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|U\d{1,9}|[mM]8(?:\[\d{0,10}(?:[YMWDhms]|[munpfa]s)\])?)"
)
# A long double is x86's 80 bits, IEEE's 128, two doubles or one: the size alone does not say. x86's has no mark.
_LONG = re.compile(r"([<>](?:f(?:12|16)|c(?:24|32)))(?::(\d{1,3}))?")
_LONG_BITS = np.finfo(np.longdouble).nmant
_X86_BITS = 63
DEPTH_MAX = 32

ML_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
        "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn",
        "int1", "int2", "int4", "uint1", "uint2", "uint4", "complex32", "bcomplex32",
    )
    if hasattr(ml_dtypes, name)
}  # fmt: skip

_ML_NAMES = {dtype.type: name for name, dtype in ML_DTYPES.items()}
_NATIVE: dict[str, str] = {char: np.dtype(char).str for char in "?bhilqBHILQefdFD"}

# Element types that a framework has and NumPy has not; their bytes are kept, and NumPy sees the type on the right.
FOREIGN: dict[str, np.dtype[Any]] = {
    "torch.complex32": np.dtype([("real", "<f2"), ("imag", "<f2")]),
    "torch.float4_e2m1fn_x2": np.dtype("u1"),
    **{f"torch.{sign}int{bits}": np.dtype("u1") for sign in ("", "u") for bits in range(1, 8)},
    **{f"torch.{name}": np.dtype("u1") for name in ("bits1x8", "bits2x4", "bits4x2", "bits8")},
    "torch.bits16": np.dtype("<u2"),
}


def name_of(dtype: np.dtype[Any], path: str = "") -> str:
    """The name of a NumPy dtype on disk.

    Raises:
        Unsupported: for object and variable-width types, which have no fixed bytes, and for whatever would not come
            back as it is: metadata, scalar classes of one's own.
    """
    if dtype.isbuiltin == 1 and dtype.metadata is None and dtype.char in _NATIVE:
        return _NATIVE[dtype.char]  # nearly all arrays: .2 µs instead of 2
    if dtype.names is None:
        return _name(dtype, path)
    try:
        name = msgspec.json.encode(_describe(dtype, path, 0)).decode()
        same = bool(parse(name) == dtype)
    except Damaged:
        same = False
    if not same:
        raise _nameless(dtype, path)
    return name


def _name(dtype: np.dtype[Any], path: str) -> str:
    if dtype.hasobject or dtype.kind == "O":
        raise Unsupported(
            f"an array of Python objects ({dtype}) has no fixed bytes",
            where=path,
            do="turn it into numbers, fixed-width strings or a list of plain values",
        )
    _check_metadata(dtype, path)
    known = _ML_NAMES.get(dtype.type)
    if known is not None:
        return known if dtype == ML_DTYPES[known] else f">{known}"
    # Compared, because types that others add to NumPy may call themselves by the name of bytes without a meaning.
    if _BUILTIN.fullmatch(dtype.str) and np.dtype(dtype.str) == dtype and (dtype.kind != "V" or dtype.type is np.void):
        foreign = _LONG.fullmatch(dtype.str) and _LONG_BITS != _X86_BITS
        return f"{dtype.str}:{_LONG_BITS}" if foreign else dtype.str
    raise _nameless(dtype, path)


def _nameless(dtype: np.dtype[Any], path: str) -> Unsupported:
    do = "convert the array to a fixed-size dtype of NumPy or ml_dtypes"
    return Unsupported(f"the dtype {dtype!r} has no name in the format", where=path, do=do)


def _check_metadata(dtype: np.dtype[Any], path: str) -> None:
    if dtype.metadata:
        raise Unsupported(
            f"the dtype {dtype} carries metadata, which would be lost",
            where=path,
            do="save the metadata beside the array, and the array as x.astype(np.dtype(x.dtype.str))",
        )


def _describe(dtype: np.dtype[Any], path: str, depth: int) -> Any:
    """A structured dtype as plain data, its fields table by table; subarrays as [base, shape]."""
    if depth > DEPTH_MAX:
        raise Unsupported(f"a dtype nested deeper than {DEPTH_MAX} levels", where=path, do="save its fields one by one")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_describe(base, path, depth + 1), list(shape)]
    if dtype.names is None:
        return _name(dtype, path)
    _check_metadata(dtype, path)
    if dtype.type not in (np.void, np.record):
        raise _nameless(dtype, path)
    fields: list[tuple[Any, ...]] = [dtype.fields[name] for name in dtype.names]  # type: ignore[index]
    titles = [field[2] if len(field) > 2 else None for field in fields]
    if any(title is not None and not isinstance(title, str) for title in titles):
        raise Unsupported("a field title that is not a string", where=path, do="drop the titles of this dtype")
    return {
        "names": [plain.encode(name) for name in dtype.names],
        "formats": [_describe(field[0], path, depth + 1) for field in fields],
        "offsets": [field[1] for field in fields],
        "titles": [plain.encode(title) for title in titles],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
        **({"record": True} if dtype.type is np.record else {}),
    }


def parse(name: str) -> np.dtype[Any]:
    """The NumPy dtype for a name on disk.

    Raises:
        Damaged: if the name is not in the table.
        Unsupported: for a long double of another kind of machine.
    """
    try:
        if name[:1] == "{":
            return _build(msgspec.json.decode(name), 0)
        return _leaf(name)
    except (TypeError, ValueError, KeyError, OverflowError, MemoryError, RecursionError, msgspec.MsgspecError) as error:
        raise Damaged(f"unknown dtype {plain.shown(name)}", do="was it written by a newer everystep?") from error


def _leaf(name: str) -> np.dtype[Any]:
    if name in ML_DTYPES:
        return ML_DTYPES[name]
    if name in FOREIGN:
        return FOREIGN[name]
    if name[:1] == ">" and name[1:] in ML_DTYPES:
        swapped: np.dtype[Any] = ML_DTYPES[name[1:]].newbyteorder(">")
        return swapped
    long = _LONG.fullmatch(name)
    if long:
        return _long(name, long[1], int(long[2] or _X86_BITS))
    dtype = np.dtype(name) if _BUILTIN.fullmatch(name) else None
    if dtype is None or dtype.str != name:
        raise ValueError(name)
    return dtype


def _long(name: str, builtin: str, bits: int) -> np.dtype[Any]:
    try:
        if bits == _LONG_BITS:
            return np.dtype(builtin)
    except TypeError:
        pass  # this machine's long double has another size: said below
    raise Unsupported(f"long doubles of another kind of machine ({name})", do="load them where they were saved")


def _build(node: Any, depth: int) -> np.dtype[Any]:
    if depth > DEPTH_MAX:
        raise ValueError("nested too deep")
    if isinstance(node, str):
        return _leaf(node)
    if isinstance(node, list):
        base, shape = node
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("not a shape")
        return np.dtype((_build(base, depth + 1), tuple(shape)))
    if not isinstance(node, dict) or not node.keys() <= _KEYS:
        raise ValueError("not a structured dtype")
    if type(node["aligned"]) is not bool or len(node["titles"]) != len(node["names"]):
        raise ValueError("not the tables of a structured dtype")
    spec: Any = {
        "names": [_text(name) for name in node["names"]],
        "formats": [_build(part, depth + 1) for part in node["formats"]],
        "offsets": node["offsets"],
        "itemsize": node["itemsize"],
    }
    titles = [None if title is None else _text(title) for title in node["titles"]]
    if any(title is not None for title in titles):
        spec["titles"] = titles
    built: np.dtype[Any] = np.dtype(spec, align=node["aligned"])
    return np.dtype((np.record, built)) if node.get("record") else built


_KEYS = {"names", "formats", "offsets", "titles", "itemsize", "aligned", "record"}


def _text(node: Any) -> str:
    text = plain.decode(node)
    if not isinstance(text, str):
        raise TypeError("not a name")
    return text
