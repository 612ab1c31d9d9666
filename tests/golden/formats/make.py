"""Makes the golden files with the frameworks themselves: `python make.py` where TensorFlow and Keras are installed.

Beside each file lies what its framework says is in it: by the names that a reader gives, dtype, shape and bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent


def value(number: int, shape: tuple[int, ...], dtype: Any = "float32") -> Any:
    count = int(np.prod(shape))
    return (np.arange(count).reshape(shape) * 0.25 + number).astype(dtype)


def told(arrays: dict[str, Any]) -> str:
    found = {
        name: [array.dtype.name, list(array.shape), array.tobytes().hex()]
        for name, array in ((name, np.asarray(array)) for name, array in arrays.items())
    }
    return json.dumps(found, indent=0, sort_keys=True) + "\n"


def checkpoint(folder: Path) -> None:
    """What tf.train.CheckpointManager writes of a module with a list, a dict and a shared variable."""
    module = tf.Module()
    module.w = tf.Variable(value(1, (2, 3)), name="weight")
    module.layers = [tf.Variable(value(2, (3,))), tf.Variable(value(3, (), "int64"))]
    module.table = {"a/b": tf.Variable(value(4, (2,), tf.bfloat16.as_numpy_dtype))}
    module.again = module.w
    module.flags = tf.Variable([True, False])
    module.words = tf.Variable(["one", "two ✓"])
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=module, step=tf.Variable(7, dtype=tf.int64)), folder, max_to_keep=2
    )
    manager.save()
    manager.save()
    expected = {
        "model/w": module.w.numpy(), "model/layers/0": module.layers[0].numpy(), "model/flags": module.flags.numpy(),
        "model/layers/1": module.layers[1].numpy(), "model/table/a%2Fb": module.table["a/b"].numpy(),
        "step": np.int64(7), "save_counter": np.int64(2),
    }  # fmt: skip
    (folder / "expected.json").write_text(told(expected))


def slices(folder: Path) -> None:
    """A checkpoint by names, as TensorFlow 1 wrote it, with a variable in slices and one of every dtype."""
    folder.mkdir()
    names = "half:float16 single:float32 double:float64 i8:int8 i16:int16 i32:int32 i64:int64 u8:uint8 u16:uint16"
    names += " u32:uint32 u64:uint64 c64:complex64 c128:complex128 flag:bool"
    tensors = {f"dense/{n}": value(1, (2, 2), d) for n, d in (pair.split(":") for pair in names.split())}
    tensors["dense"] = value(5, (1,))
    tensors["bf16"] = value(6, (3,), tf.bfloat16.as_numpy_dtype)
    tensors["f8"] = value(1, (3,), tf.dtypes.experimental.float8_e5m2.as_numpy_dtype)
    whole = value(9, (4, 3))
    parts = {"4 3 0,1:-": whole[:1], "4 3 1,3:0,2": whole[1:, :2], "4 3 1,3:2,1": whole[1:, 2:]}
    tf.raw_ops.SaveV2(
        prefix=str(folder / "model"),
        tensor_names=[*tensors, *["cut"] * len(parts)],
        shape_and_slices=[*[""] * len(tensors), *parts],
        tensors=[tf.constant(tensor) for tensor in (*tensors.values(), *parts.values())],
    )
    expected = {name.replace("/", "%2F"): array for name, array in (*tensors.items(), ("cut", whole))}
    (folder / "expected.json").write_text(told(expected))


def saved_model(folder: Path) -> None:
    module = tf.Module()
    module.v = tf.Variable(value(3, (2, 2)))
    module.call = tf.function(lambda x: x @ module.v, input_signature=[tf.TensorSpec((None, 2))])
    tf.saved_model.save(module, str(folder))
    (folder / "expected.json").write_text(told({"v": module.v.numpy()}))


def model() -> Any:
    keras.utils.set_random_seed(1)
    built = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2, name="encoder"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2, dtype="bfloat16", use_bias=False),
        ]
    )
    built.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    built.fit(np.ones((4, 3), "float32"), np.zeros((4, 2), "float32"), epochs=2, verbose=0)
    return built


def keras_files(folder: Path) -> None:
    folder.mkdir()
    built = model()
    built.save(folder / "model.keras")
    built.save_weights(folder / "model.weights.h5")
    encoder, norm, _, last = built.layers
    named = {
        "model/encoder": (encoder, ("kernel", "bias")),
        "model/batch_normalization": (norm, ("gamma", "beta", "moving_mean", "moving_variance")),
        "model/dense": (last, ("kernel",)),
    }
    expected = {f"{at}/{n}": v.numpy() for at, (layer, ns) in named.items() for n, v in zip(ns, layer.weights)}
    slots = iter(built.optimizer.variables)
    expected["optimizer/iteration"], expected["optimizer/learning_rate"] = next(slots).numpy(), next(slots).numpy()
    trained = (
        "encoder.kernel",
        "encoder.bias",
        "batch_normalization.gamma",
        "batch_normalization.beta",
        "dense.kernel",
    )
    for name in trained:
        for slot in ("momentum", "velocity"):
            expected[f"optimizer/state/model.{name}/{slot}"] = next(slots).numpy()
    assert next(slots, None) is None
    (folder / "expected.json").write_text(told({name: np.asarray(array) for name, array in expected.items()}))


def legacy(folder: Path) -> None:
    """A whole model as Keras 2 kept it."""
    folder.mkdir()
    built = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="first"), keras.layers.Dense(1)])
    built.compile(optimizer="sgd", loss="mse")
    built.save(folder / "model.h5")
    expected = {
        f"model/{layer.name}/{variable.path.replace('/', '%2F')}": variable.numpy()
        for layer in built.layers
        for variable in layer.weights
    }
    expected |= {
        f"optimizer/{variable.path.replace('/', '%2F')}": variable.numpy() for variable in built.optimizer.variables
    }
    (folder / "expected.json").write_text(told(expected))


MAKERS = {
    "tf_checkpoint": checkpoint, "tf_slices": slices, "tf_saved_model": saved_model, "keras": keras_files,
    "keras_legacy": legacy,
}  # fmt: skip

if __name__ == "__main__":
    for name, make in MAKERS.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        make(HERE / name)
        print(name, sum(path.stat().st_size for path in (HERE / name).rglob("*") if path.is_file()), "bytes")
