"""Lightning: the callback keeps what ModelCheckpoint keeps; a run that goes on is the run that was never stopped."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from _killed import check_resumes_exactly, differing
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

import everystep
from everystep.integrations.lightning import EverystepCheckpoint, EverystepIO

BATCHES, EPOCHS = 8, 4
SCORES = [0.5, 0.3, 0.6, 0.2, 0.4, 0.25]


def test_a_killed_example_goes_on_exactly(tmp_path: Path) -> None:
    rest = check_resumes_exactly("lightning_example.py", "lightning", tmp_path, kill_at=15, epoch=8, last=24)
    assert rest[0].startswith("goes on from everystep://lightning@")


class Noisy(Dataset[Any]):
    """Its samples change with every reading."""

    def __len__(self) -> int:
        return 3 * BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return torch.tensor([float(index), index / 7, noise])


class Model(pl.LightningModule):
    """Dropout, batch statistics, a schedule; its validation draws random numbers, as a shuffled loader does."""

    def __init__(self, schedule: str = "step", scores: list[float] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 1))
        self.schedule, self.scores = schedule, scores

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.net(batch / 10).square().mean()
        self.log("loss", loss, on_step=True)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        torch.rand(3)
        score = self.net(batch / 10).square().mean() if self.scores is None else self.scores[self.current_epoch]
        self.log("val_loss", score)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        gamma = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": gamma, "interval": self.schedule}}


class Stop(Callback):
    """Breaks a training off before a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KeyError("broken off")


def trainer_of(*callbacks: Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0}
    return pl.Trainer(
        callbacks=list(callbacks), accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{**defaults, **options},
    )  # fmt: skip


def loaders(workers: int = 0) -> tuple[Any, Any]:
    train = DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=workers)
    return everystep.ResumableLoader(train), DataLoader(Noisy(), batch_size=6, shuffle=True)


def scramble(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(
    folder: Path, options: dict[str, Any], *, stop: int | None = None, schedule: str = "step", seed: int = 1,
    trainer_options: dict[str, Any] | None = None, more: Callable[[], list[Callback]] = list, workers: int = 0,
) -> tuple[pl.Trainer, Any]:  # fmt: skip
    """A training with the callback, from where the run is; what it came to."""
    scramble(seed)
    with everystep.open(str(folder)).run("r") as run:
        checkpoint = EverystepCheckpoint(run, **options)
        stops = [] if stop is None else [Stop(stop)]
        trainer = trainer_of(checkpoint, *stops, *more(), **(trainer_options or {}))
        model = Model(schedule)
        if stop is None:
            trainer.fit(model, *loaders(workers), ckpt_path=checkpoint.ckpt_path)
        else:
            with pytest.raises(KeyError, match="broken off"):
                trainer.fit(model, *loaders(workers), ckpt_path=checkpoint.ckpt_path)
    optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    end = {
        "model": {name: value.numpy() for name, value in model.state_dict().items()},
        "optimizer": [
            {name: value.numpy() for name, value in one.items()} for one in optimizer.state_dict()["state"].values()
        ],
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if type(v) in (int, float)},
        "at": (trainer.global_step, trainer.current_epoch),
        "random": [random.random(), float(np.random.rand()), float(torch.rand(()))],
    }
    return trainer, end


CASES = [
    ({"every_n_train_steps": 3}, {}, "step"),
    ({"every_n_train_steps": 4}, {}, "epoch"),  # every second one on the last batch, before validation
    ({"every_n_train_steps": 2}, {"val_check_interval": 4}, "step"),
    ({"every_n_epochs": 1}, {}, "plateau"),
    ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {}, "step"),
    ({"monitor": "val_loss", "save_top_k": 1, "save_last": True}, {}, "epoch"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_run_that_was_broken_off_goes_on_exactly(tmp_path: Path, case: int) -> None:
    options, trainer_options, schedule = CASES[case]
    how: dict[str, Any] = {"schedule": schedule, "trainer_options": trainer_options}
    _, whole = train(tmp_path / "whole", options, **how)
    for stop in (9, 13, 16, 20):
        folder = tmp_path / str(stop)
        train(folder, options, stop=stop, **how)
        before = everystep.open(str(folder))["r"].latest
        assert before is not None and 0 < before.step <= stop
        _, end = train(folder, options, seed=99, **how)
        assert differing(whole, end) == [], f"stopped at {stop}, went on from {before.step}"


def test_workers_and_early_stopping_go_on_exactly(tmp_path: Path) -> None:
    how: dict[str, Any] = {"workers": 2, "more": lambda: [EarlyStopping("val_loss", patience=1, min_delta=10.0)]}
    options = {"every_n_train_steps": 3}
    trainer, whole = train(tmp_path / "whole", options, **how)
    assert trainer.current_epoch == 2, "stopped early"
    train(tmp_path / "broken", options, stop=10, **how)
    _, end = train(tmp_path / "broken", options, seed=99, **how)
    assert differing(whole, end) == []


def side_by_side(folder: Path, options: dict[str, Any], **trainer_options: Any) -> tuple[list[int], set[int], Any]:
    """(steps that the run keeps, steps in ModelCheckpoint's files, the callback)."""
    scramble(1)
    with everystep.open(str(folder / "runs")).run("r") as run:
        ours = EverystepCheckpoint(run, **options)
        theirs = ModelCheckpoint(folder / "files", "{step}", **options)
        trainer_of(ours, theirs, max_epochs=len(SCORES), **trainer_options).fit(Model(scores=SCORES), *loaders())
        files = {int(torch.load(file, weights_only=False)["global_step"]) for file in (folder / "files").glob("*.ckpt")}
        return [one.step for one in run.checkpoints()], files, ours


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "val_loss", "save_top_k": 2},
        {"monitor": "val_loss", "save_top_k": 2, "save_last": True},
        {"monitor": "val_loss", "save_top_k": 2, "mode": "max"},
        {"monitor": "val_loss", "save_top_k": 3, "every_n_epochs": 2},
        {"monitor": "loss", "save_top_k": 2, "every_n_train_steps": 5},
        {"monitor": "val_loss", "save_top_k": -1},
        {"save_top_k": 1},
        {"save_top_k": 1, "save_last": True, "every_n_train_steps": 5},
        {"save_top_k": -1, "every_n_train_steps": 7},
        {"save_top_k": 0, "save_last": True},
    ],
    ids=str,
)
def test_the_same_are_kept_as_by_modelcheckpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    kept, files, _ = side_by_side(tmp_path, options)
    assert sorted(files) == kept and kept


