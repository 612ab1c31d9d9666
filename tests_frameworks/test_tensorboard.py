"""TensorBoard and a plain log see each save, once it is durable."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import everystep
from everystep.integrations.logs import log_saves
from everystep.integrations.tensorboard import show_saves


def test_each_save_is_shown_with_its_cost_and_metrics(tmp_path: Path) -> None:
    run = everystep.open(str(tmp_path / "runs")).run("a")
    writer = SummaryWriter(str(tmp_path / "board"))
    show_saves(run, writer, prefix="saves")
    for step in (10, 20, 30):
        run.save(step, state={"w": np.full(1000, step, np.float32)}, metrics={"val_loss": 1 / step, "name": "x"})
    run.close()
    writer.close()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    past = everystep.open(str(tmp_path / "runs"))["a"]
    costs = {checkpoint.step: checkpoint.cost for checkpoint in past.checkpoints()}
    for name in ("stall_seconds", "raw_bytes", "stored_bytes"):
        shown = [(event.step, event.value) for event in board.Scalars(f"saves/{name}")]
        assert shown == [(step, pytest.approx(cost[name])) for step, cost in costs.items()]
    assert [event.value for event in board.Scalars("saves/metrics/val_loss")] == pytest.approx([0.1, 0.05, 1 / 30])
    assert "saves/metrics/name" not in board.Tags()["scalars"]


def test_a_log_has_a_line_for_each_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a test")
    with caplog.at_level(logging.INFO, "a test"), everystep.open(str(tmp_path / "runs")).run("a") as run:
        log_saves(run, logger)
        run.save(10, state={"w": np.ones(10)}, metrics={"loss": 0.25}).wait()
        assert caplog.messages == [], "told at the next save"
        run.save(20, state={"w": np.zeros(10)})
        assert len(caplog.messages) == 1
    first, second = caplog.messages
    assert first.startswith("saved a@10 (by hand): ") and first.endswith("; loss 0.25") and "stall" in first
    assert second.startswith("saved a@20")


def test_a_failed_save_is_not_told(tmp_path: Path) -> None:
    told: list[int] = []
    with everystep.open(str(tmp_path / "runs")).run("a") as run:
        run.on_saved(lambda checkpoint: told.append(checkpoint.step))
        run.save(1, state={"w": np.ones(3)}).wait()
        with pytest.raises(everystep.Conflict):
            run.save(1, state={"w": np.zeros(3)}).wait()
        run.save(2, state={"w": np.zeros(3)})
    assert told == [1, 2]
