"""A training of TensorFlow that says what it did, to be killed; see test_tensorflow_resume.py.

python tf_trainer.py FOLDER MODE STEPS [MORE]

MODE is "iterator" (run.steps and a tracked iterator, one device), "mirrored" (two logical devices; with MORE the
strategy distributes the data) or "workers" (the cluster is in TF_CONFIG; MORE names this start of it). It prints
"step N" when a step is done, and at the end "digest" of everything that counts, "weights" of what the model alone
holds, and "exact" or why the continuation was not.
"""

import hashlib
import os
import random
import sys
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import everystep

SAMPLES, FEATURES, BATCH, SAVE_EVERY = 60, 6, 8, 3
"""Seven batches an epoch: with a save every three steps most of them lie in mid-epoch."""


class Shift(keras.layers.Layer):
    """Adds what it learns; keeps a mean of what it saw for each replica, and how many steps it saw in all."""

    def build(self, shape: Any) -> None:
        self.offset = self.add_weight(shape=(shape[-1],), name="offset", initializer="zeros")
        self.seen = tf.Variable(
            tf.zeros((shape[-1],)), trainable=False, name="seen",
            synchronization=tf.VariableSynchronization.ON_READ, aggregation=tf.VariableAggregation.MEAN,
        )  # fmt: skip

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.seen.assign_add(tf.reduce_mean(tf.cast(x, tf.float32), axis=0))
        return x + self.offset


def make_model(*, mixed: bool) -> keras.Model:
    policy = "mixed_float16" if mixed else "float32"
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(16, activation="relu", dtype=policy),
            keras.layers.BatchNormalization(dtype="float32"),
            keras.layers.Dropout(0.3, dtype=policy),
            Shift(dtype=policy),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    return model


def make_optimizer(*, mixed: bool) -> keras.optimizers.Optimizer:
    rate = keras.optimizers.schedules.CosineDecay(0.01, 100, warmup_target=0.05, warmup_steps=5)
    adam = keras.optimizers.AdamW(rate, use_ema=True, ema_momentum=0.9)
    return keras.optimizers.LossScaleOptimizer(adam, dynamic_growth_steps=4) if mixed else adam


def make_data(index: int = 0, count: int = 1, ahead: int = 2) -> tf.data.Dataset:
    x = np.random.default_rng(5).normal(size=(SAMPLES * count, FEATURES)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, x.sum(1, keepdims=True))).shard(count, index)
    data = data.shuffle(20, seed=3 + index).batch(BATCH, drop_remainder=True)
    return data.prefetch(ahead) if ahead else data


def plain_variables(values: Any) -> list[Any]:
    """Of every replica here."""
    found = []
    for value in values:
        inner = value.value if isinstance(value, keras.Variable) else value
        found += list(inner.values) if hasattr(inner, "values") and not callable(inner.values) else [inner]
    return found


def digest(variables: Any) -> str:
    found = hashlib.sha256()
    for variable in plain_variables(variables):
        value = variable.numpy()
        found.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()[:32]


class Job:
    """What all modes have in common."""

    def __init__(self, strategy: Any, *, mixed: bool) -> None:
        self.strategy, self.mixed = strategy, mixed
        with strategy.scope():
            self.model, self.optimizer = make_model(mixed=mixed), make_optimizer(mixed=mixed)
            self.optimizer.build(self.model.trainable_variables)
            self.losses = keras.metrics.Mean(name="losses")
            self.generator = tf.random.Generator.from_seed(9)

        @tf.function
        def step(x: Any, y: Any) -> Any:
            return strategy.run(self.update, (x, y))

        self.step = step

    def update(self, x: Any, y: Any) -> Any:
        x = x + 0.1 * self.generator.normal(tf.shape(x))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x, training=True) - y))
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.model.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables))
        self.losses.update_state(loss)
        return loss

    @property
    def tracked(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "losses": self.losses, "generator": self.generator,
        }  # fmt: skip

    def noise(self, x: Any) -> Any:
        """Of every global generator."""
        extra = random.random() + float(np.random.rand()) + tf.random.normal(()) + keras.random.normal(())
        return x + 0.01 * extra

    def say(self, run: everystep.Run) -> None:
        seen = self.model.layers[3].seen
        own = [*self.model.variables, seen, *self.optimizer.variables, *self.losses.variables, self.generator.state]
        more = [random.random(), float(np.random.rand()), float(tf.random.normal(())), float(keras.random.normal(()))]
        print("digest", digest(own), *(value.hex() for value in more), flush=True)
        first = [plain_variables([variable])[0] for variable in self.model.weights]
        print("weights", digest(first), flush=True)
        report = run.report
        print("exact" if report is None or report.exact else f"inexact {report}", flush=True)


def train_iterator(folder: str, steps: int) -> None:
    job = Job(tf.distribute.get_strategy(), mixed=True)
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False  # an epoch that was read to its end is not kept exactly
    batches = iter(make_data(ahead=0).repeat().with_options(options))
    with everystep.open(folder).run("r") as run:
        run.track(**job.tracked, batches=batches)
        for step in run.steps(steps, save_every=SAVE_EVERY):
            x, y = next(batches)
            run.record(loss=job.step(job.noise(x), y))
            print("step", step, flush=True)
        job.say(run)


def train_mirrored(folder: str, steps: int, by_strategy: str = "") -> None:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    job = Job(strategy, mixed=False)  # Keras' loss scale looks at the gradients of the first replica alone
    epochs = -(-steps // (SAMPLES // BATCH))

    def in_two(whole: Any) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.split(whole, 2)[context.replica_id_in_sync_group]
        )

    with everystep.open(folder).run("r") as run:
        run.track(**job.tracked)
        data = strategy.experimental_distribute_dataset(make_data()) if by_strategy else make_data()
        for batch in run.batches(data, epochs=epochs, save_on=everystep.every(SAVE_EVERY)):
            halves = batch if by_strategy else [in_two(part) for part in (job.noise(batch[0]), batch[1])]
            losses = strategy.experimental_local_results(job.step(*halves))
            run.record(loss=losses[0])
            print("step", run.step, flush=True)
        job.say(run)


def train_workers(folder: str, steps: int, launch: str) -> None:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index, count = strategy.cluster_resolver.task_id, strategy.num_replicas_in_sync
    random.seed(index)  # each worker draws for itself
    np.random.seed(index)
    job = Job(strategy, mixed=False)
    epochs = -(-steps // (SAMPLES // BATCH))
    counted = tf.Variable(index * 100, trainable=False, dtype=tf.int64)  # outside of the strategy: this worker's own
    with everystep.open(folder).run("r", launch=launch) as run:
        assert (run.rank, run.ranks) == (index, count)
        run.track(**job.tracked, counted=counted)
        for x, y in run.batches(make_data(index, count), epochs=epochs, save_on=everystep.every(SAVE_EVERY)):
            loss = job.step(job.noise(x), y)
            counted.assign_add(len(x))
            run.record(loss=loss)
            run.record(worker=True, loss=loss, examples=len(x))
            print("step", run.step, flush=True)
        print("counted", int(counted), flush=True)
        job.say(run)


def main() -> None:
    folder, mode, steps, *more = sys.argv[1:]
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(1)
    for _ in range(int(os.environ.get("OTHER_LAYERS", "0"))):
        keras.layers.Dense(3)  # counted by Keras: the layers of the model get other numbers
    {"iterator": train_iterator, "mirrored": train_mirrored, "workers": train_workers}[mode](folder, int(steps), *more)


if __name__ == "__main__":
    main()
