"""Train with JAX and Optax. Kill it whenever you like and start it again: it ends with the same bits.

python examples/jax_example.py --repo runs --run jax
"""

from __future__ import annotations

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import optax

import everystep

WIDTH, CLASSES, EXAMPLES, BATCH = 64, 10, 1024, 32
PER_EPOCH = EXAMPLES // BATCH


def optimizer(total: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 10, total)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))


def begin(total: int) -> dict:
    """The whole state of the training: all of it changes with every step, and all of it is saved."""
    first, second, dropout = jax.random.split(jax.random.key(0), 3)
    params = {
        "hidden": {"w": jax.random.normal(first, (WIDTH, 4 * WIDTH)) / 8, "b": jnp.zeros(4 * WIDTH)},
        "out": {"w": jax.random.normal(second, (4 * WIDTH, CLASSES)) / 16, "b": jnp.zeros(CLASSES)},
    }
    return {"params": params, "opt_state": optimizer(total).init(params), "key": dropout}


def loss_of(params: dict, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computed in bfloat16; the parameters stay in float32."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hidden = jax.nn.gelu(x.astype(jnp.bfloat16) @ half["hidden"]["w"] + half["hidden"]["b"])
    kept = jax.random.bernoulli(key, 0.9, hidden.shape)
    logits = jnp.where(kept, hidden / 0.9, 0) @ half["out"]["w"] + half["out"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()


@partial(jax.jit, static_argnames="total", donate_argnums=0)
def train_step(state: dict, x: jax.Array, y: jax.Array, total: int) -> tuple[dict, jax.Array]:
    key, dropout = jax.random.split(state["key"])
    loss, gradients = jax.value_and_grad(loss_of)(state["params"], dropout, x, y)
    updates, opt_state = optimizer(total).update(gradients, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state, "key": key}, loss


def examples() -> tuple[jax.Array, jax.Array]:
    points, labels = jax.random.split(jax.random.key(1))
    y = jax.random.randint(labels, EXAMPLES, 0, CLASSES)
    return jax.random.normal(points, (EXAMPLES, WIDTH)) + jax.nn.one_hot(y, WIDTH), y


def batch_of(step: int) -> jax.Array:
    """The examples of a step, in an order that is new in each epoch: the step alone says which."""
    epoch, at = divmod(step - 1, PER_EPOCH)
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(2), epoch), EXAMPLES)
    return order[at * BATCH : (at + 1) * BATCH]


def train(args: argparse.Namespace) -> None:
    x, y = examples()
    state = begin(args.steps)
    # Nothing here draws from Python's or NumPy's generators; JAX has its keys in the state.
    with everystep.open(args.repo).run(args.run).track(rng=False) as run:
        steps = run.steps(args.steps)  # takes the run; where it goes on is steps.step
        if steps.step:
            state = run.at(steps.step).load(like=state)
        for step in steps:
            batch = batch_of(step)
            state, loss = train_step(state, x[batch], y[batch], args.steps)
            run.record(loss=loss)
            if step % args.save_every == 0 or step == args.steps:
                run.save(step, state=state)
            print(f"step {step} loss {float(loss):.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="runs")
    parser.add_argument("--run", default="jax")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=7, help="steps between two checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
