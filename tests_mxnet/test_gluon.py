"""Gluon blocks and trainers: every bit comes back, and a run goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from _gluon import net_of, picture, resumes_exactly, scramble, step, train
from mxnet import autograd, gluon

import everystep
from everystep import EverystepWarning, LoadReport, Mismatch, Unsupported, adapters
from everystep.adapters.mxnet_arrays import same_bits

# -------------------------------------------------------------------------------------------------------- blocks


def test_names_do_not_depend_on_the_counters_of_layers(tmp_path: Path) -> None:
    first, second = net_of(), net_of()
    assert set(first.collect_params()) != set(second.collect_params()), "MXNet's own names do"
    with everystep.open(str(tmp_path)).run("r").track(net=first) as run:
        checkpoint = run.save(1).wait()
    roles = {leaf.path: leaf.role for leaf in checkpoint.leaves() if leaf.path.startswith("net/")}
    assert roles == {
        "net/0.weight": "weights", "net/0.bias": "weights", "net/3.weight": "weights", "net/3.bias": "weights",
        "net/1.gamma": "weights", "net/1.beta": "weights",
        "net/1.running_mean": "buffer", "net/1.running_var": "buffer",
    }  # fmt: skip
    report = checkpoint.load(into={"net": second})
    assert report.complete and report.exact and len(report.loaded) == 8
    for name, param in first._collect_params_with_prefix().items():
        assert same_bits(param.data(), second._collect_params_with_prefix()[name].data())


@pytest.mark.parametrize("deferred", [True, False])
def test_a_parameter_without_values_is_an_error(deferred: bool, tmp_path: Path) -> None:
    net = gluon.nn.Sequential()
    net.add(gluon.nn.Dense(3))
    if deferred:
        net.initialize()
    said = "deferred parameter" if deferred else "not been initialized"
    whole = gluon.nn.Sequential()
    whole.add(gluon.nn.Dense(3, in_units=2))
    whole.initialize()
    with everystep.open(str(tmp_path)).run("r") as run:
        run.track(net=net)
        with pytest.raises(Unsupported, match=said) as error:
            run.save(1)
        assert "net/0.weight" in str(error.value)
        run.track(net=whole)
        checkpoint = run.save(1).wait()
        with pytest.raises(Unsupported, match=said):
            checkpoint.load(into={"net": net})


def test_what_does_not_fit_is_said_and_changes_nothing(tmp_path: Path) -> None:
    scramble(1)
    with everystep.open(str(tmp_path)).run("r").track(net=net_of()) as run:
        checkpoint = run.save(1).wait()
    other = net_of(extra=True)
    before = {name: param.data().copy() for name, param in other._collect_params_with_prefix().items()}
    with pytest.raises(Mismatch, match=r"net/4\.weight"):
        checkpoint.load(into={"net": other})
    assert all(same_bits(param.data(), before[name]) for name, param in other._collect_params_with_prefix().items())
    report = checkpoint.load(into={"net": other}, strict=False)
    assert report.missing == ["net/4.weight", "net/4.bias"] and len(report.loaded) == 8
    small = gluon.nn.HybridSequential()
    small.add(gluon.nn.Dense(15, in_units=8))
    small.initialize()
    report = checkpoint.load(into={"net": small}, strict=False)
    assert report.reshaped == ["net/0.weight", "net/0.bias"] and len(report.unexpected) == 6
    cast = net_of()
    cast.cast("float64")
    assert len(checkpoint.load(into={"net": cast}, strict=False).reshaped) == 8, "never cast in silence"


def test_shared_parameters_are_saved_once(tmp_path: Path) -> None:
    def tied() -> Any:
        net = gluon.nn.Sequential()
        net.add(gluon.nn.Dense(4, in_units=4))
        net.add(gluon.nn.Dense(4, in_units=4, params=net[0].params))
        net.initialize()
        return net

    with everystep.open(str(tmp_path)).run("r").track(net=tied()) as run:
        checkpoint = run.save(1).wait()
    assert [leaf.path for leaf in checkpoint.leaves() if "net" in leaf.path] == ["net/0.weight", "net/0.bias"]
    other = tied()
    assert len(checkpoint.load(into={"net": other}).loaded) == 4
    assert (other[1].weight.data().asnumpy() == checkpoint.load(only="net/0.weight")).all()
    state = checkpoint.load(only="net")
    apart = tied()
    report = LoadReport()
    adapters.apply(apart, {**state, "1.bias": state["0.bias"] + 1}, "net", {}, report)
    assert report.reshaped == ["net/1.bias"], "one parameter cannot take two values"


def test_what_is_not_saved_is_said(tmp_path: Path) -> None:
    net = net_of()
    net[0].helper = mx.nd.ones(3)
    net[3].weight.grad_req = "add"
    with everystep.open(str(tmp_path)).run("r") as run, pytest.warns(EverystepWarning) as said:
        run.track(net=net)
    text = str(said[0].message)
    assert "net.0.helper: an array that is no parameter" in text and "gradients that add up" in text


def test_parts_cannot_be_tracked_by_themselves(tmp_path: Path) -> None:
    net = net_of()
    with everystep.open(str(tmp_path)).run("r") as run:
        for part in (net.collect_params(), net[0].weight, mx.optimizer.create("sgd"), mx.nd.ones(2)):
            with pytest.raises(Unsupported):
                run.track(part=part)


# ------------------------------------------------------------------------------------------------------- trainer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9}, "nag": {"momentum": 0.9}, "signum": {}, "ftml": {}, "lars": {"momentum": 0.9},
    "lamb": {}, "dcasgd": {}, "sgld": {}, "adam": {}, "adagrad": {}, "rmsprop": {"centered": True},
    "adadelta": {}, "ftrl": {}, "adamax": {}, "nadam": {}, "lbsgd": {"momentum": 0.9, "batch_scale": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_exactly(name: str, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        net = net_of()
        return net, gluon.Trainer(net.collect_params(), name, {"learning_rate": 0.01, "wd": 1e-3, **OPTIMIZERS[name]})

    resumes_exactly(tmp_path, make)


SCHEDULES: dict[str, Any] = {
    "factor": lambda: mx.lr_scheduler.FactorScheduler(2, 0.5, base_lr=0.1),
    "multi": lambda: mx.lr_scheduler.MultiFactorScheduler([2, 4], 0.1, base_lr=0.1),
    "poly": lambda: mx.lr_scheduler.PolyScheduler(8, base_lr=0.1),
    "cosine": lambda: mx.lr_scheduler.CosineScheduler(8, base_lr=0.1, warmup_steps=4),
    "function": lambda: None,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on_exactly(name: str, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        net = net_of()
        options = {"lr_scheduler": SCHEDULES[name]()} if name != "function" else {}
        trainer = gluon.Trainer(net.collect_params(), "adam", options)
        if name == "function":
            trainer._optimizer.lr_scheduler = lambda updates: 0.1 / (1 + updates)
        return net, trainer

    past = resumes_exactly(tmp_path, make)
    assert past.at(6).load(only="trainer/options/num_update") == 6


def test_the_trainers_state_is_kept_by_names(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        net = net_of()
        return net, gluon.Trainer(net.collect_params(), "adam")

    past = train(tmp_path, "r", make, 2, seed=1)
    state = past.latest.load(only="trainer")
    assert set(state["state"]) == {f"net.{name}" for name in (
        "0.weight", "0.bias", "1.gamma", "1.beta", "3.weight", "3.bias",
    )}  # fmt: skip
    assert state["counts"][0]["net.0.weight"] == 2 and state["shapes"]["net.0.weight"] == [16, 8]
    paths = {leaf.path: leaf.role for leaf in past.latest.leaves()}
    assert paths["trainer/state/net.0.weight/[0]"] == "optimizer"
    train(tmp_path, "r", make, 4, seed=1)
    past.forget(keep_full=everystep.last(1), force=True)
    assert past.at(2).thin and {leaf.role for leaf in past.at(2).leaves()} == {"weights", "buffer", "rng"}


def test_layers_in_another_order_take_what_is_theirs(tmp_path: Path) -> None:
    """A trainer numbers parameters by names with counters, which sort "dense10" before "dense9"."""

    class Net(gluon.Block):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            names = ("first", "second") if not turned else ("second", "first")
            for name in names:
                setattr(self, name, gluon.nn.Dense(4, in_units=4))
            self.initialize()

        def forward(self, x: Any) -> Any:
            return self.second(self.first(x).tanh())

    def trained(net: Any) -> Any:
        trainer = gluon.Trainer(net.collect_params(), "adam")
        step_of_four(net, trainer)
        return trainer

    net = Net(False)
    with everystep.open(str(tmp_path)).run("r").track(net=net, trainer=trained(net)) as run:
        checkpoint = run.save(1).wait()
    other = Net(True)
    trainer = gluon.Trainer(other.collect_params(), "adam")
    assert checkpoint.load(into={"net": other, "trainer": trainer}).complete
    states = checkpoint.load(only="trainer/state")
    for name, param in other._collect_params_with_prefix().items():
        mean, _ = trainer._updaters[0].states[trainer._params.index(param)]
        assert (mean.asnumpy() == states[f"net.{name}"][0]).all()


def step_of_four(net: Any, trainer: Any) -> None:
    with autograd.record():
        loss = net(mx.nd.array(np.random.RandomState(0).normal(size=(2, 4)))).square().sum()
    loss.backward()
    trainer.step(2)


def test_half_precision_weights_with_masters(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        net = gluon.nn.Dense(4, in_units=8)
        net.initialize()
        net.cast("float16")
        return net, gluon.Trainer(net.collect_params(), "sgd", {"momentum": 0.9, "multi_precision": True})

    def go(name: str, total: int, seed: int) -> Any:
        scramble(seed)
        net, trainer = make()
        with everystep.open(str(tmp_path)).run(name).track(net=net, trainer=trainer) as run:
            for at in run.steps(total, save_every=3):
                for param in net.collect_params().values():
                    values = np.random.RandomState(at).normal(size=param.shape)
                    param.grad()[:] = mx.nd.array(values, dtype="float16")
                    param.data()._fresh_grad = True
                trainer.step(1)
        return everystep.open(str(tmp_path))[name]

    whole = go("whole", 6, 1)
    go("parts", 3, 1)
    assert picture(whole, 6) == picture(go("parts", 6, 2), 6)
    momentum, master = whole.at(6).load(only="trainer/state/net.weight")
    assert {momentum.dtype, master.dtype} == {np.dtype("f4")} and whole.at(6).load(only="net/weight").dtype == "f2"


def test_what_does_not_fit_a_trainer_is_said(tmp_path: Path) -> None:
    def made(kind: str, **options: Any) -> tuple[Any, Any]:
        net = net_of()
        return net, gluon.Trainer(net.collect_params(), kind, options)

    past = train(tmp_path, "r", lambda: made("adam", lr_scheduler=SCHEDULES["cosine"]()), 2, seed=1)
    net, trainer = made("adam", lr_scheduler=SCHEDULES["poly"]())
    with pytest.raises(Mismatch, match="trainer/scheduler"):
        past.latest.load(into={"net": net, "trainer": trainer})
    assert trainer._optimizer.num_update == 0 and not trainer._updaters[0].states
    net, trainer = made("sgd")
    report = past.latest.load(into={"net": net, "trainer": trainer}, strict=False)
    assert "trainer/options/beta1" in report.unexpected and "trainer/scheduler" in report.unexpected
    net, trainer = made("adam", lr_scheduler=SCHEDULES["cosine"]())
    with pytest.raises(Mismatch, match="no trainer here"):
        adapters.apply(trainer, {"state": {}}, "trainer", {}, LoadReport())


def test_an_attribute_without_a_form_is_said(tmp_path: Path) -> None:
    net = net_of()
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    trainer._optimizer.helper = object()
    with (
        everystep.open(str(tmp_path)).run("r") as run,
        pytest.warns(EverystepWarning, match=r"trainer: optimizer\.helper"),
    ):
        run.track(net=net, trainer=trainer)


# ------------------------------------------------------------------------------------------------ several devices

TWO = [mx.cpu(0), mx.cpu(1)]


@pytest.mark.parametrize("on_store", [True, False])
@pytest.mark.parametrize("trainer_first", [True, False])
def test_several_devices_go_on_exactly(on_store: bool, trainer_first: bool, tmp_path: Path) -> None:
    """Each device has running statistics of its own; the weights, and what is known of them, are the same on both."""

    def make() -> tuple[Any, Any]:
        net = net_of(ctx=TWO)
        options = {"update_on_kvstore": on_store}
        return net, gluon.Trainer(net.collect_params(), "adam", {"learning_rate": 0.01}, **options)

    def go(name: str, total: int, seed: int) -> Any:
        scramble(seed)
        net, trainer = make()
        tracked = {"trainer": trainer, "net": net} if trainer_first else {"net": net, "trainer": trainer}
        with everystep.open(str(tmp_path)).run(name).track(**tracked) as run:
            for at in run.steps(total, save_every=2):
                step(net, trainer, at, TWO)
        return everystep.open(str(tmp_path))[name]

    whole = go("whole", 6, 1)
    go("parts", 3, 1)
    parts = go("parts", 6, 2)
    assert picture(whole, 6) == picture(parts, 6)
    paths = {leaf.path for leaf in whole.at(6).leaves()}
    assert "net/1.running_mean@1" in paths and "net/0.weight@1" not in paths
    one = net_of()
    report = whole.at(6).load(into={"net": one})
    assert report.complete and any("running_mean@1" in text for text in report.inexact)
    assert (one[1].running_mean.data().asnumpy() == whole.at(6).load(only="net/1.running_mean")).all()


def test_a_live_trainer_takes_an_older_state(tmp_path: Path) -> None:
    """A store that updates the weights holds copies of them: they go back too."""
    scramble(1)
    net = net_of(ctx=TWO)
    trainer = gluon.Trainer(net.collect_params(), "adam")
    with everystep.open(str(tmp_path)).run("r").track(net=net, trainer=trainer) as run:
        ends = []
        for at in (1, 2, 3):
            step(net, trainer, at, TWO)
            run.save(at).wait()
        ends.append(picture(run, 3))
        assert run.rewind(1) == 1
        for at in (2, 3):
            step(net, trainer, at, TWO)
            run.save(at).wait()
        ends.append(picture(run, 3))
    assert ends[0] == ends[1]


def test_sparse_weights_and_gradients_go_on_exactly(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        net = gluon.nn.Embedding(50, 4, sparse_grad=True)
        net.initialize()
        return net, gluon.Trainer(net.collect_params(), "adam", {"lazy_update": True})

    def go(name: str, total: int, seed: int) -> Any:
        scramble(seed)
        net, trainer = make()
        with everystep.open(str(tmp_path)).run(name).track(net=net, trainer=trainer) as run:
            for at in run.steps(total, save_every=2):
                rows = mx.nd.array(np.random.RandomState(at).randint(0, 50, 6))
                with autograd.record():
                    loss = net(rows).square().sum()
                loss.backward()
                trainer.step(6)
        return everystep.open(str(tmp_path))[name]

    whole = go("whole", 6, 1)
    go("parts", 3, 1)
    assert picture(whole, 6) == picture(go("parts", 6, 2), 6)
