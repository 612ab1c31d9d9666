"""The command line: what it says, in text and JSON, of whole and of hurt repositories; and the door behind it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import call, flip, hurt, json_of, lines_of, record_of, slot_of, state_of, train

import everystep
from everystep.cli import human
from everystep.seam import Seam

EVIL = "\x1b[2Jrun\x07[/red]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("cli") / "repository")


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy to write into, or to hurt."""
    return shutil.copytree(trained, tmp_path / "repository")


# log -------------------------------------------------------------------------------------------------------------


def test_log_lists_the_runs_newest_first(trained: Path) -> None:
    document, repo = json_of(trained, "log"), everystep.open(str(trained))
    assert document["repository"] == str(trained) and document["warnings"] == []
    assert [about["run"] for about in document["runs"]] == ["vit@home", "resnet"]
    for about in document["runs"]:
        past = repo[about["run"]]
        latest, kept = past.latest, past.checkpoints(all=True)
        assert latest is not None
        assert about["checkpoints"] == len(kept)
        assert about["latest"] == {"id": latest.id, "step": latest.step, "time": latest.time}
        assert about["raw_bytes"] == sum(c.cost["raw_bytes"] for c in kept)
        assert about["stored_bytes"] == sum(c.cost["stored_bytes"] for c in kept) > 0
    head, vit, resnet, _, total = lines_of(trained, "log")
    assert head.split() == ["run", "checkpoints", "latest", "when", "stored", "of", "terms", "writer"]
    assert vit.split()[:3] == ["vit@home", "1", "1"] and resnet.split()[:3] == ["resnet", "6", "12"]
    assert resnet.split()[-2:] == ["2", "closed"]
    assert total.startswith("2 runs, 7 checkpoints, ")
    assert json_of(trained, "log", "-n", "1")["runs"] == document["runs"][:1]


def test_log_of_a_run_says_in_json_what_the_door_says(trained: Path) -> None:
    document, past = json_of(trained, "log", "resnet"), everystep.open(str(trained))["resnet"]
    assert [about["step"] for about in document["checkpoints"]] == [12, 10, 8, 6, 4, 2]
    for about, checkpoint in zip(document["checkpoints"], reversed(past.checkpoints())):
        named = ("id", "step", "parent", "term", "ranks", "time", "reason", "tags", "cost")
        assert {name: about[name] for name in named} == {name: getattr(checkpoint, name) for name in named}
        assert about["metrics"] == human.jsonable(checkpoint.metrics)
        assert about["current"] is True
    assert document["checkpoints"][0]["metrics"]["val_loss"] == "NaN"
    assert (document["more"], document["on_other_lines"]) == (0, 0)
    first, second = document["sessions"]
    assert human.jsonable(past.sessions()) == [
        {name: found for name, found in session.items() if name != "continues_step"} for session in (first, second)
    ]
    assert (first["ended"], first["closed"], first["continues"]) == ("died", None, None)
    assert (second["ended"], second["continues_step"], second["pid"]) == ("closed", 6, os.getpid())
    assert second["closed"] >= second["opened"] > first["opened"]


def test_log_shows_where_a_run_was_killed_and_resumed(trained: Path) -> None:
    head, *rows = lines_of(trained, "log", "resnet")
    assert head.split() == ["step", "id", "when", "size", "new", "val_loss", "epoch", "loss", "tags", "reason"]
    firsts = [row.split()[0] for row in rows]
    assert firsts == ["12", "10", "8", "──", "6", "4", "2", "──"]
    assert re.fullmatch(rf"── term 2 after step 6 · \S+ \S+ · process {os.getpid()} on \S+ · closed", rows[3])
    assert re.fullmatch(r"── term 1 · \S+ \S+ · process \d+ on \S+ · died", rows[7])
    ids = [checkpoint.id for checkpoint in everystep.open(str(trained))["resnet"].checkpoints()]
    assert [row.split()[1] for row in rows if not row.startswith("──")] == ids[::-1], "a pipe gets ids in full"
    assert "good_one" in rows[5] and rows[5].endswith("every 2 steps") and "nan" in rows[0]
    assert not any(line != line.rstrip() for line in rows)


def test_log_can_be_limited(trained: Path) -> None:
    assert [about["step"] for about in json_of(trained, "log", "resnet", "-n", "4")["checkpoints"]] == [12, 10, 8, 6]
    rows = lines_of(trained, "log", "resnet", "--number", "4")
    assert [row.split()[0] for row in rows[1:-2]] == ["12", "10", "8", "──", "6"]
    assert rows[-1] == "… 2 older checkpoints: a larger -n"


