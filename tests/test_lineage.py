"""Going back on purpose, beginning with another run's state, versions of a name, and what changed in between."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import everystep
from everystep.errors import CheckpointRetired, Conflict, Mismatch, NotFound, UsageError


def trainable(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(16, 4)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def bits(model: nn.Module) -> bytes:
    return b"".join(value.detach().numpy().tobytes() for value in model.state_dict().values())


def go(run: everystep.Run, model: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> None:
    for _ in run.steps(total, save_every=2):
        run.record(loss=train(model, optimizer))


def trained(place: Path, name: str = "a", total: int = 8) -> tuple[nn.Module, everystep.Repository]:
    repo = everystep.open(str(place))
    model, optimizer = trainable()
    with repo.run(name).track(model=model, optimizer=optimizer) as run:
        go(run, model, optimizer, total)
    return model, repo


# rewind --------------------------------------------------------------------------------------------------------------


def test_back_and_forth_again_comes_to_the_same_bits(tmp_path: Path) -> None:
    """The random states come back, too: the second way from step 4 on is the first one."""
    first, repo = trained(tmp_path)
    model, optimizer = trainable(seed=9)
    with repo.run("a").track(model=model, optimizer=optimizer) as run:
        assert run.rewind(4) == 4
        assert run.latest is not None and run.latest.step == 4
        go(run, model, optimizer, 8)
    assert bits(model) == bits(first)
    past = repo["a"]
    assert [c.step for c in past.checkpoints()] == [2, 4, 6, 8]
    assert [c.step for c in past.checkpoints(all=True)] == [2, 4, 6, 8, 6, 8]
    old, new = (c for c in past.checkpoints(all=True) if c.step == 8)
    assert (
        past.latest == new
        and old.load(only="model")["0.weight"].tobytes() == new.load(only="model")["0.weight"].tobytes()
    )
    assert repo.check().ok


def test_a_rewound_run_is_still_rewound_in_the_next_process(tmp_path: Path) -> None:
    _, repo = trained(tmp_path)
    with repo.run("a") as run:
        assert run.rewind("2") == 2
    assert everystep.open(str(tmp_path))["a"].latest.step == 2  # type: ignore[union-attr]
    model, optimizer = trainable(seed=3)
    with repo.run("a").track(model=model, optimizer=optimizer) as run:
        assert run.resume() == 2


def test_rewind_to_a_tag_the_best_or_a_checkpoint(tmp_path: Path) -> None:
    _, repo = trained(tmp_path)
    repo["a"].at(6).tag("good")
    for c, loss in zip(repo["a"].checkpoints(), (3.0, 1.0, 2.0, 4.0)):
        c.record(val_loss=loss)
    for to, step in (("good", 6), ("best:val_loss", 4), ("best", 4), (repo["a"].at(2), 2)):
        with repo.run("a") as run:
            assert run.rewind(to) == step


def test_nothing_changes_where_one_cannot_go_back(tmp_path: Path) -> None:
    _, repo = trained(tmp_path)
    trained(tmp_path, "other", 4)
    repo["a"].forget(keep_full=everystep.last(1))
    slots = repo["a"]._history().slots
    with pytest.raises(CheckpointRetired, match="optimizer state has been dropped"), repo.run("a") as run:
        run.rewind(4)
    with pytest.raises(NotFound, match="nearest: 8"), repo.run("a") as run:
        run.rewind(9)
    with pytest.raises(NotFound, match="not a checkpoint of this run"), repo.run("a") as run:
        run.rewind(repo["other"].at(2))
    model = nn.Linear(3, 3)
    with pytest.raises(Mismatch), repo.run("a").track(model=model) as run:
        run.rewind(8)
    history = repo["a"]._history()
    assert repo["a"].latest.step == 8 and history.slots == slots + 8  # type: ignore[union-attr]  open and close, each


def test_side_lines_hold_their_deltas(tmp_path: Path) -> None:
    """Dropping the line that was left, or the one that goes on, harms neither."""
    rng = np.random.default_rng(0)
    state = {"params": rng.normal(size=300_000).astype(np.float32)}
    repo = everystep.open(str(tmp_path))
    kept: dict[str, bytes] = {}

    def save(run: everystep.Run, step: int) -> None:
        state["params"] = state["params"] + rng.normal(size=300_000).astype(np.float32) * np.float32(1e-4)
        kept[run.save(step, state=state).wait().id] = state["params"].tobytes()

    with repo.run("a") as run:
        for step in range(1, 5):
            save(run, step)
        run.rewind(2)
        for step in range(3, 6):
            save(run, step)
    repo["a"].forget(keep=everystep.last(2), force=True)
    repo["a"].prune(now=True)
    assert [c.step for c in repo["a"].checkpoints(all=True)] == [4, 5]
    for checkpoint in repo["a"].checkpoints(all=True):
        assert checkpoint.load()["params"].tobytes() == kept[checkpoint.id]


# start_from ----------------------------------------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    first, repo = trained(tmp_path)
    repo["a"].at(8).record(val_loss=0.25)
    model, optimizer = trainable(seed=5)
    with repo.run("b").track(model=model, optimizer=optimizer) as run:
        report = run.start_from("a@best", only="model")
        assert report is not None and set(report.loaded) == {f"model/{name}" for name in first.state_dict()}
        assert bits(model) == bits(first) and not optimizer.state_dict()["state"]
        go(run, model, optimizer, 4)
    origin = repo["a"].at(8)
    assert repo["b"].origins == [{"run": "a", "id": origin.id, "step": 8, "only": ["model"]}]
    assert [c.step for c in repo["b"].checkpoints()] == [2, 4] and repo["b"].at(2).parent is None

    after = bits(model)
    model, optimizer = trainable(seed=6)
    with repo.run("b").track(model=model, optimizer=optimizer) as run:
        assert run.start_from("a@best", only="model") is None, "a restart goes on from its own checkpoint"
        assert run.resume() == 4
    assert bits(model) == after and len(repo["b"].origins) == 1


def test_from_another_repository_with_all(tmp_path: Path) -> None:
    first, one = trained(tmp_path / "one")
    two = everystep.open(str(tmp_path / "two"))
    model, optimizer = trainable(seed=5)
    with two.run("b").track(model=model, optimizer=optimizer) as run:
        run.start_from(one["a"].at(8))
        run.save(0)
    assert bits(model) == bits(first) and optimizer.state_dict()["state"]
    assert two["b"].origins[0]["only"] == []


@pytest.mark.parametrize(
    ("source", "only", "error", "part"),
    [
        ("b@8", None, NotFound, "runs here: a"),
        ("a@9", None, NotFound, "nearest: 8"),
        ("a", None, UsageError, "other@best"),
        ("a@", None, UsageError, "other@best"),
        (7, None, UsageError, "other@best"),
        ("a@8", "modle", UsageError, "tracked: model, optimizer"),
    ],
)
def test_what_cannot_be_begun_with(tmp_path: Path, source: Any, only: str | None, error: type, part: str) -> None:
    _, repo = trained(tmp_path)
    model, optimizer = trainable(seed=5)
    before = bits(model)
    run = repo.run("c").track(model=model, optimizer=optimizer)
    with pytest.raises(error) as caught:
        run.start_from(source, only=only)
    assert part in str(caught.value) and bits(model) == before
    with pytest.raises(UsageError, match="track"):
        repo.run("d").start_from("a@8")
    assert repo.runs() == ["a"]


# names ---------------------------------------------------------------------------------------------------------------


def test_versions_count_up_and_are_never_reused(tmp_path: Path) -> None:
    _, repo = trained(tmp_path)
    past = repo["a"]
    assert past.at(2).tag_version("best_model") == "best_model_v1"
    assert past.at(2).tag_version("best_model") == "best_model_v1", "it is that already"
    assert past.at(4).tag_version("best_model") == "best_model_v2"
    assert past.at(2).tag_version("best_model") == "best_model_v3"
    assert past.tagged("best_model").step == 2 and past.find("best_model").step == 2
    past.untag("best_model_v3")
    assert past.tagged("best_model").step == 4
    assert past.at(6).tag_version("best_model") == "best_model_v4"
    assert {n: c.step for n, c in past.versions("best_model").items()} == {1: 2, 2: 4, 4: 6}
    past.at(8).tag("best_model_v12")
    assert past.at(8).tag_version("best_model") == "best_model_v12"
    assert past.at(2).tag_version("best.model") == "best.model_v1"
    with pytest.raises(UsageError):
        past.at(2).tag_version("7")
    with pytest.raises(Conflict):
        past.at(2).tag("best_model_v12")


def test_notes_of_a_checkpoint_and_of_a_run(tmp_path: Path) -> None:
    _, repo = trained(tmp_path)
    repo["a"].at(4).note("the loss jumps here").note("lower the rate")
    repo["a"].note("of the run")
    assert repo["a"].at(4).notes == ["the loss jumps here", "lower the rate"] and repo["a"].at(2).notes == []
    assert repo["a"].notes == ["of the run"]


# questions -----------------------------------------------------------------------------------------------------------


def asked(tmp_path: Path) -> everystep.PastRun:
    with everystep.open(str(tmp_path)).run("a") as run:
        for step, loss in enumerate((0.5, 0.2, math.nan, 0.3, 0.2), 1):
            run.save(100 * step, state={"x": np.arange(step)}, metrics={"val_loss": loss, "lr": step}).wait()
    return everystep.open(str(tmp_path))["a"]


def test_queries_follow_the_log(tmp_path: Path) -> None:
    past = asked(tmp_path)

    def steps(text: str) -> list[int]:
        return [c.step for c in past.query(text)]

    assert steps("val_loss < 0.3 and step > 200") == [500]
    assert steps("val_loss <= 0.3") == [200, 400, 500]
    past.at(300).record(val_loss=0.1)
    assert steps("val_loss <= 0.2") == [200, 300, 500]
    past.at(300).tag("good")
    assert steps('tag == "good" or lr == 1') == [100, 300]
    past.forget(keep=everystep.last(3), force=True)
    assert steps("val_loss <= 0.2") == [300, 500]
    past.undo()
    assert steps("val_loss <= 0.2") == [200, 300, 500]
    assert [c.step for c in past.ranking("val_loss")] == [300, 200, 500, 400, 100]
    assert [c.step for c in past.ranking("lr", "max", limit=2)] == [500, 400]
    with pytest.raises(UsageError, match="val_loss"):
        past.query("val_los < 1")
    with pytest.raises(NotFound, match="nearest: val_loss"):
        past.ranking("val_los", "min")


def test_a_query_sees_the_current_line_or_all(tmp_path: Path) -> None:
    past = asked(tmp_path)
    with everystep.open(str(tmp_path)).run("a") as run:
        run.rewind(200)
        run.save(300, state={"x": np.arange(9)}, metrics={"val_loss": 0.4, "lr": 3}).wait()
    assert [c.step for c in past.query("lr >= 2")] == [200, 300]
    assert [c.step for c in past.query("lr >= 2", all=True)] == [200, 300, 300, 400, 500]


@pytest.mark.parametrize("harm", ["lost", "garbage", "folder", "lies", "less", "another"])
def test_the_catalog_may_be_lost_broken_or_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    """What it answers is checked against the log: it is made anew, or done without."""
    import sqlite3

    cache = tmp_path / "cache"
    monkeypatch.setenv("EVERYSTEP_CACHE", str(cache))
    past = asked(tmp_path / "runs")
    assert [c.step for c in past.query("val_loss < 0.3")] == [200, 500]
    (file,) = cache.glob("*.sqlite")
    if harm in ("lies", "less", "another"):
        with sqlite3.connect(file) as db:
            db.execute(
                {
                    "lies": "UPDATE metrics SET value = 0.1 WHERE name = 'val_loss'",
                    "less": "DELETE FROM checkpoints WHERE step = 200",
                    "another": "UPDATE runs SET slots = 3, head = 'of another log'",
                }[harm]
            )
        db.close()
    else:
        for path in cache.iterdir():
            path.unlink()
        if harm == "garbage":
            file.write_bytes(b"not a database at all" * 500)
        elif harm == "folder":
            file.mkdir()
    again = everystep.open(str(tmp_path / "runs"))["a"]
    assert [c.step for c in again.query("val_loss < 0.3")] == [200, 500]


def test_no_cache_folder_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EVERYSTEP_CACHE", str(tmp_path / "file" / "cache"))
    assert [c.step for c in asked(tmp_path / "runs").query("val_loss < 0.3")] == [200, 500]


def test_all_runs_are_asked_at_once(tmp_path: Path) -> None:
    asked(tmp_path)
    repo = everystep.open(str(tmp_path))
    with repo.run("b") as run:
        run.save(7, state={"x": np.arange(2)}, metrics={"val_loss": 0.01})
    with repo.run("no metrics") as run:
        run.save(1, state={"x": np.arange(2)})
    assert [(c.run, c.step) for c in repo.query("val_loss < 0.3")] == [("a", 200), ("a", 500), ("b", 7)]
    with pytest.raises(UsageError, match="val_loss"):
        repo.query("val_los < 1")


# what changed --------------------------------------------------------------------------------------------------------


def test_diff_of_two_checkpoints(tmp_path: Path) -> None:
    _, repo = trained(tmp_path)
    one, two = repo["a"].at(2), repo["a"].at(4)
    found = one.diff(two)
    by_path = {leaf.path: leaf for leaf in found.leaves}
    before, after = one.load(), two.load()
    weight = by_path["model/0.weight"]
    a, b = before["model"]["0.weight"], after["model"]["0.weight"]
    assert weight.kind == "changed" and weight.changed == (a != b).mean()
    assert weight.distance == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5)
    assert weight.largest == pytest.approx(np.abs(b - a).max(), rel=1e-6)
    assert "loop/step" in {value.path for value in found.values}
    assert found.config == [] and found.environment == [] and not found.same
    assert one.diff(repo["a"].at(2)).same
    part = one.diff(two, only="model/0.bias")
    assert [leaf.path for leaf in part.leaves] == ["model/0.bias"] and part.values == []
    with pytest.raises(NotFound):
        one.diff(two, only="modle")


def test_diff_reads_only_what_may_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frozen, moving = rng.normal(size=600_000), rng.normal(size=300_000)
    repo = everystep.open(str(tmp_path))
    with repo.run("a", config={"lr": 0.1}) as run:
        run.save(1, state={"frozen": frozen, "moving": moving, "name": "x", "gone": frozen[:5]}).wait()
        run.config["lr"] = 0.2
        run.save(2, state={"frozen": frozen, "moving": moving + 1, "name": "y", "new": frozen[:9]}).wait()
    read: list[int] = []
    found = repo["a"].at(1).diff(repo["a"].at(2), progress=read.append)
    kinds = {leaf.path: leaf.kind for leaf in found.leaves if not leaf.path.startswith("rng/")}
    assert kinds == {"frozen": "same", "moving": "changed", "gone": "removed", "new": "added"}
    assert [(v.path, v.before, v.after) for v in found.values] == [("name", "x", "y")]
    assert sum(read) < 2 * moving.nbytes + 1000
    with repo.run("b", config={"lr": 0.3}) as run:
        run.save(1, state={"frozen": frozen, "moving": moving.astype(np.float32)}).wait()
    other = repo["a"].at(1).diff(repo["b"].at(1))
    kinds = {leaf.path: leaf.kind for leaf in other.leaves if not leaf.path.startswith("rng/")}
    assert kinds == {"frozen": "same", "moving": "reshaped", "gone": "removed"}
    assert [(v.path, v.before, v.after) for v in other.config] == [("lr", 0.2, 0.3)]


def test_an_explicit_state_is_spoken_of_by_its_own_paths(tmp_path: Path) -> None:
    """Nobody who saved `state=` knows of the section that it lies in."""
    model = nn.Linear(2, 3)
    saved = {"model": {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}}
    repo = everystep.open(str(tmp_path))
    with repo.run("a") as run:
        run.save(1, state=saved).wait()
    past = repo["a"].at(1)
    for attempt in (
        lambda: past.load(only="modle"),
        lambda: past.diff(past, only="modle"),
        lambda: past.summarize(only="modle"),
        lambda: past.export(str(tmp_path / "x.npz"), only="modle"),
    ):
        with pytest.raises(NotFound) as caught:
            attempt()
        assert "'modle'" in caught.value.what and "nearest: model" in caught.value.do
    other = nn.Linear(2, 3)
    report = past.load(into={"model": other})
    assert bits(other) == bits(model) and sorted(report.loaded) == ["model/bias", "model/weight"]
    third = nn.Linear(2, 3)
    with repo.run("b").track(model=third) as run:
        run.start_from("a@1")
    assert bits(third) == bits(model)


def test_a_run_that_is_held_is_seen_as_it_was(tmp_path: Path) -> None:
    past = asked(tmp_path)
    other = everystep.open(str(tmp_path))["a"]
    with past.holding():
        seen = past.at(200)
        other.at(200).record(val_loss=9.0).tag("new")
        assert seen.metrics["val_loss"] == 0.2 and past.tags == {} and past.at(200).tags == []
    assert seen.metrics["val_loss"] == 9.0 and seen.tags == ["new"]
