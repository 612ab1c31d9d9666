"""The verbs that name and go back: tag, note, rewind, alone and beside a process that is saving."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _cli import call, json_of, lines_of, process
from _forked import Held, fork, save, state_at

import everystep


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(tmp_path_factory.mktemp("naming") / "repository")


@pytest.fixture
def place(forked: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return shutil.copytree(forked, tmp_path / "repository")


def past_of(place: Path, name: str = "a") -> everystep.PastRun:
    return everystep.open(str(place))[name]


# tag -------------------------------------------------------------------------------------------------------------


def test_a_tag_is_given_moved_and_taken_away(place: Path) -> None:
    four, five = past_of(place).at(4), past_of(place).at(5)
    assert lines_of(place, "tag", "a@best:val_loss", "release") == [f"release is step 5 of a, {five.id}"]
    assert past_of(place).tagged("release") == five
    refused = call(place, "tag", "a@4", "release")
    assert refused.exit_code == everystep.Conflict.exit_code and "--move" in refused.stderr
    assert "move=True" not in refused.stderr, "what to type, not what to call"
    assert past_of(place).tagged("release") == five
    document = json_of(place, "tag", "a@4", "release", "--move")
    assert document["moved_from"] == {"id": five.id, "step": 5} and (document["id"], document["step"]) == (four.id, 4)
    assert past_of(place).tagged("release") == four
    assert lines_of(place, "tag", "a", "release", "--delete") == [
        f"release is no tag any more; it was step 4, {four.id}"
    ]
    assert "release" not in past_of(place).tags
    assert json_of(place, "show", "a@release", code=3)["error"]["kind"] == "not-found"


def test_numbered_tags_count_on(place: Path) -> None:
    assert json_of(place, "tag", "a@latest", "model", "--version")["tag"] == "model_v1", (
        "it is the newest version already"
    )
    assert json_of(place, "tag", "a@2", "model", "--version")["tag"] == "model_v2"
    assert json_of(place, "show", "a@model")["checkpoint"]["step"] == 2
    assert call(place, "tag", "a", "model_v2", "--delete").exit_code == 0
    assert json_of(place, "tag", "a@3", "model", "--version")["tag"] == "model_v3", "a number is never used twice"
    found = call(place, "tag", "a", "model", "--delete")
    assert found.exit_code == 2 and "model_v3" in found.stderr


def test_tags_are_listed(place: Path) -> None:
    found = json_of(place, "tag")["tags"]
    assert [(one["run"], one["tag"], one["step"]) for one in found] == [("a", "before", 2), ("a", "model_v1", 5)]
    assert json_of(place, "tag", "a")["tags"] == found and json_of(place, "tag", "a@2")["tags"] == found[:1]
    head, first, second = lines_of(place, "tag")
    assert head.split() == ["run", "tag", "step", "id", "when", "metrics"]
    assert first.split()[:4] == ["a", "before", "2", past_of(place).at(2).id] and "val_loss 0.8" in first
    assert second.split()[1] == "model_v1"
    assert lines_of(place, "tag", "b") == ["no tag yet in b"] and lines_of(place, "tag", "a@3") == ["no tag yet in a@3"]


def test_a_tag_of_another_checkpoint_is_not_deleted(place: Path) -> None:
    found = call(place, "tag", "a@5", "before", "--delete")
    assert found.exit_code == everystep.Conflict.exit_code and "on step 2, not on step 5" in found.stderr
    assert "before" in past_of(place).tags
    assert call(place, "tag", "a@2", "before", "--delete").exit_code == 0


# note ------------------------------------------------------------------------------------------------------------


def test_notes_are_added_and_listed(place: Path) -> None:
    assert lines_of(place, "note", "a", "without", "quotes") == ["noted in a"]
    assert json_of(place, "note", "a@latest", "the plot")["note"] == "the plot"
    assert past_of(place).notes == ["a note of the run", "without quotes"]
    assert past_of(place).at(5).notes == ["the plot"]
    assert lines_of(place, "note", "a") == [
        "a  a note of the run", "a  without quotes", "a@2  a note of step 2", "a@5  the plot",
    ]  # fmt: skip
    assert [one["step"] for one in json_of(place, "note", "a")["notes"]] == [None, None, 2, 5]
    assert lines_of(place, "note", "a@2") == ["a@2  a note of step 2"]
    assert lines_of(place, "note", "a@3") == ["no note yet in a@3"]
    assert call(place, "note", "a", " ").exit_code == 2 and len(past_of(place).notes) == 2


# rewind ----------------------------------------------------------------------------------------------------------


def test_rewind_goes_back_and_forth(place: Path) -> None:
    two = past_of(place).at(2)
    assert lines_of(place, "rewind", "a@before") == [
        f"a continues from step 2, {two.id}; 3 checkpoints left on another line: log --all"
    ]
    assert past_of(place).latest == two
    document = json_of(place, "rewind", "a@model_v1")
    assert (document["step"], document["moved"], document["left"]) == (5, True, [])
    terms = len(past_of(place).sessions())
    assert json_of(place, "rewind", "a@5")["moved"] is False
    assert lines_of(place, "rewind", "a@5") == ["a is at step 5 already"]
    assert len(past_of(place).sessions()) == terms, "there was nothing to take the run over for"
    assert [session["ended"] for session in past_of(place).sessions()] == ["closed"] * terms
    with everystep.open(str(place)).run("a") as run:
        assert run.resume() == 5


def test_what_is_saved_after_a_rewind_continues_from_there(place: Path) -> None:
    assert process("-r", str(place), "rewind", "a@1").returncode == 0
    with everystep.open(str(place)).run("a") as run:
        assert run.resume() == 1
        save(run, 2, 0.05)
    assert [checkpoint.step for checkpoint in past_of(place).checkpoints()] == [1, 2]
    assert past_of(place).best("val_loss").metrics["val_loss"] == 0.05


def test_rewind_to_what_was_thinned_is_refused(place: Path) -> None:
    past_of(place).forget(None, everystep.last(1))
    found = call(place, "rewind", "a@2")
    assert found.exit_code == everystep.CheckpointRetired.exit_code and "optimizer state" in found.stderr
    latest = past_of(place).latest
    assert latest is not None and latest.step == 5


OWNER = """
import sys
import everystep