def test_top_k_is_kept_over_a_break_and_the_best_is_found(tmp_path: Path) -> None:
    options: dict[str, Any] = {"monitor": "val_loss", "save_top_k": 2, "save_last": True}
    _, files, ours = side_by_side(tmp_path / "whole", options)
    for stop in (2 * BATCHES + 3, 4 * BATCHES + 1):
        scramble(1)
        with everystep.open(str(tmp_path / "broken")).run("r") as run:
            callback = EverystepCheckpoint(run, **options)
            with pytest.raises(KeyError):
                trainer_of(callback, Stop(stop), max_epochs=len(SCORES)).fit(
                    Model(scores=SCORES), *loaders(), ckpt_path=callback.ckpt_path
                )
    with everystep.open(str(tmp_path / "broken")).run("r") as run:
        callback = EverystepCheckpoint(run, **options)
        trainer = trainer_of(callback, max_epochs=len(SCORES))
        trainer.fit(Model(scores=SCORES), *loaders(), ckpt_path=callback.ckpt_path)
        assert {one.step for one in run.checkpoints()} == files
        assert callback.best_model_path == ours.best_model_path == "everystep://r@32"
        assert run.best("val_loss").step == 32 and run.best("val_loss").metrics["val_loss"] == pytest.approx(0.2)
        model = Model()
        trainer.validate(model, DataLoader(Noisy(), batch_size=6), ckpt_path="best", verbose=False)
        best = dict(run.best("val_loss").load(only="state_dict"))
        assert differing(best, {name: value.numpy() for name, value in model.state_dict().items()}) == []


def test_what_a_killed_process_did_not_drop_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_to(epochs: int) -> list[int]:
        with everystep.open(str(tmp_path)).run("r") as run:
            callback = EverystepCheckpoint(run, "val_loss", save_top_k=1)
            trainer_of(callback, max_epochs=epochs).fit(Model(scores=SCORES), *loaders(), ckpt_path=callback.ckpt_path)
            return [one.step for one in run.checkpoints()]

    with monkeypatch.context() as patched:
        patched.setattr("everystep.integrations.lightning.drop", lambda run, ids: None)
        assert train_to(2) == [8, 16]
    assert train_to(3) == [16]


def test_the_plugin_alone_serves_modelcheckpoint(tmp_path: Path) -> None:
    files = tmp_path / "files"
    with everystep.open(str(tmp_path / "runs")).run("r") as run:
        theirs = ModelCheckpoint(files, "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
        trainer = trainer_of(theirs, plugins=[EverystepIO(run)], max_epochs=4)
        trainer.fit(Model(scores=SCORES), *loaders())
        assert not files.exists()
        assert {name: one.step for name, one in run.tags.items()} == {"epoch=1": 16, "epoch=3": 32, "last": 32}
        assert [one.step for one in run.checkpoints()] == [16, 32]
    with everystep.open(str(tmp_path / "runs")).run("r") as run:
        trainer = trainer_of(ModelCheckpoint(files), plugins=[EverystepIO(run)], max_epochs=5)
        trainer.fit(Model(scores=SCORES), *loaders(), ckpt_path=str(files / "last.ckpt"))
        assert trainer.global_step == 40
        with pytest.raises(everystep.NotFound, match="nothing"):
            trainer.validate(Model(scores=SCORES), loaders()[1], ckpt_path=str(files / "nothing.ckpt"))


def test_files_of_before_go_on_in_a_run(tmp_path: Path) -> None:
    scramble(1)
    theirs = ModelCheckpoint(tmp_path / "files", "old")
    trainer_of(theirs, max_epochs=2).fit(Model(scores=SCORES), *loaders())
    with everystep.open(str(tmp_path / "runs")).run("r") as run:
        trainer = trainer_of(EverystepCheckpoint(run), max_epochs=3)
        trainer.fit(Model(scores=SCORES), *loaders(), ckpt_path=str(tmp_path / "files" / "old.ckpt"))
        assert trainer.global_step == 24 and [one.step for one in run.checkpoints()] == [24]


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path)).run("r") as run:
        assert EverystepCheckpoint(run).ckpt_path is None
        trainer = trainer_of(EverystepCheckpoint(run), max_epochs=1)
        with pytest.raises(everystep.UsageError, match="no checkpoint of the run 'r'"):
            trainer.fit(Model(), *loaders(), ckpt_path="everystep://other@latest")
        with pytest.raises(everystep.NotFound, match="no checkpoint of step 7"):
            trainer.fit(Model(), *loaders(), ckpt_path="everystep://r@7")


def test_lightning_does_not_warn_of_a_loader_that_knows_its_place(tmp_path: Path) -> None:
    train(tmp_path, {"every_n_train_steps": 3}, stop=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        train(tmp_path, {"every_n_train_steps": 3})
