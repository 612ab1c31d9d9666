"""Plain values as JSON, exactly: None, bool, int of any size, float with its bits, complex, str, bytes, tuple keys."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from typing import Any

from everystep.errors import Damaged, Unsupported, UsageError

_SAFE_INT = 1 << 53
DEPTH_MAX = 100


def is_plain(value: object) -> bool:
    """Whether a value is kept as it is; subclasses (an IntEnum, a numpy str_) are not: they would come back changed."""
    return value is None or type(value) in (bool, int, float, complex, str, bytes)


def shown(node: Any) -> str:
    """The beginning of what was read, for a message: in bounded time, whatever it is."""
    head = node[0] if isinstance(node, list) and node else node
    return repr(head[:80]) if isinstance(head, (str, bytes)) else f"a {type(head).__name__}"


def encode(value: Any, path: str = "", depth: int = 0) -> Any:
    """A JSON value for a plain value; tuples of plain values are taken too, since they serve as dict keys.

    Raises:
        Unsupported: for anything else.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -_SAFE_INT < value < _SAFE_INT else {"i": hex(value)}
    if kind is float:
        return {"f": struct.pack(">d", value).hex()}
    if kind is complex:
        return {"c": struct.pack(">dd", value.real, value.imag).hex()}
    if kind is str:
        return _encode_text(value)
    if kind is bytes:
        return {"b": base64.b64encode(value).decode()}
    if kind is tuple:
        if depth >= DEPTH_MAX:
            raise Unsupported(f"tuples nested deeper than {DEPTH_MAX} levels", where=path, do="flatten this key")
        return {"t": [encode(part, path, depth + 1) for part in value]}
    raise Unsupported(
        f"a {kind.__module__}.{kind.__qualname__} is not a plain value",
        where=path,
        do="use None, bool, int, float, complex, str, bytes or a tuple of them",
    )


def check_text(text: Any, what: str, *, empty: bool = False) -> str:
    """A name or a text that goes into a record as it is.

    Raises:
        UsageError: for what is no text, or holds half a character.
    """
    if isinstance(text, str) and (text or empty):
        try:
            text.encode()
        except UnicodeEncodeError:
            pass  # said below
        else:
            return text
    raise UsageError(f"{what} cannot be {text!r}", do="give it as a text of whole Unicode characters")


def encode_metric(value: Any, path: str = "") -> Any:
    """Like `encode`, but finite floats stay readable numbers: JSON keeps those exactly."""
    return value if type(value) is float and math.isfinite(value) else encode(value, path)


def _encode_text(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"s": value.encode("utf-8", "surrogatepass").hex()}
    return value


def decode(node: Any, depth: int = 0) -> Any:
    """The inverse of `encode`.

    Raises:
        Damaged: if the node is not one that `encode` makes.
    """
    if node is None or type(node) in (bool, int, str, float):
        return node
    try:
        ((kind, body),) = node.items()
        if kind == "i":
            return int(body, 16)
        if kind == "f":
            return struct.unpack(">d", bytes.fromhex(body))[0]
        if kind == "c":
            return complex(*struct.unpack(">dd", bytes.fromhex(body)))
        if kind == "s":
            return bytes.fromhex(body).decode("utf-8", "surrogatepass")
        if kind == "b":
            return base64.b64decode(body, validate=True)
        if kind == "t" and isinstance(body, list) and depth < DEPTH_MAX:
            return tuple(decode(part, depth + 1) for part in body)
    except (AttributeError, TypeError, ValueError, struct.error, binascii.Error) as error:
        raise Damaged(f"not a plain value: {shown(node)}") from error
    raise Damaged(f"unknown kind of plain value: {shown(kind)}")
