"""A run's configuration as a dict that remembers what is new in it."""

from __future__ import annotations

from typing import Any

from everystep.errors import UsageError
from everystep.schema.plain import check_text, decode, encode


class RunConfig(dict[str, Any]):
    """The configuration as it is; what is set goes into the next record. Nothing can be taken out."""

    def __init__(self, stored: dict[str, Any], new: dict[str, Any]) -> None:
        super().__init__({**stored, **{name: decode(value) for name, value in new.items()}})
        self._new = new

    def __setitem__(self, name: str, value: Any) -> None:
        self._new[check_text(name, "the name of a configuration value")] = encode(value, f"config {name}")
        super().__setitem__(name, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __delitem__(self, name: str) -> None:
        raise UsageError(f"config {name!r} stays: a run's configuration only grows", do="set it to None")

    def pop(self, name: str, *default: Any) -> Any:
        del self[name]

    def popitem(self) -> Any:
        del self["…"]

    def clear(self) -> None:
        del self["…"]
