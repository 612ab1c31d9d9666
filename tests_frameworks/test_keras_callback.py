"""Keras: one callback to resume, as BackupAndRestore, and to keep the best, as ModelCheckpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from _killed import check_resumes_exactly, differing

import everystep
from everystep.integrations.keras import EverystepBackup, ResumableDataset

BATCHES, EPOCHS = 6, 4
SCORES = [0.5, 0.3, 0.6, 0.2, 0.4, 0.25]


def test_a_killed_example_goes_on_exactly(tmp_path: Path) -> None:
    check_resumes_exactly("keras_example.py", "keras", tmp_path, kill_at=15, epoch=8, last=24)


def batches() -> list[Any]:
    x = np.random.default_rng(7).normal(size=(BATCHES * 4, 3)).astype("float32")
    return [(x[4 * i : 4 * i + 4], x[4 * i : 4 * i + 4].sum(1, keepdims=True)) for i in range(BATCHES)]


def make_model(mixed: bool = False) -> Any:
    policy = "mixed_float16" if mixed else None
    model = keras.Sequential(
        [
            keras.layers.Dense(8, dtype=policy),
            keras.layers.BatchNormalization(dtype=policy),
            keras.layers.Dropout(0.4, seed=3, dtype=policy),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    model.build((None, 3))
    optimizer: Any = keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.05, 5, 0.9))
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if mixed else optimizer, loss="mse")
    return model


class Stop(keras.callbacks.Callback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if int(self.model.optimizer.iterations) == self.step:
            raise KeyError("broken off")


class Scored(keras.callbacks.Callback):
    """A val_loss that is known beforehand."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["val_loss"] = SCORES[epoch]


def train(
    folder: Path, *, stop: int | None = None, seed: int = 1, own_data: bool = False, mixed: bool = False,
    epochs: int = EPOCHS, more: tuple[Any, ...] = (), **options: Any,
) -> Any:  # fmt: skip
    keras.utils.set_random_seed(seed)
    keras.utils.clear_session()
    data = ResumableDataset(batches(), seed=5)
    model = make_model(mixed)
    with everystep.open(str(folder)).run("r") as run:
        backup = EverystepBackup(run, data=data if own_data else None, **options)
        callbacks = [Scored(), backup, *more, *([] if stop is None else [Stop(stop)])]
        how = {"epochs": epochs, "callbacks": callbacks, "shuffle": False, "verbose": 0}
        x: Any = data if own_data else InOrder()
        if stop is None:
            model.fit(x, **how)
        else:
            with pytest.raises(KeyError, match="broken off"):
                model.fit(x, **how)
    return {
        "model": [keras.ops.convert_to_numpy(one) for one in model.variables],
        "optimizer": [keras.ops.convert_to_numpy(one) for one in model.optimizer.variables],
    }


class InOrder(keras.utils.PyDataset):
    def __init__(self) -> None:
        super().__init__()
        self.batches = batches()

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixed": True},
        {"save_freq": 2, "own_data": True},
        {"save_freq": 6, "own_data": True},
        {"save_freq": 3},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_fit_that_was_broken_off_goes_on_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", **options)
    for stop in (9, 13):
        folder = tmp_path / str(stop)
        train(folder, stop=stop, **options)
        end = train(folder, seed=99, **options)
        assert differing(whole, end) == [], f"stopped at {stop}"
        assert everystep.open(str(folder))["r"].latest == everystep.open(str(folder))["r"].at(BATCHES * EPOCHS)


@pytest.mark.parametrize("mode", ["auto", "max"])
def test_the_best_are_kept_as_by_modelcheckpoint(tmp_path: Path, mode: str) -> None:
    theirs = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{epoch}.weights.h5"), save_best_only=True, save_weights_only=True, mode=mode
    )
    train(tmp_path / "runs", save_best_only=True, mode=mode, epochs=6, more=(theirs,))
    best = {int(path.name.partition(".")[0]) * BATCHES for path in tmp_path.glob("*.weights.h5")}
    past = everystep.open(str(tmp_path / "runs"))["r"]
    assert {one.step for one in past.checkpoints()} == best | {6 * BATCHES}
    assert past.best("val_loss", mode="min" if mode == "auto" else mode).step in best


def test_what_the_best_was_is_remembered_over_a_break(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_best_only": True, "epochs": 6, "max_to_keep": 1}
    train(tmp_path / "whole", **options)
    for stop in (13, 15, 26):
        train(tmp_path / "broken", stop=stop, **options)
    train(tmp_path / "broken", **options)
    kept = [
        [one.step for one in everystep.open(str(tmp_path / name))["r"].checkpoints()] for name in ("whole", "broken")
    ]
    assert kept == [[24, 36], [24, 36]]


def test_max_to_keep(tmp_path: Path) -> None:
    train(tmp_path, max_to_keep=2)
    assert [one.step for one in everystep.open(str(tmp_path))["r"].checkpoints()] == [18, 24]


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path)).run("r") as run:
        with pytest.raises(everystep.UsageError, match="save_freq="):
            EverystepBackup(run, save_freq="batch")
        with pytest.raises(everystep.UsageError, match="is a higher 'size' better"):
            EverystepBackup(run, monitor="size", save_best_only=True)
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", loss="mse")
        backup = EverystepBackup(run)
        backup.set_model(model)
        with pytest.raises(everystep.UsageError, match="not built yet"):
            backup.on_train_begin()
    train(tmp_path)
    with everystep.open(str(tmp_path)).run("r") as run:
        model = keras.Sequential([keras.layers.Dense(5)])
        model.build((None, 3))
        model.compile("sgd", loss="mse")
        backup = EverystepBackup(run)
        backup.set_model(model)
        with pytest.raises(everystep.Mismatch, match="other variables"):
            backup.on_train_begin()
