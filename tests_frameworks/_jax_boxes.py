"""Programs for test_jax_boxes.py, on four devices that 1, 2 or 4 processes have: what each asks the storage for.

python _jax_boxes.py VERB FOLDER RANK RANKS PORT
"""

from __future__ import annotations

import os
import sys

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // int(sys.argv[4])}"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import numpy as np
import optax
import pytest
import torch.distributed.tensor  # noqa: F401  (its DTensors take boxes, too: neither adapter may take the other's)
from _jax import bits
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import everystep
from everystep.storage import LocalStorage

RANK, RANKS, PORT = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
SHAPE = (256, 1024)
SPECS: dict[str, tuple[Any, ...]] = {
    "rows": ("x",), "cols": (None, "x"), "both": ("x", "y"), "all": (("x", "y"),), "copied": (),
}  # fmt: skip
NAMES = list(SPECS)
TYPES = ("bool", "int4", "uint16", "float8_e4m3fn", "float64", "complex64")
SHAPES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "deep": ((4, 6, 8), ("y", None, "x")),
    "empty": ((0, 4), ("x",)),
    "thin": ((4, 1, 1), (("y", "x"),)),
    "one": ((), ()),
}
# Chunks that are larger than the gaps that a read passes over.
SETTINGS = everystep.Settings(chunk_bytes_max=128 << 10, small_leaf_bytes=1024, poll_seconds=0.01)
Spec = Callable[[str], tuple[Any, ...]]


def sharding(spec: tuple[Any, ...]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y")), PartitionSpec(*spec))


def as_saved(name: str) -> tuple[Any, ...]:
    return SPECS[name]


def turned(by: int) -> Spec:
    """Each array as another one was."""
    return lambda name: SPECS[NAMES[(NAMES.index(name) + by) % len(NAMES)]]


def drawn(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(SHAPE, np.float32) for name in NAMES}


def keys() -> Any:
    return jax.random.split(jax.random.key(7), 8)


def placed(array: Any, spec: tuple[Any, ...], nothing: bool = False) -> Any:
    return put(array, sharding(spec), nothing)


def put(array: Any, where: NamedSharding, nothing: bool = False) -> Any:
    """An array, or with `nothing` others of its kind, over the devices."""
    if nothing:
        array = np.zeros_like(array) if isinstance(array, np.ndarray) else jax.random.split(jax.random.key(99), 8)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index], dtype=array.dtype)


