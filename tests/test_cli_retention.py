"""The verbs that drop, bring back and free, and the one that says what runs take up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import call, flip, json_of, lines_of, process, record_of, slot_of

import everystep

METRICS = {step: {"val_loss": abs(step - 7) / 10, "size": step} for step in range(1, 13)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a: 12 steps, best at 7, step 4 tagged. Run b: one step. Weights and moments, which no two steps share."""
    place = tmp_path_factory.mktemp("retention") / "repository"
    repo, rng = everystep.open(str(place)), np.random.default_rng(0)
    with repo.run("a") as run:
        for step in range(1, 13):
            weights, moments = rng.standard_normal((2, 3000)).astype("f4")
            state = {"model": {"w": weights}, "optimizer": {"m": moments}}
            run.save(step, state=state, metrics=METRICS[step]).wait()
    repo["a"].at(4).tag("release_1")
    with repo.run("b") as run:
        run.save(1, state={"w": np.ones(2000)}).wait()
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return shutil.copytree(trained, tmp_path / "repository")


def kept(place: Path, run: str = "a") -> list[int]:
    return [checkpoint.step for checkpoint in everystep.open(str(place))[run].checkpoints(all=True)]


def actions(document: Any, action: str) -> list[int]:
    return sorted(one["step"] for one in document["decisions"] if one["action"] == action)


# forget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        (["--keep-last", "8"], [4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (["--keep-last", "2"], [4, 11, 12]),
        (["--keep-best", "3:val_loss"], [4, 6, 7, 8, 12]),
        (["--keep-best", "val_loss"], [4, 7, 12]),
        (["--keep-best", "2:val_loss:max"], [1, 2, 4, 12]),
        (["--keep-best", "2:size:min", "--keep-best", "size:max"], [1, 2, 4, 12]),
        (["--keep-every", "5"], [4, 5, 10, 12]),
        (["--keep-every", "5", "--keep-every", "3"], [3, 4, 5, 6, 9, 10, 12]),
        (["--keep-within", "7d"], list(range(1, 13))),
        (["--keep-tag", "release_*"], [4, 12]),
        (["--keep-last", "2", "--keep-best", "2:val_loss", "--keep-every", "6"], [4, 6, 7, 11, 12]),
    ],
)
def test_what_the_rules_keep(trained: Path, tmp_path: Path, rules: list[str], stay: list[int]) -> None:
    plan = json_of(trained, "forget", "a", *rules, "--dry-run")
    assert actions(plan, "keep") == stay and plan["dry_run"] is True
    assert actions(plan, "drop") == [step for step in range(1, 13) if step not in stay]
    assert kept(trained) == list(range(1, 13)), "a dry run does nothing"
    place = shutil.copytree(trained, tmp_path / "copy")
    done = json_of(place, "forget", "a", *rules, "--force")
    assert done["decisions"] == plan["decisions"] and done["counts"] == plan["counts"]
    assert kept(place) == stay


def test_every_decision_has_its_reason(trained: Path) -> None:
    rules = ["--keep-last", "2", "--keep-best", "2:val_loss", "--full-last", "2", "--dry-run"]
    head, *rows = lines_of(trained, "forget", "a", *rules)
    assert head.split() == ["step", "id", "when", "size", "why"]
    by_step = {row.split()[1]: row for row in rows if row.startswith(("keep", "thin", "drop"))}
    assert by_step["12"].startswith("keep") and by_step["12"].endswith("newest, last 2")
    assert by_step["11"].endswith("last 2")
    assert by_step["7"].startswith("thin") and "best val_loss, no. 1" in by_step["7"]
    assert by_step["4"].startswith("thin") and "tag release_1" in by_step["4"]
    assert by_step["1"].startswith("drop") and by_step["1"].endswith("no rule keeps it")
    assert rows[-2:] == ["2 kept, 3 thinned, 7 dropped", "… that is the plan; nothing was done"]


def test_thinning_keeps_the_weights(place: Path) -> None:
    document = json_of(place, "forget", "a", "--full-last", "3")
    assert actions(document, "thin") == list(range(1, 10)) and actions(document, "drop") == []
    thin = everystep.open(str(place))["a"].at(3)
    assert thin.thin and "optimizer" not in {leaf.role for leaf in thin.leaves()}
    assert thin.load(only="model/w").shape == (3000,)
    with pytest.raises(everystep.CheckpointRetired):
        thin.load(only="optimizer")
    again = json_of(place, "forget", "a", "--full-last", "3")
    assert actions(again, "thin") == [], "what is thin is not thinned again"


def test_tags_of_a_pattern_keep_their_optimizer(place: Path) -> None:
    document = json_of(place, "forget", "a", "--full-last", "1", "--keep-tag", "release_*", "--force")
    assert (actions(document, "keep"), actions(document, "thin")) == ([4, 12], [])
    assert everystep.open(str(place))["a"].at(4).load(only="optimizer/m").shape == (3000,)


