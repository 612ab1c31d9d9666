"""TensorFlow's values, models, optimizers and generators: taken and put back, bit for bit, or refused with a reason."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from _tensorflow import bits, new_run, rows, small_model, there_and_back, train

import everystep
from everystep import EverystepWarning, Mismatch, Unsupported, adapters
from everystep.adapters import tensorflow as adapter
from everystep.adapters import tensorflow_values
from everystep.schema import LoadReport

DTYPES = sorted((dtype.name for dtype in adapter._DISK_NAMES), key=str)


# ------------------------------------------------------------------------------------------- values in a given state


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_type(tmp_path: Path, name: str) -> None:
    dtype = tf.as_dtype(name)
    kind = np.dtype(dtype.as_numpy_dtype)
    raw = np.random.default_rng(3).integers(0, 256, size=6 * kind.itemsize).astype(np.uint8)
    small = name in ("bool", "int2", "uint2", "int4", "uint4")
    array = (raw[:6] % 2).astype(kind) if small else raw.view(kind)
    parts = {"matrix": array.reshape(2, 3), "scalar": array[1:2].reshape(()), "empty": np.empty((0, 3), kind)}
    state = {name: tf.constant(part, dtype) for name, part in parts.items()}
    back = there_and_back(tmp_path, state)
    for key, one in state.items():
        assert bits(back[key]) == bits(one), key
    plain = there_and_back(tmp_path, state, like="numpy")
    assert plain["matrix"].dtype == kind and plain["matrix"].tobytes() == array.tobytes()


def test_every_type_that_training_uses_is_there() -> None:
    assert {"bfloat16", "float16", "complex64", "bool", "float8_e5m2", "float8_e4m3fn", "uint64"} <= set(DTYPES)


def test_nan_payloads_and_minus_zero(tmp_path: Path) -> None:
    array = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800001], np.uint32).view(np.float32)
    value = tf.constant(array)
    assert bits(there_and_back(tmp_path, {"a": value})["a"]) == bits(value)
    assert value.numpy().tobytes() == array.tobytes()


def test_strings(tmp_path: Path) -> None:
    state = {
        "texts": tf.constant([["a", "ü" * 3000], ["", "\0x\0"]]),
        "one": tf.constant(b"\xff\x00"),
        "none": tf.zeros((0, 2), tf.string),
    }
    back = there_and_back(tmp_path, state)
    for key, value in state.items():
        assert back[key].dtype == tf.string and back[key].shape == value.shape
        assert np.array_equal(back[key].numpy(), value.numpy())


def test_ragged_sparse_and_what_describes_them(tmp_path: Path) -> None:
    ragged = tf.ragged.constant([[[1, 2], []], [[3]], []], dtype=tf.int32)
    uniform = tf.RaggedTensor.from_uniform_row_length(tf.ragged.constant([[1.0], [2.0, 3.0], [], [4.0]]), 2)
    state = {
        "ragged": ragged,
        "uniform": uniform,
        "texts": tf.ragged.constant([["a"], ["b", "c"]]),
        "sparse": tf.SparseTensor([[0, 1], [2, 0]], tf.constant([1.5, 2.5], tf.bfloat16), [3, 2]),
        "slices": tf.IndexedSlices(tf.constant([[1.0], [2.0]]), tf.constant([0, 4]), tf.constant([5, 1])),
        "open": tf.IndexedSlices(tf.constant([[1.0]]), tf.constant([2])),
        "shape": tf.TensorShape([3, None]),
        "unknown": tf.TensorShape(None),
        "dtype": tf.bfloat16,
    }
    back = there_and_back(tmp_path, state)
    for key in ("ragged", "uniform", "texts"):
        assert back[key].to_list() == state[key].to_list() and back[key].shape == state[key].shape
        assert back[key].uniform_row_length == state[key].uniform_row_length
    for part in ("indices", "values", "dense_shape"):
        assert bits(getattr(back["sparse"], part)) == bits(getattr(state["sparse"], part))
        if part != "dense_shape":
            assert bits(getattr(back["open"], part)) == bits(getattr(state["open"], part))
    assert bits(back["slices"].values) == bits(state["slices"].values) and back["open"].dense_shape is None
    assert back["shape"] == state["shape"] and back["unknown"].rank is None and back["dtype"] is tf.bfloat16


def test_a_variable_is_the_value_that_it_had(tmp_path: Path) -> None:
    variable, loose = tf.Variable([1.0, 2.0]), tf.Variable([1, 2], shape=tf.TensorShape([None]))
    layered = keras.Variable(np.arange(3.0, dtype=np.float32))
    with new_run(tmp_path) as run:
        saved = run.save(1, state={"a": variable, "b": loose, "c": layered, "same": variable})
        variable.assign([7.0, 7.0])
        loose.assign([5])
        back = saved.wait().load(like="saved")
    assert back["a"].numpy().tolist() == [1, 2] and back["b"].numpy().tolist() == [1, 2]
    assert back["c"].numpy().tolist() == [0, 1, 2] and back["same"] is back["a"]


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        for state, match in (
            ({"x": tf.quantization.quantize([1.0], 0.0, 1.0, tf.qint8).output}, "qint8 has no name"),
            ({"x": tf.data.Dataset.range(2)._variant_tensor}, "variant has no name"),
            ({"x": tf.data.Dataset.range(2)}, "could only be restored by running code"),
        ):
            with pytest.raises(Unsupported, match=match) as caught:
                run.save(1, state=state)
            assert caught.value.where == "state/x"

        @tf.function
        def inside(value: Any) -> None:
            with pytest.raises(Unsupported, match="symbolic tensor"):
                run.save(1, state={"x": value})

        inside(tf.constant(1.0))


def test_parts_that_do_not_fit_together_are_damage() -> None:
    from everystep.schema import Composite

    for kind, parts in (
        ("tensorflow.string", {"shape": [2], "lengths": np.array([1, 5]), "bytes": b"abc"}),
        ("tensorflow.string", {"shape": [1 << 40], "lengths": np.array([1]), "bytes": b"a"}),
        ("tensorflow.ragged", {"rows": [{"splits": tf.constant([0, 9], tf.int64)}], "values": tf.constant([1])}),
        ("tensorflow.ragged", {"rows": [{"length": 2, "count": 9, "type": "string"}], "values": tf.constant([1])}),
        ("tensorflow.sparse", {"indices": tf.constant([[7]], tf.int64), "values": tf.constant([1]), "shape": [3]}),
        ("tensorflow.dtype", {"name": "no such"}),
        ("tensorflow.shape", {"sizes": [-4]}),
        ("tensorflow.other", {}),
    ):
        with pytest.raises(everystep.Damaged):
            adapters.compose(Composite(kind, parts))


# ----------------------------------------------------------------------------------------------------------- names


def test_names_do_not_depend_on_what_was_made_before() -> None:
    first = rows(small_model())
    for _ in range(3):
        keras.layers.Dense(1)
    assert list(rows(small_model())) == list(first)
    assert set(first) == {
        "model/dense/kernel", "model/dense/bias", "model/named/kernel", "model/named/bias",
        "model/dense_1/kernel", "model/dense_1/bias", "model/dropout/seed_generator",
        *(f"model/batch_normalization/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")),
    }  # fmt: skip
    roles = {path.removeprefix("model/"): role for path, (role, _, _) in first.items()}
    assert roles["dense/kernel"] == roles["batch_normalization/gamma"] == "weights"
    assert roles["batch_normalization/moving_mean"] == "buffer" and roles["dropout/seed_generator"] == "rng"


class Tower(keras.Model):
    """Layers in attributes, lists, dicts; one that is shared; a variable, and a module of TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [keras.layers.Dense(4, name=f"block{i}") for i in range(2)]
        self.heads = {"a": keras.layers.Dense(1), "b": keras.layers.Dense(1)}
        self._gate = keras.layers.Dense(4)
        self.again = self.blocks[0]
        self.attention = keras.layers.MultiHeadAttention(2, 4, dropout=0.1)
        self.recurrent = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True))
        self.loss_mean = keras.metrics.Mean()
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.listed = [tf.Variable(1.0)]
        self.seeds = keras.random.SeedGenerator(4)
        self.module = Module()

    def call(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x) * self._gate(x)
        x = self.recurrent(self.attention(x, x))
        return self.heads["a"](x) + self.heads["b"](x)