def test_a_line_that_was_left_is_hidden_until_asked_for(place: Path) -> None:
    repo = everystep.open(str(place))
    left = hurt(place, "resnet", 12, manifest=True)
    with pytest.warns(everystep.DamageWarning), repo.run("resnet") as run:
        assert run.resume() == 10
        run.save(11, state=state_of(11)).wait()
    document = json_of(place, "log", "resnet")
    assert [about["step"] for about in document["checkpoints"]] == [11, 10, 8, 6, 4, 2]
    assert document["on_other_lines"] == 1
    assert lines_of(place, "log", "resnet")[-1] == "… 1 checkpoint on lines that were left: --all"
    whole = json_of(place, "log", "resnet", "--all")["checkpoints"]
    assert [(about["step"], about["current"]) for about in whole[:3]] == [(11, True), (12, False), (10, True)]
    assert whole[1]["id"] == left
    rows = lines_of(place, "log", "resnet", "--all")
    assert rows[1].split()[:2] == ["●", "11"] and rows[3].split()[:3] == ["│", "○", "12"]
    assert [row[:3].rstrip() for row in rows[4:7]] == ["├─╯", "●", "●"]
    assert json_of(place, "show", "resnet")["checkpoints"] == 7
    assert any(line.split() == ["other", "lines", "1", "checkpoint"] for line in lines_of(place, "show", "resnet"))


def test_a_run_that_died_before_its_first_checkpoint_is_shown(tmp_path: Path) -> None:
    code = "import everystep, os, sys; everystep.open(sys.argv[1]).run('early').resume(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (row,) = lines_of(tmp_path, "log", "early")
    assert row.startswith("── term 1 · ") and row.endswith(" · died")
    (about,) = json_of(tmp_path, "log")["runs"]
    assert (about["checkpoints"], about["latest"], about["ended"]) == (0, None, "died")
    assert any(line.split() == ["latest", "no", "checkpoint", "yet"] for line in lines_of(tmp_path, "show", "early"))
    assert call(tmp_path, "show", "early@latest").exit_code == 3
    assert call(tmp_path, "fsck").exit_code == 0


# show ------------------------------------------------------------------------------------------------------------


def test_show_of_a_run(trained: Path) -> None:
    document, past = json_of(trained, "show", "resnet"), everystep.open(str(trained))["resnet"]
    assert document["config"] == {"lr": 0.1, "betas": [0.9, 0.99], "amp": True}
    assert past.config == {"lr": 0.1, "betas": (0.9, 0.99), "amp": True}
    assert document["attachments"] == past.attachments == ["tokenizer.json"]
    assert document["notes"] == past.notes == ["the learning rate was too high"]
    assert document["metrics"] == past.metric_names == ["epoch", "loss", "val_loss"]
    assert document["tags"] == {"good_one": {"id": past.at(4).id, "step": 4}}
    assert document["steps"] == [2, 4, 6, 8, 10, 12] and document["latest"]["id"] == past.at(12).id
    text = "\n".join(lines_of(trained, "show", "resnet"))
    for part in (
        "run resnet", "good_one  step 4", "lr     0.1", "betas  0.9, 0.99", "amp    yes", "tokenizer.json",
        "the learning rate", "step 6         closed", "the beginning  died", f"numpy {np.__version__}",
    ):  # fmt: skip
        assert part in text, text


@pytest.mark.parametrize(
    ("spec", "step"),
    [
        ("8", 8),
        ("latest", 12),
        ("best:val_loss", 10),
        ("best:val_loss:max", 2),
        ("best:epoch:max", 12),
        ("good_one", 4),
    ],
)
def test_show_takes_every_spec(trained: Path, spec: str, step: int) -> None:
    checkpoint = everystep.open(str(trained))["resnet"].at(step)
    for name in (spec, checkpoint.id, checkpoint.id[:9]):
        about = json_of(trained, "show", f"resnet@{name}")["checkpoint"]
        assert (about["id"], about["step"]) == (checkpoint.id, step)
    assert lines_of(trained, "show", f"resnet@{spec}")[0] == f"checkpoint resnet@{step}"


