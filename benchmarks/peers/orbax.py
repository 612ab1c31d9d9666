"""Orbax, sync and async, with JAX arrays that lie where the state lies.

JAX never changes an array in place, so Orbax refers to what it is handed until it has written it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from benchmarks.peers import Peer, State


class Orbax(Peer):
    name = "Orbax"
    syncs = False
    needs = ("orbax=pip install orbax-checkpoint", "jax")
    where = frozenset({"blocking", "whole"})
    plain = True
    most = 3.0
    refers = True

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import orbax.checkpoint as orbax

        jax.config.update("jax_enable_x64", True)  # or it would make four bytes of an eight-byte counter
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._orbax = orbax
        self._arrays = {
            part: {name: jax.dlpack.from_dlpack(value) for name, value in values.items()}
            for part, values in state.items()
        }
        self._form = jax.tree.map(orbax.utils.to_shape_dtype_struct, self._arrays)
        self._saver = self._make()

    def save(self, step: int) -> None:
        self.step = step
        self._saver.save(self.path(step), args=self._orbax.args.StandardSave(self._arrays))

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        return self._saver.restore(self.path(step), args=self._orbax.args.StandardRestore(self._form))

    def close(self) -> None:
        self._saver.close()

    def _make(self) -> Any:
        return self._orbax.Checkpointer(self._orbax.StandardCheckpointHandler())


class OrbaxAsync(Orbax):
    name = "Orbax async"
    where = frozenset({"blocking", "training", "link"})

    def finish(self) -> None:
        self._saver.wait_until_finished()
        super().finish()

    def _make(self) -> Any:
        return self._orbax.AsyncCheckpointer(self._orbax.StandardCheckpointHandler())


PEERS = (Orbax, OrbaxAsync)