class Module(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable([1.0, 2.0])
        self.parts = [tf.Variable(1.0), {"inner": tf.Variable(2, trainable=False)}]
        self.generator = tf.random.Generator.from_seed(3)
        self.table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)


def test_names_of_a_model_of_ones_own() -> None:
    model = Tower()
    model(tf.zeros((2, 5, 4)))
    model.module.table.insert(tf.constant(["x", "y"]), tf.constant([1, 2], tf.int64))
    found = rows(model)
    assert {
        "model/blocks/0/kernel", "model/blocks/1/bias", "model/heads/a/kernel", "model/gate/kernel",
        "model/attention/query_dense/kernel", "model/recurrent/forward_layer/cell/kernel",
        "model/recurrent/backward_layer/cell/recurrent_kernel", "model/loss_mean/total", "model/count", "model/seeds",
        "model/listed/0",
        "model/module/w", "model/module/parts/0", "model/module/parts/1/inner", "model/module/generator",
        "model/module/table/-values",
    } <= set(found)  # fmt: skip
    assert not [path for path in found if "again" in path], "a shared layer has one name"
    assert [found[f"model/{name}"][0] for name in ("count", "module/w", "module/generator", "loss_mean/total")] == [
        "buffer", "weights", "rng", "other",
    ]  # fmt: skip
    variables = len({id(variable) for variable in (*model.variables, *model.metrics_variables)})
    assert len(found) == variables + 6 + 2  # six of TensorFlow's own; the lengths of the table's keys, its values

    other = Tower()
    other(tf.ones((2, 5, 4)))
    assert set(rows(other)) <= set(found)


