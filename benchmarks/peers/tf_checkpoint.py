"""tf.train.Checkpoint, sync and async, of variables whose memory is that of the state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.utils.dlpack import to_dlpack

from benchmarks.peers import Peer, State


class TfCheckpoint(Peer):
    name = "TF Checkpoint"
    syncs = False
    needs = ("tensorflow",)
    where = frozenset({"blocking", "whole"})
    plain = True
    refers = True

    def __init__(self, state: State, folder: str) -> None:
        super().__init__(state, folder)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
        import tensorflow

        self._tf = tensorflow
        make = tensorflow.experimental.dlpack.from_dlpack
        variables = {
            part: {name: tensorflow.Variable(make(to_dlpack(value))) for name, value in values.items()}
            for part, values in state.items()
        }
        self._checkpoint = tensorflow.train.Checkpoint(**variables)

    def save(self, step: int) -> None:
        self.step = step
        self._checkpoint.write(self.path(step))

    def load(self, step: int | None = None) -> Mapping[str, Mapping[str, Any]]:
        """Tensor by tensor; faster than a restore into variables that were made for it."""
        reader = self._tf.train.load_checkpoint(self.path(step))
        names = {key.partition("/.ATTRIBUTES")[0]: key for key in reader.get_variable_to_shape_map()}
        return {
            part: {name: reader.get_tensor(names[f"{part}/{name.replace('.', '..')}"]) for name in values}
            for part, values in self.state.items()
        }


class TfCheckpointAsync(TfCheckpoint):
    name = "TF Checkpoint async"
    where = frozenset({"blocking"})

    def save(self, step: int) -> None:
        self.step = step
        self._checkpoint.write(self.path(step), options=self._tf.train.CheckpointOptions(enable_async=True))

    def finish(self) -> None:
        self._checkpoint.sync()
        super().finish()


PEERS = (TfCheckpoint, TfCheckpointAsync)
