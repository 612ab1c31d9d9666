"""Keras: a callback that does what BackupAndRestore and ModelCheckpoint do together, in a run; on every backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

import everystep
from everystep.integrations.shared import drop, load_state, numbers

try:
    import keras
except ImportError as error:
    raise everystep.Unsupported("Keras is not installed here", do='pip install "everystep[keras]"') from error

# Where Keras' own BackupAndRestore tells `fit` which epoch comes first; there is no other way in.
_INITIAL_EPOCH = "_initial_epoch"
_REASON = "Keras"


class ResumableDataset(keras.utils.PyDataset):
    """A dataset of batches whose order depends on its seed and the epoch alone, and that can begin at any batch: what
    `EverystepBackup(run, data=dataset)` needs to go on in the middle of an epoch. Give `fit` shuffle=False.

    Args:
        batches: another PyDataset, or anything with a length that gives batch number i.
        shuffle: the batches in another order every epoch.
    """

    def __init__(self, batches: Any, *, shuffle: bool = True, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.batches, self.shuffle, self.seed = batches, shuffle, seed
        self.go_to(0, 0)

    def go_to(self, epoch: int, batch: int) -> None:
        """The epoch that comes next, and its first batch."""
        count = len(self.batches)
        order = np.random.default_rng((self.seed, epoch)).permutation(count) if self.shuffle else np.arange(count)
        self._left = order[batch:]

    def __len__(self) -> int:
        return len(self._left)

    def __getitem__(self, index: int) -> Any:
        return self.batches[int(self._left[index])]


class EverystepBackup(keras.callbacks.Callback):
    """`model.fit(…, callbacks=[EverystepBackup(run)])`: started again, it goes on from the newest checkpoint.

    The model has to be built, as for BackupAndRestore. Between epochs the continuation is exact (weights, optimizer,
    seed generators, random states, what `save_best_only` remembers), if the data comes in the same order. From the
    middle of an epoch it is with a `ResumableDataset`; without one, `fit` goes back to the newest checkpoint that was
    saved between epochs.

    A step is a batch.

    Args:
        run: whoever opened it closes it.
        save_freq: "epoch", or a number of batches.
        monitor, mode, save_best_only, initial_value_threshold: as in ModelCheckpoint. With `save_best_only` the newest
            checkpoint is kept to go on from, and of those before it those that were the best when they were saved.
        max_to_keep: so many are kept at most, the newest; with `save_best_only` so many of the best.
        data: the ResumableDataset that `fit` is given.
    """

    def __init__(
        self,
        run: everystep.Run,
        *,
        save_freq: str | int = "epoch",
        monitor: str = "val_loss",
        mode: str = "auto",
        save_best_only: bool = False,
        initial_value_threshold: float | None = None,
        max_to_keep: int | None = None,
        data: ResumableDataset | None = None,
    ) -> None:
        super().__init__()
        if save_freq != "epoch" and (type(save_freq) is not int or save_freq < 1):
            raise everystep.UsageError(f"save_freq={save_freq!r} is not known", do='"epoch", or a number of batches')
        self.run, self.save_freq, self.monitor = run, save_freq, monitor
        rule: Any = everystep.best(monitor, None if mode == "auto" else mode) if save_best_only else None
        self.mode, self.save_best_only, self.max_to_keep = getattr(rule, "mode", mode), save_best_only, max_to_keep
        self.data = data
        self.best: float | None = initial_value_threshold
        self._step = self._epoch = self._skipped = self._first = self._batch = self._since = 0
        self._saved: everystep.Saved | None = None
        self._last: list[Any] = []
        """Of an epoch that began in its middle: the variables as its last batch left them."""
        self._steps: list[int] = []
        """Of what is kept, oldest first; with save_best_only: of what was the best."""
        self._newest: int | None = None
        self._waiting: set[int] = set()

    # resume ---------------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        if not self.model.built:
            raise everystep.UsageError(
                "the model is not built yet: it has no variables to fill", do="model.build(shape), or call it once"
            )
        if self.model.optimizer is not None and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        found = self._place_to_go_on()
        if found is None:
            return
        newest = self.run.latest
        state = load_state(found, like="numpy")
        _fill(self.model.variables, state["model"], "model")
        _fill(_optimizer_variables(self.model), state["optimizer"], "optimizer")
        if newest == found:
            self.run.resume()
        else:
            self.run.rewind(found)
        self.best, self._newest = state["best"], found.step
        ours = [one.step for one in self.run.checkpoints() if one.reason == _REASON]
        self._steps = list(state["steps"]) if self.save_best_only else ours
        if self.save_best_only and state["best_only"]:  # a process that was killed may have left what had to go
            self._drop({*ours} - {*self._steps, found.step})
        self._since, self._step = state["since"], found.step
        self._epoch, self._skipped = state["epoch"], state["batch"]
        setattr(self.model, _INITIAL_EPOCH, self._epoch)
        found.set_random_state()

    def _place_to_go_on(self) -> everystep.Checkpoint | None:
        """The newest checkpoint; without a dataset that can begin anywhere, the newest between two epochs."""
        for checkpoint in reversed(self.run.checkpoints()):
            if checkpoint.reason == _REASON and (self.data is not None or load_state(checkpoint, "batch") == 0):
                return checkpoint
        return None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch != self._epoch:
            self._epoch, self._skipped = epoch, 0
        self._first, self._skipped = self._skipped, 0
        self._batch = self._first
        if self.data is not None:
            self.data.go_to(epoch, self._first)

    # save -----------------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        done = self._first + batch + 1  # fit counts from where the dataset began
        more, self._batch = done - self._batch, done
        self._since, self._step = self._since + more, self._step + more
        if self._first and self.data is not None and done == len(self.data.batches):
            self._last = [np.array(one) for one in self._values()]
        if self.save_freq != "epoch" and self._since >= int(self.save_freq):
            self._since = 0
            self._save(self._epoch, self._batch, logs or {})

    def on_test_begin(self, logs: Any = None) -> None:
        self._undo_last()

    def _values(self) -> list[Any]:
        return [keras.ops.convert_to_numpy(one.value) for one in self._variables()]

    def _variables(self) -> list[Any]:
        return [*self.model.variables, *_optimizer_variables(self.model)]

    def _undo_last(self) -> None:
        """An epoch that began in its middle ends when `fit` asks for a batch too many: what that step did without a
        batch (it counts, and draws seeds) is taken back."""
        last, self._last = self._last, []
        for variable, value in zip(self._variables(), last):
            variable.assign(value)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._undo_last()
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0, logs or {})

    def on_train_end(self, logs: Any = None) -> None:
        setattr(self.model, _INITIAL_EPOCH, None)  # another fit begins as it is told to
        self._settle()

    def _save(self, epoch: int, batch: int, logs: Mapping[str, Any]) -> None:
        self._settle()
        step = self._step
        if batch and batch == (len(self.data.batches) if self.data is not None else self.params.get("steps")):
            epoch, batch = epoch + 1, 0
        metrics = numbers({**logs, "epoch": epoch})
        self._choose(step, metrics)
        state = {
            "model": _arrays(self.model.variables),
            "optimizer": _arrays(_optimizer_variables(self.model)),
            "epoch": epoch,
            "batch": batch,
            "since": self._since,
            "best": self.best,
            "best_only": self.save_best_only,
            "steps": self._steps if self.save_best_only else [],
        }
        self._saved = self.run.save(step, state=state, metrics=metrics, reason=_REASON)

    # what is kept ---------------------------------------------------------------------------------------------------

    def _choose(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step into what is kept; `_waiting` is what goes once this one is durable."""
        before, self._newest = self._newest, step
        improved = not self.save_best_only or self._improves(metrics.get(self.monitor))
        kept = [*self._steps, step] if improved else list(self._steps)
        if self.max_to_keep is not None:
            kept = kept[-self.max_to_keep :]
        self._waiting = {*self._steps, *([] if before is None else [before])} - {*kept, step}
        self._steps = kept

    def _improves(self, value: float | None) -> bool:
        """As ModelCheckpoint decides: without the metric, it saves. NaN never is the best."""
        if value is None:
            return True
        if math.isnan(value):
            return False
        if self.best is None or (value < self.best if self.mode == "min" else value > self.best):
            self.best = value
            return True
        return False

    def _settle(self) -> None:
        if self._saved is None:
            return
        self._saved.wait()
        gone, self._waiting, self._saved = self._waiting, set(), None
        self._drop(gone)

    def _drop(self, steps: set[int]) -> None:
        if steps:
            drop(self.run, {one.id for one in self.run.checkpoints() if one.step in steps and one.reason == _REASON})


def _optimizer_variables(model: Any) -> list[Any]:
    return list(model.optimizer.variables) if model.optimizer is not None else []


def _arrays(variables: Any) -> dict[str, Any]:
    """By position and own name: the names of layers count on from model to model in one process."""
    return {f"{i:04d}.{one.name}": keras.ops.convert_to_numpy(one.value) for i, one in enumerate(variables)}


def _fill(variables: Any, arrays: Mapping[str, Any], what: str) -> None:
    """
    Raises:
        Mismatch: if they are not the same variables; nothing is filled then.
    """
    wanted = {f"{i:04d}.{one.name}": one for i, one in enumerate(variables)}
    wrong = sorted(wanted.keys() ^ arrays.keys())
    wrong += [name for name, one in wanted.items() if name in arrays and tuple(one.shape) != np.shape(arrays[name])]
    if wrong:
        raise everystep.Mismatch(
            f"the checkpoint's {what} has other variables: {', '.join(wrong[:5])}",
            do="build and compile the model as it was, or give the run another name",
        )
    for name, one in wanted.items():
        one.assign(arrays[name])
