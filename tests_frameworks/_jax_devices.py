"""Programs of several devices or processes, for test_jax_sharding.py: the devices are chosen when JAX starts.

python _jax_devices.py VERB FOLDER [RANK PORT LAUNCH]
"""

from __future__ import annotations

import os
import sys

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 if len(sys.argv) > 3 else 4}"

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from _jax import bits, same, saved
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import everystep
from everystep.errors import Mismatch, Unsupported

SHAPE = (8, 12)
WHOLE = np.arange(96, dtype=np.float32).reshape(SHAPE)
SPECS = [(), ("x",), (None, "y"), ("x", "y"), (("x", "y"),), (None, ("y", "x")), ("y",)]


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))


def placed(array: Any, spec: tuple[Any, ...]) -> jax.Array:
    sharding = NamedSharding(mesh(), PartitionSpec(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shardings(folder: Path) -> None:
    """Every sharding, into every other; a leaf does not say which it was."""
    for number, spec in enumerate(SPECS):
        state = {"w": placed(WHOLE, spec), "half": placed(WHOLE.astype("bfloat16"), spec), "n": placed(WHOLE[0, 0], ())}
        checkpoint = saved(folder / str(number), state)
        assert all(leaf.boxes == () for leaf in checkpoint.leaves())
        assert bits(checkpoint.load()["w"]) == bits(WHOLE)
        for other in SPECS:
            sharding = NamedSharding(mesh(), PartitionSpec(*other))
            abstract = jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding)
            for template in (abstract, placed(np.zeros(SHAPE, np.float32), other)):
                loaded = checkpoint.load(like={**state, "w": template})
                assert loaded["w"].sharding == sharding
                same(loaded, state)
        alone = checkpoint.load(like="saved")["w"]
        assert isinstance(alone.sharding, SingleDeviceSharding) and bits(np.asarray(alone)) == bits(WHOLE)


def keys(folder: Path) -> None:
    """Random keys over devices, and what is too small for its template's sharding."""
    many = jax.device_put(jax.random.split(jax.random.key(0), 8), NamedSharding(mesh(), PartitionSpec(("x", "y"))))
    state = {"keys": many, "few": jax.random.split(jax.random.key(0), 6), "w": np.arange(6.0, dtype=np.float32)}
    checkpoint = saved(folder, state)
    loaded = checkpoint.load(only="keys", like=many)
    assert bits(loaded) == bits(many) and loaded.sharding.device_set == many.sharding.device_set
    for name, kind in (("w", np.float32), ("few", many.dtype)):
        uneven = jax.ShapeDtypeStruct((6,), kind, sharding=many.sharding)
        with pytest.raises(Unsupported, match="a sharding that fits the shape"):
            checkpoint.load(only=name, like=uneven)
    with pytest.raises(Mismatch, match="does not fit the template"):
        checkpoint.load(only="few", like=many)


def train(folder: Path) -> None:
    """A step over four devices whose state is donated, interrupted and resumed at another sharding."""
    rows, columns = (NamedSharding(mesh(), PartitionSpec(*spec)) for spec in (("x", "y"), (("x", "y"),)))
    step = jax.jit(lambda w: w * 1.5 + 1, donate_argnums=0)
    straight = jax.device_put(WHOLE, rows)
    for _ in range(6):
        straight = step(straight)
    for sharding, until in ((rows, 3), (columns, 6)):
        w = jax.device_put(WHOLE, sharding)
        with everystep.open(str(folder / "repo")).run("r") as run:
            steps = run.steps(until)
            if steps.step:
                w = run.at(steps.step).load(like={"w": w})["w"]
            for number in steps:
                w = step(w)
                run.save(number, state={"w": w})
        assert w.sharding.is_equivalent_to(sharding, 2)
    assert bits(w) == bits(straight)


def ranks(folder: Path) -> None:
    """Two processes of two devices each: every one saves what it holds; the second is also told where it is by JAX."""
    rank, port, launch = int(sys.argv[3]), sys.argv[4], sys.argv[5]
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    run = everystep.open(str(folder / "repo")).run("r", launch=launch)
    run.track(rng=False)
    assert (run.rank, run.ranks) == (rank, 2)
    steps = run.steps(2 if launch == "first" else 3)
    state = state_of(0)
    if steps.step:
        state = run.at(steps.step).load(like=state)
        check(state, state_of(steps.step))
    for step in steps:
        run.save(step, state=state_of(step)).wait()
    run.close()


def state_of(step: int) -> dict[str, Any]:
    """By every spec; the devices of one process lie in one row of the mesh, or not beside each other."""
    mixed = NamedSharding(Mesh(np.array(jax.devices())[[0, 2, 1, 3]], ("z",)), PartitionSpec("z"))
    return {
        "mixed": jax.make_array_from_callback(SHAPE, mixed, lambda index: WHOLE[index] * step),
        **{f"w{number}": placed(WHOLE + step + number, spec) for number, spec in enumerate(SPECS[:5])},
        "n": placed(np.int32(step), ()),
    }


def check(left: dict[str, Any], right: dict[str, Any]) -> None:
    for name in right:
        for one, other in zip(left[name].addressable_shards, right[name].addressable_shards, strict=True):
            assert bits(np.asarray(one.data)) == bits(np.asarray(other.data)) and one.index == other.index, name


if __name__ == "__main__":
    {"shardings": shardings, "keys": keys, "train": train, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
