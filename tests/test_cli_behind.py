"""`--behind URL` of `log`, `show` and `stats`: what is not in the place behind yet, and how far it lags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _cli import call, json_of, lines_of
from test_front import Two, save, unsaid

import everystep


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, str]:
    """Run a: steps 1 to 4, of which 1 and 2 are behind; run b: step 1, which is; run c, which is not there."""
    near, far = tmp_path / "near", str(tmp_path / "far")
    repo = everystep.open(str(near))
    for name, steps in (("a", (1, 2)), ("b", (1,)), ("a", (3, 4)), ("c", (1,))):
        with repo.run(name).track(rng=False) as run:
            run.resume()
            for step in steps:
                run.save(step, state={"w": np.arange(5000.0) * step}, metrics={"loss": 1 / step}).wait()
        if name == "b":
            repo.push(far)
    return near, far


def test_the_runs_with_their_lag(places: tuple[Path, str]) -> None:
    near, far = places
    document = json_of(near, "log", "--behind", far)
    lags = {about["run"]: about["behind"] for about in document["runs"]}
    assert {name: lag["checkpoints"] for name, lag in lags.items()} == {"a": 2, "b": 0, "c": 1}
    assert {lag["place"] for lag in lags.values()} == {far} and lags["a"]["seconds"] > 0 < lags["a"]["nbytes"]
    text = {line.split()[0]: line for line in lines_of(near, "log", "--behind", far) if line}
    assert "lag" in text["run"] and "2 checkpoints, " in text["a"] and " none " in text["b"]
    assert "lag" not in lines_of(near, "log")[0]


def test_a_run_s_checkpoints_that_are_not_there_yet(places: tuple[Path, str]) -> None:
    near, far = places
    document = json_of(near, "log", "a", "--behind", far)
    assert {one["step"]: one["is_behind"] for one in document["checkpoints"]} == {1: True, 2: True, 3: False, 4: False}
    repo = everystep.open(str(near), behind=far)
    lag = repo["a"].lag
    assert lag is not None and document["behind"]["missing"] == list(lag.missing)
    assert document["behind"]["nbytes"] == lag.nbytes and repo.behind == far
    lines = lines_of(near, "log", "a", "--behind", far)
    assert lines[0].split()[:2] == ["behind", "step"]
    assert [line.split()[2] for line in lines if line.startswith("not yet")] == ["4", "3"]
    assert lines[-1].startswith(f"… not yet in {far}: 2 checkpoints, ")
    assert json_of(near, "log", "--where", "loss < 0.3", "--behind", far)["checkpoints"][0]["is_behind"] is False
    everystep.open(str(near)).push(far)
    lines = lines_of(near, "log", "a", "--behind", far)
    assert lines[-1] == f"… all of it is in {far}" and lines[0].split()[0] == "step"


def test_show_and_stats_say_it(places: tuple[Path, str]) -> None:
    near, far = places
    assert json_of(near, "show", "a@2", "--behind", far)["behind"]["checkpoints"] == 2
    there, missing, run = (lines_of(near, "show", what, "--behind", far) for what in ("a@2", "a@3", "a"))
    assert [line for line in there if line.startswith("behind")] == [f"behind  in {far}"]
    assert [line for line in missing if line.startswith("behind")] == [f"behind  not yet in {far}"]
    assert any(line.split()[:4] == ["behind", "not", "yet", "in"] for line in run)
    stats = json_of(near, "stats", "--behind", far)
    assert [about["behind"]["checkpoints"] for about in stats["runs"]] == [2, 0, 1]
    assert f"… b: all of it is in {far}" in lines_of(near, "stats", "--behind", far)
    assert lines_of(near, "stats", "b", "--behind", far)[-1] == f"… all of it is in {far}"


def test_without_it_nothing_is_said(places: tuple[Path, str]) -> None:
    near, _ = places
    assert json_of(near, "log", "a")["behind"] is None and json_of(near, "show", "a")["behind"] is None
    assert {one["is_behind"] for one in json_of(near, "log", "a")["checkpoints"]} == {None}
    assert [about["behind"] for about in json_of(near, "stats")["runs"]] == [None] * 3
    assert "behind" not in call(near, "log", "a").stdout + call(near, "show", "a@2").stdout
    assert everystep.open(str(near))["a"].lag is None


def test_a_place_that_does_not_answer_is_said_and_the_rest_is_shown(
    places: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = places
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NEVER-TO-BE-SEEN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "NEVER-TO-BE-SEEN")
    asked: list[str] = []

    def no_route(self: object, name: str) -> None:
        asked.append(name)
        raise everystep.StorageError("no route to host", where="far")

    far = "s3://bucket/p?endpoint=http://127.0.0.1:1&region=x"
    monkeypatch.setattr("everystep.front.Behind.vault", no_route)
    document = json_of(near, "log", "a", "--behind", far)
    text, runs = call(near, "log", "a", "--behind", far), call(near, "log", "--behind", far)
    assert document["behind"] == {"place": "s3://bucket/p", "error": "no route to host"}
    assert [one["is_behind"] for one in document["checkpoints"]] == [None] * 4
    assert text.stdout.endswith("… it is not known what is in s3://bucket/p: no route to host\n")
    assert "NEVER" not in text.output + runs.output and runs.stdout.count("no answer") == 3
    assert asked == ["a"] * 3, "whoever does not answer is asked once in a call"


def test_the_same_place_is_refused(places: tuple[Path, str]) -> None:
    near, _ = places
    found = call(near, "stats", "--behind", str(near))
    assert found.exit_code == 2 and "same place" in found.stderr


def test_what_a_run_says_at_its_end_names_the_lag() -> None:
    two = Two(behind_seconds=0.05)
    run = two.run()
    save(run, 1)[0].wait(30, where="remote")
    two.network.cut()
    with unsaid() as said:
        save(run, 2, 3)
        missing = run.lag.missing
        assert [run.at(step).id for step in (2, 3)] == list(missing) and "missing" not in repr(run.lag)
        run.close()
    assert any("not yet in memory://far: 2 checkpoints, " in text for text in said)