def test_a_checkpoint_object_of_tensorflow(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        model, optimizer = small_model(), keras.optimizers.Adam(0.01)
        optimizer.build(model.trainable_variables)
        data = iter(tf.data.Dataset.range(9).shuffle(9, seed=1))
        return tf.train.Checkpoint(
            model=model, optimizer=optimizer, step=tf.Variable(0), data=data, root_of=tf.train.Checkpoint(Module())
        ), data

    checkpoint, data = make()
    train(checkpoint.model, checkpoint.optimizer)
    checkpoint.step.assign(5)
    next(data), next(data)
    with new_run(tmp_path) as run:
        run.track(all=checkpoint)
        saved = run.save(1).wait()
    paths = {leaf.path for leaf in saved.leaves()}
    assert {"all/model/dense/kernel", "all/step", "all/root_of/w", "all/optimizer/iteration"} <= paths
    assert "all/optimizer/state/all.model.named.kernel/momentum" in paths

    other, fresh = make()
    other.save_counter.assign_add(3)  # TensorFlow's own count of its saves is not of the run
    report = saved.load(into={"all": other})
    assert report.exact, report
    assert rows(other, "all") == rows(checkpoint, "all")
    assert [int(next(fresh)) for _ in range(7)] == [int(next(data)) for _ in range(7)]


class Words(tf.train.experimental.PythonState):
    def __init__(self, words: str) -> None:
        self.words = words

    def serialize(self) -> str:
        return self.words

    def deserialize(self, string_value: bytes) -> None:
        self.words = string_value.decode()


def test_tables_and_python_states(tmp_path: Path) -> None:
    def make(words: str) -> Any:
        table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
        return tf.train.Checkpoint(words=Words(words), table=table)

    one, other = make("ü" * 3000), make("")
    one.table.insert(tf.constant(["x", "yy"]), tf.constant([1, 2], tf.int64))
    other.table.insert(tf.constant(["z"]), tf.constant([3], tf.int64))
    with new_run(tmp_path) as run:
        saved = run.track(all=one).save(1).wait()
    assert saved.load(into={"all": other}).exact
    assert other.words.words == one.words.words
    assert other.table.lookup(tf.constant(["x", "yy", "z"])).numpy().tolist() == [1, 2, -1]


# ------------------------------------------------------------------------------------------------------ optimizers

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True, use_ema=True, gradient_accumulation_steps=2),
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "plain": lambda: keras.optimizers.SGD(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(),
    "adadelta": lambda: keras.optimizers.Adadelta(),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), dynamic_growth_steps=2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_of_every_kind(tmp_path: Path, kind: str) -> None:
    model, optimizer = small_model(), OPTIMIZERS[kind]()
    train(model, optimizer, 3)
    with new_run(tmp_path) as run:
        saved = run.track(model=model, optimizer=optimizer).save(1).wait()
    held = rows(optimizer, "optimizer", model=model)
    variables = {id(variable): variable for variable in optimizer.variables}
    assert len(held) >= len(variables)
    kept = sorted(data for _, _, data in held.values())
    for variable in variables.values():
        assert variable.numpy().tobytes() in kept, variable.path
    assert {role for role, _, _ in held.values()} == {"optimizer"}

    for _ in range(2):
        keras.layers.Dense(1)
    other, fresh = small_model(), OPTIMIZERS[kind]()
    report = saved.load(into={"model": other, "optimizer": fresh})  # it is built for what it was built for
    assert report.exact, report
    assert rows(fresh, "optimizer", model=other) == held
    for one, two in ((model, optimizer), (other, fresh)):
        train(one, two, 2, seed=5)
    assert rows(other) == rows(model)
    assert rows(fresh, "optimizer", model=other) == rows(optimizer, "optimizer", model=model)


