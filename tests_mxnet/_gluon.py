"""Small Gluon trainings in which every random number counts, and pictures of their ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

import everystep
from everystep import adapters
from everystep.schema import flatten


def scramble(seed: int) -> None:
    """Every global generator somewhere else, as in a new process."""
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)


def net_of(*, ctx: Any = None, extra: bool = False) -> gluon.nn.HybridSequential:
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(16, activation="relu", in_units=8))
    net.add(gluon.nn.BatchNorm(in_channels=16), gluon.nn.Dropout(0.3), gluon.nn.Dense(4, in_units=16))
    if extra:
        net.add(gluon.nn.Dense(4, in_units=4))
    net.initialize(mx.init.Xavier(), ctx=ctx or mx.cpu())
    return net


def step(net: Any, trainer: Any, at: int, ctx: list[Any] | None = None) -> float:
    """One update with data that depends on the step alone, and dropout that does not."""
    data = np.random.RandomState(at)
    parts = [mx.nd.array(data.normal(size=(4, 8)), ctx=one) for one in ctx or [mx.cpu()]]
    with autograd.record():
        losses = [net(x).square().mean() for x in parts]
    for loss in losses:
        loss.backward()
    trainer.step(4 * len(parts))
    return float(sum(loss.asscalar() for loss in losses))


def picture(run: Any, at: int) -> Any:
    """All of a checkpoint, bit for bit."""
    tree = flatten(run.at(at).load(), adapters.describe)
    rows = []
    for leaf, payload in zip(tree.leaves, tree.payloads):
        data = np.empty(leaf.nbytes, np.uint8)
        adapters.copy(payload, data)
        rows.append((leaf.path, leaf.dtype, leaf.shape, data.tobytes()))
    return tree.nodes, tree.values, rows


Make = Callable[[], tuple[Any, Any]]


def train(place: Path, name: str, make: Make, total: int, *, seed: int, ctx: list[Any] | None = None) -> Any:
    """Up to a step, from wherever the run is; saves every second step, and at the last."""
    scramble(seed)
    net, trainer = make()
    with everystep.open(str(place)).run(name).track(net=net, trainer=trainer) as run:
        for at in run.steps(total, save_every=2):
            run.record(loss=step(net, trainer, at, ctx))
        assert run.report is None or run.report.exact, run.report
    return everystep.open(str(place))[name]


def resumes_exactly(place: Path, make: Make, *, ctx: list[Any] | None = None, steps: tuple[int, int] = (3, 6)) -> Any:
    """A run that goes on in other objects after its first steps ends like one that went through."""
    stop, total = steps
    whole = train(place, "whole", make, total, seed=1, ctx=ctx)
    train(place, "parts", make, stop, seed=1, ctx=ctx)
    parts = train(place, "parts", make, total, seed=2, ctx=ctx)
    assert picture(whole, total) == picture(parts, total)
    return parts
