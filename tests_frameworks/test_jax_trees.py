"""Pytrees: Optax states, Flax's classes, registered nodes, and a state back in the form of a template."""

from __future__ import annotations

import dataclasses
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _jax import bits, new_run, same, saved
from flax import linen, struct
from flax.core import freeze
from flax.training.train_state import TrainState

import everystep
from everystep.errors import EverystepWarning, Mismatch, Unsupported

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4, jnp.bfloat16)}}
OPTIMIZERS = {
    "adamw with a schedule": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, 50))
    ),
    "masked, by parts": lambda: optax.multi_transform(
        {"fast": optax.adam(1e-2), "slow": optax.sgd(1e-3, momentum=0.9)}, {"a": "fast", "b": {"c": "slow"}}
    ),
    "accumulated": lambda: optax.MultiSteps(optax.lion(1e-3), 3),
    "hyperparameters in the state": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "average": lambda: optax.chain(optax.ema(0.99), optax.apply_if_finite(optax.adafactor(1e-3), 3)),
}


def trained(optimizer: optax.GradientTransformation, steps: int, params: Any, state: Any) -> tuple[Any, Any]:
    for _ in range(steps):
        gradients = jax.tree.map(lambda leaf: (leaf * 0.5 + 1).astype(leaf.dtype), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optax_goes_on_exactly(name: str, tmp_path: Path) -> None:
    optimizer = OPTIMIZERS[name]()
    params, state = trained(optimizer, 4, PARAMS, optimizer.init(PARAMS))
    checkpoint = saved(tmp_path, {"params": params, "opt_state": state})
    # After a step: where hyperparameters are arrays, the first one makes float32 of bfloat16.
    template = dict(zip(("params", "opt_state"), trained(optimizer, 1, PARAMS, optimizer.init(PARAMS))))
    loaded = checkpoint.load(like=template)
    same(loaded, {"params": params, "opt_state": state})
    same(trained(optimizer, 3, **_named(loaded)), trained(optimizer, 3, params, state))
    same(checkpoint.load(like=template["params"], only="params"), params)
    same(checkpoint.load(like=jax.eval_shape(lambda: template)), loaded)
    roles = {leaf.role for leaf in checkpoint.leaves() if leaf.path.startswith("opt_state")}
    assert roles == {"optimizer"}


def _named(state: dict[str, Any]) -> dict[str, Any]:
    return {"params": state["params"], "state": state["opt_state"]}


def test_without_a_template_fields_are_reached_by_name(tmp_path: Path) -> None:
    optimizer = optax.adam(1e-3)
    checkpoint = saved(tmp_path, {"opt_state": optimizer.init(PARAMS)})
    loaded = checkpoint.load()["opt_state"]
    assert loaded[0].count == 0 and loaded[0].mu["a"].shape == (2, 3)
    made = checkpoint.load(like="jax", types=[optax.ScaleByAdamState, optax.EmptyState])["opt_state"]
    same(made, optimizer.init(PARAMS))


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dense(2)(linen.Dropout(0.3, deterministic=not train)(x))


class State(TrainState):
    batch_stats: Any
    key: jax.Array


def begin() -> State:
    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((1, 4)), False)
    return State.create(
        apply_fn=net.apply, params=variables["params"], tx=optax.adamw(1e-2), batch_stats=variables["batch_stats"],
        key=jax.random.key(1),
    )  # fmt: skip


@partial(jax.jit, donate_argnums=0)
def train(state: State, x: jax.Array) -> State:
    key, dropout = jax.random.split(state.key)

    def loss_of(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, changed = state.apply_fn(variables, x, True, mutable=["batch_stats"], rngs={"dropout": dropout})
        return jnp.square(y - 1).mean(), changed["batch_stats"]

    gradients, stats = jax.grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=stats, key=key)


def batch(step: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(2), step), (16, 4))


def test_a_train_state_of_flax_goes_on_exactly(tmp_path: Path) -> None:
    state = begin()
    for step in range(1, 4):
        state = train(state, batch(step))
    checkpoint = saved(tmp_path, state)
    fresh = begin()
    loaded = checkpoint.load(like=fresh)
    assert type(loaded) is State and loaded.tx is fresh.tx and loaded.apply_fn is fresh.apply_fn
    assert [bits(leaf) for leaf in jax.tree.leaves(loaded)] == [bits(leaf) for leaf in jax.tree.leaves(state)]
    assert loaded.step.weak_type and int(loaded.step) == 3
    for step in range(4, 7):
        state, loaded = train(state, batch(step)), train(loaded, batch(step))
    assert [bits(leaf) for leaf in jax.tree.leaves(loaded)] == [bits(leaf) for leaf in jax.tree.leaves(state)]
    roles = {leaf.path.split("/")[0]: leaf.role for leaf in checkpoint.leaves() if leaf.path[:4] != "rng/"}
    assert roles == {
        "step": "other", "params": "weights", "opt_state": "optimizer", "batch_stats": "buffer", "key": "rng"
    }  # fmt: skip
    plain = checkpoint.load()
    assert plain.params["Dense_0"]["kernel"].shape == (4, 8) and "apply_fn" not in plain


@jax.tree_util.register_pytree_with_keys_class
class Moments:
    """A registered node that is no dataclass; `decay` is static."""

    def __init__(self, mean: Any, square: Any, decay: float) -> None:
        self.mean, self.square, self.decay = mean, square, decay

    def tree_flatten_with_keys(self) -> Any:
        key = jax.tree_util.GetAttrKey
        return ((key("mean"), self.mean), (key("square"), self.square)), self.decay

    @classmethod
    def tree_unflatten(cls, decay: float, children: Any) -> Moments:
        return cls(*children, decay)


