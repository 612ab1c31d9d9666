"""What a shell is told when somebody presses Tab, and the script that asks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _cli import call, json_of, process
from _forked import fork

import everystep


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(tmp_path_factory.mktemp("completion") / "repository")


def answers(place: Path, line: str) -> list[str]:
    """What comes behind a line that is typed so far, as bash asks for it."""
    words = len(f"{line}x".split())
    found = call(
        None, env={"COMP_WORDS": line, "COMP_CWORD": str(words - 1), "_EVERYSTEP_COMPLETE": "complete_bash",
                   "EVERYSTEP_REPO": str(place)},
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    return found.stdout.split()


SPECS = ["latest", "best:val_loss", "best:width", "before", "model_v1", "5", "4", "6", "3", "2", "1"]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("everystep l", ["log"]),
        ("everystep fo", ["forget"]),
        ("everystep log ", ["a", "b", "seed"]),
        ("everystep log s", ["seed"]),
        ("everystep fsck s", ["seed"]),
        ("everystep show a@", [f"a@{spec}" for spec in SPECS]),
        ("everystep show a@be", ["a@best:val_loss", "a@best:width", "a@before"]),
        ("everystep show a@best:v", ["a@best:val_loss"]),
        ("everystep show see", ["seed", "seed@latest", "seed@9"]),
        ("everystep rewind see", ["seed@latest", "seed@9"]),
        ("everystep rewind ", ["a@", "b@", "seed@"]),
        ("everystep rewind nobody@", []),
        ("everystep diff a@1 @m", ["@model_v1"]),
        ("everystep diff a@1 b@", ["b@latest", "b@best:val_loss", "b@2", "b@1"]),
        ("everystep tag a mo", ["model_v1"]),
        ("everystep tag a@3 b", ["before"]),
        ("everystep log --best v", ["val_loss"]),
        ("everystep log b --best ", ["val_loss", "width"]),
        ("everystep forget a --keep-l", ["--keep-last"]),
        ("everystep completion f", ["fish"]),
    ],
)
def test_what_is_offered(forked: Path, line: str, meant: list[str]) -> None:
    assert answers(forked, line) == meant


def test_the_repository_that_is_typed_is_the_one_that_is_asked(forked: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert answers(nowhere, f"everystep -r {forked} log ") == ["a", "b", "seed"]
    assert answers(nowhere, f"everystep log -r {forked} s") == ["seed"]
    assert answers(nowhere, "everystep log ") == [] and not nowhere.exists(), "looking makes nothing"
    broken = shutil.copytree(forked, tmp_path / "broken")
    (broken / "format.json").unlink()
    assert answers(broken, "everystep log ") == [], "Tab is no place for an error"


def test_names_that_could_move_the_cursor_are_not_offered(tmp_path: Path) -> None:
    for name in ("\x1b[2Jrun", "run"):
        with everystep.open(str(tmp_path)).run(name) as run:
            run.save(1, state=[1.0]).wait()
    assert answers(tmp_path, "everystep log ") == ["run"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell: str) -> None:
    found = process("completion", shell)
    assert (found.returncode, found.stderr) == (0, "")
    assert "everystep" in found.stdout and "_EVERYSTEP_COMPLETE" in found.stdout
    assert json_of(None, "completion", shell)["script"] == found.stdout.rstrip("\n")
    wrong = call(None, "completion", "tcsh")
    assert wrong.exit_code == 2 and "'bash', 'zsh', 'fish'" in wrong.stderr


# Line, the end of it that bash (5.2) says it will replace, as read from an interactive shell; what comes in its place.
REPLACED = [
    ("everystep sho", "sho", ["show"]),
    ("everystep show se", "se", ["seed", "seed@latest", "seed@9"]),
    ("everystep show a@be", "@be", ["@best:val_loss", "@best:width", "@before"]),
    ("everystep show seed@", "@", ["@latest", "@9"]),
    ("everystep show a@best:", "", ["val_loss", "width"]),
    ("everystep show a@best:v", "v", ["val_loss"]),
    ("everystep diff a@1 @m", "@m", ["@model_v1"]),
    ("everystep fsck nobody", "nobody", []),
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_puts_the_answer_in_the_right_place(forked: Path, tmp_path: Path) -> None:
    """Bash cuts words at @ and :, and replaces only the last piece."""
    script = tmp_path / "completion.bash"
    script.write_text(process("completion", "bash").stdout)
    asked = "\n".join(
        f"COMP_LINE='{line}' COMP_POINT={len(line)}; COMPREPLY=(); _everystep_completion everystep '{end}' ''; "
        'echo "${COMPREPLY[@]}"'
        for line, end, _ in REPLACED
    )
    tool = tmp_path / "everystep"
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m everystep "$@"\n')
    tool.chmod(0o755)
    done = subprocess.run(
        ["bash", "--norc", "-c", f"source {script}\n{asked}"], capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "EVERYSTEP_REPO": str(forked)},
    )  # fmt: skip
    assert done.stderr == ""
    assert [row.split() for row in done.stdout.splitlines()] == [meant for _, _, meant in REPLACED]
