"""What changed, and what a leaf looks like: checked against the plain formulas."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from everystep.analysis import compare_leaf, compare_values, summarize
from everystep.analysis.compare import ADDED, CHANGED, REMOVED, RESHAPED, SAME

FINITE = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e10, 1e10, width=32))


@given(FINITE)
def test_summary_is_what_numpy_says(array: np.ndarray) -> None:
    found = summarize(array)
    wide = array.astype(np.float64)
    assert found is not None
    assert found.norm == pytest.approx(float(np.linalg.norm(wide)))
    assert found.mean == pytest.approx(float(wide.mean()), abs=1e-9)
    assert (found.low, found.high) == (wide.min(), wide.max())
    assert (found.not_finite, found.zeros) == (0, int((array == 0).sum()))


def test_summary_over_more_than_one_block() -> None:
    array = np.random.default_rng(0).standard_normal((700, 1000)).astype(np.float32)
    found = summarize(array)
    assert found is not None and found.norm == pytest.approx(float(np.linalg.norm(array.astype(np.float64))))


def test_summary_leaves_out_what_is_not_finite() -> None:
    found = summarize(np.array([3.0, np.nan, np.inf, -4.0]))
    assert found is not None
    assert (found.norm, found.not_finite, found.low, found.high) == (5.0, 2, -4.0, 3.0)


def test_summary_of_other_kinds() -> None:
    bf16 = summarize(np.array([3, 4], ml_dtypes.bfloat16))
    assert bf16 is not None and bf16.norm == 5.0
    turned = summarize(np.array([3 + 4j]))
    assert turned is not None and turned.norm == 5.0
    empty = summarize(np.empty(0, np.float32))
    assert empty is not None and empty.norm == 0.0
    assert summarize(np.array(["a"])) is None
    assert summarize(np.zeros(2, [("a", "i4")])) is None
    assert summarize(np.array(["2020-01-01"], "M8[D]")) is None


def test_a_leaf_that_moved() -> None:
    before = np.array([3.0, 4.0, 0.0, 0.0], np.float32)
    after = np.array([3.0, 4.0, 0.0, 2.0], np.float32)
    found = compare_leaf("w", before, after)
    assert (found.kind, found.changed, found.distance, found.largest) == (CHANGED, 0.25, 0.4, 2.0)


def test_bits_decide_what_changed() -> None:
    nan = np.array([np.nan, 0.0])
    assert compare_leaf("w", nan, nan.copy()).kind == SAME
    assert compare_leaf("w", nan, np.array([np.nan, -0.0])).changed == 0.5


def test_from_nothing_is_infinitely_far() -> None:
    assert compare_leaf("w", np.zeros(3), np.ones(3)).distance == math.inf


def test_leaves_that_only_one_state_has() -> None:
    one = np.ones((2, 3), np.float32)
    assert compare_leaf("w", None, one).kind == ADDED
    assert compare_leaf("w", one, None).kind == REMOVED
    found = compare_leaf("w", one, np.ones((3, 2), np.float32))
    assert (found.kind, found.before, found.after) == (RESHAPED, "float32[2, 3]", "float32[3, 2]")


def test_what_has_no_numbers_has_no_distance() -> None:
    found = compare_leaf("names", np.array(["ab", "cd"]), np.array(["ab", "ce"]))
    assert (found.changed, found.distance) == (0.5, None)


def test_plain_values() -> None:
    before = {"lr": 0.1, "betas": (0.9, 0.99), "old": 1, "same": math.nan, "deep": {"x": [1, 2]}}
    after = {"lr": 0.2, "betas": (0.9, 0.999), "new": 2, "same": math.nan, "deep": {"x": [1, 3]}}
    found = {change.path: (change.kind, change.before, change.after) for change in compare_values(before, after)}
    assert found == {
        "lr": (CHANGED, 0.1, 0.2),
        "betas/1": (CHANGED, 0.99, 0.999),
        "old": (REMOVED, 1, None),
        "new": (ADDED, None, 2),
        "deep/x/1": (CHANGED, 2, 3),
    }