def test_slots_are_named_by_what_they_belong_to() -> None:
    model, optimizer = small_model(), keras.optimizers.Adam()
    optimizer.build(model.trainable_variables[2:4])
    found = set(rows(optimizer, "optimizer", model=model))
    assert "optimizer/state/model.batch_normalization.gamma/velocity" in found and "optimizer/iteration" in found
    assert len([path for path in found if "/state/" in path]) == 4
    alone = rows(optimizer, "optimizer")
    assert "optimizer/state/variable0/momentum" in alone


def test_an_optimizer_that_was_built_for_a_part_is_built_for_that_part(tmp_path: Path) -> None:
    model, optimizer = small_model(), keras.optimizers.Adam()
    optimizer.build(model.layers[-1].trainable_variables)
    with new_run(tmp_path) as run:
        saved = run.track(model=model, optimizer=optimizer).save(1).wait()
    other, fresh = small_model(), keras.optimizers.Adam()
    assert saved.load(into={"model": other, "optimizer": fresh}).exact
    assert [v is w for v, w in zip(fresh._trainable_variables, other.layers[-1].trainable_variables)] == [True, True]
    assert len(fresh._trainable_variables) == 2
    with pytest.raises(Unsupported, match="is not built yet") as caught:
        saved.load(into={"optimizer": keras.optimizers.Adam()})
    assert caught.value.where == "optimizer" and "optimizer.build(" in str(caught.value)


