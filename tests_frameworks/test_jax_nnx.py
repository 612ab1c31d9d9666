"""Flax NNX: modules, optimizers and generators are tracked as objects, and go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from _jax import bits, new_run, same, saved
from flax import nnx

import everystep
from everystep.errors import Mismatch


class Net(nnx.Module):
    """Shared, normalised, with dropout, and layers in a list."""

    def __init__(self, rngs: nnx.Rngs, width: int = 8) -> None:
        self.layers = nnx.List([nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)])
        self.again = self.layers[0]
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.4, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(4, jnp.bfloat16))
        self.seen = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen[...] += 1
        x = self.drop(nnx.relu(self.norm(self.layers[0](x))))
        return self.again(self.layers[1](x)).sum(-1, keepdims=True) * self.scale[...]


def make(width: int = 8, seed: int = 0) -> tuple[Net, nnx.Optimizer, nnx.Rngs]:
    model = Net(nnx.Rngs(seed), width)
    schedule = optax.linear_schedule(1e-2, 0.0, 20)
    return model, nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param), nnx.Rngs(data=seed + 5)


@nnx.jit
def train(model: Net, optimizer: nnx.Optimizer, rngs: nnx.Rngs) -> jax.Array:
    x = jax.random.normal(rngs.data(), (16, 4))
    loss, gradients = nnx.value_and_grad(lambda model: jnp.square(model(x) - 1).mean())(model)
    optimizer.update(model, gradients)
    return loss


def leaves(*objects: Any) -> list[Any]:
    return [bits(leaf) for one in objects for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(one)))]


def run_to(path: Path, until: int, total: int, seed: int) -> list[Any]:
    model, optimizer, rngs = make(seed=seed)
    with new_run(path) as run:
        run.track(model=model, optimizer=optimizer, rngs=rngs)
        for step in run.steps(total, save_every=2):
            run.record(loss=train(model, optimizer, rngs))
            if step == until:
                break
    return leaves(model, optimizer, rngs)


def test_a_run_goes_on_exactly_in_new_objects(tmp_path: Path) -> None:
    whole = run_to(tmp_path / "whole", 0, 9, seed=0)
    run_to(tmp_path / "cut", 5, 9, seed=0)
    assert run_to(tmp_path / "cut", 0, 9, seed=77) == whole
    past = everystep.open(str(tmp_path / "cut" / "repo"))["r"]
    roles = {leaf.path: leaf.role for leaf in past.latest.leaves()}
    assert roles["model/again/kernel"] == roles["model/layers/[1]/bias"] == roles["model/scale"] == "weights"
    assert roles["model/norm/mean"] == "buffer" and roles["optimizer/step"] == "optimizer"
    assert {role for path, role in roles.items() if path.startswith("rngs/")} == {"rng"}
    assert not any(path.startswith("model/layers/[0]") for path in roles), "it is model.again, and there once"
    assert past.latest.load(only="model/seen") == 9


def test_another_shape_changes_nothing(tmp_path: Path) -> None:
    run_to(tmp_path, 4, 4, seed=0)
    model, optimizer, rngs = make(width=6)
    before = leaves(model, optimizer, rngs)
    latest = everystep.open(str(tmp_path / "repo"))["r"].latest
    with pytest.raises(Mismatch, match=r"reshaped: model/"):
        latest.load(into={"model": model, "optimizer": optimizer, "rngs": rngs})
    assert leaves(model, optimizer, rngs) == before


def test_only_the_model_comes_in(tmp_path: Path) -> None:
    run_to(tmp_path, 4, 4, seed=0)
    model, _, _ = make(seed=3)
    latest = everystep.open(str(tmp_path / "repo"))["r"].latest
    report = latest.load(into={"model": model})
    assert report.complete and "model/layers/[1]/bias" in report.loaded
    assert model.again.kernel is model.layers[0].kernel


def test_the_state_of_a_module_can_be_given_as_it_is(tmp_path: Path) -> None:
    model, optimizer, rngs = make()
    train(model, optimizer, rngs)
    graph, state = nnx.split(model)
    checkpoint = saved(tmp_path, {"params": state, "pure": nnx.to_pure_dict(state)})
    template = nnx.state(make(seed=5)[0])
    loaded = checkpoint.load(like=template, only="params")
    assert type(loaded) is type(template)
    same(nnx.to_pure_dict(loaded), nnx.to_pure_dict(state))
    again = nnx.merge(graph, loaded)
    assert leaves(again) == leaves(model)
    plain = checkpoint.load()
    assert plain["params"]["norm"]["mean"].tolist() == plain["pure"]["norm"]["mean"].tolist()


def test_a_damaged_start_is_said(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    with new_run(tmp_path) as run:
        run.track(model=model).save(1)
    with pytest.raises(Mismatch, match="missing: optimizer"):
        everystep.open(str(tmp_path / "repo"))["r"].latest.load(into={"model": model, "optimizer": optimizer})