def test_a_plan_that_drops_most_asks_first(place: Path) -> None:
    found = call(place, "forget", "a", "--keep-last", "2")
    assert found.exit_code == everystep.Conflict.exit_code and found.stdout == ""
    assert found.stderr.splitlines()[-1] == "  do:    --dry-run shows the plan, --force carries it out"
    assert kept(place) == list(range(1, 13))
    assert process("-r", str(place), "forget", "a", "--keep-last", "2", "--force").returncode == 0
    assert kept(place) == [4, 11, 12]


def test_one_checkpoint_can_be_dropped(place: Path) -> None:
    document = json_of(place, "forget", "a@best:val_loss")
    assert [(one["step"], one["action"]) for one in document["decisions"]] == [(7, "drop")]
    assert kept(place) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert lines_of(place, "forget", "a@8", "--dry-run")[-2:] == ["1 dropped", "… that is the plan; nothing was done"]
    for spec, part in (("latest", "everystep rewind a@STEP"), ("release_1", "everystep tag a release_1 --delete")):
        found = call(place, "forget", f"a@{spec}")
        assert found.exit_code == everystep.Conflict.exit_code and part in found.stderr
    assert len(kept(place)) == 11


# undo and prune --------------------------------------------------------------------------------------------------


def test_undo_brings_back_step_by_step(place: Path) -> None:
    call(place, "forget", "a", "--keep-last", "10")
    call(place, "forget", "a", "--full-last", "9")
    call(place, "forget", "a@5")
    assert lines_of(place, "undo", "a") == [
        "a: 1 checkpoint back: 5", "… 3 checkpoints more can be brought back: undo once more",
    ]  # fmt: skip
    assert lines_of(place, "undo", "a")[0] == "a: 1 checkpoint back: 3"
    assert not everystep.open(str(place))["a"].at(3).thin and len(kept(place)) == 10
    document = json_of(place, "undo", "a")
    assert [one["step"] for one in document["back"]] == [1, 2] and document["undoable"] == 0
    assert kept(place) == list(range(1, 13))
    found = call(place, "undo", "a")
    assert found.exit_code == 3 and "nothing that was dropped" in found.stderr


def test_prune_waits_and_now_does_not(place: Path) -> None:
    whole = everystep.open(str(place))["a"].stats().total_bytes
    call(place, "forget", "a", "--keep-last", "3", "--force")
    (waiting,) = json_of(place, "prune", "a")["runs"]
    assert waiting["nbytes"] == waiting["packs"] == 0 and waiting["pending_bytes"] > whole / 2
    (freed,) = json_of(place, "prune", "a", "--now")["runs"]
    assert freed["nbytes"] == waiting["pending_bytes"] and freed["pending_bytes"] == 0 and freed["packs"] >= 8
    assert freed["held_bytes"] == waiting["held_bytes"] - freed["nbytes"]
    assert call(place, "undo", "a").exit_code == 3
    assert everystep.open(str(place)).check().ok and kept(place) == [4, 10, 11, 12]


def test_prune_of_all_runs_goes_on_behind_a_damaged_one(place: Path) -> None:
    head, first, second, total = lines_of(place, "prune")
    assert head.split()[:3] == ["run", "freed", "packs"] and total.split()[0] == "all"
    assert [first.split()[0], second.split()[0]] == ["a", "b"]
    flip(record_of(place, "a", slot_of(place, "a", 3)))
    document = json_of(place, "prune", code=4)
    assert [one["run"] for one in document["runs"]] == ["b"]
    (refused,) = document["refused"]
    assert (refused["run"], refused["kind"]) == ("a", "damaged")
    found = call(place, "prune")
    assert found.exit_code == 4 and "a: part of the log cannot be read" in found.stdout and "b " in found.stdout
    assert json_of(place, "prune", "a", code=4)["error"]["kind"] == "damaged"


# stats -----------------------------------------------------------------------------------------------------------


def test_stats_are_those_of_the_door(trained: Path) -> None:
    document, repo = json_of(trained, "stats"), everystep.open(str(trained))
    assert [about["run"] for about in document["runs"]] == ["a", "b"]
    for about in document["runs"]:
        meant = repo[about["run"]].stats()
        assert (about["total_bytes"], about["ratio"]) == (meant.total_bytes, meant.ratio)
        assert about["logical_bytes"] == meant.logical_bytes and about["checkpoints"] == meant.checkpoints
        for kind in ("roles", "codecs"):
            shares = {name: (s.logical_bytes, s.stored_bytes) for name, s in getattr(meant, kind).items()}
            assert {name: tuple(s.values()) for name, s in about[kind].items()} == shares
    every = document["all"]
    assert every["total_bytes"] == sum(about["total_bytes"] for about in document["runs"])
    assert every["ratio"] == every["total_bytes"] / every["logical_bytes"]
    assert every["roles"]["optimizer"] == document["runs"][0]["roles"]["optimizer"]
    files = sum(path.stat().st_size for path in (trained / "runs").rglob("*") if path.is_file())
    assert every["total_bytes"] == files