def first() -> NamedSharding:
    """Over devices of the first process alone."""
    return NamedSharding(Mesh(np.array(jax.devices()[: 4 // RANKS]), ("z",)), PartitionSpec("z"))


def weak(array: Any) -> Any:
    array.aval = array.aval.update(weak_type=True)
    return array


def wholes(step: int) -> dict[str, Any]:
    """What the state is, wherever it lies."""
    params = drawn(step)
    start = optax.adam(0.1).init({name: np.zeros(()) for name in NAMES})
    state = start[0]._replace(count=np.asarray(step, np.int32), mu=drawn(100 + step), nu=drawn(200 + step))
    return {
        "params": params, "optimizer": (state, *start[1:]), "half": params["rows"].astype("bfloat16"),
        "keys": keys(), "key": jax.random.key(step), "tied": params["rows"], "few": np.arange(3.0), "epoch": step,
        "first": params["copied"], "weak": params["all"], "odd": params["rows"][:6],
        "types": {name: np.arange(step, step + 64).reshape(4, 16).astype(name) for name in TYPES},
        "shapes": {name: np.random.default_rng(step).standard_normal(shape) for name, (shape, _) in SHAPES.items()},
    }  # fmt: skip


def state_of(step: int, spec: Spec, nothing: bool = False) -> dict[str, Any]:
    """The state over the devices; with `nothing`, with other values."""
    whole = wholes(step)

    def named(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: placed(array, spec(name), nothing) for name, array in arrays.items()}

    params, state = named(whole["params"]), whole["optimizer"][0]
    count = placed(state.count, (), nothing)
    return {
        **whole,
        "params": params,
        "optimizer": (state._replace(count=count, mu=named(state.mu), nu=named(state.nu)), *whole["optimizer"][1:]),
        "half": placed(whole["half"], spec("rows"), nothing),
        "keys": placed(whole["keys"], spec("all")[:1], nothing),
        "key": placed(whole["key"] if not nothing else jax.random.key(99), ()),
        "types": {name: placed(array, spec("both"), nothing) for name, array in whole["types"].items()},
        "shapes": {name: placed(array, SHAPES[name][1], nothing) for name, array in whole["shapes"].items()},
        "first": put(whole["first"], first(), nothing),
        "weak": weak(placed(whole["weak"], spec("all"), nothing)),
        "tied": params["rows"] if spec is as_saved else placed(whole["tied"], (), nothing),
    }


def check(loaded: Any, step: int, spec: Spec) -> None:
    """Every shard of every leaf has the bits of the whole there, and lies where it was wanted."""
    wanted, whole = state_of(step, spec, nothing=True), wholes(step)
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    triples = zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), jax.tree.leaves(whole), strict=True)
    for one, like, expected in triples:
        if not isinstance(like, jax.Array):
            assert bits(one) == bits(expected)
            continue
        assert one.sharding.is_equivalent_to(like.sharding, like.ndim) and one.aval == like.aval
        for shard, other in zip(one.addressable_shards, like.addressable_shards, strict=True):
            assert shard.index == other.index and shard.device == other.device
            part = expected[shard.index[: like.ndim]]  # of keys, it counts their words, too
            assert raw(shard.data) == raw(part)


def raw(value: Any) -> bytes:
    is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value).tobytes()


class Net(nnx.Module):
    def __init__(self, step: int) -> None:
        self.rows = nnx.Param(placed(np.zeros(SHAPE, np.float32), SPECS["rows"]))
        self.deep = nnx.Dict(cols=nnx.Param(placed(np.zeros(SHAPE, np.float32), SPECS["cols"])))
        self.copied = nnx.BatchStat(placed(np.zeros(SHAPE, np.float32), SPECS["copied"]))
        self.rngs = nnx.Rngs(step)


def objects(step: int, spec: Spec, nothing: bool = False) -> dict[str, Any]:
    """A module and its optimizer, every large array of them another one."""
    net = Net(step if not nothing else 99)
    found = {"net": net, "adam": nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)}
    for target in found.values():
        new = []
        for path, variable in nnx.to_flat_state(nnx.state(target)):
            if variable.get_raw_value().shape == SHAPE:
                variable = variable.copy(placed(of_path(path, step), spec(name_of(path)), nothing))
            new.append((path, variable))
        nnx.update(target, nnx.from_flat_state(new))
    return found


def of_path(path: Any, step: int) -> Any:
    return np.random.default_rng(crc32(f"{path} {step}".encode())).standard_normal(SHAPE, np.float32)


def name_of(path: Any) -> str:
    return next(name for name in NAMES if name in path)


def check_objects(found: dict[str, Any], step: int, spec: Spec) -> None:
    large = 0
    for target in found.values():
        for path, variable in nnx.to_flat_state(nnx.state(target)):
            value = variable.get_raw_value()
            if value.shape == SHAPE:
                large += 1
                assert value.sharding.is_equivalent_to(sharding(spec(name_of(path))), 2)
                for shard in value.addressable_shards:
                    assert np.asarray(shard.data).tobytes() == of_path(path, step)[shard.index].tobytes()
    assert large == 7  # three arrays, and two moments for each of two parameters
    assert bits(found["net"].rngs.params()) == bits(nnx.Rngs(step).params())


class Asked:
    """Counts the bytes that this process asks its storage for."""

    def __init__(self) -> None:
        self.nbytes, whole = 0, LocalStorage.get

        def get(storage: LocalStorage, key: str, start: int = 0, stop: int | None = None) -> memoryview:
            found = whole(storage, key, start, stop)
            self.nbytes += len(found)
            return found

        LocalStorage.get = get  # type: ignore[method-assign]

    def during(self, load: Callable[[], Any]) -> int:
        before = self.nbytes
        load()
        return self.nbytes - before


def repository(folder: Path) -> everystep.Repository:
    return everystep.open(str(folder / "repo"), settings=SETTINGS)


def run_at(folder: Path, name: str, launch: str) -> everystep.Run:
    return repository(folder).run(name, launch=launch) if RANKS > 1 else repository(folder).run(name)


