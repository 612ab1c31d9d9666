"""fsck that reads a part of the data, and goes on behind what cannot be read or has been dropped meanwhile."""

from __future__ import annotations

import errno
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import call, hurt, json_of, lines_of, record_of, slot_of

import everystep
from everystep.cli import typed
from everystep.seam import Files, Seam

SMALL: dict[str, Any] = {"chunk_bytes_max": 4096, "small_leaf_bytes": 1024}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Six checkpoints of about 30 chunks each, none shared."""
    rng = np.random.default_rng(0)
    repo = everystep.open(str(tmp_path / "repository"), settings=everystep.Settings(**SMALL))
    with repo.run("a") as run:
        for step in range(1, 7):
            run.save(step, state={"w": rng.standard_normal(30_000).astype("f4")}).wait()
    with repo.run("b") as run:
        run.save(1, state={"w": np.ones(3)}).wait()
    return tmp_path / "repository"


# a part of the data ----------------------------------------------------------------------------------------------


def test_a_share_of_the_chunks_is_read(place: Path) -> None:
    whole = json_of(place, "fsck")
    assert whole["bytes_read"] == whole["bytes_there"] > 6 * 120_000 and whole["read"] == 1.0
    tenth = json_of(place, "fsck", "--read", "1/10")
    assert tenth["ok"] is True and tenth["read"] == 0.1 and tenth["bytes_there"] == whole["bytes_there"]
    assert 0.01 < tenth["bytes_read"] / tenth["bytes_there"] < 0.3
    assert len(tenth["checkpoints"]) == 7 and tenth["records"] == whole["records"]
    none = json_of(place, "fsck", "--no-data")
    assert (none["bytes_read"], none["bytes_there"], none["read"]) == (0, None, 0.0)
    (last,) = [row for row in lines_of(place, "fsck", "--read", "20%") if "of data" in row]
    assert last.endswith(": all that was read is whole") and " of 7" in last


def test_other_chunks_are_drawn_each_time(place: Path) -> None:
    read = {everystep.open(str(place)).check(read=Fraction(1, 3)).bytes_read for _ in range(6)}
    assert len(read) > 1
    assert everystep.open(str(place)).check(read=1.0).bytes_read == everystep.open(str(place)).check().bytes_there


def test_what_is_hurt_is_found_sooner_or_later(place: Path) -> None:
    id = hurt(place, "a", 4)
    codes = [call(place, "fsck", "a", "--read", "1/2").exit_code for _ in range(20)]
    assert set(codes) == {0, 4}, "a half of the chunks may hold it, or not"
    findings = json_of(place, "fsck", "--read", "1", code=4)["findings"]
    assert {finding["id"] for finding in findings} == {id}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("1/10", Fraction(1, 10)),
        ("10%", Fraction(1, 10)),
        ("0.1", Fraction(1, 10)),
        ("2.5%", Fraction(1, 40)),
        ("1", 1),
    ],
)
def test_a_share_as_people_type_it(text: str, share: Fraction) -> None:
    assert typed.share(text, "--read") == share


@pytest.mark.parametrize("text", ["0", "2", "-1/2", "1/0", "a tenth", "", "%", "nan", "inf", "101%"])
def test_what_is_no_share(place: Path, text: str) -> None:
    found = call(place, "fsck", f"--read={text}")
    assert found.exit_code == 2 and found.stderr.splitlines()[-1] == "  do:    --read 1/10, --read 10% or --read 0.1"
    with pytest.raises(everystep.UsageError):
        everystep.open(str(place)).check(read=float("nan"))
    assert call(place, "fsck", "--read", "1/2", "--no-data").exit_code == 2
    assert "the run is a" in call(place, "fsck", "a@3").stderr


# what cannot be read ---------------------------------------------------------------------------------------------


class Unreadable(Files):
    """Files with a part of their names in them fail with an error of the disk."""

    def __init__(self, *parts: str) -> None:
        self.parts, self.bad = parts, set[int]()

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        if fd in self.bad:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(fd, into, offset)

    def open_read(self, path: str) -> int:
        fd = super().open_read(path)
        (self.bad.add if any(part in path for part in self.parts) else self.bad.discard)(fd)
        return fd


def checked(place: Path, *parts: str) -> Any:
    return everystep.open(str(place), seam=Seam(Unreadable(*parts))).check()


def test_a_record_that_cannot_be_read_is_a_finding(place: Path) -> None:
    slot = slot_of(place, "a", 3)
    where = str(record_of(place, "a", slot))
    report = checked(place, where)
    assert [(finding.run, finding.where) for finding in report.findings] == [("a", where)]
    assert "Input/output error" in report.findings[0].what
    assert [(one.run, one.step) for one in report.checked] == [*(("a", step) for step in (1, 2, 4, 5, 6)), ("b", 1)]
    assert all(one.whole for one in report.checked)


def test_a_pack_that_cannot_be_read_is_a_finding_of_its_checkpoints(place: Path) -> None:
    newest = max((place / "runs/a/packs").glob("*/*"), key=lambda path: int(path.name))
    report = checked(place, str(newest))
    (finding,) = report.findings
    assert "Input/output error" in finding.what and finding.where == str(newest)
    assert [one.step for one in report.checked if not one.whole] == [6] and len(report.checked) == 7


def test_a_log_that_cannot_be_listed_is_a_finding(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Files.names

    def refuse(self: Files, path: str) -> Any:
        if path.endswith("runs/a/log"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return names(self, path)

    monkeypatch.setattr(Files, "names", refuse)
    found = call(place, "fsck")
    assert found.exit_code == 4 and "a: cannot read this: Permission denied" in found.stdout
    assert [row.split()[:2] for row in found.stdout.splitlines()[1:3]] == [["a", "damaged"], ["b", "whole"]]


# what goes while it is looked at ---------------------------------------------------------------------------------


def test_a_checkpoint_that_is_dropped_meanwhile_is_no_finding(place: Path) -> None:
    past = everystep.open(str(place))["a"]
    seen: list[int] = []

    def drop(run: str, done: int, total: int) -> None:
        if run == "a" and not seen:
            past.forget(everystep.last(2), force=True)
            past.prune(now=True)
        seen.append(done)

    report = everystep.open(str(place)).check(progress=drop)
    assert report.ok, report.findings
    assert [(one.run, one.step) for one in report.checked] == [("a", 1), ("a", 5), ("a", 6), ("b", 1)]


def test_a_checkpoint_that_is_thinned_meanwhile_is_looked_at_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    repo = everystep.open(str(tmp_path), settings=everystep.Settings(**SMALL))
    with repo.run("a") as run:
        for step in range(1, 5):
            model, moments = rng.standard_normal((2, 5000)).astype("f4")
            run.save(step, state={"model": {"w": model}, "optimizer": {"m": moments}}).wait()
    past = repo["a"]

    def thin(run: str, done: int, total: int) -> None:
        if done == 1:
            past.forget(None, everystep.last(1))
            past.prune(now=True)

    report = repo.check(progress=thin)
    assert report.ok and [one.step for one in report.checked] == [1, 2, 3, 4], report.findings
