"""Numbers, times and names as people read them; nothing here asks or prints."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_AGES = ((60, 1, "s"), (3600, 60, "min"), (2 * 86400, 3600, "h"), (60 * 86400, 86400, "days"))
_NUMPY = re.compile(r"([<>|])([iufc])(\d+)")
_KINDS = {"i": "int", "u": "uint", "f": "float", "c": "complex"}
STEPS_SHOWN = 8


def clean(text: object) -> str:
    """Text from disk, harmless to a terminal: control characters as escapes, so that no name can move the cursor."""
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


def size(nbytes: float) -> str:
    """Bytes with three digits: 1.25 MiB."""
    unit = 0
    while nbytes >= 1024 and unit + 1 < len(_UNITS):
        nbytes, unit = nbytes / 1024, unit + 1
    digits = 0 if unit == 0 or nbytes >= 100 else 1 if nbytes >= 10 else 2
    return f"{nbytes:.{digits}f} {_UNITS[unit]}"


def age(seconds: float, date: str) -> str:
    """How long ago; the date, once that says more."""
    if seconds < 2:  # clocks of two machines differ: what seems to come is now
        return "now"
    return f"{span(seconds)} ago" if seconds < _AGES[-1][0] else date[:10]


def span(seconds: float) -> str:
    """How long, in the largest unit that is not 0."""
    for limit, unit, name in _AGES:
        if seconds < limit:
            return f"{int(seconds / unit)} {name}"
    return f"{int(seconds / 86400)} days"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def share(part: float) -> str:
    """Of a whole, so that only nothing is 0 % and only all of it is 100 %."""
    if part in (0.0, 1.0):
        return f"{part:.0%}".replace("%", " %")
    return f"{min(max(100 * part, 0.01), 99.99):.3g} %" if part < 0.999 else f"{min(100 * part, 99.99):.4g} %"


def count(number: int, one: str) -> str:
    """1 checkpoint, 2 checkpoints; leaves."""
    many = {"leaf": "leaves"}.get(one, f"{one}s")
    return f"{number} {one if number == 1 else many}"


def value(found: Any) -> str:
    """A plain value on one line."""
    if isinstance(found, dict):
        return ", ".join(f"{clean(name)} {value(part)}" for name, part in found.items())
    if isinstance(found, (list, tuple)):
        return ", ".join(map(value, found))
    if isinstance(found, float):
        return f"{found:.10g}"
    if isinstance(found, bool):
        return "yes" if found else "no"
    return "none" if found is None else clean(found)


def numbers(column: Sequence[Any]) -> list[str]:
    """Metrics of one column; floats of ordinary size get the same number of decimals, so that their points align."""
    floats = [abs(v) for v in column if isinstance(v, float) and math.isfinite(v) and v]
    small, large = min(floats, default=1.0), max(floats, default=1.0)
    form = ".4g" if small < 1e-5 or large >= 1e6 else ".4f" if small >= 1e-3 else ".6f"
    return ["" if v is None else format(v, form) if isinstance(v, float) else clean(v) for v in column]


def element(dtype: str) -> str:
    """An element type by the name that NumPy and PyTorch users know."""
    found = _NUMPY.fullmatch(dtype)
    if found:
        swapped = " big-endian" if found[1] == ">" and found[3] != "1" else ""
        return f"{_KINDS[found[2]]}{int(found[3]) * 8}{swapped}"
    return {"|b1": "bool"}.get(dtype, "record" if dtype.startswith("{") else clean(dtype))


def shape(extents: Sequence[int]) -> str:
    return " × ".join(map(str, extents)) or "scalar"


def steps(found: Sequence[int]) -> str:
    """Which steps: all of a few, the ends of many."""
    if len(found) <= STEPS_SHOWN:
        return ", ".join(map(str, found))
    first, last = found[:3], found[-2:]
    return f"{', '.join(map(str, first))} … {', '.join(map(str, last))} ({len(found)} checkpoints)"


def jsonable(found: Any) -> Any:
    """The nearest that strict JSON has: NaN and infinities by name, tuples as lists, bytes in hexadecimal."""
    if isinstance(found, float) and not math.isfinite(found):
        return "NaN" if math.isnan(found) else "Infinity" if found > 0 else "-Infinity"
    if found is None or isinstance(found, (bool, int, float, str)):
        return found
    if isinstance(found, dict):
        return {str(name): jsonable(part) for name, part in found.items()}
    if isinstance(found, (list, tuple)):
        return [jsonable(part) for part in found]
    return found.hex() if isinstance(found, bytes) else str(found)