@jax.tree_util.register_pytree_node_class
class Pair:
    """Registered without names."""

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right

    def tree_flatten(self) -> Any:
        return (self.left, self.right), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Pair:
        return cls(*children)


@partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["layers", "activation"])
@dataclasses.dataclass(frozen=True)
class Layers:
    w: Any
    layers: int
    activation: Any


@struct.dataclass
class Ema:
    params: Any
    decay: float = struct.field(pytree_node=False, default=0.9)
    name: str = struct.field(pytree_node=False, default="ema")


@dataclasses.dataclass
class Plain:
    """No pytree at all."""

    w: Any
    note: str


class Named(NamedTuple):
    x: Any
    y: Any = None


def nodes(scale: float, activation: Any = jax.nn.relu) -> dict[str, Any]:
    w = jnp.arange(4.0) * scale
    return {
        "moments": Moments(w, [w + 1], 0.5),
        "pair": Pair((w, None), {}),
        "layers": Layers({"w": w}, 3, activation),
        "ema": Ema(w, decay=0.99),
        "frozen": freeze({"b": {"w": w}, "a": w + 2}),
        "named": Named(w),
        "plain": Plain(w, "text"),
        "numpy": (np.float32(scale), np.arange(3) * int(scale)),
        "counts": [1, 2.5, True, "x", b"y", 3 + 1j],
        3: {(1, "a"): w},
    }


def test_registered_nodes_come_back_by_a_template(tmp_path: Path) -> None:
    state, template = nodes(2.0), nodes(5.0, activation=jax.nn.gelu)
    loaded = saved(tmp_path, state).load(like=template)
    assert loaded["layers"].activation is jax.nn.gelu and loaded["layers"].layers == 3
    assert loaded["ema"].decay == 0.99 and type(loaded["plain"]) is Plain and loaded["plain"].note == "text"
    assert list(loaded) == list(template)
    for name in ("moments", "pair", "frozen", "named", "numpy", "counts", "ema", 3):
        same(loaded[name], state[name])
    for name in ("layers", "plain"):
        assert bits(jax.tree.leaves(loaded[name].w)[0]) == bits(jnp.arange(4.0) * 2)


def test_registered_nodes_are_plain_containers_without_one(tmp_path: Path) -> None:
    plain = saved(tmp_path, nodes(2.0)).load()
    assert plain["moments"].mean.tolist() == [0, 2, 4, 6]
    assert plain["pair"][0][1] is None and plain["pair"][1] == {}
    assert plain["frozen"]["b"]["w"].tolist() == [0, 2, 4, 6] and plain["ema"].decay == 0.99
    assert plain["layers"].layers == 3 and "activation" not in plain["layers"]


def test_what_has_state_and_no_form_is_refused(tmp_path: Path) -> None:
    with new_run(tmp_path) as run, pytest.raises(Unsupported, match="running code"):
        run.save(1, state={"tx": optax.sgd(0.1)})


def test_a_template_that_does_not_fit_changes_nothing_and_says_where(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"params": {"w": jnp.ones(3), "old": jnp.ones(2), "n": 4}, "opt_state": None})
    template = {"params": {"w": jnp.zeros((3, 1)), "new": jnp.zeros(2), "n": "four"}, "opt_state": jnp.ones(1)}
    with pytest.raises(Mismatch) as caught:
        checkpoint.load(like=template)
    text = str(caught.value)
    assert "missing: params/new" in text and "unexpected: params/old" in text
    assert "reshaped: params/w, params/n, opt_state" in text
    with pytest.warns(EverystepWarning, match="params/new"):
        loaded = checkpoint.load(like=template, strict=False)
    same(loaded, template)
    with pytest.raises(Mismatch, match="reshaped: w"):
        checkpoint.load(like={"w": jnp.ones(3, jnp.bfloat16)}, only="params", strict=True)


def test_several_parts_by_a_dict_of_templates(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"params": PARAMS, "key": jax.random.key(3)})
    template = {"params/b": {"c": jnp.zeros(4, jnp.bfloat16)}, "key": jax.random.key(0)}
    loaded = checkpoint.load(only=["params/b", "key"], like=template)
    same(loaded, {"params/b": PARAMS["b"], "key": jax.random.key(3)})


def test_a_getter_and_a_setter_train_and_resume_by_themselves(tmp_path: Path) -> None:
    def loop(path: Path, until: int, total: int) -> State:
        state = begin()

        def put(loaded: State) -> None:
            nonlocal state
            state = loaded

        with new_run(path) as run:
            run.track(train=(lambda: state, put), rng=False)
            for step in run.steps(total, save_every=2):
                state = train(state, batch(step))
                if step == until:
                    break
        return state

    whole = loop(tmp_path / "whole", 9, 9)
    loop(tmp_path / "cut", 5, 9)
    assert everystep.open(str(tmp_path / "cut" / "repo"))["r"].latest.step == 4
    resumed = loop(tmp_path / "cut", 9, 9)
    assert resumed.step == 9
    assert [bits(leaf) for leaf in jax.tree.leaves(resumed)] == [bits(leaf) for leaf in jax.tree.leaves(whole)]


def test_a_signal_saves_what_a_getter_gives(tmp_path: Path) -> None:
    state = {"w": jnp.zeros(3)}
    with new_run(tmp_path) as run:
        run.track(train=(lambda: state, lambda loaded: None), rng=False)
        for step in run.steps(100, save_every=50):
            state = {"w": state["w"] + 1}
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert run.stopped == "SIGTERM"
    latest = everystep.open(str(tmp_path / "repo"))["r"].latest
    assert latest.step == 3 and latest.load()["train"]["w"].tolist() == [3, 3, 3]