class Holder:
    """A program's state, which it rebinds."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def pair(self) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        return lambda: self.state, lambda made: setattr(self, "state", made)


def save(folder: Path) -> None:
    with run_at(folder, f"given-{RANKS}", "save") as run:
        run.save(1, state=state_of(1, as_saved)).wait()
    with run_at(folder, f"tracked-{RANKS}", "save") as run:
        holder = Holder(state_of(1, as_saved))
        run.track(rng=False, train=holder.pair(), **objects(1, as_saved)).save(1).wait()


def load(folder: Path) -> None:
    """What was saved by one process and by two, as other arrays were; and on with what two saved."""
    asked, facts = Asked(), {}
    for saved in (1, 2):
        checkpoint = repository(folder)[f"given-{saved}"].latest
        checkpoint.leaves()  # from here on, the manifest is known
        for by in (0, 1, 3):
            check(checkpoint.load(like=state_of(1, turned(by), nothing=True)), 1, turned(by))
            abstract = jax.tree.map(as_abstract, state_of(1, turned(by), nothing=True))
            check(checkpoint.load(like=abstract), 1, turned(by))
        facts[str(saved)] = {name: of_leaf(asked, checkpoint, name) for name in NAMES}
    facts["tracked"] = into_objects(asked, folder)
    facts["first"] = on_the_first(asked, checkpoint)
    refused(checkpoint)
    go_on(folder)
    (folder / f"facts-{RANKS}-{RANK}.json").write_text(json.dumps(facts))


def into_objects(asked: Asked, folder: Path) -> float:
    """What is asked for where tracked objects are filled that two processes saved, as they were."""
    tracked = repository(folder)["tracked-2"].at(1)
    tracked.leaves()
    whole = asked.during(tracked.load)
    holder, found = Holder(state_of(1, as_saved, nothing=True)), objects(1, as_saved, nothing=True)
    report: list[Any] = []
    into = {"train": holder.pair(), **found}
    given, device_put = [], jax.device_put
    jax.device_put = lambda array, *where: given.append((array.nbytes, where)) or device_put(array, *where)
    share = asked.during(lambda: report.append(tracked.load(into=into))) / whole
    jax.device_put = device_put
    assert report[0].complete
    assert all(nbytes < 4096 or where[0] is not None for nbytes, where in given), "an array went through one device"
    check(holder.state, 1, as_saved)
    check_objects(found, 1, as_saved)
    return share


def on_the_first(asked: Asked, checkpoint: everystep.Checkpoint) -> float:
    """The same of an array that only devices of the first process hold."""
    whole = asked.during(lambda: checkpoint.load(only="first"))
    like = jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=first())
    return asked.during(lambda: checkpoint.load(only="first", like=like)) / whole


def refused(checkpoint: everystep.Checkpoint) -> None:
    """What does not fit is said as of whole arrays."""
    rows, uneven = sharding(SPECS["rows"]), sharding((("x", "y"), None))
    for dtype, shape in ((np.float16, SHAPE), (np.float32, (SHAPE[0], SHAPE[1] + 2))):
        like = jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        with pytest.raises(everystep.Mismatch, match="does not fit the template"):
            checkpoint.load(only="params/rows", like=like)
    with pytest.raises(everystep.Unsupported, match="sharding that fits the shape"):
        checkpoint.load(only="odd", like=jax.ShapeDtypeStruct((6, 1024), np.float32, sharding=uneven))


def as_abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def of_leaf(asked: Asked, checkpoint: everystep.Checkpoint, name: str) -> dict[str, float]:
    """By the spec that it is loaded at, how much of a saved leaf is asked for."""
    path, found = f"params/{name}", {}
    whole = asked.during(lambda: checkpoint.load(only=path))
    for target, spec in SPECS.items():
        like = jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding(spec))
        found[target] = asked.during(lambda like=like: checkpoint.load(only=path, like=like)) / whole
    return found


def go_on(folder: Path) -> None:
    """Resumed by so many processes at a sharding of theirs, and saved again for the next number of them."""
    spec = turned(RANKS)
    with run_at(folder, "tracked-2", f"load-{RANKS}") as run:
        step = repository(folder)["tracked-2"].latest.step
        holder, found = Holder(state_of(step, spec, nothing=True)), objects(step, spec, nothing=True)
        run.track(rng=False, train=holder.pair(), **found)
        assert run.resume() == step
        check(holder.state, step, spec)
        check_objects(found, step, spec)
        holder.state = state_of(step + 1, spec)
        for target, other in zip(found.values(), objects(step + 1, spec).values(), strict=True):
            nnx.update(target, nnx.state(other))
        run.save(step + 1).wait()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if RANKS > 1:
        jax.distributed.initialize(f"localhost:{PORT}", RANKS, RANK)
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
