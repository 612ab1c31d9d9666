"""The door as DESIGN.md shows it: a training as it is written, then every call on what it kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from _train import Numbers, new_repository, one_thread, picture, scramble
from torch import nn
from torch.utils.data import DataLoader

import everystep
from everystep import (
    Checkpoint,
    Conflict,
    EverystepWarning,
    Mismatch,
    NotFound,
    Repository,
    Run,
    Unsupported,
    UsageError,
)
from everystep.storage import MemoryStorage

__all__ = ["one_thread"]


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.2))
        self.fc = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x)).squeeze(-1)


class Trainer:
    """What a program has besides everystep."""

    def __init__(self, width: int = 8) -> None:
        scramble(1)
        self.model = Net(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 40, 0.5)

    def train_step(self) -> torch.Tensor:
        self.model.train()
        x = torch.randn(16, 3)
        self.optimizer.zero_grad()
        loss = (self.model(x) - x.sum(-1)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def validate(self) -> float:
        self.model.eval()
        x = torch.linspace(-1, 1, 60).reshape(20, 3)
        with torch.no_grad():
            return float((self.model(x) - x.sum(-1)).square().mean())

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def picture(self) -> Any:
        return picture({name: part.state_dict() for name, part in self.parts.items()})


@pytest.fixture(scope="module")
def kept() -> Iterator[tuple[Repository, Trainer]]:
    """A finished run, as the example in DESIGN.md makes it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    repo, trainer = new_repository(), Trainer()
    model, optimizer, scheduler = trainer.model, trainer.optimizer, trainer.scheduler
    train_step, validate = trainer.train_step, trainer.validate

    run = repo.run("resnet")
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)

    for step in run.steps(100, save_every=10):
        loss = train_step()
        run.record(loss=loss)
        if step % 25 == 0:
            run.record(val_loss=validate())
    run.close()
    torch.set_num_threads(threads)
    yield repo, trainer


@pytest.fixture
def past(kept: tuple[Repository, Trainer]) -> everystep.PastRun:
    return kept[0]["resnet"]


# ------------------------------------------------------------------------------------------------- the example


def test_the_example(kept: tuple[Repository, Trainer], past: everystep.PastRun) -> None:
    assert [c.step for c in past.checkpoints()] == list(range(10, 101, 10))
    assert past.latest is not None and past.latest.step == 100
    assert [c.reason for c in past.checkpoints()] == ["every 10 steps"] * 9 + ["the last step"]
    assert [step for step, _ in past.series("loss")] == list(range(1, 101))
    assert [step for step, _ in past.series("val_loss")] == [25, 50, 75, 100]
    assert past.at(50).metrics.keys() == {"loss", "val_loss"} and past.at(40).metrics.keys() == {"loss"}
    # Step 25 was no checkpoint: a metric of it is none of step 30.
    assert past.best("val_loss", mode="min").step in (50, 100)
    assert past.best("val_loss").metrics["val_loss"] == min(dict(past.series("val_loss"))[n] for n in (50, 100))
    trainer = Trainer()
    report = past.latest.load(into=trainer.parts)
    assert report.exact and report.complete, report
    assert trainer.picture() == kept[1].picture()


def test_it_goes_on_where_it_was() -> None:
    repo, trainer = new_repository(), Trainer()
    for until in (3, 7):
        with repo.run("resnet").track(**trainer.parts) as run:
            for step in run.steps(20, save_every=1):
                trainer.train_step()
                if step == until:
                    break
        trainer = Trainer()
    with repo.run("resnet").track(**trainer.parts) as run:
        loop = run.steps(20, save_every=1)
        assert (next(loop), len(loop)) == (7, 13)
        assert run.report is not None and run.report.exact


def test_by_hand() -> None:
    repo, trainer = new_repository(), Trainer()
    run = repo.run("resnet").track(**trainer.parts)
    step = run.resume()
    assert step == 0 and run.report is None and run.latest is None
    for step in range(1, 4):
        run.record(loss=trainer.train_step())
        saved = run.save(step, metrics={"val_loss": 0.5 / step})
    checkpoint = saved.wait()
    assert isinstance(checkpoint, Checkpoint) and saved.done and not saved.skipped
    assert (checkpoint.step, checkpoint.reason) == (3, "by hand")
    assert checkpoint.metrics.keys() == {"loss", "val_loss"} and checkpoint == run.latest
    assert run.resume() == 3
    run.close()
    again = Trainer()
    with repo.run("resnet").track(**again.parts) as run:
        assert run.resume() == 3
        assert again.picture() == trainer.picture()
        state = {"params": {"w": np.arange(4.0)}, "opt_state": [np.zeros(4), 7], "note": "as it is"}
        run.save(4, state=state)
    latest = repo["resnet"].latest
    assert latest is not None
    loaded = latest.load()["state"]
    assert picture(loaded) == picture(state)
    roles = {leaf.path: leaf.role for leaf in latest.leaves()}
    assert (roles["state/params/w"], roles["state/opt_state/[0]"]) == ("weights", "optimizer")