def test_show_of_a_checkpoint(trained: Path) -> None:
    document = json_of(trained, "show", "resnet@4")
    checkpoint = everystep.open(str(trained))["resnet"].at(4)
    about = document["checkpoint"]
    assert about["environment"] == checkpoint.environment and about["parent_step"] == 2
    assert document["leaves"] == [
        {"path": leaf.path, "dtype": leaf.dtype, "shape": list(leaf.shape), "role": leaf.role, "kind": leaf.kind,
         "nbytes": leaf.nbytes}
        for leaf in checkpoint.leaves()
    ]  # fmt: skip
    assert document["more"] == 0
    assert document["roles"]["weights"] == {"leaves": 1, "nbytes": 300 * 40 * 4}
    assert document["roles"]["optimizer"] == {"leaves": 1, "nbytes": 300 * 40 * 8}
    assert sum(role["nbytes"] for role in document["roles"].values()) == checkpoint.cost["raw_bytes"]
    text = "\n".join(lines_of(trained, "show", "resnet@4"))
    for part in (f"id      {checkpoint.id}", f"parent  {checkpoint.parent}, step 2", "tags    good_one",
                 "val_loss  0.375", "model/w  ", "46.9 KiB"):  # fmt: skip
        assert part in text, text
    assert re.search(r"^  model/w +float32 +300 × 40 +weights +46.9 KiB$", text, re.M)
    assert re.search(r"^  optimizer/m +float64 +300 × 40 +optimizer +93.8 KiB$", text, re.M)


def test_show_limits_leaves_and_says_so(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path)).run("many") as run:
        run.save(1, state={f"layer{i:02d}": np.zeros(2) for i in range(40)}).wait()
    total = len(everystep.open(str(tmp_path))["many"].at(1).leaves())
    assert total >= 40

    def shown(*args: str) -> tuple[int, list[str]]:
        text = "\n".join(lines_of(tmp_path, "show", "many@1", *args))
        return len(re.findall(r"^  layer\d+ ", text, re.M)), re.findall(r"… (\d+) leaves more: --all-leaves", text)

    assert shown() == (24, [str(total - 24)])
    assert shown("--leaves", "3") == (3, [str(total - 3)])
    assert shown("--leaves", "0") == (0, [str(total)])
    assert shown("--all-leaves") == (40, [])
    assert len(json_of(tmp_path, "show", "many@1")["leaves"]) == total
    few = json_of(tmp_path, "show", "many@1", "--leaves", "3")
    assert (len(few["leaves"]), few["more"]) == (3, total - 3)


def test_the_last_at_sign_splits_unless_a_run_has_the_whole_name(place: Path) -> None:
    assert json_of(place, "show", "vit@home")["run"] == "vit@home"
    assert json_of(place, "show", "vit@home@1")["checkpoint"]["step"] == 1
    with everystep.open(str(place)).run("vit@home@1") as run:
        run.save(5, state=[np.zeros(3)]).wait()
    assert json_of(place, "show", "vit@home@1")["run"] == "vit@home@1"
    assert json_of(place, "show", "vit@home@1@latest")["checkpoint"]["step"] == 5


# fsck ------------------------------------------------------------------------------------------------------------


def test_fsck_of_what_is_whole(trained: Path) -> None:
    document = json_of(trained, "fsck")
    assert document["ok"] is True and document["data"] is True and document["findings"] == []
    assert [(c["run"], c["step"]) for c in document["checkpoints"]] == [
        *(("resnet", step) for step in (2, 4, 6, 8, 10, 12)), ("vit@home", 1),
    ]  # fmt: skip
    assert document["bytes_read"] > 6 * 300 * 40 * 4
    rows = lines_of(trained, "fsck")
    assert [row.split() for row in rows[1:3]] == [
        ["resnet", "whole", "2,", "4,", "6,", "8,", "10,", "12"], ["vit@home", "whole", "1"],
    ]  # fmt: skip
    assert rows[-1].endswith(": all is whole") and "7 checkpoints" in rows[-1]
    assert json_of(trained, "fsck", "vit@home")["runs"] == ["vit@home"]
    assert [c["run"] for c in json_of(trained, "fsck", "vit@home")["checkpoints"]] == ["vit@home"]


