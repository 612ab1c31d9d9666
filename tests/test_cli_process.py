"""The command line as a process: how it ends, what it sends to a terminal and to a pipe, how it is laid out."""

from __future__ import annotations

import importlib.util
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from _cli import COMMAND, QUIET, call, flip, process, record_of, slot_of, train
from typer.main import get_command
from typer.testing import CliRunner

import everystep
from everystep.cli import human
from everystep.cli.app import app
from everystep.cli.table import Column, cut, lay_out

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("cli") / "repository")


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy to write into, or to hurt."""
    return shutil.copytree(trained, tmp_path / "repository")


# how a call ends ---------------------------------------------------------------------------------------------------


def test_stdout_and_stderr_of_a_real_process(place: Path) -> None:
    found = process("-r", str(place), "log", "resnet")
    assert (found.returncode, found.stderr) == (0, "") and "\x1b" not in found.stdout
    assert found.stdout == call(place, "log", "resnet").stdout
    flip(record_of(place, "resnet", slot_of(place, "resnet", 6)))
    found = process("-r", str(place), "log", "resnet")
    assert found.returncode == 0 and found.stderr.count("\n") == 1 and ".py" not in found.stderr
    found = process("-r", str(place), "fsck")
    assert (found.returncode, found.stderr) == (4, ""), "no progress bar where nobody looks"
    found = process("-r", str(place), "show", "nobody")
    assert (found.returncode, found.stdout) == (3, "") and "Traceback" not in found.stderr
    assert process("log", env={"EVERYSTEP_REPO": str(place)}).returncode == 0


def test_version_and_help() -> None:
    found = process("--version")
    assert (found.returncode, found.stdout) == (0, f"everystep {everystep.__version__} (kernel: {everystep.KERNEL})\n")
    found = process("--version", env={"EVERYSTEP_KERNEL": "0"})
    assert (found.returncode, found.stdout) == (0, f"everystep {everystep.__version__} (kernel: NumPy)\n")
    assert process().stdout == process("--help").stdout


def test_the_installed_command_is_this_one() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="everystep")
    assert entry.load() is everystep.cli.main


@pytest.mark.parametrize("args", [("log", "resnet"), ("log", "--json"), ("show", "no"), ("show", "no", "--json")])
def test_a_reader_that_leaves_early_is_no_error(trained: Path, args: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        found = subprocess.run(
            [*COMMAND, "-r", str(trained), *args], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert found.returncode == (3 if "no" in args else 0)
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full device")
def test_an_output_that_is_full_is_said(trained: Path) -> None:
    for args in (("log",), ("log", "--json"), ("show", "no", "--json")):
        with open("/dev/full", "w") as full:
            command = [*COMMAND, "-r", str(trained), *args]
            found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        what = "no run 'no'" if "no" in args else "the output cannot be written: "
        assert found.returncode == (3 if "no" in args else everystep.StorageError.exit_code)
        assert found.stderr.startswith(f"error: {what}") and "Traceback" not in found.stderr


def test_an_output_without_unicode_still_says_it(trained: Path) -> None:
    found = process("-r", str(trained), "log", "resnet", env={"PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0 and "\\u2500\\u2500 term 2" in found.stdout


def test_an_interrupt_is_no_traceback(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(everystep.Repository, "check", interrupt)
    found = call(trained, "fsck")
    assert (found.exit_code, found.stdout, found.stderr.strip()) == (130, "", "")


def test_a_fault_of_our_own_is_not_hidden(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: Any, **named: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(everystep.Repository, "check", fault)
    assert isinstance(call(trained, "fsck").exception, ZeroDivisionError)


# on a terminal -----------------------------------------------------------------------------------------------------


def on_terminal(place: Path, *args: str, columns: int = 80, stdout: Any = None, **env: str) -> tuple[int, str]:
    """The exit code and what a terminal of that width is sent; with `stdout`, only stderr is the terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns)) if hasattr(termios, "tcsetwinsize") else _set_size(theirs, columns)
    around = {name: value for name, value in os.environ.items() if name not in QUIET}
    running = subprocess.Popen(
        [*COMMAND, "-r", str(place), *args],
        stdin=theirs, stdout=stdout or theirs, stderr=theirs, env={**around, "TERM": "xterm-256color", **env},
    )  # fmt: skip
    os.close(theirs)
    parts: list[bytes] = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:
        pass  # how Linux says that the other side has closed
    finally:
        os.close(ours)
    return running.wait(), b"".join(parts).decode().replace("\r\n", "\n")


def _set_size(terminal: int, columns: int) -> None:
    import fcntl

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("columns", [60, 80, 140])
@pytest.mark.parametrize("args", [("log",), ("log", "resnet"), ("log", "resnet", "--all")])
def test_tables_fit_the_terminal(trained: Path, columns: int, args: tuple[str, ...]) -> None:
    code, text = on_terminal(trained, *args, columns=columns)
    rows = plain(text).splitlines()
    assert code == 0 and "\x1b[1m" in text
    assert max(len(row) for row in rows if not row.startswith("…")) <= columns, "\n".join(rows)
    if "resnet" in args:
        newest = everystep.open(str(trained))["resnet"].latest
        assert newest is not None and newest.id[:8] in rows[1] and newest.id not in rows[1]
        assert "ago" in rows[1] or "now" in rows[1]
        assert ("no room for" in rows[-1]) == (columns < 140), rows[-1]


