"""Before the first save: what a plan may take, and whether there is room for it."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _train import WithoutGit

import everystep
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