def test_fsck_names_the_hurt_and_the_whole(place: Path) -> None:
    id = hurt(place, "resnet", 12)
    report = everystep.open(str(place)).check()
    document = json_of(place, "fsck", code=4)
    assert document["ok"] is False
    assert [c["step"] for c in document["checkpoints"] if not c["whole"]] == [12]
    (finding,) = document["findings"]
    assert (finding["id"], finding["run"], finding["step"]) == (id, "resnet", 12)
    assert [(f.what, f.where) for f in report.findings] == [(finding["what"], finding["where"])]
    assert document["records"] == report.records and document["bytes_read"] == report.bytes_read
    found = call(place, "fsck")
    assert found.exit_code == everystep.Damaged.exit_code and found.stderr == ""
    rows = found.stdout.splitlines()
    assert rows[1].split() == ["resnet", "hurt", "12", "2,", "4,", "6,", "8,", "10"]
    assert "resnet: step 12: " in found.stdout and finding["where"] in found.stdout
    assert rows[-1].endswith("1 finding; 1 checkpoint hurt, 6 whole")
    assert call(place, "fsck", "vit@home").exit_code == 0
    structure = json_of(place, "fsck", "--no-data")
    assert structure["ok"] is True and structure["bytes_read"] == 0
    assert lines_of(place, "fsck", "--no-data")[-1].endswith("the structure is whole; data not read")


def test_fsck_names_what_leans_on_the_hurt(place: Path) -> None:
    weights = np.random.default_rng(0).standard_normal(9000).astype("f4")
    with everystep.open(str(place)).run("drift").track(rng=False) as run:
        for step in (8, 10, 12):
            run.save(step, state={"model": {"w": weights + np.float32(1e-6 * step)}}).wait()
    hurt(place, "drift", 8)
    document = json_of(place, "fsck", code=4)
    assert [c["step"] for c in document["checkpoints"] if not c["whole"]] == [8, 10, 12]
    assert {finding["step"] for finding in document["findings"]} == {8, 10, 12}


def test_fsck_of_the_structure_sees_a_hurt_manifest(place: Path) -> None:
    id = hurt(place, "resnet", 4, manifest=True)
    document = json_of(place, "fsck", "resnet", "--no-data", code=4)
    assert [finding["id"] for finding in document["findings"]] == [id]
    assert json_of(place, "show", "resnet@4", code=4)["error"]["kind"] == "damaged"
    assert len(json_of(place, "log", "resnet")["checkpoints"]) == 6, "the log says what it says"


def test_fsck_of_a_damaged_log(place: Path) -> None:
    slot = slot_of(place, "resnet", 8)
    flip(record_of(place, "resnet", slot))
    document = json_of(place, "fsck", "--no-data", code=4)
    (finding,) = document["findings"]
    assert finding["id"] is None and finding["where"] == str(record_of(place, "resnet", slot))
    found = call(place, "fsck", "--no-data")
    assert re.search(r"^resnet +damaged log +2, 4, 6, 10, 12$", found.stdout, re.M)
    assert found.stdout.rstrip().endswith("1 finding; 0 checkpoints hurt, 6 whole")


# what is hurt, missing or mistaken ----------------------------------------------------------------------------------


def test_a_damaged_record_is_one_line_of_warning(place: Path) -> None:
    flip(record_of(place, "resnet", slot_of(place, "resnet", 6)))
    for args in (("log", "resnet"), ("log",), ("show", "resnet"), ("show", "resnet@best:val_loss")):
        found = call(place, *args)
        assert found.exit_code == 0, found.output
        assert re.fullmatch(
            r"warning: record \d+ of run 'resnet' cannot be read and left out; run fsck\n", found.stderr
        )
        document = call(place, *args, "--json")
        assert found.stderr == f"warning: {json.loads(document.stdout)['warnings'][0]}\n" == document.stderr
    assert [about["step"] for about in json_of(place, "log", "resnet")["checkpoints"]] == [12, 10, 8, 4, 2]


def test_a_newest_record_that_is_damaged_hides_what_is_latest(place: Path) -> None:
    for slot in range(slot_of(place, "resnet", 12), len(list((place / "runs/resnet/log").iterdir()))):
        flip(record_of(place, "resnet", slot))
    assert json_of(place, "show", "resnet@latest", code=4)["error"]["kind"] == "damaged"
    assert json_of(place, "show", "resnet@10")["checkpoint"]["step"] == 10
    assert json_of(place, "log")["runs"][1]["latest"]["step"] == 10


@pytest.mark.parametrize("verb", [("log",), ("fsck",), ("show", "resnet")])
def test_a_repository_without_a_sound_format_file(place: Path, verb: tuple[str, ...]) -> None:
    flip(place / "format.json")
    assert json_of(place, *verb, code=4)["error"]["where"] == str(place / "format.json")
    (place / "format.json").unlink()
    error = json_of(place, *verb, code=4)["error"]
    assert "format.json" in error["what"] and "copy" in error["do"]


