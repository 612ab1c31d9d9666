"""How a path is written: the names of leaves, as `leaves()` lists them and `load(only=…)` takes them."""

from __future__ import annotations

from collections.abc import Hashable

from everystep.schema import join


def path_to(*keys: Hashable) -> str:
    """The path of what lies under these keys of a nested state: `path_to("model", "fc/1", 0)` is `model/fc%2F1/[0]`."""
    path = ""
    for key in keys:
        path = join(path, key)
    return path
