"""What people type for a share, a time or a number of best ones, and the rules that come of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import everystep
from everystep import Rule, UsageError
from everystep.cli.options import instead

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_TIME = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_SECONDS)})")


def share(text: str, option: str) -> Fraction:
    """1/10, 10% or 0.1.

    Raises:
        UsageError: for anything else, and for what is not above 0 and at most 1.
    """
    try:
        found = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found <= 1:
        raise UsageError(f"{option} {text}: not a share", do=f"{option} 1/10, {option} 10% or {option} 0.1")
    return found


def seconds(text: str, option: str) -> float:
    """90s, 30min, 12h, 7d or 2w.

    Raises:
        UsageError: for anything else.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise UsageError(f"{option} {text}: not a time", do=f"a number and {', '.join(_SECONDS)}: {option} 7d")
    return float(found[1]) * _SECONDS[found[2]]


def metric(text: str, option: str) -> tuple[str, str | None]:
    """METRIC, METRIC:min or METRIC:max; the name of a metric may have a colon, too.

    Raises:
        UsageError: for an empty name.
    """
    name, colon, mode = text.rpartition(":")
    if not (colon and mode in ("min", "max")):
        name, mode = text, ""
    if not name:
        raise UsageError(f"{option} does not say which metric", do=f"{option} val_loss, or {option} val_loss:min")
    return name, mode or None


def best(text: str, option: str) -> Rule:
    """N:METRIC[:MODE]; METRIC[:MODE] for the one best.

    Raises:
        UsageError: accordingly.
    """
    number, colon, rest = text.partition(":")
    counted = bool(colon) and number.isascii() and number.isdigit()
    if not rest.strip() and number.isascii() and number.isdigit():
        raise UsageError(f"{option} {text}: the best {number} by which metric?", do=f"{option} {number}:val_loss")
    name, mode = metric(rest if counted else text, option)
    if counted and int(number) < 1:
        raise UsageError(f"{option} {text}: how many is a positive number", do=f"{option} 3:{name}")
    count = int(number) if counted else 1
    with instead(UsageError, do=f"{option} {count}:{name}:min or {option} {count}:{name}:max"):
        return everystep.best(count, name, mode)


def every(text: str, option: str) -> Rule:
    """Steps, or a time.

    Raises:
        UsageError: for anything else.
    """
    if re.fullmatch(r"0*[1-9][0-9]{0,17}", text, re.ASCII):
        return everystep.every(int(text))
    if _TIME.fullmatch(text.strip()):
        return everystep.every(seconds=seconds(text, option))
    raise UsageError(f"{option} {text}: neither steps nor a time", do=f"{option} 1000 or {option} 6h")


def union(rules: Sequence[Rule]) -> Rule | None:
    """What any of them keeps; None without rules."""
    whole: Rule | None = None
    for rule in rules:
        whole = rule if whole is None else whole | rule
    return whole