def test_batches_of_an_ordinary_loader() -> None:
    repo, trainer = new_repository(), Trainer()
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True)
    with repo.run("resnet").track(**trainer.parts) as run:
        for batch in run.batches(loader, epochs=2, save_every=1):
            assert batch.shape[1] == 3
            trainer.train_step()
    assert [c.step for c in repo["resnet"].checkpoints()] == [6, 12]


# ------------------------------------------------------------------------------------------------- reading


def test_arrays_and_tensors(past: everystep.PastRun, kept: tuple[Repository, Trainer]) -> None:
    checkpoint, model = past.at(100), kept[1].model
    state = checkpoint.load()
    assert state.keys() == {"model", "optimizer", "scheduler", "rng"}
    assert all(type(value) is np.ndarray for value in state["model"].values())
    tensors = checkpoint.load(like="torch")["model"]
    for name, value in model.state_dict().items():
        assert type(tensors[name]) is torch.Tensor and torch.equal(tensors[name], value)
        assert state["model"][name].tobytes() == value.numpy().tobytes()
    assert type(checkpoint.load(only="model/fc.weight", like="saved")) is torch.Tensor
    with pytest.raises(UsageError, match="like='keras'"):
        checkpoint.load(like="keras")
    assert checkpoint.verify() == sum(leaf.nbytes for leaf in checkpoint.leaves())


def test_parts_of_a_state(past: everystep.PastRun) -> None:
    checkpoint = past.at(100)
    whole = checkpoint.load()
    for path in ("model", "optimizer/groups/[0]", "model/fc.weight", "rng"):
        value = whole
        for part in path.split("/"):
            value = value[0 if part == "[0]" else part]
        assert picture(checkpoint.load(only=path)) == picture(value)
    several = checkpoint.load(only=["model/fc.bias", "scheduler"])
    assert several.keys() == {"model/fc.bias", "scheduler"}
    with pytest.raises(NotFound, match=r"nearest: model/fc\.weight"):
        checkpoint.load(only="model/fc.weigth")


