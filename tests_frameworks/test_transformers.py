"""Transformers: the callback saves in the Trainer's place, keeps what it keeps, and goes on exactly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _killed import check_resumes_exactly, differing
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import everystep
from everystep.integrations.transformers import EverystepCallback

BATCHES = 6
SCORES = [0.5, 0.3, 0.6, 0.2, 0.4, 0.25, 0.5, 0.5]


def test_a_killed_example_goes_on_exactly(tmp_path: Path) -> None:
    check_resumes_exactly("transformers_example.py", "transformers", tmp_path, kill_at=15, epoch=8, last=24)
    assert not list(tmp_path.glob("*/trainer-output/checkpoint-*")), "the Trainer wrote none of its own"
    kept = [one.step for one in everystep.open(str(tmp_path / "killed" / "runs"))["transformers"].checkpoints()]
    assert kept == [15, 18, 21, 24], "save_total_limit=4"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found = self.net(x)
        return {"loss": (found - x.mean(1, keepdim=True)).square().mean(), "logits": found}


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([index / 3, index / 7, 1.0]), "labels": torch.tensor([0.0])}


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyError("broken off")


def trainer_of(folder: Path, callbacks: list[Any], *, epochs: int = 4, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    arguments = TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, seed=5, **{**defaults, **options},
    )  # fmt: skip
    scores = iter(())

    def compute_metrics(found: Any) -> dict[str, float]:
        return {"score": next(scores)}

    trainer = Trainer(
        Model(), arguments, train_dataset=Data(), eval_dataset=Data(), callbacks=callbacks,
        compute_metrics=compute_metrics if arguments.eval_strategy != "no" else None,
    )  # fmt: skip
    scores = (SCORES[trainer.state.global_step // 4 - 1] for _ in iter(int, 1))
    return trainer


def train(
    folder: Path, *, stop: int | None = None, seed: int = 1, more: tuple[Any, ...] = (), **options: Any
) -> tuple[Trainer, Any]:
    for one in (random.seed, np.random.seed, torch.manual_seed):
        one(seed)
    with everystep.open(str(folder / "runs")).run("r") as run:
        callback = EverystepCallback(run)
        trainer = trainer_of(folder, [*more, *([] if stop is None else [Stop(stop)]), callback], **options)
        from_folder = callback.resume_from(trainer)
        if stop is None:
            trainer.train(resume_from_checkpoint=from_folder)
        else:
            with pytest.raises(KeyError, match="broken off"):
                trainer.train(resume_from_checkpoint=from_folder)
    assert from_folder is None or not Path(from_folder).exists(), "the folder is gone"
    assert not list(folder.glob("checkpoint-*"))
    states = trainer.optimizer.state_dict()["state"].values()
    end = {
        "model": {name: value.numpy() for name, value in trainer.model.state_dict().items()},
        "optimizer": [{name: value.numpy() for name, value in one.items()} for one in states],
        "scheduler": trainer.lr_scheduler.get_last_lr(),
        "step": trainer.state.global_step,
        "flos": trainer.state.total_flos,
        "random": [random.random(), float(np.random.rand()), float(torch.rand(()))],
    }
    return trainer, end


CASES: list[dict[str, Any]] = [
    {"save_steps": 4},
    {"save_strategy": "epoch"},
    {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 4},
    {"save_steps": 3, "gradient_accumulation_steps": 2, "epochs": 8},
    {"save_steps": 4, "max_steps": 22},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_training_that_was_broken_off_goes_on_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    _, whole = train(tmp_path / "whole", **options)
    for stop in (8, 13, 18):
        folder = tmp_path / str(stop)
        train(folder, stop=stop, **options)
        before = everystep.open(str(folder / "runs"))["r"].latest
        assert before is not None and 0 < before.step < stop
        _, end = train(folder, seed=99, **options)
        assert differing(whole, end) == [], f"stopped at {stop}, went on from {before.step}"


def test_callbacks_with_state_go_on(tmp_path: Path) -> None:
    """The patience that is used up is part of the checkpoint."""
    options: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "score",
        "greater_is_better": False, "epochs": 6, "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip

    def patience() -> tuple[Any, ...]:
        return (EarlyStoppingCallback(early_stopping_patience=2),)

    trainer, whole = train(tmp_path / "whole", more=patience(), **options)
    assert trainer.state.global_step == 24 and trainer.state.best_global_step == 16
    train(tmp_path / "broken", more=patience(), stop=23, **options)
    trainer, end = train(tmp_path / "broken", more=patience(), seed=99, **options)
    assert trainer.state.global_step == 24 and differing(whole, end) == []


@pytest.mark.parametrize(
    "options",
    [
        {"save_total_limit": 2},
        {"save_total_limit": 3, "metric_for_best_model": "score", "greater_is_better": False},
        {"save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "score"},
        {"save_total_limit": 3, "load_best_model_at_end": True, "greater_is_better": True,
         "metric_for_best_model": "score"},
        {"save_total_limit": None},
    ],
    ids=str,
)  # fmt: skip
def test_the_same_are_kept_and_loaded_as_by_the_trainer_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**options, "eval_strategy": "steps", "eval_steps": 4, "epochs": 5}
    for one in (random.seed, np.random.seed, torch.manual_seed):
        one(1)
    theirs = trainer_of(tmp_path / "theirs", [], **options)
    theirs.train()
    folders = {int(path.name.partition("-")[2]) for path in (tmp_path / "theirs").glob("checkpoint-*")}
    ours, end = train(tmp_path / "ours", **options)
    past = everystep.open(str(tmp_path / "ours" / "runs"))["r"]
    assert {one.step for one in past.checkpoints()} == folders
    assert differing(end["model"], {name: value.numpy() for name, value in theirs.model.state_dict().items()}) == []
    assert ours.state.best_global_step == theirs.state.best_global_step
    if options.get("load_best_model_at_end"):
        assert ours.state.best_model_checkpoint == f"everystep://r@{ours.state.best_global_step}"
        best = past.best("eval_score", mode="max" if options.get("greater_is_better", True) else "min")
        assert best.step == ours.state.best_global_step


def test_a_save_has_the_metrics_of_its_step(tmp_path: Path) -> None:
    train(tmp_path, eval_strategy="steps", eval_steps=8)
    past = everystep.open(str(tmp_path / "runs"))["r"]
    first, second = past.at(4).metrics, past.at(8).metrics
    assert "eval_score" not in first and {"loss", "learning_rate"} <= first.keys()
    assert second["eval_score"] == SCORES[1] and "loss" in second


def test_back_to_an_older_one_on_purpose(tmp_path: Path) -> None:
    _, whole = train(tmp_path)
    with everystep.open(str(tmp_path / "runs")).run("r") as run:
        callback = EverystepCallback(run)
        trainer = trainer_of(tmp_path, [callback])
        trainer.train(resume_from_checkpoint=callback.resume_from(trainer, "8"))
    assert [one.step for one in run.checkpoints()] == [4, 8, 12, 16, 20, 24]
    assert differing(whole["model"], {name: value.numpy() for name, value in trainer.model.state_dict().items()}) == []


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path / "runs")).run("r") as run:
        options = {"save_strategy": "best", "metric_for_best_model": "score", "eval_strategy": "steps", "eval_steps": 4}
        trainer = trainer_of(tmp_path, [EverystepCallback(run)], **options)
        with pytest.raises(everystep.UsageError, match="saves where no callback is asked"):
            trainer.train()


def test_save_steps_of_its_own(tmp_path: Path) -> None:
    with everystep.open(str(tmp_path / "runs")).run("r") as run:
        trainer_of(tmp_path, [EverystepCallback(run, save_steps=10)], save_strategy="no").train()
        assert [one.step for one in run.checkpoints()] == [10, 20]
