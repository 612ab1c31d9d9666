"""Train a small Gluon network. Kill it whenever you like and start it again: it ends with the same bits.

python examples/mxnet_example.py --runs runs --run mxnet
"""

from __future__ import annotations

import argparse
import math
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # with another number, sums round differently

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.contrib import amp

import everystep

SAMPLES, BATCH, FEATURES, CLASSES = 800, 32, 20, 5
BATCHES = SAMPLES // BATCH


def make_net() -> gluon.nn.HybridSequential:
    net = gluon.nn.HybridSequential()
    net.add(
        gluon.nn.Dense(64, activation="relu", in_units=FEATURES),
        gluon.nn.BatchNorm(in_channels=64),
        gluon.nn.Dropout(0.2),
        gluon.nn.Dense(CLASSES, in_units=64),
    )
    net.initialize(mx.init.Xavier())
    net.hybridize()
    return net


def make_data() -> gluon.data.DataLoader:
    data = np.random.RandomState(7)
    x = data.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ data.normal(size=(FEATURES, CLASSES))).argmax(1).astype(np.float32)
    return gluon.data.DataLoader(gluon.data.ArrayDataset(x, y), batch_size=BATCH, shuffle=True)


def train(args: argparse.Namespace) -> None:
    random.seed(0)
    np.random.seed(0)
    mx.random.seed(0)
    if args.amp:
        amp.init(target_dtype="bfloat16")
    epochs = math.ceil(args.steps / BATCHES)
    net, loss_of = make_net(), gluon.loss.SoftmaxCrossEntropyLoss()
    schedule = mx.lr_scheduler.CosineScheduler(epochs * BATCHES, base_lr=0.01, warmup_steps=10)
    trainer = gluon.Trainer(net.collect_params(), "adam", {"lr_scheduler": schedule})

    with everystep.open(args.runs).run(args.run) as run:
        run.track(net=net, trainer=trainer)
        for x, y in run.batches(make_data(), epochs=epochs, save_on=everystep.every(args.save_every)):
            with autograd.record():
                loss = loss_of(net(x), y)
            loss.backward()
            trainer.step(len(x))
            run.record(loss=loss.mean())
            print(f"step {run.step} loss {loss.mean().asscalar():.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", help="the repository")
    parser.add_argument("--run", default="mxnet")
    parser.add_argument("--steps", type=int, default=250, help=f"rounded up to whole epochs of {BATCHES} steps")
    parser.add_argument("--save-every", type=int, default=8, help="steps between two checkpoints")
    parser.add_argument("--amp", action="store_true", help="mixed precision, in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