class Counting(MemoryStorage):
    """Notes which bytes are read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[str, int]] = []

    def get(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        data = super().get(key, start, stop)
        self.read.append((key, len(data)))
        return data


def test_one_leaf_reads_its_own_chunks_alone() -> None:
    storage = Counting()
    repo = new_repository(storage=storage)
    rng = np.random.default_rng(1)
    state = {f"layer{n}": rng.random(3 << 19) for n in range(6)}  # 12 MiB each, which is three chunks
    with repo.run("r") as run:
        run.save(1, state=state)
    checkpoint = repo["r"].at(1)
    checkpoint.leaves()
    storage.read.clear()
    assert checkpoint.load(only="layer4").tobytes() == state["layer4"].tobytes()
    packs = [nbytes for key, nbytes in storage.read if "/packs/" in key]
    assert 0.5 * 12 * 2**20 < sum(packs) <= 12 * 2**20, "not the stored bytes of one leaf"
    storage.read.clear()
    assert checkpoint.load(only="layer1").tobytes() == state["layer1"].tobytes()
    whole = sum(nbytes for _, nbytes in storage.read)
    checkpoint.verify()
    assert sum(nbytes for _, nbytes in storage.read) - whole > 5 * whole


def test_progress_is_told(past: everystep.PastRun) -> None:
    told: list[int] = []
    past.at(100).load(progress=told.append)
    assert sum(told) >= sum(leaf.nbytes for leaf in past.at(100).leaves())


def test_another_shape_is_reported_or_refused(past: everystep.PastRun, kept: tuple[Repository, Trainer]) -> None:
    other = Trainer(width=9)
    before = other.picture()
    with pytest.raises(Mismatch, match="nothing was changed") as caught:
        past.at(100).load(into=other.parts)
    assert "model/fc.weight" in str(caught.value) and "resnet@100" in str(caught.value)
    assert other.picture() == before
    report = past.at(100).load(into={"model": other.model}, strict=False)
    assert "model/fc.weight" in report.reshaped and "model/body.0.weight" in report.reshaped
    assert set(report.loaded) == {"model/fc.bias", "model/body.1.num_batches_tracked"}
    assert report.missing == report.unexpected == [] and not report.complete and not report.exact
    assert torch.equal(other.model.fc.bias, kept[1].model.fc.bias)

    class Deeper(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1)
            del self.body[1]

    report = past.at(100).load(into={"model": Deeper(), "ema": nn.Linear(1, 1)}, strict=False)
    assert report.missing == ["ema", "model/head.weight", "model/head.bias"]
    assert "model/body.1.running_mean" in report.unexpected
    with pytest.raises(UsageError, match="leave only= out"):
        past.at(100).load(into={"model": Deeper()}, only="model")


def test_what_a_checkpoint_says_of_itself(past: everystep.PastRun) -> None:
    first, second = past.checkpoints()[:2]
    assert second.parent == first.id and first.parent is None and first != second
    assert len({c.id for c in past.checkpoints()}) == 10 == len(set(past.checkpoints()))
    assert first.environment["packages"]["torch"] == torch.__version__
    assert f"resnet@{first.step}" in repr(first) and first.time <= second.time
    assert (first.term, first.ranks) == (1, 1)
    cost = first.cost
    assert cost["raw_bytes"] == first.verify()
    assert cost["stored_bytes"] > 0 and all(value >= 0 for value in cost.values())
    assert 0 < cost["stall_seconds"] < 60 and 0 < cost["encode_seconds"] < 60


def test_what_is_not_there(kept: tuple[Repository, Trainer], past: everystep.PastRun) -> None:
    repo = kept[0]
    with pytest.raises(NotFound, match="resnet") as caught:
        repo["resnt"]
    assert "runs here: resnet" in str(caught.value) and caught.value.exit_code == 3
    with pytest.raises(NotFound, match="no repository here yet"):
        new_repository()["resnet"]
    with pytest.raises(NotFound, match="nearest: 20, 30, 10"):
        past.at(21)
    with pytest.raises(NotFound, match="nearest: val_loss"):
        past.best("val_los", mode="min")
    with pytest.raises(NotFound, match="no tag 'best'"):
        past.tagged("best")
    with pytest.raises(NotFound, match="no attachment"):
        past.attachment("vocab")
    assert "resnet" in repo and "resnt" not in repo and list(repo) == repo.runs() == ["resnet"]
    empty = new_repository().run("r")
    assert empty.latest is None and empty.checkpoints() == [] and empty.config == {}
    with pytest.raises(NotFound, match="no checkpoint yet"):
        empty.find("latest")


# ------------------------------------------------------------------- tags, metrics, notes, configuration, attachments


def filled(metrics: Iterable[dict[str, Any]] = ({},) * 4) -> tuple[Repository, Run]:
    """A run that is being written, with a checkpoint for each set of metrics."""
    repo = new_repository()
    run = repo.run("r")
    for step, values in enumerate(metrics, 1):
        run.save(step, state={"w": np.full(3, step)}, metrics=values).wait()
    return repo, run


def test_tags() -> None:
    repo, run = filled()
    past = repo["r"]
    assert past.at(2).tag("good") == past.tagged("good") == past.find("good") == past.at(2)
    past.at(2).tag("good")
    with pytest.raises(Conflict, match="the tag 'good' is on step 2"):
        past.at(3).tag("good")
    past.at(3).tag("good", move=True).tag("better")
    assert past.tagged("good").step == 3 and past.at(3).tags == ["better", "good"] and past.at(2).tags == []
    assert {name: c.step for name, c in run.tags.items()} == {"better": 3, "good": 3}
    run.untag("good")
    with pytest.raises(NotFound, match="nearest: better"):
        past.tagged("beter")
    with pytest.raises(NotFound, match="no tag 'good'"):
        past.untag("good")
    for name in ("", "12", "latest", "best:x", "a@b", "a\nb"):
        with pytest.raises(UsageError, match="cannot be a tag"):
            past.at(1).tag(name)
    run.close()


def test_what_is_written_beside_never_takes_the_run() -> None:
    """Tags, late metrics and notes of another program, and this one goes on writing as if nothing were."""
    repo, run = filled()
    other = Repository(repo._place)["r"]
    other.at(2).tag("good").record(accuracy=0.9)
    other.note("the learning rate was too high")
    other.untag("good")
    checkpoint = run.save(5, state={"w": np.zeros(3)}).wait()
    assert checkpoint.term == 1 and len(run.sessions()) == 1
    assert run.notes == ["the learning rate was too high"] and run.at(2).metrics == {"accuracy": 0.9}
    assert run.best("accuracy").step == 2
    run.close()


def test_specs_of_the_command_line() -> None:
    _, run = filled([{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}])
    run.at(3).tag("good")
    for spec, step in {"latest": 3, "2": 2, "best:loss": 2, "best:loss:max": 1, "good": 3, run.at(1).id[:6]: 1}.items():
        assert run.find(spec).step == step
    for spec in ("7", "bad", "best:accuracy"):
        with pytest.raises(NotFound):
            run.find(spec)
    run.close()


def test_best() -> None:
    nan = math.nan
    _, run = filled(
        [{"loss": nan, "acc": 1}, {"loss": 2.0}, {"loss": 1.0, "acc": 3}, {"loss": nan, "acc": 3}, {"loss": 1.0}]
    )
    assert run.best("loss").step == 3 and run.best("loss", mode="max").step == 2
    assert run.best("acc").step == 3, "of equals the earlier"
    run.at(5).record(loss=0.5, acc=nan, remark="late")
    assert run.best("loss").step == 5 and run.best("acc").step == 3
    run.at(2).record(loss=nan)
    assert run.best("loss", mode="max").step == 3
    run.at(2).record(quality=0.5)
    with pytest.raises(UsageError, match="Its name does not say"):
        run.best("quality")
    assert run.best("quality", mode="max").step == 2
    with pytest.raises(NotFound, match="no checkpoint with a metric 'remark'"):
        run.best("remark", mode="max")
    run.close()


def test_metrics_belong_to_exactly_their_step() -> None:
    repo, trainer = new_repository(), Trainer()
    with repo.run("r").track(model=trainer.model, optimizer=trainer.optimizer) as run:
        loss = torch.tensor(0.0)
        for step in run.steps(6, save_every=2):
            trainer.train_step()
            loss.fill_(step)
            run.record(loss=loss)
            run.record(step=step + 100, ahead=True)
            run.record(double=2 * step)
        run.record(step=4, val_loss=0.25)  # an evaluation that came late
        run.record(step=5, val_loss=0.5)  # of a step that was not saved
    past = repo["r"]
    assert [c.metrics for c in past.checkpoints()] == [
        {"loss": 2.0, "double": 4}, {"loss": 4.0, "double": 8, "val_loss": 0.25}, {"loss": 6.0, "double": 12},
    ]  # fmt: skip
    assert past.series("loss") == [(n, float(n)) for n in range(1, 7)]
    assert past.series("val_loss") == [(4, 0.25), (5, 0.5)] and past.best("val_loss").step == 4
    assert past.series("ahead") == [(n + 100, True) for n in range(1, 7)]


def test_metrics_of_no_step_are_said_to_be_lost() -> None:
    _, run = filled()
    run.record(final=1.0)
    run.attach("report.txt", b"too late")
    run.config["seed"] = 3
    with pytest.warns(EverystepWarning, match="not kept: metric 'final' of no step, attachment 'report.txt'"):
        run.close()
    assert run.config == {"seed": 3}


def test_too_many_metrics_without_a_save_are_said() -> None:
    repo = new_repository(series_steps_max=5)
    run = repo.run("r")
    with pytest.warns(EverystepWarning, match="metrics of more than 5 steps") as said:
        for step in range(1, 11):
            run.record(step=step, loss=float(step))
            run.record(step=step, acc=float(step))
    assert len(said) == 1
    run.save(10, state={"w": 1}).wait()
    assert [step for step, _ in run.series("loss")] == [6, 7, 8, 9, 10]
    run.close()


def test_configuration() -> None:
    repo = new_repository()
    with repo.run("r", config={"lr": 0.1, "betas": (0.9, 0.99), "name": "ü"}) as run:
        assert run.config == {"lr": 0.1, "betas": (0.9, 0.99), "name": "ü"}
        run.config["lr"] = 0.2
        run.config.update(epochs=3)
        config = run.config
        config |= {"warmup": None}
        assert run.config.setdefault("lr", 9) == 0.2 and run.config.setdefault("big", 2**70) == 2**70
        run.save(1, state={"w": 1}).wait()
        run.config["lr"] = 0.3
        for take_out in (lambda c: c.pop("lr"), lambda c: c.clear(), lambda c: c.popitem()):
            with pytest.raises(UsageError, match="only grows"):
                take_out(run.config)
        with pytest.raises(UsageError, match="config 'lr' stays"):
            del run.config["lr"]
        with pytest.raises(Unsupported, match="config layers"):
            run.config["layers"] = [1, 2]
    assert repo["r"].config == {
        "lr": 0.3, "betas": (0.9, 0.99), "name": "ü", "epochs": 3, "warmup": None, "big": 2**70,
    }  # fmt: skip


def test_attachments() -> None:
    repo = new_repository()
    large = np.random.default_rng(1).bytes((9 << 20) + 5)
    with repo.run("r") as run:
        run.attach("tokenizer.json", b"{}").attach("architecture", bytearray(b"")).attach("large", memoryview(large))
        run.save(1, state={"w": 1})
        run.attach("tokenizer.json", b"{1}")
        run.save(2, state={"w": 2})
        with pytest.raises(UsageError, match="not bytes"):
            run.attach("path", "tokenizer.json")  # type: ignore[arg-type]
    past = repo["r"]
    assert past.attachments == ["architecture", "large", "tokenizer.json"]
    assert [past.attachment(name) for name in past.attachments] == [b"", large, b"{1}"]
