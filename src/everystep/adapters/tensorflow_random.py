"""The random state that TensorFlow and Keras keep for the whole process."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops

from everystep.adapters.tensorflow_values import aggregation, components, keras, unwrap

RANDOM = ("tensorflow", "keras")
_SEEDS = "keras.src.random.seed_generator"
_GLOBAL = "keras.src.backend.common.global_state"


def random_state() -> dict[str, Any]:
    """Of eager operations that are seeded by tf.random.set_seed, the global generators of TensorFlow and of Keras."""
    now, generator = context.context(), stateful_random_ops.global_generator
    found: dict[str, Any] = {
        "seed": None if now._seed is None else int(now._seed),
        "operations": None if now._seed is None else _pack(now._rng),
        "generator": None if generator is None else _values(generator.state),
        "algorithm": None if generator is None else int(generator.algorithm),
    }
    state = {"tensorflow": found}
    if keras() is not None:
        seeds = _keras_seeds()
        state["keras"] = {"seeds": None if seeds is None else _values(seeds.state)}
    return state


def set_random_state(state: Mapping[str, Any]) -> list[str]:
    left: list[str] = []
    if "tensorflow" in state:
        saved = state["tensorflow"]
        if saved["seed"] is not None:
            now = context.context()
            now._set_global_seed(saved["seed"])
            now._rng.setstate(_unpack(saved["operations"]))
        if saved["generator"] is not None:
            left += _set_generator(saved["generator"], saved["algorithm"])
    if "keras" in state and keras() is not None:
        left += _set_keras(state["keras"]["seeds"])
    return left


def _values(variable: Any) -> list[Any]:
    """One for each replica that has its own."""
    plain = unwrap(variable)
    parts = components(plain)
    return [part.numpy() for part in (parts if aggregation(plain, "rng") is not None else parts[:1])]


def _set_values(variable: Any, values: list[Any], name: str) -> list[str]:
    plain = unwrap(variable)
    parts = components(plain)
    if any(np.shape(value) != tuple(plain.shape) for value in values) or not values:
        return [f"random state of {name}: saved in another form"]
    if len(values) not in (1, len(parts)):
        return [f"random state of {name}: saved by {len(values)} replicas, {len(parts)} here"]
    for part, value in zip(parts, values if len(values) > 1 else values * len(parts)):
        part.assign(value)
    return []


def _set_generator(values: list[Any], algorithm: int) -> list[str]:
    generator = stateful_random_ops.global_generator
    if generator is None:
        tf.random.set_global_generator(tf.random.Generator.from_state(values[0], algorithm))
        return []
    if int(generator.algorithm) != algorithm:
        return ["random state of tensorflow: the global generator has another algorithm"]
    return _set_values(generator.state, values, "tensorflow")


def _keras_seeds() -> Any | None:
    """The generator that Keras makes when something first asks it for numbers and gives no seed."""
    return _module(_GLOBAL).get_global_attribute(_module(_SEEDS).GLOBAL_SEED_GENERATOR)


def _module(name: str) -> Any:
    return sys.modules[name]


def _set_keras(values: list[Any] | None) -> list[str]:
    module: Any = keras()
    here = _keras_seeds()
    if values is not None and here is None:
        here = module.random.SeedGenerator(0, name="global_seed_generator")
    if values is None:
        here = None  # made again from Python's random state when it is needed, as in the run that goes on
    _module(_GLOBAL).set_global_attribute(_module(_SEEDS).GLOBAL_SEED_GENERATOR, here)
    return [] if values is None or here is None else _set_values(here.state, values, "keras")


def _pack(generator: random.Random) -> dict[str, Any]:
    version, words, gauss = generator.getstate()
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def _unpack(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return state["version"], tuple(int(word) for word in state["words"]), state["gauss"]