ERRORS: list[tuple[list[str], int, str, str]] = [
    (["show", "resnt"], 3, "not-found", "runs here: resnet"),
    (["log", "nothing-like-it"], 3, "not-found", "resnet, vit@home"),
    (["fsck", "resnt"], 3, "not-found", "resnet"),
    (["show", "resnt@4"], 3, "not-found", "resnet"),
    (["show", "resnet@5"], 3, "not-found", "nearest: 4, 6, 2"),
    (["show", "resnet@99999999999999999999999"], 3, "not-found", "a step, latest"),
    (["show", "resnet@²"], 3, "not-found", "a step, latest"),
    (["show", "resnet@good"], 3, "not-found", "tags here: good_one"),
    (["show", "resnet@"], 2, "usage", "a step, latest"),
    (["show", "resnet@best:"], 2, "usage", "best:METRIC"),
    (["show", "resnet@best:val_los"], 3, "not-found", "nearest: val_loss"),
    (["show", "resnet@best:val_loss:up"], 2, "usage", "resnet@best:val_loss:max"),
    (["show", "resnet@best:epoch"], 2, "usage", "resnet@best:epoch:min"),
    (["show", "@4"], 2, "usage", "RUN@SPEC"),
    (["show"], 2, "usage", "everystep show --help"),
    (["lgo"], 2, "usage", "'log'"),
    (["log", "--jsno"], 2, "usage", "--json"),
    (["log", "resnet", "-n", "0"], 2, "usage", "everystep log --help"),
    (["log", "resnet", "surplus"], 2, "usage", "everystep log --help"),
]


