"""What a store says of an object beside its bytes."""

from __future__ import annotations

from typing import NamedTuple


class Stat(NamedTuple):
    """Length in bytes; and seconds by the store's own clock, of which only differences mean something."""

    nbytes: int
    time: float