def test_the_optimizer_that_a_model_was_compiled_with(tmp_path: Path) -> None:
    def make() -> keras.Model:
        model = small_model()
        model.compile(keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"])
        return model

    model = make()
    model.fit(np.ones((8, 4), np.float32), np.ones((8, 2), np.float32), epochs=2, verbose=0)
    with new_run(tmp_path) as run:
        saved = run.track(model=model).save(1).wait()
    assert "model/optimizer/state/model.dense.kernel/momentum" in {leaf.path for leaf in saved.leaves()}
    again = make()
    assert saved.load(into={"model": again}).exact
    assert rows(again) == rows(model)

    bare = small_model()
    report = saved.load(into={"model": bare})
    assert report.complete and not report.exact and "model/optimizer is in the checkpoint" in report.inexact[0]

    # Tracked by itself it is there once; a model alone does not ask for it.
    with new_run(tmp_path, "apart") as run:
        apart = run.track(model=model, optimizer=model.optimizer).save(1).wait()
    assert not [leaf.path for leaf in apart.leaves() if leaf.path.startswith("model/optimizer")]
    report = apart.load(into={"model": make()})
    assert report.complete and "model/optimizer is not in the checkpoint" in report.inexact[0]


# ---------------------------------------------------------------------------------------------- matching, and misfits


def test_a_misfit_changes_nothing(tmp_path: Path) -> None:
    model = small_model()
    with new_run(tmp_path) as run:
        saved = run.track(model=model).save(1).wait()
    wider = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(9), keras.layers.Dense(8, name="named"), keras.layers.Dense(3)]
    )
    before = rows(wider)
    with pytest.raises(Mismatch, match="nothing was changed"):
        saved.load(into={"model": wider})
    assert rows(wider) == before
    report = saved.load(into={"model": wider}, strict=False)
    assert {"model/dense/kernel", "model/dense/bias", "model/named/kernel"} <= set(report.reshaped)
    assert "model/named/bias" in report.loaded and not report.missing
    assert "model/batch_normalization/gamma" in report.unexpected
    assert wider.get_layer("named").bias.numpy().tobytes() == model.get_layer("named").bias.numpy().tobytes()


