"""What a run says while it works: warnings, what its background found, and each save that became durable."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from everystep.checkpoint import Checkpoint
from everystep.errors import DamageWarning, EverystepWarning
from everystep.past import PastRun
from everystep.save import Writer
from everystep.vault import Place


class TellingRun(PastRun):
    """A run that others can listen to."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place, name)
        self._listeners: list[Callable[[Checkpoint], Any]] = []

    def on_saved(self, listener: Callable[[Checkpoint], Any]) -> None:
        """Calls `listener(checkpoint)` for each save of this process once it is durable: on the thread that saves, at
        the next save or at close()."""
        self._listeners.append(listener)

    def _say_notices(self, writer: Writer) -> None:
        while writer.notices:
            self._warn(writer.notices.pop(0))
        while writer.durable:
            id = writer.durable.pop(0)
            for listener in self._listeners:
                listener(Checkpoint(self._vault, self._history().commits[id]))

    def _warn(self, text: str) -> None:
        warnings.warn(f"run {self.name!r}: {text}", EverystepWarning, stacklevel=3)

    def _warn_damaged(self, text: str) -> None:
        warnings.warn(f"run {self.name!r}: {text}", DamageWarning, stacklevel=3)