run = everystep.open(sys.argv[1]).run("a").track(rng=False)
run.resume()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_run_that_is_written_is_waited_for_or_taken(place: Path) -> None:
    """The process that waits says so, and can be interrupted; --takeover does not wait."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None and owner.stdout is not None
    try:
        assert owner.stdout.readline() == "ready\n"
        tagged = call(place, "tag", "a@3", "meanwhile")
        assert tagged.exit_code == 0, "names and notes disturb nobody"
        found = json_of(place, "rewind", "a@3", "--takeover")
        assert found["moved"] is True
        latest = past_of(place).latest
        assert latest is not None and latest.step == 3
        assert past_of(place).sessions()[-2]["ended"] == "taken over"
    finally:
        owner.communicate("\n")


def test_run_in_use_says_what_to_type(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **named: object) -> int:
        raise everystep.RunInUse("process 1 on vm is writing this run", where="a", do="pass takeover=True")

    monkeypatch.setattr(everystep.Run, "rewind", refuse)
    found = call(place, "rewind", "a@3")
    assert found.exit_code == everystep.RunInUse.exit_code
    assert found.stderr.splitlines()[-1] == "  do:    end it first, or --takeover"


# mistakes and names ----------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], int, str]] = [
    (["tag", "a", "release"], 2, "a@latest"),
    (["tag", "a@9", "release"], 3, "nearest: "),
    (["tag", "nobody@1", "release"], 3, "runs here: "),
    (["tag", "a@1", "12"], 2, "best_model_v1"),
    (["tag", "a@1", "latest"], 2, "best_model_v1"),
    (["tag", "a@1", "x@y"], 2, "best_model_v1"),
    (["tag", "a@1", "x", "--move", "--version"], 2, "one of them at a time"),
    (["tag", "a", "--delete"], 2, "RUN NAME --delete"),
    (["tag", "a", "befor", "--delete"], 3, "nearest: before"),
    (["note"], 2, "everystep note --help"),
    (["note", "nobody", "text"], 3, "runs here: "),
    (["note", "a@9", "text"], 3, "nearest: "),
    (["rewind", "a"], 2, "a@latest"),
    (["rewind", "a@nothing"], 3, "tags here: "),
    (["rewind", "nobody@1"], 3, "runs here: "),
]


@pytest.mark.parametrize(("args", "code", "part"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_change_nothing_and_say_what_to_do(forked: Path, args: list[str], code: int, part: str) -> None:
    before = sorted(path for path in forked.rglob("*"))
    found = call(forked, *args)
    assert (found.exit_code, found.stdout) == (code, "")
    what, *rest = found.stderr.splitlines()
    assert what.startswith("error: ") and rest[-1].startswith("  do:    ") and part in found.stderr, found.stderr
    assert json_of(forked, *args, code=code)["error"]["do"] == rest[-1].removeprefix("  do:    ")
    assert sorted(path for path in forked.rglob("*")) == before


EVIL = "\x1b[2Jrun\x07[/red]"


def test_names_from_disk_cannot_move_the_cursor(tmp_path: Path) -> None:
    model = Held({"\x1b]0;w\x07": state_at(1)["model"]["frozen"]})
    with everystep.open(str(tmp_path)).run(EVIL, config={"\x9bk": 1}).track(rng=False, model=model) as run:
        for step in (1, 2, 3):
            model.state["\x1b]0;w\x07"] = model.state["\x1b]0;w\x07"] + 1
            run.save(step, metrics={"\x1b[1m": step / 2, "loss": 1 / step}, reason="\r\x1b[A").wait()
    calls = [
        ("diff", f"{EVIL}@1", "@2", "--all"), ("show", f"{EVIL}@1", "--norms"), ("tag", f"{EVIL}@1", "tägø"), ("tag",),
        ("note", EVIL, "\x1b[31mred"), ("note", EVIL), ("log", "--best", "\x1b[1m:max"), ("log", EVIL, "--all"),
        ("log", EVIL, "--tag", "\x1b"), ("stats",), ("forget", EVIL, "--keep-last", "2", "--keep-tag", "\x1b"),
        ("undo", EVIL), ("prune",), ("rewind", f"{EVIL}@2"), ("rewind", EVIL), ("tag", EVIL, "\x1b", "--delete"),
    ]  # fmt: skip
    for args in calls:
        for output in (call(tmp_path, *args).output, call(tmp_path, *args, "--json").output):
            assert output and all(c.isprintable() or c == "\n" for c in output), (args, output)