def test_another_element_type_is_a_misfit(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        saved = run.track(v=tf.Variable([1.0, 2.0])).save(1).wait()
    for other in (tf.Variable([1.0, 2.0], dtype=tf.float64), tf.Variable([[1.0], [2.0]]), tf.Variable([1.0])):
        with pytest.raises(Mismatch, match="reshaped: v"):
            saved.load(into={"v": other})
    loose = tf.Variable([5.0], shape=tf.TensorShape([None]))
    saved.load(into={"v": loose})
    assert loose.numpy().tolist() == [1, 2]
    with pytest.raises(Mismatch, match="no state of a Sequential here"):
        saved.load(into={"v": small_model()})


def test_what_is_not_built_is_named(tmp_path: Path) -> None:
    lazy = keras.Sequential([keras.layers.Dense(2)])
    with new_run(tmp_path) as run:
        run.track(net=lazy)
        with pytest.raises(Unsupported, match="not built yet") as caught:
            run.save(1)
        assert caught.value.where == "net" and "build(input_shape)" in str(caught.value)
    holder = tf.Module()
    holder.inner = keras.layers.Dense(3, name="late")
    with new_run(tmp_path, "b") as run:
        run.track(holder=holder)
        with pytest.raises(Unsupported, match="'late'") as caught:
            run.save(1)
        assert caught.value.where == "holder/inner"
    with new_run(tmp_path, "c") as run:
        run.track(model=small_model(), optimizer=keras.optimizers.Adam())
        with pytest.raises(Unsupported, match="not built yet") as caught:
            run.save(1)
        assert caught.value.where == "optimizer"


def test_an_adapted_layer_computes_again_what_it_computes_with(tmp_path: Path) -> None:
    def make() -> keras.Model:
        return keras.Sequential([keras.Input((2,)), keras.layers.Normalization(), keras.layers.Dense(1)])

    model, other = make(), make()
    model.layers[0].adapt(np.array([[1.0, 5.0], [3.0, 9.0]], np.float32))
    with new_run(tmp_path) as run:
        saved = run.track(model=model).save(1).wait()
    assert saved.load(into={"model": other}).exact
    x = tf.constant([[4.0, 4.0]])
    assert model(x).numpy().tobytes() == other(x).numpy().tobytes()


def test_what_a_save_leaves_out_is_said(tmp_path: Path) -> None:
    words = keras.layers.TextVectorization(vocabulary=["a", "b"])
    words(tf.constant(["a b"]))
    with new_run(tmp_path) as run, pytest.warns(EverystepWarning, match="the vocabulary of 'text_vectorization"):
        run.track(words=words)
    tf.random.set_seed(None)  # as a program that seeds nothing
    unseeded = iter(tf.data.Dataset.range(5).shuffle(5))
    with new_run(tmp_path, "b") as run, pytest.warns(EverystepWarning, match="the seed of a shuffle"):
        run.track(data=unseeded)


def test_bare_tensors_are_refused(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        for bare in (tf.constant(1.0), tf.data.Dataset.range(3), [tf.Variable(1.0)]):
            with pytest.raises(Unsupported, match="cannot track"):
                run.track(x=bare)


def test_optimizers_that_hide_their_state_are_refused(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.track(old=tf.compat.v1.train.AdamOptimizer())
        with pytest.raises(Unsupported, match="use an optimizer of Keras 3"):
            run.save(1)


# -------------------------------------------------------------------------------------------------- random numbers


def draw() -> list[bytes]:
    """Of every global generator, seeded operations inside and outside of Keras."""
    values = [
        tf.random.normal((3,)), tf.random.uniform((2,), maxval=9, dtype=tf.int32), keras.random.normal((2,)),
        tf.random.get_global_generator().normal((2,)), tf.nn.dropout(tf.ones(8), 0.5),
    ]  # fmt: skip
    return [random.randbytes(4), np.random.bytes(4), *(value.numpy().tobytes() for value in values)]


@pytest.mark.parametrize("fresh", [False, True])
def test_global_random_state(fresh: bool) -> None:
    keras.utils.set_random_seed(11)
    tf.random.set_global_generator(tf.random.Generator.from_seed(2))
    draw()
    kept = adapters.random_state()
    expected = [draw(), draw()]
    if fresh:  # as a new process is, in which nothing has drawn yet
        keras.utils.set_random_seed(99)
        from tensorflow.python.ops import stateful_random_ops

        stateful_random_ops.global_generator = None
    assert adapters.set_random_state(kept) == []
    assert [draw(), draw()] == expected


def test_keras_begins_its_own_numbers_where_the_run_would_have() -> None:
    keras.utils.set_random_seed(5)
    kept = adapters.random_state()
    expected = keras.random.normal((3,)).numpy().tobytes()
    keras.utils.set_random_seed(6)
    keras.random.normal((3,))
    assert adapters.set_random_state(kept) == []
    assert keras.random.normal((3,)).numpy().tobytes() == expected


def test_generators_that_are_tracked(tmp_path: Path) -> None:
    one, two = tf.random.Generator.from_seed(1, alg="philox"), keras.random.SeedGenerator(3)
    three = tf.random.Generator.from_seed(1, alg="threefry")
    one.normal((3,)), two.next()
    with new_run(tmp_path) as run:
        saved = run.track(one=one, two=two).save(1).wait()
    assert {leaf.role for leaf in saved.leaves() if leaf.path in ("one", "two")} == {"rng"}
    expected = one.normal((3,)).numpy().tobytes(), two.next().numpy().tobytes()
    other, seeds = tf.random.Generator.from_seed(7, alg="philox"), keras.random.SeedGenerator(9)
    assert saved.load(into={"one": other, "two": seeds}).exact
    assert (other.normal((3,)).numpy().tobytes(), seeds.next().numpy().tobytes()) == expected
    with pytest.raises(Mismatch, match="reshaped: one"):
        saved.load(into={"one": three, "two": seeds})


# ---------------------------------------------------------------------------------------------------- declared frozen


def test_frozen_layers_are_not_copied_while_nothing_writes_to_them(tmp_path: Path) -> None:
    body = keras.layers.Dense(600, name="body")
    model = keras.Sequential([keras.Input((600,)), body, keras.layers.Dense(1)])
    body.trainable = False
    declared = adapters.standing([model])
    assert len(declared) == 2

    def marks() -> list[Any]:
        described = [adapter.describe(variable, "") for variable in (body.kernel, body.bias, model.layers[1].kernel)]
        return [(found.payload, adapter.mark(found.payload, declared)) for found in described]

    first = marks()
    assert [mark for _, mark in marks()] == [mark for _, mark in first] and first[2][1] is None
    body.bias.assign_add(tf.ones(600))
    second = marks()
    assert second[0][1] == first[0][1] and second[1][1] != first[1][1]

    with new_run(tmp_path) as run:
        run.track(model=model, frozen="trusted")
        kept = [run.save(1).wait()]
        model.layers[1].bias.assign([1.0])
        kept.append(run.save(2).wait())
        body.kernel.assign(body.kernel * 2)
        kept.append(run.save(3).wait())
    loaded = [one.load(only="model/body/kernel") for one in kept]
    assert loaded[1].tobytes() == loaded[0].tobytes() and np.array_equal(loaded[2], loaded[0] * 2)


# ---------------------------------------------------------------------------------------------------------- the world


@pytest.mark.parametrize(
    ("jobs", "job", "task", "expected"),
    [
        ({"worker": 3}, "worker", 2, (2, 3)),
        ({"chief": 1, "worker": 2}, "chief", 0, (0, 3)),
        ({"chief": 1, "worker": 2}, "worker", 1, (2, 3)),
        ({"worker": 1}, "worker", 0, None),
        ({"chief": 1, "worker": 2, "ps": 1}, "chief", 0, None),
        ({"chief": 1, "worker": 2}, "evaluator", 0, None),
    ],
)
def test_ranks_of_a_cluster(jobs: dict[str, int], job: str, task: int, expected: Any, monkeypatch: Any) -> None:
    import json

    cluster = {name: [f"host{i}:1" for i in range(count)] for name, count in jobs.items()}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": job, "index": task}}))
    assert tensorflow_values.world() == expected


def test_what_is_in_tf_config_need_not_be_a_cluster(monkeypatch: Any) -> None:
    for text in ("", "not json", "{}", "[]", '{"cluster": 3}'):
        monkeypatch.setenv("TF_CONFIG", text)
        assert tensorflow_values.world() is None
    monkeypatch.delenv("TF_CONFIG")
    assert tensorflow_values.world() is None


def test_values_of_replicas_in_a_program_without_a_strategy() -> None:
    variable = tf.Variable([0.0, 0.0])
    saved = {"0": tf.constant([1.0, 2.0]), "1": tf.constant([3.0, 6.0])}
    for how, expected in (("mean", [2, 4]), ("sum", [4, 8]), ("first", [1, 2])):
        report = LoadReport()
        value = {"aggregation": how, "per_replica": saved}
        place = tensorflow_values.fit(variable, "buffer", value, "v", (0, 1), report)
        assert place is not None and report.inexact == ["v was kept by 2 replicas, is by 1"]
        place()
        assert variable.numpy().tolist() == expected
    assert tensorflow_values.fit(tf.Variable([1]), "buffer", value, "v", (0, 1), report) is None


def test_bfloat16_lies_in_numpy_as_it_is(tmp_path: Path) -> None:
    back = there_and_back(tmp_path, {"x": tf.constant([1.5, -2.0], tf.bfloat16)}, like="numpy")
    assert back["x"].dtype == np.dtype(ml_dtypes.bfloat16) and back["x"].astype(np.float32).tolist() == [1.5, -2]


def test_loaded_as_tensors(tmp_path: Path) -> None:
    back = there_and_back(tmp_path, {"x": np.arange(3.0), "n": np.float32(2)}, like="tensorflow")
    assert isinstance(back["x"], tf.Tensor) and back["x"].dtype == tf.float64 and back["n"].dtype == tf.float32