def test_colours_can_be_turned_off_and_on(trained: Path) -> None:
    assert "\x1b[" not in on_terminal(trained, "log", "resnet", NO_COLOR="1")[1]
    assert "\x1b[" not in on_terminal(trained, "show", "nobody", NO_COLOR="1")[1]
    assert "\x1b[1;31merror: " in on_terminal(trained, "show", "nobody")[1]
    forced = process("-r", str(trained), "log", "resnet", env={"FORCE_COLOR": "1"}).stdout
    assert "\x1b[" in forced and plain(forced) == process("-r", str(trained), "log", "resnet").stdout
    assert "\x1b" not in process("-r", str(trained), "log", "--json", env={"FORCE_COLOR": "1"}).stdout


def test_progress_is_on_stderr_and_only_on_a_terminal(trained: Path, tmp_path: Path) -> None:
    with open(tmp_path / "answer", "w+") as answer:
        code, text = on_terminal(trained, "fsck", stdout=answer)
        answer.seek(0)
        assert code == 0 and "1/1" in text and "vit@home" in text
        assert answer.read() == process("-r", str(trained), "fsck").stdout


# the parts ---------------------------------------------------------------------------------------------------------


def test_help_has_examples_everywhere_and_the_page_is_up_to_date() -> None:
    for verb in ((), *((name,) for name in get_command(app).commands)):  # type: ignore[attr-defined]
        found = CliRunner().invoke(app, [*verb, "--help"])
        assert found.exit_code == 0 and "Examples:\n" in found.stdout and "--json" in found.stdout
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "scripts" / "cli_reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference.page(), "docs/cli.md is stale: python scripts/cli_reference.py"


def test_starting_is_light() -> None:
    code = "import sys, everystep.cli; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "everystep.cli.app" in found
    assert not {"torch", "tensorflow", "jax", "mxnet", "rich.console", "rich.progress"} & set(found)


def test_numbers_as_people_read_them() -> None:
    assert [human.size(n) for n in (0, 1023, 1024, 1500, 15 << 20, 150 << 30, 1 << 62)] == [
        "0 B", "1023 B", "1.00 KiB", "1.46 KiB", "15.0 MiB", "150 GiB", "4096 PiB",
    ]  # fmt: skip
    ages = [human.age(s, "2026-05-01 12:00:00") for s in (-9, 1, 59, 61, 7300, 3 * 86400, 1e8)]
    assert ages == ["now", "now", "59 s ago", "1 min ago", "2 h ago", "3 days ago", "2026-05-01"]
    assert human.numbers([0.5, None, 12.25, 3, "x", math.nan]) == ["0.5000", "", "12.2500", "3", "x", "nan"]
    assert human.numbers([1e-9, 2.0]) == ["1e-09", "2"] and human.numbers([3e-4, 0.1]) == ["0.000300", "0.100000"]
    assert [human.value(v) for v in (1, True, None, 0.1, "a", (1, 2), {"k": [1]})] == [
        "1", "yes", "none", "0.1", "a", "1, 2", "k 1",
    ]  # fmt: skip
    dtypes = ("<f4", ">f8", "|b1", "|u1", "bfloat16", '{"names":[]}', "<c16", "torch.bits8", "|S3")
    assert [human.element(dtype) for dtype in dtypes] == [
        "float32", "float64 big-endian", "bool", "uint8", "bfloat16", "record", "complex128", "torch.bits8", "|S3",
    ]  # fmt: skip
    assert human.steps(range(100, 1000, 100)) == "100, 200, 300 … 800, 900 (9 checkpoints)"
    assert human.jsonable({1: (math.inf, -math.inf, b"\xff", 1j)}) == {"1": ["Infinity", "-Infinity", "ff", "1j"]}


def test_columns_are_cut_then_left_out() -> None:
    columns = [Column("id"), Column("path", least=6, keep_end=True), Column("none"), Column("extra", spare=True)]
    rows = [["abcdef", "model/layer/weight", "", "12345"], ["b", "x", "", "1"]]
    wide = lay_out(columns, rows, None)
    assert wide.head.plain == "id      path                extra" and wide.left_out == []
    assert wide.rows[1].plain == "b       x                   1"
    assert lay_out(columns, rows, 25).rows[0].plain == "abcdef  …er/weight  12345"
    narrow = lay_out(columns, rows, 16)
    assert narrow.left_out == ["extra"] and narrow.rows[0].plain == "abcdef  …/weight"
    assert lay_out(columns, rows, 3).rows[0].plain == "abcdef  …eight", "what may not be cut stays"
    for width in range(1, 30):
        assert len(cut("日本語のテキスト", width)) <= width and cut("abc", width, True)[-1] in "c…"
