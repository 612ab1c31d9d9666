"""Keras's files with Keras itself: what it writes is read equal, and it loads what we write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import everystep
from everystep import formats

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "amsgrad": lambda: keras.optimizers.AdamW(0.01, amsgrad=True, use_ema=True, ema_momentum=0.9),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.01),
    "adadelta": lambda: keras.optimizers.Adadelta(0.01),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
}


def stacked() -> Any:
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, name="encoder"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(4, use_bias=False),
            layers.Dense(3),
        ]
    )


def functional() -> Any:
    entry = keras.Input((8,), name="tokens")
    x = layers.Embedding(20, 6)(entry)
    inner = keras.Sequential([layers.Dense(6), layers.LayerNormalization()], name="block")
    x = inner(x)
    x = x + layers.MultiHeadAttention(2, 3, dropout=0.1)(x, x)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(4))(x)
    x = layers.RNN([layers.GRUCell(3), layers.SimpleRNNCell(3)])(x)
    x = layers.Reshape((3, 1))(x)
    x = layers.SeparableConv1D(2, 2)(x)
    x = layers.Conv1D(2, 2, padding="same", dtype="bfloat16")(x)
    x = layers.PReLU()(layers.Flatten()(x))
    x = layers.GroupNormalization(2)(x)
    return keras.Model(entry, layers.Dense(3, name="head")(layers.Dense(4)(x)))


MODELS: dict[str, Any] = {"sequential": stacked, "functional": functional}


@keras.saving.register_keras_serializable("tests")
class Own(keras.Model):
    """A model of its own class: layers in attributes, some of them private."""

    def __init__(self, units: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.units = units
        self.first, self._second = layers.Dense(units), layers.Dense(units)
        self.drop = layers.Dropout(0.5)

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.first.build(shape)
        self._second.build((None, self.units))
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        return self._second(self.drop(self.first(x), training=training)) * self.scale

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


def trained(model: Any, optimizer: Any = None, steps: int = 2) -> Any:
    model.compile(optimizer=optimizer or keras.optimizers.Adam(0.01), loss="mse", run_eagerly=True)
    shape = model.input_shape if not isinstance(model, Own) else (None, 5)
    x = np.random.default_rng(0).integers(0, 20, (8, *shape[1:])).astype("float32")
    y = np.zeros((8, 3), "float32")
    for _ in range(steps):
        model.train_on_batch(x, y)
    return model


def weights_equal(one: Any, other: Any) -> None:
    """All but the random generators, which are no part of Keras's files."""
    ours, kept = (getattr(of, "weights", None) or of.variables for of in (one, other))
    assert len(ours) == len(kept) > 0
    for mine, theirs in zip(ours, kept):
        mine, theirs = keras.ops.convert_to_numpy(mine), keras.ops.convert_to_numpy(theirs)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mine.tobytes() == theirs.tobytes()


def count(state: Any) -> int:
    return sum(map(count, state.values())) if isinstance(state, dict) else 1


def leaves(state: Any) -> list[Any]:
    return [leaf for value in state.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


@pytest.fixture(autouse=True)
def from_the_beginning() -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)


# ------------------------------------------------------------------------------------------------ what Keras wrote


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_files_of_keras_have_all_variables_equal(make: Any, tmp_path: Path) -> None:
    model = trained(make())
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    for content in (
        formats.read(tmp_path / "m.keras", strict=True),
        formats.read(tmp_path / "m.weights.h5", strict=True),
    ):
        got = (
            content.state["model"]
            if content.format == "keras"
            else {k: v for k, v in content.state.items() if k != "optimizer"}
        )
        wanted = [keras.ops.convert_to_numpy(variable) for variable in model.weights]
        found = leaves(got)
        assert sorted(a.tobytes() for a in found) == sorted(a.tobytes() for a in wanted)
        assert {a.dtype for a in found} == {a.dtype for a in wanted}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_state_of_every_optimizer_by_names(make: Any, tmp_path: Path) -> None:
    model = trained(stacked(), make(), steps=3)
    model.save(tmp_path / "m.keras")
    state = formats.read(tmp_path / "m.keras", strict=True).state
    optimizer = state["optimizer"]
    assert optimizer["iteration"] == 3 and optimizer["variables"][0] == "model.encoder.kernel"
    by_path = {variable.path: keras.ops.convert_to_numpy(variable) for variable in model.optimizer.variables}
    kept = optimizer.get("state", {})
    for name, slots in kept.items():
        for slot, array in slots.items():
            _, layer, variable = name.split(".")
            theirs = [
                array
                for path, array in by_path.items()
                if path.endswith(f"_{layer}_{variable}_{slot}") or path.endswith(f"/{layer}_{variable}_{slot}")
            ]
            assert any(array.tobytes() == other.tobytes() for other in theirs), (name, slot, list(by_path))
    own = sum(isinstance(value, np.ndarray) for value in optimizer.values())
    assert own + count(kept) == len(by_path)