def test_stats_in_text(place: Path) -> None:
    rows = [row.split() for row in lines_of(place, "stats")]
    assert rows[0] == ["run", "checkpoints", "logical", "stored", "ratio", "chunks", "other", "manifests", "log"]
    assert rows[1][:2] == ["a", "12"] and rows[2][:2] == ["b", "1"] and rows[3][:2] == ["all", "13"]
    roles = [row[0] for row in rows[6:9]]
    assert rows[5] == ["role", "logical", "stored", "ratio"] and {"weights", "optimizer"} <= set(roles)
    assert ["codec", "logical", "stored", "ratio"] in rows
    call(place, "forget", "a", "--keep-last", "8", "--full-last", "2")
    lines = lines_of(place, "stats", "a")
    assert "thin" in lines[0] and not any(line.startswith("all") for line in lines)
    assert lines[-1] == "… 10 checkpoints dropped or thinned can be brought back: undo"
    shutil.rmtree(place / "runs")
    assert lines_of(place, "stats") == [f"no run yet in {place}"]
    assert lines_of(place, "prune") == ["no run yet"]


# mistakes --------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], int, str]] = [
    (["forget", "a"], 2, "--keep-last 10"),
    (["forget", "a", "--dry-run"], 2, "--keep-last 10"),
    (["forget", "a@3", "--keep-last", "2"], 2, "not both"),
    (["forget", "nobody", "--keep-last", "2"], 3, "runs here: a, b"),
    (["forget", "a", "--keep-last", "0"], 2, "everystep forget --help"),
    (["forget", "a", "--keep-last", "many"], 2, "everystep forget --help"),
    (["forget", "a", "--keep-best", "3:size"], 2, "--keep-best 3:size:min or --keep-best 3:size:max"),
    (["forget", "a", "--keep-best", "0:val_loss"], 2, "--keep-best 3:val_loss"),
    (["forget", "a", "--keep-best", "3:"], 2, "which metric"),
    (["forget", "a", "--keep-every", "often"], 2, "--keep-every 6h"),
    (["forget", "a", "--keep-every", "0"], 2, "--keep-every 1000"),
    (["forget", "a", "--keep-within", "7"], 2, "--keep-within 7d"),
    (["forget", "a", "--keep-within", "7m"], 2, "s, min, h, d, w"),
    (["forget", "a", "--keep-within", "0d"], 2, "--keep-within 7d"),
    (["undo"], 2, "everystep undo --help"),
    (["undo", "a@3"], 2, "the run is a"),
    (["undo", "c"], 3, "runs here: "),
    (["prune", "a@3"], 2, "the run is a"),
    (["prune", "c"], 3, "runs here: "),
    (["stats", "c"], 3, "runs here: "),
    (["stats", "a@latest"], 2, "the run is a"),
]


@pytest.mark.parametrize(("args", "code", "part"), MISTAKES, ids=lambda value: str(value)[:45])
def test_mistakes_drop_nothing_and_say_what_to_do(trained: Path, args: list[str], code: int, part: str) -> None:
    found = call(trained, *args)
    assert (found.exit_code, found.stdout) == (code, "")
    what, *rest = found.stderr.splitlines()
    assert what.startswith("error: ") and rest[-1].startswith("  do:    ") and part in found.stderr, found.stderr
    assert json_of(trained, *args, code=code)["error"]["do"] == rest[-1].removeprefix("  do:    ")
    assert kept(trained) == list(range(1, 13))


# repack --------------------------------------------------------------------------------------------------------------


def test_repack_frees_what_lies_beside_a_frozen_leaf(tmp_path: Path) -> None:
    place, rng = tmp_path / "repository", np.random.default_rng(0)
    frozen = rng.standard_normal(2000).astype("f4")
    with everystep.open(str(place)).run("a") as run:
        for step in (1, 2, 3):
            run.save(step, state={"frozen": frozen, "moving": rng.standard_normal(50_000)}).wait()
    everystep.open(str(place))["a"].forget(keep=everystep.last(1), force=True, undo_seconds=0)
    before = json_of(place, "stats", "a")["runs"][0]["total_bytes"]
    done = json_of(place, "repack", "a")
    after = json_of(place, "stats", "a")["runs"][0]["total_bytes"]
    assert done["packs"] >= 1 and done["freed_bytes"] > 300_000 > 50_000 > done["written_bytes"] > 0
    assert before - after > 300_000
    (line,) = lines_of(place, "repack", "a")
    assert line == "a: nothing to gain"
    assert everystep.open(str(place))["a"].at(3).load()["frozen"].tobytes() == frozen.tobytes()
    assert json_of(place, "repack", "a", "--dead", "2", code=2)["error"]["kind"] == "usage"
    assert json_of(place, "fsck")["ok"]