@pytest.mark.parametrize(("args", "code", "kind", "part"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors_say_what_where_and_what_to_do(trained: Path, args: list[str], code: int, kind: str, part: str) -> None:
    found = call(trained, *args)
    assert (found.exit_code, found.stdout) == (code, "")
    what, *rest = found.stderr.splitlines()
    assert what.startswith("error: ") and len(what) > len("error: ")
    assert all(line.startswith(("  where: ", "  do:    ")) for line in rest) and rest[-1].startswith("  do:    ")
    assert part in found.stderr, found.stderr
    as_json = call(trained, *args, "--json")
    assert (as_json.exit_code, as_json.stderr) == (code, "")
    error = json.loads(as_json.stdout)["error"]
    assert (error["kind"], error["what"]) == (kind, what.removeprefix("error: "))
    assert set(error) == {"kind", "what", "where", "do"}


def test_which_repository(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(*args: str, **env: str) -> Any:
        found = call(None, *args, "--json", env=env)  # type: ignore[arg-type]
        return [about["run"] for about in json.loads(found.stdout)["runs"]] if found.exit_code == 0 else found.exit_code

    both, missing = ["vit@home", "resnet"], str(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)
    assert runs("-r", str(trained), "log") == both
    assert runs("log", "-r", str(trained)) == both
    assert runs("--repo", missing, "log", "--repo", str(trained)) == both, "the nearer one counts"
    assert runs("log", EVERYSTEP_REPO=str(trained)) == both
    assert runs("-r", missing, "log", EVERYSTEP_REPO=str(trained)) == 3, "what is typed comes before the environment"
    assert not (tmp_path / "missing").exists(), "looking makes nothing"
    assert runs("log") == 2, "an empty folder"
    (tmp_path / "train.py").touch()
    assert runs("log") == 2, "a folder with other things"
    assert call(tmp_path, "log").exit_code == everystep.ForeignRepository.exit_code
    shutil.copytree(trained, tmp_path / "runs")
    assert "everystep -r runs" in call(None, "log").stderr, "the usual folder is there"
    monkeypatch.chdir(trained)
    assert runs("log") == both, "the present folder is one"


def test_a_newer_format_is_said_even_of_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blake3 import blake3

    line = b'{"format":"everystep","version":99,"features":[],"id":"00"}'
    (tmp_path / "format.json").write_bytes(line + b"\nblake3 " + blake3(line).hexdigest().encode() + b"\n")
    monkeypatch.chdir(tmp_path)
    assert json_of(None, "log", code=5)["error"]["kind"] == "newer-format"


def test_an_empty_repository(place: Path) -> None:
    shutil.rmtree(place / "runs")
    assert json_of(place, "log")["runs"] == []
    assert lines_of(place, "log") == [f"no run yet in {place}"]
    assert lines_of(place, "fsck") == ["0 runs, 0 records, 0 checkpoints, 0 B of data: all is whole"]


def test_names_from_disk_cannot_move_the_cursor(tmp_path: Path) -> None:
    state = {"\x1b]0;title\x07": np.zeros(2), "model": np.zeros(1)}
    with everystep.open(str(tmp_path)).run(EVIL, config={"\x9bk": "a\nb\u202e"}) as run:
        run.save(1, state=state, metrics={"\x1b[1m": 1.0}, reason="\r\x1b[A").wait().tag("tägø")
        run.note("\x1b[31mred")
    for args in (("log",), ("log", EVIL), ("show", EVIL), ("show", f"{EVIL}@1"), ("fsck",), ("show", f"{EVIL}@2")):
        for output in (call(tmp_path, *args).output, call(tmp_path, *args, "--json").output):
            assert all(c.isprintable() or c == "\n" for c in output), (args, output)
    assert "\\x1b[2Jrun\\x07[/red]" in lines_of(tmp_path, "log")[1]
    assert "tägø" in lines_of(tmp_path, "log", EVIL)[1]


# what the door gained for it ---------------------------------------------------------------------------------------


class Numbered(Seam):
    """Ids that count, so that their beginnings are known."""

    def __init__(self, begin: str) -> None:
        super().__init__()
        self._begin, self._ids = begin, itertools.count()

    def token(self, size: int) -> str:
        return f"{self._begin}{next(self._ids):012x}" if size == 8 else super().token(size)


def test_find_prefers_tags_then_steps_then_ids(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path), seam=Numbered("7777")).run("digits") as run:
        one, two, step = (run.save(step, state=[np.full(2, step)]).wait() for step in (1, 2, 7777000))
    assert run.find(one.id) == one and run.find(two.id) == two
    assert run.find("7777000") == step, "a step comes before an id"
    with pytest.raises(everystep.UsageError, match="3 checkpoints have an id that begins with '7777'"):
        run.find("7777")
    with pytest.raises(everystep.NotFound):
        run.find("777")
    with everystep.open(str(tmp_path), seam=Numbered("beef")).run("words") as run:
        one, two = (run.save(step, state=[np.full(2, step)]).wait() for step in (1, 2))
    two.tag(one.id)
    assert run.find(one.id) == two, "a tag comes before an id"


def test_leaves_have_the_paths_that_load_takes(tmp_path: Path) -> None:
    state: Any = {"rng": {"key": np.arange(3)}, "params": {"w": np.ones(2)}, "loop": 7}
    with everystep.open(str(tmp_path)).run("jax") as run:
        checkpoint = run.save(1, state=state).wait()
    paths = {leaf.path: leaf for leaf in checkpoint.leaves()}
    assert {"rng/key", "params/w"} <= paths.keys()
    assert (checkpoint.load(only="rng/key") == state["rng"]["key"]).all(), "the state's own rng, not ours"
    assert checkpoint.load(only="loop") == 7
    assert (checkpoint.load(only="params/w") == 1).all() and paths["params/w"].nbytes == 16
    with everystep.open(str(tmp_path)).run("plain") as run:
        checkpoint = run.save(1, state={"w": np.ones(2)}).wait()
    for leaf in checkpoint.leaves():
        assert checkpoint.load(only=leaf.path).shape == leaf.shape


def test_leaves_are_those_of_all_ranks(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path))
    runs = [repo.run("wide", rank=rank, ranks=2, launch="one") for rank in range(2)]
    saves: list[Any] = [None, None]

    def save(rank: int) -> None:
        saves[rank] = runs[rank].save(3, state={"model": {f"part{rank}": np.zeros(4), "same": np.ones(2)}})

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpoint = saves[0].wait()
    saves[1].wait()
    for run in runs:
        run.close()
    assert checkpoint.ranks == 2
    paths = [leaf.path for leaf in checkpoint.leaves() if leaf.path.startswith("model/")]
    assert sorted(paths) == ["model/part0", "model/part1", "model/same"] and len(set(paths)) == 3


def test_sessions_say_how_they_ended(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path))
    first = repo.run("shared")
    first.save(1, state=[np.zeros(2)]).wait()
    assert [session["ended"] for session in repo["shared"].sessions()] == [None], "this process lives"
    assert " · open" in lines_of(tmp_path, "log", "shared")[-1]
    with repo.run("shared", takeover=True) as second:
        second.resume()
        second.save(2, state=[np.ones(2)]).wait()
    assert [session["ended"] for session in repo["shared"].sessions()] == ["taken over", "closed"]
    with pytest.raises(everystep.RunTakenOver):
        first.save(2, state=[np.zeros(2)]).wait()
    with pytest.raises(everystep.RunTakenOver):
        first.close()
