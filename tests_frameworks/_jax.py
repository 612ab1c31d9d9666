"""For the tests of JAX: states compared bit for bit, keys and weak types included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import everystep


def new_run(path: Path, name: str = "r") -> everystep.Run:
    return everystep.open(str(path / "repo")).run(name)


def saved(path: Path, state: Any) -> everystep.Checkpoint:
    """The checkpoint of an explicit state, in a run of its own."""
    repo = everystep.open(str(path / "repo"))
    with repo.run(f"run{len(repo.runs())}") as run:
        return run.save(1, state=state).wait()


def bits(leaf: Any) -> tuple[Any, ...]:
    """All that makes a leaf: type, shape and bytes; of keys their implementation, of arrays whether they are weak."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return ("key", str(jax.random.key_impl(leaf)), *bits(jax.random.key_data(leaf)))
    if isinstance(leaf, jax.Array):
        return ("jax", str(leaf.dtype), leaf.shape, bool(leaf.weak_type), np.asarray(leaf).tobytes())
    if isinstance(leaf, (np.ndarray, np.generic)):
        return (type(leaf).__name__, str(leaf.dtype), leaf.shape, leaf.tobytes())
    return (type(leaf).__name__, repr(leaf))


def same(left: Any, right: Any) -> None:
    """Fails unless two pytrees have the same structure, classes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(left)]
    for path, one, other in zip(paths, jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert bits(one) == bits(other), path
