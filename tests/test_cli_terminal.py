"""What the verbs look like on terminals of several widths, and their bars while they work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from _forked import fork
from test_cli_process import on_terminal, plain

ROOMY = 140


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(tmp_path_factory.mktemp("terminal") / "repository")


def rows_of(text: str) -> list[str]:
    """What stays on the screen: a bar writes over itself, and is gone at the end."""
    return plain(text.rpartition("\x1b[2K")[2]).splitlines()


VERBS = [
    "log a --all", "log --best val_loss", "log a --where step>2", "show a@5 --norms", "show b", "diff a@1 @5",
    "diff a@5 b@2 --all", "tag", "note a", "stats", "fsck --read 1/2", "prune",
    "forget a --keep-last 2 --keep-best 3:val_loss --full-last 1 --dry-run",
]  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("typed", VERBS)
def test_every_verb_fits_the_terminal(forked: Path, tmp_path: Path, columns: int, typed: str) -> None:
    place = shutil.copytree(forked, tmp_path / "repository")
    code, text = on_terminal(place, *typed.split(), columns=columns)
    rows = rows_of(text)
    assert code == 0 and rows
    own = ("… no room", "repository", "2 runs, ", "3 runs, ")  # sentences and paths wrap as they like
    assert max(len(row) for row in rows if not row.startswith(own)) <= columns, "\n".join(rows)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("show", "a@5", "--norms"), "a@5 "),
        (("diff", "a@1", "@5"), "a@1 @5 "),
        (("prune",), "seed "),
        (("stats",), "2/2"),
        (("fsck",), "1/1"),
    ],
)
def test_long_work_has_a_bar_that_goes(forked: Path, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    place = shutil.copytree(forked, tmp_path / "repository")
    with open(tmp_path / "answer", "w+") as answer:
        code, text = on_terminal(place, *args, columns=ROOMY, stdout=answer)
        assert code == 0 and said in plain(text) and "━" in text
        answer.seek(0)
        assert "━" not in answer.read()
    assert rows_of(text) in ([], [""]), "nothing of it stays"
