"""everystep through its public door, as a user would."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import everystep
from benchmarks.peers import Peer, State


class Everystep(Peer):
    name = "everystep"
    keeps_all = True
    kept, most = 3.0, 3.5
    settings = everystep.Settings()
    keep_full: everystep.Rule | None = None

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        repository = everystep.open(folder, settings=self.settings)
        self._run = repository.run("bench", keep_full=self.keep_full)

    def save(self, step: int) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no byte changed")  # of sequences whose point this is
            self._saved = self._run.save(step, state=self.state)
        self.step = step

    def finish(self) -> None:
        self._saved.wait()

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        return everystep.open(self.folder)["bench"].at(self.step if step is None else step).load(like="torch")

    def close(self) -> None:
        self._run.close()


class EverystepAlone(Everystep):
    """Each checkpoint by itself, not as a difference to the one before: more bytes, less work."""

    name = "everystep, no deltas"
    kept, most = 2.0, 2.5
    settings = everystep.Settings(base_depth_max=0)


class EverystepThin(Everystep):
    """All weights, and the optimizer's state of the last two."""

    name = "everystep, keep_full=last(2)"
    where = frozenset({"whole"})
    keep_full = everystep.last(2)

    def full(self, step: int) -> bool:
        return step > self.step - 2


PEERS = (Everystep, EverystepAlone, EverystepThin)
