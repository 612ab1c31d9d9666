"""JAX arrays: every element type, weak types, random keys, donated and deleted ones, and 64 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from _jax import bits, new_run, same, saved

import everystep
from everystep.errors import Mismatch, Unsupported, UsageError

DTYPES = [
    "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "complex64", "bfloat16",
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "int4", "uint4", "int2", "uint2",
]  # fmt: skip


def every_pattern(name: str) -> np.ndarray[Any, Any]:
    """Values of a type made of random bits, NaN of all kinds among them."""
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    random = np.random.default_rng(0)
    if name == "bool":
        return random.integers(0, 2, (7, 33)).astype(bool)
    small = {"int4": (-8, 8), "uint4": (0, 16), "int2": (-2, 2), "uint2": (0, 4)}
    if name in small:
        return random.integers(*small[name], (7, 33)).astype(dtype)
    limit = 16 if name == "float4_e2m1fn" else 256
    return random.integers(0, limit, 7 * 33 * dtype.itemsize).astype(np.uint8).view(dtype).reshape(7, 33)


@pytest.mark.parametrize("name", DTYPES)
def test_every_element_type_comes_back(name: str, tmp_path: Path) -> None:
    array = jax.device_put(every_pattern(name))
    assert str(array.dtype) == name
    state = {"w": array, "empty": array[:0], "scalar": array[0, 0]}
    checkpoint = saved(tmp_path, state)
    for like in ("saved", "jax", jax.eval_shape(lambda: state), state):
        same(state, checkpoint.load(like=like))
    plain = checkpoint.load()["w"]
    assert type(plain) is np.ndarray and bits(plain) == bits(np.asarray(array))


def test_a_weak_type_stays_weak(tmp_path: Path) -> None:
    state = {"weak": jnp.asarray(2.0) * 3, "strong": jnp.float32(2), "wide": jnp.broadcast_to(jnp.asarray(1), (3, 2))}
    assert [state[name].weak_type for name in state] == [True, False, True]
    checkpoint = saved(tmp_path, state)
    for like in ("saved", "jax", state):
        same(state, checkpoint.load(like=like))
    half = checkpoint.load(like="saved")["weak"] * jnp.ones(1, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_come_back(impl: str, tmp_path: Path) -> None:
    key = jax.random.key(7, impl=impl)
    state = {"key": key, "keys": jax.random.split(key, (2, 3)), "raw": jax.random.PRNGKey(3)}
    checkpoint = saved(tmp_path, state)
    for like in ("saved", "jax", state, jax.eval_shape(lambda: state)):
        loaded = checkpoint.load(like=like)
        same(state, loaded)
        assert bits(jax.random.normal(loaded["key"], 5)) == bits(jax.random.normal(key, 5))
    assert checkpoint.load()["key"]["impl"] == impl
    assert {leaf.path: leaf.role for leaf in checkpoint.leaves()}["keys/data"] == "rng"


def test_a_template_of_other_keys_does_not_fit(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"key": jax.random.key(1)})
    with pytest.raises(Mismatch, match="key"):
        checkpoint.load(like={"key": jax.random.key(1, impl="rbg")})
    with pytest.raises(Mismatch, match="key"):
        checkpoint.load(like={"key": jax.random.PRNGKey(1)})


def test_a_state_that_is_donated_after_the_save_is_saved_as_it_was(tmp_path: Path) -> None:
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"large": jnp.zeros((600, 1000)), "small": jnp.zeros(3)}
    with new_run(tmp_path) as run:
        for number in range(1, 6):
            before, state = state, step(state)
            assert all(leaf.is_deleted() for leaf in before.values())
            run.save(number, state=state)
    for checkpoint in everystep.open(str(tmp_path / "repo"))["r"].checkpoints():
        loaded = checkpoint.load()
        assert (loaded["large"] == checkpoint.step).all() and (loaded["small"] == checkpoint.step).all()


def test_what_was_loaded_can_be_donated(tmp_path: Path) -> None:
    tied = jnp.arange(5000.0)
    checkpoint = saved(tmp_path, {"a": tied, "b": tied, "c": jnp.ones(64)})
    first, again = (checkpoint.load(like={"a": tied, "b": tied, "c": tied[:64]}) for _ in range(2))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state), donate_argnums=0)
    for _ in range(3):
        first = step(first)
    assert bits(first["a"]) == bits(tied * 8) == bits(first["b"])
    same(again, {"a": tied, "b": tied, "c": jnp.ones(64)})


def test_a_deleted_array_is_refused_by_its_path(tmp_path: Path) -> None:
    gone = jnp.ones(4)
    gone.delete()
    with new_run(tmp_path) as run, pytest.raises(Unsupported, match="donate_argnums") as caught:
        run.save(1, state={"params": {"w": gone}})
    assert caught.value.where == "params/w" or caught.value.where == "state/params/w"


def test_a_template_may_be_deleted(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": jnp.arange(4.0), "key": jax.random.key(0)})
    template = {"w": jnp.zeros(4), "key": jax.random.key(5)}
    jax.tree.map(lambda leaf: leaf.delete(), template)
    same(checkpoint.load(like=template), {"w": jnp.arange(4.0), "key": jax.random.key(0)})


def test_a_traced_value_is_refused(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:

        def step(x: jax.Array) -> jax.Array:
            run.save(1, state={"w": x})
            return x

        with pytest.raises(Unsupported, match="outside of jit"):
            jax.jit(step)(jnp.ones(3))


def test_64_bits_are_never_cut(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        state = {"i": jnp.arange(3) + 2**40, "f": jnp.linspace(0.0, 1.0, 5), "c": jnp.ones(2, jnp.complex128)}
        assert {str(leaf.dtype) for leaf in state.values()} == {"int64", "float64", "complex128"}
        checkpoint = saved(tmp_path, state)
        same(state, checkpoint.load(like=state))
    for like in ("saved", "jax"):
        with pytest.raises(Unsupported, match="jax_enable_x64"):
            checkpoint.load(like=like)
    assert checkpoint.load()["i"].dtype == np.int64


def test_arrays_of_numpy_become_arrays_of_jax(tmp_path: Path) -> None:
    state = {"w": np.arange(6, dtype=">f4").reshape(2, 3), "n": 3, "text": "abc", "big": np.float32(2)}
    checkpoint = saved(tmp_path, state)
    loaded = checkpoint.load(like="jax")
    assert isinstance(loaded["w"], jax.Array) and loaded["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert isinstance(loaded["big"], jax.Array) and (loaded["n"], loaded["text"]) == (3, "abc")
    checkpoint = saved(tmp_path, {"text": np.array(["a", "b"])})
    with pytest.raises(Unsupported, match="JAX cannot hold"):
        checkpoint.load(like="jax")


def test_a_like_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"numpy, torch, .*jax"):
        saved(tmp_path, {"w": jnp.ones(2)}).load(like="cupy")


def test_tied_arrays_are_stored_once(tmp_path: Path) -> None:
    weight = jnp.arange(1000.0)
    checkpoint = saved(tmp_path, {"params": weight, "opt_state": {"copy": weight}})
    assert [(leaf.path, leaf.role) for leaf in checkpoint.leaves() if leaf.role != "rng"] == [("params", "weights")]
    loaded = checkpoint.load(like="saved")
    assert loaded["params"] is loaded["opt_state"]["copy"]
