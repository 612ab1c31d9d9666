"""The verbs that look back: log with its graph and filters, show with norms, diff, and what they say of mistakes."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import call, json_of, lines_of, process
from _forked import fork, state_at

import everystep
from everystep.cli import human, leaves
from everystep.cli.graph import draw


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(tmp_path_factory.mktemp("history") / "repository")


@pytest.fixture
def place(forked: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return shutil.copytree(forked, tmp_path / "repository")


def steps_of(document: Any) -> list[int]:
    return [about["step"] for about in document["checkpoints"]]


# the graph -------------------------------------------------------------------------------------------------------


def drawn(shown: str, parents: dict[str, str | None], line: str) -> list[str]:
    rows = []
    for id, one in zip(shown, draw(shown, parents, line)):
        rows += [one.joins] if one.joins else []
        rows.append(f"{one.node} {id}")
    return rows


def test_lines_that_were_left_stand_beside_the_current_one() -> None:
    parents = {"a": None, "b": "a", "c": "b", "d": "c", "e": "b", "f": "e"}
    assert drawn("fedcba", parents, "feba") == ["● f", "● e", "│ ○ d", "│ ○ c", "├─╯", "● b", "● a"]


def test_a_tip_that_is_not_the_newest_keeps_its_column() -> None:
    parents = {"a": None, "b": "a", "c": "b", "d": "c"}
    assert drawn("dcba", parents, "ba") == ["  ○ d", "  ○ c", "╭─╯", "● b", "● a"]


def test_several_lines_meet_and_cross() -> None:
    parents = {"a": None, "b": "a", "c": "b", "d": "b", "e": "a", "f": "b"}
    assert drawn("fedcba", parents, "fba") == [
        "● f", "│ ○ e", "│ │ ○ d", "│ │ │ ○ c", "├─┼─┴─╯", "● │ b", "├─╯", "● a",
    ]  # fmt: skip


def test_checkpoints_that_are_not_shown_are_passed_over() -> None:
    parents = {"a": None, "b": "a", "c": "b", "d": "c", "e": "b", "f": "e"}
    assert drawn("fda", parents, "feba") == ["● f", "│ ○ d", "├─╯", "● a"]
    assert drawn("dc", parents, "feba") == ["○ d", "○ c"], "of the current line nothing is shown"
    assert drawn("", parents, "feba") == []


def test_the_graph_of_a_run(forked: Path) -> None:
    rows = lines_of(forked, "log", "a", "--all")
    firsts = [re.match(r"[ │●○├╯─]*\d*", row)[0].rstrip() for row in rows]  # type: ignore[index]
    assert firsts[1:10] == ["●       5", "●       4", "│ ○     6", "│ ○     5", "│ ○     4", "├─╯",
                            "●       3", "●       2", "●       1"]  # fmt: skip
    assert rows[-1] == "… ● the current line, ○ lines that were left"
    document = json_of(forked, "log", "a", "--all")
    assert steps_of(document) == [5, 4, 6, 5, 4, 3, 2, 1]
    assert [about["current"] for about in document["checkpoints"]] == [True, True, *[False] * 3, *[True] * 3]
    parents = everystep.open(str(forked))["a"].parents()
    assert {about["id"]: about["parent"] for about in document["checkpoints"]} == parents


def test_a_dropped_checkpoint_leaves_no_gap_in_the_graph(place: Path) -> None:
    past = everystep.open(str(place))["a"]
    gone = past.at(3)
    past.forget(everystep.when(lambda kept: kept.id != gone.id))
    parents = past.parents()
    assert gone.id not in parents
    assert [id for id, parent in parents.items() if parent == past.at(2).id] == [
        checkpoint.id for checkpoint in past.checkpoints(all=True) if checkpoint.step == 4
    ]
    rows = lines_of(place, "log", "a", "--all")
    assert rows[6] == "├─╯" and rows[7].startswith("●       2")


def test_a_run_that_was_rewound_and_has_not_saved_says_so(place: Path) -> None:
    with everystep.open(str(place)).run("a") as run:
        run.rewind("before")
    document = json_of(place, "log", "a")
    assert (steps_of(document), document["rewound_to"], document["on_other_lines"]) == ([2, 1], 2, 6)
    text = lines_of(place, "log", "a")
    assert "… rewound to step 2: what the run saves next continues from there" in text
    assert json_of(place, "log", "b")["rewound_to"] is None


# which checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        (["a", "--best", "val_loss"], [5, 4, 3, 2, 1]),
        (["a", "--best", "val_loss", "--all"], [5, 4, 6, 5, 4, 3, 2, 1]),
        (["a", "--best", "val_loss:max", "-n", "2"], [1, 2]),
        (["a", "--best", "width:max", "-n", "1"], [5]),
        (["a", "--where", "val_loss < 0.8 and step > 3"], [5, 4]),
        (["a", "--where", "val_loss < 0.8 and step > 3", "--all"], [5, 4, 6, 5, 4]),
        (["a", "--tag", "*"], [5, 2]),
        (["a", "--tag", "model_*"], [5]),
        (["a", "--tag", "*", "--where", "step < 4"], [2]),
        (["a", "--best", "val_loss", "--tag", "*", "--where", "step < 9"], [5, 2]),
        (["--best", "val_loss"], [2, 5, 1, 4, 3, 2, 1]),
        (["--best", "val_loss", "--all", "-n", "6"], [2, 5, 1, 4, 6, 5]),
        (["--where", "val_loss < 0.3"], [2, 1, 5]),
        (["--tag", "before"], [2]),
        (["a", "--where", "thin"], []),
        (["--tag", "nothing*"], []),
    ],
)
def test_log_finds_what_is_asked_for(forked: Path, args: list[str], steps: list[int]) -> None:
    assert steps_of(json_of(forked, "log", *args)) == steps
    rows = [row for row in lines_of(forked, "log", *args) if re.match(r"[ │●○]*(\d+ +)?([ab] +)?\d", row)]
    assert len(rows) == len(steps)


def test_a_ranking_says_places_lines_and_runs(forked: Path) -> None:
    head, first, second, *_ = lines_of(forked, "log", "a", "--best", "val_loss", "--all")
    assert head.split()[:3] == ["no.", "step", "id"] and head.split()[6] == "val_loss", "the metric comes first"
    assert first.split()[:3] == ["1", "●", "5"] and second.split()[:3] == ["2", "●", "4"]
    rows = lines_of(forked, "log", "--best", "val_loss", "-n", "2")
    assert [row.split()[:3] for row in rows[1:3]] == [["1", "b", "2"], ["2", "a", "5"]]
    assert rows[-1] == "… 5 more checkpoints: a larger -n"
    document = json_of(forked, "log", "--best", "val_loss", "-n", "2")
    assert [about["run"] for about in document["checkpoints"]] == ["b", "a"] and document["more"] == 5


def test_what_is_left_out_is_said(forked: Path) -> None:
    rows = lines_of(forked, "log", "a", "--best", "val_loss")
    assert rows[-1] == "… 3 checkpoints on lines that were left: --all"
    assert lines_of(forked, "log", "a", "--tag", "no*") == ["no checkpoint with a tag like 'no*' in a"]
    assert lines_of(forked, "log", "--where", "val_loss < 0") == ["no checkpoint with val_loss < 0 in any run"]
    left = lines_of(forked, "log", "a", "--where", "step == 6")
    assert left == ["no checkpoint with step == 6 in a", "", "… 1 checkpoint on lines that were left: --all"]


def test_the_best_of_each_metric_is_marked(forked: Path) -> None:
    best = everystep.open(str(forked))["a"].best("val_loss")
    assert json_of(forked, "log", "a")["best"] == {"val_loss": best.id}, "of width nobody knows which way is better"
    text = process("-r", str(forked), "log", "a", env={"FORCE_COLOR": "1"}).stdout
    assert "\x1b[1;32m0.2000\x1b[0m" in text and "\x1b[1;32m0.3000" not in text


def test_a_thinned_checkpoint_is_marked(place: Path) -> None:
    everystep.open(str(place))["a"].forget(None, everystep.last(2))
    document = json_of(place, "log", "a")
    assert [about["thin"] for about in document["checkpoints"]] == [False, False, True, True, True]
    rows = lines_of(place, "log", "a")
    assert " thin " not in rows[2] and all(" thin " in row for row in rows[3:6])
    assert "optimizer state has been dropped" in "\n".join(lines_of(place, "show", "a@2"))
    assert steps_of(json_of(place, "log", "a", "--where", "thin")) == [3, 2, 1]


# show ------------------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_leaves(forked: Path) -> None:
    document = json_of(forked, "show", "a@5", "--norms")
    found = {leaf["path"]: leaf["summary"] for leaf in document["leaves"]}
    state = state_at(5)
    for name, array in state["model"].items():
        summary, finite = found[f"model/{name}"], array[np.isfinite(array)].astype("f8")
        assert summary["norm"] == pytest.approx(math.sqrt((finite**2).sum()))
        assert summary["mean"] == pytest.approx(finite.mean())
        assert (summary["low"], summary["high"]) == (finite.min(), finite.max())
        assert summary["not_finite"] == array.size - finite.size
    checkpoint = everystep.open(str(forked))["a"].at(5)
    told: list[int] = []
    summaries = checkpoint.summarize(only="model", progress=told.append)
    assert sorted(summaries) == sorted(f"model/{name}" for name in state["model"]) and sum(told) > 0
    with pytest.raises(everystep.NotFound, match="no path"):
        checkpoint.summarize(only="modle")


def test_norms_in_a_table_stand_for_parts_too(forked: Path) -> None:
    text = "\n".join(lines_of(forked, "show", "a@5", "--norms"))
    assert re.search(r"^  ├─ head.bias +0.7071 +0.5 +0.5 +0.5 +1 ", text, re.M), text
    whole = [value for array in state_at(5)["model"].values() for value in array.ravel() if np.isfinite(value)]
    norm = math.sqrt(sum(float(value) ** 2 for value in whole))
    mean = sum(map(float, whole)) / len(whole)
    assert re.search(rf"^  model/ +{norm:.4g} +{mean:.4g} +-5 +5 +1 +5 leaves", text, re.M), text
    assert "every number is finite" not in text
    assert "  every number is finite" in lines_of(forked, "show", "a@4", "--norms")


def test_a_checkpoint_without_numbers_in_a_leaf_has_norms(tmp_path: Path) -> None:
    state = {"text": np.array(["a", "b"]), "empty": np.zeros(0), "bad": np.full(2, np.inf), "flag": np.array([True])}
    with everystep.open(str(tmp_path)).run("odd") as run:
        run.save(1, state=state).wait()
    found = {leaf["path"]: leaf["summary"] for leaf in json_of(tmp_path, "show", "odd@1", "--norms")["leaves"]}
    assert found["text"] is None and found["bad"]["not_finite"] == 2 and found["flag"]["norm"] == 1
    rows = {
        row.split()[0]: row.split() for row in lines_of(tmp_path, "show", "odd@1", "--norms") if row.startswith("  ")
    }
    assert rows["bad"][1] == "2" and rows["text"][1] == "<U1" and rows["empty"][1] == "float64"


def test_the_tree_sums_up_what_has_no_room() -> None:
    names = [f"model/block.{i}.{part}" for i in range(9) for part in ("q.weight", "q.bias", "k")]
    found = [
        {"path": path, "dtype": "<f4", "shape": [2], "role": "weights", "nbytes": 8} for path in ["step", *names]
    ]  # fmt: skip
    wide = [row.plain for row in leaves.lines_of(found, None, None)]
    labels = [row.split("  ")[1] for row in wide[1:]]
    assert labels[:3] == ["step", "model/block.", "├─ 0."] and sum(row.endswith("8 B") for row in wide) == 28
    some = [row.plain for row in leaves.lines_of(found, 12, None)]
    assert len(some) == 1 + 2 + 9 + 1 and some[-1] == "  … 27 leaves more: --all-leaves"
    assert some[3].split() == ["├─", "0.", "3", "leaves", "weights", "24", "B"] and some[-2].startswith("  └─ 8. ")
    more = [row.plain for row in leaves.lines_of(found, 13, None)]
    assert more[4:6] != some[4:6] and more[4].split()[:3] == ["│", "├─", "q."], "where there is room, it is used"
    few = [row.plain for row in leaves.lines_of(found, 2, None)]
    assert few[2].split() == ["model/block.", "27", "leaves", "weights", "216", "B"]
    assert [row.plain for row in leaves.lines_of(found, 0, None)] == ["  … 28 leaves more: --all-leaves"]


def test_a_path_is_the_labels_above_it(forked: Path) -> None:
    checkpoint = everystep.open(str(forked))["a"].at(5)
    found = [{"path": leaf.path} for leaf in checkpoint.leaves()]

    def paths(nodes: list[leaves.Node], above: str = "") -> list[str]:
        return [
            path
            for node in nodes
            for path in (
                [above + node.label] * (node.leaf is not None) + paths(list(node.children.values()), above + node.label)
            )
        ]

    assert sorted(paths(leaves.grow(found))) == sorted(leaf.path for leaf in checkpoint.leaves())


def test_show_says_where_a_run_began_and_what_was_noted(place: Path) -> None:
    about = json_of(place, "show", "b")
    (origin,) = about["origins"]
    assert (origin["run"], origin["step"], origin["only"]) == ("seed", 9, ["model"])
    assert any(re.match(r"began with +seed@9 \(\w+\), only model$", row) for row in lines_of(place, "show", "b"))
    assert json_of(place, "show", "a@2")["checkpoint"]["notes"] == ["a note of step 2"]
    assert "  a note of step 2" in lines_of(place, "show", "a@2")
    assert json_of(place, "show", "a")["notes"] == ["a note of the run"]
    past = everystep.open(str(place))["a"]
    past.forget(everystep.last(4), force=True)
    assert json_of(place, "show", "a")["undoable"] == [1, 3, 4]
    assert any("1, 3, 4; undo brings them back" in row for row in lines_of(place, "show", "a"))


# diff ------------------------------------------------------------------------------------------------------------


def test_diff_says_what_the_door_says(forked: Path) -> None:
    past = everystep.open(str(forked))["a"]
    found = past.at(1).diff(past.at(5))
    document = json_of(forked, "diff", "a@1", "@5")
    assert (document["before"]["step"], document["after"]["id"], document["same"]) == (1, past.at(5).id, False)
    by_path = {leaf.path: leaf for leaf in found.changed}
    assert {leaf["path"] for leaf in document["leaves"]} == set(by_path)
    for leaf in document["leaves"]:
        meant = by_path[leaf["path"]]
        assert (leaf["kind"], leaf["changed"]) == (meant.kind, meant.changed)
        assert leaf["distance"] == human.jsonable(meant.distance) and leaf["largest"] == human.jsonable(meant.largest)
    weight = next(leaf for leaf in document["leaves"] if leaf["path"] == "model/layer.0.weight")
    assert (weight["changed"], weight["distance"], weight["largest"]) == (1.0, 4.0, 4.0)
    distances = [leaf["distance"] for leaf in document["leaves"]]
    assert distances == sorted(distances, reverse=True), "what went farthest comes first"
    values = {change["path"]: (change["before"], change["after"]) for change in document["values"]}
    assert values["step"] == (1, 5) and values["optimizer/lr"] == (0.1, 0.02)
    assert document["metrics"][0] == {"path": "val_loss", "kind": "changed", "before": 0.9, "after": 0.2}
    assert document["counts"]["same"] == len(found.leaves) - len(found.changed)


def test_diff_in_text(forked: Path) -> None:
    rows = lines_of(forked, "diff", "a@1", "@5", "--only", "model")
    assert rows[:2] == ["a@1 → a@5", "leaves: 3 changed, 2 the same"]
    assert rows[3].split() == ["model/layer.0.weight", "100", "%", "4", "4", "float32[4,", "5]"]
    assert not any("frozen" in row for row in rows)
    everything = lines_of(forked, "diff", "a@1", "@5", "--only", "model", "--all")
    assert any(re.match(r"  model/frozen +0 % +0 +0 +float64\[6\]$", row) for row in everything)
    some = lines_of(forked, "diff", "a@1", "@5", "-n", "1")
    assert re.match(r"  … \d leaves more: a larger -n", some[4])
    assert any(re.match(r"  val_loss +0.9 +0.2 +-0.7$", row) for row in rows)


def test_diff_of_two_runs(forked: Path) -> None:
    document = json_of(forked, "diff", "a@5", "b@2")
    kinds = {leaf["path"]: leaf["kind"] for leaf in document["leaves"]}
    assert kinds["optimizer/m"] == "removed" and kinds["model/layer.0.bias"] == "changed"
    assert document["config"] == [{"path": "lr", "kind": "changed", "before": 0.1, "after": 0.01}]
    rows = lines_of(forked, "diff", "a@5", "b@2")
    assert rows[0] == "a@5 → b@2" and "config" in rows
    assert any(re.match(r"  optimizer/m +removed +float64\[4, 5\]$", row) for row in rows)
    assert any(re.match(r"  width +50 +—$", row) for row in rows)


def test_diff_can_answer_with_its_exit_code(forked: Path) -> None:
    assert call(forked, "diff", "a@1", "@5").exit_code == 0
    assert call(forked, "diff", "a@1", "@5", "--exit-code").exit_code == 1
    same = call(forked, "diff", "a@5", "@latest", "--exit-code")
    assert same.exit_code == 0 and same.stdout.splitlines() == ["a@5 → a@5", "the same state"]
    assert call(forked, "diff", "a@4", "a@2", "--only", "model/frozen", "--exit-code").exit_code == 0
    assert json_of(forked, "diff", "a@1", "@2", "--exit-code", code=1)["same"] is False
    assert process("-r", str(forked), "diff", "a@1", "@5", "--exit-code").returncode == 1


# mistakes --------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], int, str]] = [
    (["log", "a@4"], 2, "the run is a"),
    (["log", "--best", "val_los"], 3, "nearest: val_loss"),
    (["log", "a", "--best", "val_los"], 3, "nearest: val_loss"),
    (["log", "a", "--best", "width"], 2, "--best width:min or --best width:max"),
    (["log", "--best", "width"], 2, "--best width:min or --best width:max"),
    (["log", "--best", ""], 2, "--best val_loss"),
    (["log", "--where", "val_loss <"], 2, "val_loss < 0.3 and step > 500"),
    (["log", "a", "--where", "val_los < 1"], 2, "val_loss"),
    (["log", "--where", "val_los < 1"], 2, "val_loss"),
    (["show", "a", "--norms"], 2, "show a@latest --norms"),
    (["diff", "a@1"], 2, "everystep diff --help"),
    (["diff", "a@1", "5"], 2, "@5 for one of a"),
    (["diff", "a", "@5"], 2, "a@latest"),
    (["diff", "a@1", "a"], 2, "a@latest"),
    (["diff", "a@1", "@9"], 3, "nearest: 6, 5, 4"),
    (["diff", "a@1", "@"], 2, "a step, latest"),
    (["diff", "a@1", "@5", "--only", "modle"], 3, "nearest: "),
    (["diff", "@1", "@5"], 2, "RUN@SPEC"),
]


@pytest.mark.parametrize(("args", "code", "part"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_get_what_and_what_to_do(forked: Path, args: list[str], code: int, part: str) -> None:
    found = call(forked, *args)
    assert (found.exit_code, found.stdout) == (code, "")
    what, *rest = found.stderr.splitlines()
    assert what.startswith("error: ") and rest[-1].startswith("  do:    ") and part in found.stderr, found.stderr
    assert json_of(forked, *args, code=code)["error"]["do"] == rest[-1].removeprefix("  do:    ")
