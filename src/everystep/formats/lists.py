"""Lists in the shape of an array, for what no array holds."""

from __future__ import annotations

from typing import Any


def shaped(items: list[Any], shape: tuple[int, ...]) -> Any:
    """Items in the order of an array as nested lists; the item itself where there are no axes. An empty list stands
    for whatever has an axis without length."""
    if not shape:
        return items[0]
    made = list(items)
    for size in reversed(shape[1:] if items else ()):
        made = [made[at : at + size] for at in range(0, len(made), size)]
    return made
