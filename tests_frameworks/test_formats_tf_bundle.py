"""TensorFlow's checkpoints with TensorFlow itself: what it writes is read equal, and it loads what we write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import everystep
from everystep import formats
from everystep.formats.tf_bundle import state_of
from everystep.formats.tf_bundle_crc import crc32c
from everystep.formats.tf_bundle_proto import DTYPES, NUMBERS
from everystep.formats.tf_bundle_table import table

CHANCE = np.random.default_rng(0)


def random_array(dtype: Any, *shape: int) -> np.ndarray:
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return CHANCE.random(shape) < 0.5
    if dtype.name in ("int4", "uint4"):
        return CHANCE.integers(0, 7, shape).astype(dtype)
    return np.frombuffer(CHANCE.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def equal(one: Any, other: Any) -> None:
    one, other = np.asarray(one), np.asarray(other)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def test_our_table_of_dtypes_is_that_of_tensorflow() -> None:
    for number, dtype in DTYPES.items():
        if number in NUMBERS.values():
            assert tf.dtypes.as_dtype(number).as_numpy_dtype == dtype.type, number


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_every_dtype_both_ways(dtype: Any, tmp_path: Path) -> None:
    x = random_array(dtype, 3, 5)
    prefix = str(tmp_path / "theirs")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=["a"], shape_and_slices=[""], tensors=[tf.constant(x)])
    equal(formats.read(prefix, strict=True).state["a"], x)
    formats.write(tmp_path / "ours.index", {"a": x})
    reader = tf.train.load_checkpoint(str(tmp_path / "ours"))
    key = "a/.ATTRIBUTES/VARIABLE_VALUE"
    assert reader.get_variable_to_shape_map()[key] == [3, 5]
    equal(reader.get_tensor(key), x)


def test_slices_text_and_empty_tensors(tmp_path: Path) -> None:
    x = random_array("f4", 70, 9)
    words = np.array([[b"a", b"b" * 300], [b"", "ü".encode()]])
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x"),
        tensor_names=["cut", "cut", "cut", "words", "none", "scalar", "empty", "no/words"],
        shape_and_slices=["70 9 0,64:-", "70 9 64,6:0,4", "70 9 64,6:4,5", "", "", "", "", ""],
        tensors=[
            x[:64],
            x[64:, :4],
            x[64:, 4:],
            words,
            np.zeros((0, 3), "f4"),
            np.int64(-5),
            b"",
            np.zeros((0,), "S1"),
        ],
    )
    state = formats.read(tmp_path / "x", strict=True).state
    equal(state["cut"], x)
    assert state["words"] == [[b"a", b"b" * 300], [b"", "ü".encode()]]
    assert state["none"].shape == (0, 3) and state["scalar"][()] == -5
    assert state["empty"] == b"" and state["no"]["words"] == []


def test_several_data_files(tmp_path: Path) -> None:
    """As a cluster writes them: each worker a file, merged by the coordinator."""
    arrays = {f"v{i}": random_array("f8", 4, i + 1) for i in range(5)}
    prefixes = []
    for name, array in arrays.items():
        prefixes.append(str(tmp_path / f"part-{name}"))
        tf.raw_ops.SaveV2(prefix=prefixes[-1], tensor_names=[name], shape_and_slices=[""], tensors=[array])
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(tmp_path / "whole"))
    assert len(list(tmp_path.glob("whole.data-*-of-00005"))) == 5
    state = formats.read(tmp_path / "whole", strict=True).state
    for name, array in arrays.items():
        equal(state[name], array)


def module() -> Any:
    made = tf.Module()
    made.w = tf.Variable(random_array("f4", 2, 3), name="weight")
    made.again = made.w
    made.layers = [tf.Variable(random_array("f8", 3)), tf.Variable(random_array("i4"))]
    made.table = {"k/x": tf.Variable(random_array(ml_dtypes.bfloat16, 2)), "a.b": tf.Variable([True, False])}
    made.inner = tf.Module()
    made.inner.b = tf.Variable(random_array("u1", 9))
    return made


def test_a_checkpoint_is_read_restored_from_ours_and_the_same(tmp_path: Path) -> None:
    first, step = module(), tf.Variable(41, dtype=tf.int64)
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=first, step=step), str(tmp_path / "t"), 3)
    manager.save()
    step.assign(42)
    path = manager.save()
    assert state_of((tmp_path / "t" / "checkpoint").read_text()) == ["ckpt-1", "ckpt-2"]
    state = formats.read(path, strict=True).state
    assert state["step"] == 42 and state["save_counter"] == 2
    equal(state["model"]["table"]["k/x"], first.table["k/x"].numpy())

    formats.write(tmp_path / "ours.index", state)
    second, other = module(), tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(model=second, step=other)
    status = checkpoint.restore(str(tmp_path / "ours"))
    status.assert_consumed()
    assert other.numpy() == 42
    for mine, theirs in (
        (second.w, first.w), (second.layers[0], first.layers[0]), (second.layers[1], first.layers[1]),
        (second.table["k/x"], first.table["k/x"]), (second.table["a.b"], first.table["a.b"]),
        (second.inner.b, first.inner.b),
    ):  # fmt: skip
        equal(mine.numpy(), theirs.numpy())
    assert second.again is second.w


def test_a_state_of_dicts_and_lists_restores_into_objects_of_the_same_names(tmp_path: Path) -> None:
    x, shared = random_array("f4", 4), random_array("f4", 2, 2)
    formats.write(tmp_path / "x.index", {"net": {"blocks": [{"w": x}, {"w": x + 1}], "tie": shared}, "head": shared})
    made = tf.Module()
    made.blocks = [tf.Module(), tf.Module()]
    made.blocks[0].w, made.blocks[1].w = tf.Variable(tf.zeros(4)), tf.Variable(tf.zeros(4))
    made.tie = tf.Variable(tf.zeros((2, 2)))
    tf.train.Checkpoint(net=made, head=made.tie).read(str(tmp_path / "x")).assert_consumed()
    equal(made.blocks[1].w.numpy(), x + 1)
    equal(made.tie.numpy(), shared)


def test_a_restored_checkpoint_can_be_saved_again(tmp_path: Path) -> None:
    formats.write(tmp_path / "x.index", {"v": np.arange(3.0)})
    variable = tf.Variable(tf.zeros(3, tf.float64))
    checkpoint = tf.train.Checkpoint(v=variable)
    checkpoint.restore(str(tmp_path / "x")).expect_partial()
    path = checkpoint.save(str(tmp_path / "again"))
    equal(formats.read(path, strict=True).state["v"], np.arange(3.0))


def test_a_saved_model(tmp_path: Path) -> None:
    made = tf.Module()
    made.v = tf.Variable(random_array("f4", 2, 2))
    made.call = tf.function(lambda x: x @ made.v, input_signature=[tf.TensorSpec((None, 2))])
    tf.saved_model.save(made, str(tmp_path / "m"))
    content = formats.read(tmp_path / "m", strict=True)
    assert content.format == "saved_model"
    equal(content.state["v"], made.v.numpy())


def test_a_run_goes_out_to_tensorflow(tmp_path: Path) -> None:
    state = {"model": {"w": random_array("f4", 3, 3)}, "step": np.int64(9)}
    with everystep.open(tmp_path / "runs").run("r") as run:
        run.save(9, state=state)
    checkpoint = everystep.open(tmp_path / "runs")["r"].latest
    assert checkpoint is not None
    checkpoint.export(tmp_path / "ckpt-9.index")
    made = tf.Module()
    made.w = tf.Variable(tf.zeros((3, 3)))
    tf.train.Checkpoint(model=made).restore(str(tmp_path / "ckpt-9")).expect_partial()
    equal(made.w.numpy(), state["model"]["w"])


def test_a_table_that_another_writer_packed(tmp_path: Path) -> None:
    """A large index of many blocks is read by TensorFlow as by us."""
    state = {f"layer{i:04}": {"kernel": np.full(2, i, "f4")} for i in range(2500)}
    formats.write(tmp_path / "x.index", state)
    reader = tf.train.load_checkpoint(str(tmp_path / "x"))
    assert len(reader.get_variable_to_shape_map()) >= 2500
    for i in (0, 1, 777, 2499):
        equal(reader.get_tensor(f"layer{i:04}/kernel/.ATTRIBUTES/VARIABLE_VALUE"), state[f"layer{i:04}"]["kernel"])
    assert crc32c(table([])) == crc32c(table([]))
