"""A Keras model whose fit saves into a run. Kill it whenever you like and start it again: it ends with the same bits.

python examples/keras_example.py --repo runs
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import everystep
from everystep.integrations.keras import EverystepBackup, ResumableDataset

EPOCHS, BATCHES, SAVE_EVERY = 3, 8, 3


class Told(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        print(f"step {int(self.model.optimizer.iterations)}", flush=True)


def make_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.layers.Dense(32, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3, seed=3),
            keras.layers.Dense(1),
        ]
    )
    model.build((None, 8))
    schedule = keras.optimizers.schedules.CosineDecay(0.05, decay_steps=EPOCHS * BATCHES)
    model.compile(keras.optimizers.AdamW(schedule), loss="mse")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--run", default="keras")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(7).normal(size=(BATCHES * 4, 8)).astype("float32")
    batches = [(x[4 * i : 4 * i + 4], x[4 * i : 4 * i + 4].sum(1, keepdims=True)) for i in range(BATCHES)]
    data = ResumableDataset(batches, shuffle=True, seed=0)
    with everystep.open(args.repo).run(args.run) as run:
        backup = EverystepBackup(run, save_freq=SAVE_EVERY, data=data)
        if run.latest is not None:
            print(f"goes on from step {run.latest.step}", flush=True)
        make_model().fit(data, epochs=EPOCHS, callbacks=[backup, Told()], shuffle=False, verbose=0)


if __name__ == "__main__":
    main()
