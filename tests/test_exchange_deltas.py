"""Folders of differences: added up in order, or refused, and never taken for weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _exchange import imported, refused, save, survey, weights
from _formats import check

from everystep import exchange
from everystep.errors import Mismatch, NotFound, UsageError
from everystep.seam import Seam


def deltas(folder: Path, epochs: range, base: str | None) -> list[dict[str, torch.Tensor]]:
    """Weights after each epoch, of which the folder has the differences."""
    torch.manual_seed(0)
    state = {
        "fc": torch.randn(5, 3),
        "half": torch.randn(4).bfloat16(),
        "count": torch.tensor(0),
        "still": torch.ones(2, dtype=torch.int32),
    }
    if base:
        save(state, folder / base)
    kept = [state]
    for epoch in epochs:
        change = {"fc": torch.randn(5, 3), "half": torch.randn(4).bfloat16(), "count": torch.tensor(1)}
        state = {name: value + change[name] if name in change else value for name, value in state.items()}
        kept.append(state)
        save(change, folder / f"delta_weights_epoch_{epoch}.pth")
    return kept


@pytest.mark.parametrize("base", ["weights_epoch_0.pth", "initial.pth", "base_weights.pth"])
def test_deltas_are_added_to_their_base_in_their_own_dtype(tmp_path: Path, base: str) -> None:
    expected = deltas(tmp_path, range(1, 7), base)
    found = survey(tmp_path).found
    assert [(one.step, one.role) for one in found] == [(0, exchange.STATE), *((n, exchange.DELTA) for n in range(1, 7))]
    for step, got in imported(tmp_path).items():
        check(expected[step], got.state)
        assert bool(got.notes) == (step > 0)


def test_the_delta_of_epoch_0_comes_behind_the_initial_weights(tmp_path: Path) -> None:
    expected = deltas(tmp_path, range(4), "initial.pth")
    got = imported(tmp_path)
    assert list(got) == [0, 1, 2, 3, 4]
    for step, one in got.items():
        check(expected[step], one.state)


def test_deltas_within_larger_states_and_in_folders_of_their_own(tmp_path: Path) -> None:
    base = {"epoch": 0, "model_state_dict": weights(1.0), "optimizer_state_dict": {"state": {}}}
    save(base, tmp_path / "run" / "checkpoint.pth")
    for epoch in (1, 2):
        save(
            {"epoch": epoch, "loss": 0.5, "delta": weights(epoch)}, tmp_path / f"delta_weights_epoch_{epoch}" / "w.pth"
        )
    got = imported(tmp_path)
    assert [float(one.state["model_state_dict"]["fc.weight"][0]) for one in got.values()] == [1.0, 2.0, 4.0]
    assert got[2].state.keys() == {"epoch", "loss", "model_state_dict"} and got[2].metrics == {"loss": 0.5}


def test_deltas_without_their_base_are_refused_and_never_taken_for_weights(tmp_path: Path) -> None:
    deltas(tmp_path, range(1, 4), None)
    assert {one.role for one in survey(tmp_path).found} == {exchange.DELTA}
    errors = refused(tmp_path)
    assert list(errors) == [1, 2, 3]
    for error in errors.values():
        assert isinstance(error, NotFound) and "weights_epoch_0, initial, base" in error.what
        assert "delta_weights_epoch" in error.where and error.do


def test_behind_a_missing_delta_no_sum_is_made(tmp_path: Path) -> None:
    expected = deltas(tmp_path, range(1, 9), "initial.pth")
    (tmp_path / "delta_weights_epoch_3.pth").unlink()
    save(expected[6], tmp_path / "weights_epoch_6.pth")
    errors = refused(tmp_path)
    assert list(errors) == [4, 5] and all("the file of step 3 is missing" in error.what for error in errors.values())
    for found, got in exchange.each(survey(tmp_path), Seam()):
        if found.step in (0, 1, 2, 6, 7, 8):  # from the weights of epoch 6 on, sums go on
            assert isinstance(got, exchange.Imported)
            check(expected[found.step], got.state)


def test_deltas_that_are_not_at_one_distance_or_of_unclear_beginning_are_refused(tmp_path: Path) -> None:
    deltas(tmp_path / "far", range(7, 8), "weights_epoch_0.pth")  # what became of epochs 1 to 6?
    assert list(refused(tmp_path / "far")) == [7]
    deltas(tmp_path / "fives", range(5, 16, 5), "weights_epoch_0.pth")
    assert list(imported(tmp_path / "fives")) == [0, 5, 10, 15]
    deltas(tmp_path / "both", range(0, 3), "weights_epoch_0.pth")  # does delta 0 lead to these weights, or from them?
    errors = refused(tmp_path / "both")
    assert list(errors) == [1, 2] and "called initial" in errors[1].what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"other": torch.ones(3)}, "other"),
        ({"fc.weight": torch.ones(4)}, r"float32\[3\].*float32\[4\]"),
        ({"fc.weight": torch.ones(3, dtype=torch.float64)}, "float64"),
        ({"fc.weight": torch.ones(3, dtype=torch.int8)}, "int8"),  # quantised: not the difference itself
    ],
    ids=["name", "shape", "wider", "quantised"],
)
def test_a_delta_that_does_not_fit_its_base_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    save(weights(1.0), tmp_path / "initial.pth")
    save(change, tmp_path / "delta_weights_epoch_1.pth")
    error = refused(tmp_path)[1]
    assert isinstance(error, Mismatch) and re.search(said, error.what)


def test_narrow_deltas_and_tied_weights_are_added_once(tmp_path: Path) -> None:
    tied = torch.ones(3)
    save({"a": tied, "b": tied}, tmp_path / "initial.pth")
    half = torch.full((3,), 0.5, dtype=torch.bfloat16)
    save({"a": half, "b": half}, tmp_path / "delta_weights_epoch_1.pth")
    state = imported(tmp_path)[1].state
    assert state["a"] is state["b"] and state["a"].dtype == np.float32 and state["a"].tolist() == [1.5] * 3


def test_a_delta_is_added_to_no_other_state(tmp_path: Path) -> None:
    deltas(tmp_path, range(1, 4), "initial.pth")
    (tmp_path / "delta_weights_epoch_2.pth").write_bytes((tmp_path / "delta_weights_epoch_2.pth").read_bytes()[:-400])
    found = survey(tmp_path)
    assert [one.step for one in found.found] == [0, 1, 3] and found.found[2].missing == "the file of step 2"
    base, first, _ = found.found
    got = exchange.read(base, None, Seam())
    with pytest.raises(UsageError, match="was not read"):
        exchange.read(first, None, Seam())
    with pytest.raises(UsageError, match="was not read"):
        exchange.read(first, exchange.Imported(got.state, {}, path="another"), Seam())
    one, other = exchange.read(first, got, Seam()), exchange.read(first, got.state, Seam())
    assert one.state["fc"].tobytes() == other.state["fc"].tobytes()
