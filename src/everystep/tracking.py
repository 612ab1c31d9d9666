"""What a run tracks: named objects whose state makes it, and what of them is declared frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from everystep import adapters
from everystep.checkpoint import LOOP, RESERVED, RNG
from everystep.errors import UsageError
from everystep.restore import STATE, WORKER
from everystep.save.frozen import Declared
from everystep.save.roles import with_roles
from everystep.schema import Roled
from everystep.seam import Seam
from everystep.workers import Worker

TRUSTED = "trusted"


class Tracking:
    """The objects by name; `state` captures them."""

    def __init__(self, seam: Seam) -> None:
        self.objects: dict[str, Any] = {}
        self.worker = Worker(seam)
        self.with_rng = True
        self._trusts = False
        self._seeds: dict[str, Any] = {}
        self._below: tuple[str, ...] | None = ()

    def add(self, objects: dict[str, Any], *, rng: bool, frozen: str | Collection[str] | None) -> list[str]:
        """Takes all of them or none; answers the new names.

        Raises:
            Unsupported, UsageError: for what cannot be tracked.
        """
        for name, target in objects.items():
            if name in RESERVED:
                raise UsageError(f"the name {name!r} is taken by everystep itself", do="track it under another name")
            adapters.check_trackable(target, name)
        below = _check_frozen(frozen)
        new = [name for name in objects if name not in self.objects]
        self.objects.update(objects)
        self.with_rng = self.with_rng and rng
        if frozen is not None:
            self._trusts = True
            self._below = None if below is None or self._below is None else (*self._below, *below)
        return new

    def resumed(self, random: Mapping[str, Any]) -> None:
        """The run goes on from a checkpoint with these random states."""
        self.worker.forget()
        self._seeds = {name: random[name] for name in adapters.RESEEDED if name in random}

    def reseed(self, step: int) -> None:
        """A step is complete: random generators whose state nobody can read go on from a seed of the next one's own."""
        if self.with_rng:
            adapters.reseed(step, self._seeds)

    def state(self, step: int, explicit: Any, position: dict[str, Any]) -> dict[str, Any]:
        """All that a checkpoint holds.

        Args:
            explicit: a state that is given beside what is tracked.
            position: in the data.
        """
        self.reseed(step)
        whole: dict[str, Any] = {
            name: adapters.capture(target, name, self.objects) for name, target in self.objects.items()
        }
        if explicit is not None:
            whole[STATE] = with_roles(explicit)
        if self.with_rng:
            whole[RNG] = Roled("rng", adapters.random_state())
        whole[LOOP] = Roled("rng", {**position, "step": step})
        own = self.worker.section(step)
        if own is not None:
            whole[WORKER] = own
        return whole

    def declared(self) -> Declared:
        """What need not be copied while it stands still."""
        return Declared(adapters.standing(self.objects.values()), self._below) if self._trusts else Declared()


def _check_frozen(frozen: Any) -> tuple[str, ...] | None:
    """The names below which leaves are declared frozen; None for all of them."""
    if frozen is None:
        return ()
    if frozen == TRUSTED:
        return None
    names = (frozen,) if isinstance(frozen, str) else tuple(frozen) if isinstance(frozen, Collection) else (frozen,)
    if isinstance(frozen, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(
            f"frozen={frozen!r} is not known",
            do='frozen="trusted", or names of what does not train: frozen=("model.encoder",)',
        )
    return names
