"""Before the first save: what a plan may take, and whether there is room for it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import WithoutGit
from test_ranks import together

import everystep
from everystep import Part
from everystep.forecast import foresee
from everystep.rules import every, last, union
from everystep.seam import Files


class Small(Files):
    """A disk with this much room."""

    def __init__(self, free: int) -> None:
        self._free = free

    def free(self, path: str) -> int:
        return self._free


def said(folder: Path, free: int, total: int = 100, **rules: everystep.Rule) -> list[str]:
    seam = WithoutGit(Small(free))
    model = torch.nn.Linear(100, 250)  # 101,000 bytes
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    repo = everystep.open(str(folder), seam=seam)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = repo.run("a", **rules).track(rng=False, model=model, optimizer=optimizer)  # type: ignore[arg-type]
        for step in run.steps(total, save_every=10):
            model.weight.data += step
            if step == 11:
                break
        run.close()
    return [str(w.message) for w in caught if "room for" in str(w.message)]


def test_what_surely_fits_is_not_talked_about(tmp_path: Path) -> None:
    assert said(tmp_path, 10**8) == []


def test_what_may_not_fit_is_said_once_before_the_first_save(tmp_path: Path) -> None:
    (text,) = said(tmp_path, 2_000_000)
    assert "10 checkpoints of 0.30 MB take up to 3.33 MB, and there is room for 2.00 MB" in text
    assert said(tmp_path, 2_000_000) == [], "a run that goes on was told before"


@pytest.mark.parametrize(
    ("rules", "free", "fits"),
    [
        ({"keep": last(2)}, 1_000_000, True),
        ({"keep": last(2)}, 800_000, False),
        ({"keep_full": last(1)}, 1_600_000, True),
        ({"keep_full": last(1)}, 1_400_000, False),
    ],
)
def test_rules_that_drop_or_thin_count(tmp_path: Path, rules: dict[str, everystep.Rule], free: int, fits: bool) -> None:
    assert (said(tmp_path, free, **rules) == []) == fits


def test_a_quota_is_room_too(tmp_path: Path) -> None:
    with (
        pytest.warns(everystep.EverystepWarning, match=r"a checkpoint of 0\.80 MB takes"),
        everystep.open(str(tmp_path)).run("a", quota_bytes=1_000_000).track(rng=False) as run,
    ):
        run.save(1, state={"w": np.arange(100_000.0)}).wait()


def test_plans_are_laid_out_as_the_rules_will(tmp_path: Path) -> None:
    rule = union(None, every(30) | every(epochs=1))
    planned = foresee(rule, 100, 40, None, last(2) | every(60), last(1))
    assert (planned.saves, planned.kept, planned.full) == (6, 3, 1)  # 30 40 60 80 90 100: of them 60, 90 and 100


# several ranks ------------------------------------------------------------------------------------------------------


def told_by_ranks(folder: Path, free: int, state_of: Any, *, keep_full: everystep.Rule | None = None) -> list[str]:
    """What two ranks, saving a plan of steps 10, 20 … 100 by their loops, say of room up to step 30."""

    class Held:
        def __init__(self, rank: int) -> None:
            self.rank, self.step = rank, 0

        def state_dict(self) -> dict[str, Any]:
            return state_of(self.rank, self.step)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("nothing is resumed")

    def work(rank: int) -> None:
        seam = WithoutGit(Small(free))
        repo = everystep.open(str(folder), seam=seam, settings=everystep.Settings(poll_seconds=0.01))
        held = Held(rank)
        run = repo.run("a", rank=rank, ranks=2, launch="one", keep_full=keep_full).track(rng=False, model=held)
        for step in run.steps(100, save_every=10):
            held.step = step
            if step == 31:
                break
        run.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert together(work, range(2)) == [None, None]
    assert [c.step for c in everystep.open(str(folder))["a"].checkpoints()] == [10, 20, 30]
    return [str(w.message) for w in caught if "room for" in str(w.message)]


def cut_in_two(rank: int, step: int) -> dict[str, Any]:
    return {"w": Part(np.full(10_000, step + 1.0), (10_000 * rank,), (20_000,))}


def two_sizes(rank: int, step: int) -> dict[str, Any]:
    """What rank 0 cannot know before: the other holds much more."""
    return {f"of{rank}": np.full((1_000, 39_000)[rank], step + 1.0)}


def test_of_a_leaf_that_is_cut_every_rank_s_part_counts_before_the_first_save(tmp_path: Path) -> None:
    (text,) = told_by_ranks(tmp_path / "a", 1_500_000, cut_in_two)
    assert "10 checkpoints of 0.16 MB take up to 1.76 MB, and there is room for 1.50 MB" in text
    assert "all 2 ranks save" in text
    assert told_by_ranks(tmp_path / "b", 1_800_000, cut_in_two) == []


def test_what_only_other_ranks_hold_counts_as_soon_as_a_checkpoint_says_it(tmp_path: Path) -> None:
    (text,) = told_by_ranks(tmp_path / "a", 3_000_000, two_sizes)
    assert "10 checkpoints of 0.32 MB take up to 3.52 MB, and there is room for 3.0" in text
    assert told_by_ranks(tmp_path / "b", 3_600_000, two_sizes) == []
