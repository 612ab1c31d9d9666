"""`everystep push`, `pull`, `mirror`: what they say, in text and in JSON, and how they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import call, json_of, lines_of

import everystep


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Run a: steps 1 to 4; run b: step 1."""
    repo = everystep.open(str(tmp_path / "one"))
    with repo.run("a").track(rng=False) as run:
        for step in range(1, 5):
            state = {"params": {"head": np.full(3000, step, "f4"), "body": np.arange(50_000.0) * step}}
            run.save(step, state=state, metrics={"val_loss": 1 / step}).wait()
    with repo.run("b").track(rng=False) as run:
        run.save(1, state={"w": np.ones(100)}).wait()
    return tmp_path / "one"


def test_push_says_what_went_there(place: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "two")
    planned = json_of(place, "push", other, "--dry-run")
    assert planned["all"]["sent"] == 5 and planned["dry_run"] and not Path(other, "format.json").exists()
    assert lines_of(place, "push", other, "a@1", "a@best:val_loss")[-1].startswith("2 checkpoints to ")
    done = json_of(place, "push", other)
    assert [(one["run"], one["steps"], one["there"]) for one in done["runs"]] == [("a", [2, 3], 2), ("b", [1], 0)]
    assert done["all"]["sent_bytes"] > 0 and done["all"]["raw_bytes"] > 0
    assert lines_of(place, "push", other)[-1].startswith("0 checkpoints to ")
    assert lines_of(place, "push", other)[-1].endswith("; 5 there already")
    assert everystep.open(other).check().ok


def test_push_of_what_rules_name(place: Path, tmp_path: Path) -> None:
    done = json_of(place, "push", str(tmp_path / "two"), "a", "--keep-last", "1", "--keep-best", "2:val_loss")
    assert done["runs"][0]["steps"] == [3, 4]
    named = json_of(place, "push", str(tmp_path / "two"), "a@1", "--as", "other")
    assert named["runs"][0]["target_run"] == "other"
    assert everystep.open(str(tmp_path / "two")).runs() == ["a", "other"]


def test_pull_of_one_leaf(place: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    done = json_of(mine, "pull", str(place), "a@latest", "--only", "params/head")
    assert done["runs"][0]["target_run"] == "a.params.head" and done["verb"] == "pull"
    state = everystep.open(str(mine))["a.params.head"].at(4).load()
    assert list(state["params"]) == ["head"] and (state["params"]["head"] == 4).all()
    assert lines_of(mine, "pull", str(place), "b")[-1].startswith("1 checkpoint from ")


def test_mirror_and_promote(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    planned = json_of(place, "mirror", str(copy), "--dry-run")
    done = json_of(place, "mirror", str(copy))
    assert (done["runs"], done["packs"]) == (2, planned["packs"]) and done["records"] == planned["records"] > 5
    assert "0 packs copied" in lines_of(place, "mirror", str(copy))[0]
    refused = call(copy, "tag", "a@1", "x")
    assert refused.exit_code == everystep.ReadOnly.exit_code and "mirror" in refused.stderr
    assert lines_of(copy, "mirror", "--promote")[0].endswith("can be written from now on")
    assert call(copy, "tag", "a@1", "x").exit_code == 0
    assert call(place, "mirror", str(copy)).exit_code == everystep.Conflict.exit_code


def test_another_run_of_that_name_is_said(place: Path, tmp_path: Path) -> None:
    other = everystep.open(str(tmp_path / "two"))
    with other.run("a").track(rng=False) as run:
        run.save(7, state={"w": np.ones(10)}).wait()
    for more in (["--dry-run"], []):
        found = call(place, "push", str(tmp_path / "two"), "a", *more)
        assert found.exit_code == 0 and "shares no checkpoint with run 'a'" in found.stderr and "--as" in found.stderr
    assert other["a"].latest is not None and other["a"].latest.step == 7
    (again,) = json_of(place, "push", str(tmp_path / "two"), "a")["runs"]
    assert not again["apart"] and again["there"] == 4
    assert "shares no" not in call(place, "push", str(tmp_path / "three")).stderr


@pytest.mark.parametrize(("verb", "method"), [("push", "push"), ("pull", "pull"), ("mirror", "mirror")])
def test_an_interrupt_says_what_became_of_it(
    place: Path, tmp_path: Path, verb: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(everystep.Repository, method, interrupt)
    found = call(place, verb, str(tmp_path / "two"))
    assert found.exit_code == 130 and found.stderr.startswith("interrupted: ") and "goes on" in found.stderr


def test_a_part_says_how_far_it_is(place: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    everystep.open(str(place)).push(
        str(tmp_path / "two"),
        "a",
        only="params/head",
        progress=lambda run, done, total, nbytes: told.append((run, done, total)),
    )
    assert told == [("a", done, 4) for done in range(5)]


def test_how_many_of_which_metric(place: Path, tmp_path: Path) -> None:
    found = call(place, "push", str(tmp_path / "two"), "a", "--keep-best", "3")
    assert found.exit_code == everystep.UsageError.exit_code and "--keep-best 3:val_loss" in found.stderr


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["push", "nowhere", "c"], everystep.NotFound.exit_code),
        (["push", "nowhere", "a@77"], everystep.NotFound.exit_code),
        (["push", "nowhere", "--as", "x"], everystep.UsageError.exit_code),
        (["pull", "nowhere"], everystep.NotFound.exit_code),
        (["mirror"], everystep.UsageError.exit_code),
        (["mirror", "--promote"], everystep.UsageError.exit_code),
    ],
)
def test_what_makes_no_sense(place: Path, tmp_path: Path, args: list[str], code: int) -> None:
    given = [str(tmp_path / arg) if arg == "nowhere" else arg for arg in args]
    found = call(place, *given)
    assert found.exit_code == code and "do:" in found.stderr
    assert call(place, "push", str(place)).exit_code == everystep.UsageError.exit_code
