"""What the adapters' makers of composites share: names from a closed table, and which errors mean unfit parts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class Misfit(Exception):
    """The parts of a composite do not fit together; `adapters.compose` says of which."""


MISFITS = (Misfit, AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError)
"""What a maker raises where parts do not fit together, beside its framework's own."""


def known(name: Any, table: Collection[str]) -> str:
    """A name that the data chose, if it is one of these.

    Raises:
        Misfit: if not.
    """
    if not isinstance(name, str) or name not in table:
        raise Misfit(f"unknown name {str(name)[:80]!r}")
    return name
