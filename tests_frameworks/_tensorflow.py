"""For the tests of TensorFlow: runs of their own, and objects compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import everystep
from everystep import adapters
from everystep.schema import flatten


def new_run(path: Path, name: str = "r") -> everystep.Run:
    return everystep.open(str(path / "repo")).run(name)


def there_and_back(path: Path, state: Any, like: str = "saved") -> Any:
    """An explicit state as it is loaded again."""
    repo = everystep.open(str(path / "repo"))
    with repo.run(f"run{len(repo.runs())}") as run:
        return run.save(1, state=state).wait().load(like=like)


def bits(value: Any) -> tuple[Any, ...]:
    """All that makes a tensor."""
    assert isinstance(value, tf.Tensor), value
    array = value.numpy()
    data = array.tobytes() if isinstance(array, (np.ndarray, np.generic)) else array
    return value.dtype.name, tuple(value.shape), data


def rows(target: Any, name: str = "model", **others: Any) -> dict[str, tuple[str, str, bytes]]:
    """path -> (role, dtype, bytes) of every leaf of a tracked object."""
    state = {name: adapters.capture(target, name, {name: target, **others})}
    tree = flatten(state, adapters.describe)
    found = {}
    for leaf, payload in zip(tree.leaves, tree.payloads):
        data = np.empty(leaf.nbytes, np.uint8)
        adapters.copy(payload, data)
        found[leaf.path] = (leaf.role, leaf.dtype, data.tobytes())
    return found


def small_model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(8, name="named"),
            keras.layers.Dense(2),
        ]
    )


def train(model: Any, optimizer: Any, steps: int = 1, seed: int = 0) -> None:
    numbers = np.random.default_rng(seed)
    for _ in range(steps):
        x = tf.constant(numbers.normal(size=(6, 4)).astype(np.float32))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - 1))
            loss = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
