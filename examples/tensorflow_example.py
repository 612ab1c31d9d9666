"""Train a Keras model in mixed precision with a loop of your own. Kill it whenever you like and start it again: it ends
with the same bits.

python examples/tensorflow_example.py --runs runs --run keras
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import everystep

SAMPLES, BATCH, FEATURES, CLASSES = 800, 32, 20, 5
BATCHES = SAMPLES // BATCH


def make_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(CLASSES, dtype="float32", name="out"),
        ]
    )
    return model


def make_optimizer(updates: int) -> keras.optimizers.Optimizer:
    """A rate that warms up and goes down, and a loss scale that doubles every 40 good steps."""
    rate = keras.optimizers.schedules.CosineDecay(1e-4, updates, warmup_target=1e-2, warmup_steps=10)
    adam = keras.optimizers.AdamW(rate, use_ema=True, ema_momentum=0.98)
    return keras.mixed_precision.LossScaleOptimizer(adam, dynamic_growth_steps=40)


def make_data() -> tf.data.Dataset:
    """In another order each epoch."""
    numbers = np.random.default_rng(7)
    x = numbers.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ numbers.normal(size=(FEATURES, CLASSES))).argmax(1)
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(SAMPLES, seed=3)
    return data.batch(BATCH, drop_remainder=True).prefetch(2)


def train(args: argparse.Namespace) -> None:
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_global_policy("mixed_float16")
    epochs = -(-args.steps // BATCHES)
    model, optimizer = make_model(), make_optimizer(epochs * BATCHES)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
            scaled = optimizer.scale_loss(loss)
        optimizer.apply_gradients(zip(tape.gradient(scaled, model.trainable_variables), model.trainable_variables))
        return loss

    with everystep.open(args.runs).run(args.run) as run:
        run.track(model=model, optimizer=optimizer)
        for x, y in run.batches(make_data(), epochs=epochs, save_on=everystep.every(args.save_every)):
            noise = tf.random.normal(tf.shape(x), stddev=0.1)
            loss = train_step(x + noise, y)
            run.record(loss=loss)
            print(f"step {run.step} loss {float(loss):.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", help="the repository")
    parser.add_argument("--run", default="keras")
    parser.add_argument("--steps", type=int, default=250, help=f"rounded up to whole epochs of {BATCHES} steps")
    parser.add_argument("--save-every", type=int, default=8, help="steps between two checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