def test_whole_models_of_keras_2(tmp_path: Path) -> None:
    model = trained(stacked())
    model.save(tmp_path / "m.h5")
    content = formats.read(tmp_path / "m.h5", strict=True)
    for layer in model.layers:
        for variable in layer.weights:
            got = content.state["model"][layer.name][variable.path]
            assert got.tobytes() == keras.ops.convert_to_numpy(variable).tobytes()
    assert len(leaves(content.state["optimizer"])) == len(model.optimizer.variables)
    assert "model_config" in content.metadata


def test_a_model_that_was_saved_as_a_folder(tmp_path: Path) -> None:
    model = trained(stacked())
    model.save(tmp_path / "m", zipped=False)
    model.save(tmp_path / "m.keras")
    one, other = formats.read(tmp_path / "m", strict=True), formats.read(tmp_path / "m.keras", strict=True)
    assert [a.tobytes() for a in leaves(one.state["model"])] == [a.tobytes() for a in leaves(other.state["model"])]


def test_code_in_a_file_of_keras_is_kept_as_text(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), layers.Lambda(lambda x: x * 2), layers.Dense(1)])
    model.save(tmp_path / "m.keras")
    content = formats.read(tmp_path / "m.keras", strict=True)
    assert "__lambda__" in content.metadata["keras/config.json"] and list(content.state["model"]) == ["dense"]


# --------------------------------------------------------------------------------------------------- what we write


def into_keras(state: Any, model: Any, tmp_path: Path) -> tuple[Any, formats.Written]:
    attachments = {"keras/config.json": model.to_json().encode()}
    written = formats.write(tmp_path / "ours.keras", state, attachments=attachments)
    formats.write(tmp_path / "ours.weights.h5", state, attachments=attachments)
    return keras.models.load_model(tmp_path / "ours.keras"), written


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_keras_wrote_goes_through_us_and_back(make: Any, tmp_path: Path) -> None:
    model = trained(make())
    model.save(tmp_path / "m.keras")
    state = formats.read(tmp_path / "m.keras", strict=True).state
    loaded, written = into_keras(state, model, tmp_path)
    assert not any("optimizer" in note.text for note in written.changed)
    weights_equal(loaded, model)
    weights_equal(loaded.optimizer, model.optimizer)
    fresh = make()
    fresh.load_weights(tmp_path / "ours.weights.h5")
    weights_equal(fresh, model)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_go_through_us_and_back(make: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = trained(stacked(), make(), steps=3)
    model.save(tmp_path / "m.keras")
    loaded, written = into_keras(formats.read(tmp_path / "m.keras", strict=True).state, model, tmp_path)
    assert not any("optimizer" in note.text for note in written.changed)
    assert not [w for w in recwarn if "optimizer" in str(w.message)]
    weights_equal(loaded.optimizer, model.optimizer)


@pytest.mark.parametrize("make", [stacked, functional, lambda: Own()], ids=["sequential", "functional", "own"])
@pytest.mark.parametrize("tracked", ["model", "both"])
def test_a_checkpoint_of_a_run_loads_in_keras(make: Any, tracked: str, tmp_path: Path) -> None:
    model = make()
    if isinstance(model, Own):
        model.build((None, 5))
    model = trained(model)
    with everystep.open(tmp_path / "runs").run("r") as run:
        run.track(model=model, **({"optimizer": model.optimizer} if tracked == "both" else {}))
        run.attach("keras/config.json", model.to_json().encode())
        run.save(2)
    checkpoint = everystep.open(tmp_path / "runs")["r"].latest
    assert checkpoint is not None
    checkpoint.export(tmp_path / "x.keras")
    checkpoint.export(tmp_path / "x.weights.h5", only="model")
    loaded = keras.models.load_model(tmp_path / "x.keras")
    weights_equal(loaded, model)
    weights_equal(loaded.optimizer, model.optimizer)
    fresh = make()
    if isinstance(fresh, Own):
        fresh.build((None, 5))
    fresh.load_weights(tmp_path / "x.weights.h5")
    weights_equal(fresh, model)


def test_a_file_of_keras_comes_into_a_run_and_into_a_model(tmp_path: Path) -> None:
    """Read by names, saved as a checkpoint, and loaded into a live model and optimizer as if they had saved it."""
    model = trained(stacked())
    model.save(tmp_path / "m.keras")
    state = formats.read(tmp_path / "m.keras", strict=True).state
    with everystep.open(tmp_path / "runs").run("r") as run:
        run.save(2, state=state)
    other = trained(stacked(), steps=1)
    checkpoint = everystep.open(tmp_path / "runs")["r"].latest
    assert checkpoint is not None
    report = checkpoint.load(into={"model": other, "optimizer": other.optimizer}, strict=False)
    assert report.missing == ["model/dropout/seed_generator"] and not report.unexpected and not report.reshaped
    weights_equal(other, model)
    weights_equal(other.optimizer, model.optimizer)
