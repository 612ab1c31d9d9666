"""The verbs that write files for other programs, and make runs of old ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from _cli import call, json_of, lines_of, process
from _forked import fork, state_at

import everystep


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(tmp_path_factory.mktemp("exchange") / "repository")


@pytest.fixture
def old(forked: Path, tmp_path: Path) -> Path:
    """A folder as people keep them: checkpoints, one of them cut off, and other things."""
    folder = tmp_path / "old"
    folder.mkdir()
    for step in (1, 2, 3):
        process("-r", str(forked), "export", f"a@{step}", str(folder / f"step_{step}.npz"), "--only", "model")
    (folder / "step_4.npz").write_bytes((folder / "step_3.npz").read_bytes()[:-200])
    (folder / "notes.txt").write_text("the learning rate was too high")
    return folder


# export ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_becomes_a_file(forked: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.npz"
    document = json_of(forked, "export", "a@best:val_loss", str(file), "--only", "model")
    assert (document["run"], document["step"], document["only"]) == ("a", 5, "model")
    assert document["file"] == str(file) and document["nbytes"] == file.stat().st_size
    with np.load(file) as found:
        for name, array in state_at(5)["model"].items():
            assert found[name].tobytes() == array.tobytes() and found[name].dtype == array.dtype
    whole = tmp_path / "whole.safetensors"
    first, *others = lines_of(forked, "export", "a@5", str(whole))
    assert first.startswith(f"{whole}: ") and first.endswith(", a@5")
    changed = json_of(forked, "export", "a@5", str(whole), "--overwrite")["changed"]
    assert len(others) == len(changed) >= 1, "plain values have another form there, and that is said"


def test_a_file_that_is_there_stays(forked: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.npz"
    file.write_text("mine")
    found = call(forked, "export", "a@5", str(file))
    assert found.exit_code == everystep.Conflict.exit_code and found.stdout == ""
    assert found.stderr.splitlines()[-1] == "  do:    give another name, or --overwrite"
    assert file.read_text() == "mine"
    assert call(forked, "export", "a@5", str(file), "--overwrite").exit_code == 0 and file.stat().st_size > 1000
    assert call(forked, "export", "a@4", str(tmp_path / "other"), "--format", "npz").exit_code == 0
    assert np.load(tmp_path / "other")["model/layer.0.weight"][0, 0] == 4


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (["export", "a", "x.npz"], 2, "a@latest"),
        (["export", "a@5"], 2, "everystep export --help"),
        (["export", "a@9", "x.npz"], 3, "nearest: "),
        (["export", "a@5", "x.foo"], 2, "one of these endings, or --format"),
        (["export", "a@5", "x.npz", "--format", "foo"], 2, "safetensors"),
        (["export", "a@5", "x.npz", "--only", "modle"], 3, "nearest: "),
        (["export", "a@5", "no/such/folder/x.npz"], 3, "no such folder"),
        (["import", "nothing-here"], 3, "check the path"),
        (["import"], 2, "everystep import --help"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_write_nothing_and_say_what_to_do(
    forked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = call(forked, *args)
    assert (found.exit_code, found.stdout) == (code, ""), found.stderr
    what, *rest = found.stderr.splitlines()
    assert what.startswith("error: ") and rest[-1].startswith("  do:    ") and part in found.stderr, found.stderr
    assert json_of(forked, *args, code=code)["error"]["do"] == rest[-1].removeprefix("  do:    ")
    assert not list(tmp_path.iterdir())


# import ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_files_becomes_a_run(old: Path, tmp_path: Path) -> None:
    place = tmp_path / "repository"
    plan = json_of(place, "import", str(old), "--dry-run", code=4)
    assert plan["run"] == "old" and [one["step"] for one in plan["brought"]] == [1, 2, 3]
    assert not place.exists(), "a dry run makes no repository"
    document = json_of(place, "import", str(old), "--run", "resnet", code=4)
    assert [one["step"] for one in document["brought"]] == [1, 2, 3] and document["stored_bytes"] > 0
    assert {Path(one["path"]).name: one["kind"] for one in document["skipped"]} == {
        "step_4.npz": "damaged", "notes.txt": "unknown",
    }  # fmt: skip
    past = everystep.open(str(place))["resnet"]
    assert [checkpoint.id for checkpoint in past.checkpoints()] == [one["checkpoint"] for one in document["brought"]]
    for checkpoint in past.checkpoints():
        weight = state_at(checkpoint.step)["model"]["layer.0.weight"]
        assert checkpoint.load()["layer.0.weight"].tobytes() == weight.tobytes()


def test_an_import_in_text(old: Path, tmp_path: Path) -> None:
    place = tmp_path / "repository"
    found = call(place, "import", str(old))
    assert found.exit_code == everystep.Damaged.exit_code, "a damaged file is not passed over in silence"
    rows = found.stdout.splitlines()
    assert rows[0].split()[:3] == ["step", "size", "file"] and rows[1].split()[0] == "1"
    assert "not taken" in rows and any(row.startswith(f"  {old}/step_4.npz: ") for row in rows)
    assert rows[-1].startswith("old: 3 checkpoints came in, ")
    (old / "step_4.npz").unlink()
    again = lines_of(place, "import", str(old))
    assert again[-1] == "old: nothing came in" and any("step 2 is in the run already" in row for row in again)
    shutil.copy(old / "step_3.npz", old / "step_5.npz")
    assert call(place, "import", str(old / "notes.txt")).exit_code == 3


def test_an_import_goes_into_the_repository_that_is_there(forked: Path, old: Path, tmp_path: Path) -> None:
    place = shutil.copytree(forked, tmp_path / "repository")
    (old / "step_4.npz").unlink()
    found = process("-r", str(place), "import", str(old / "step_2.npz"), "--run", "single")
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    assert everystep.open(str(place)).runs() == ["a", "b", "seed", "single"]
    assert json_of(place, "fsck")["ok"] is True
