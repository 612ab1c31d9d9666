"""Accelerate: save_state and load_state through a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _killed import check_resumes_exactly
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep.integrations.accelerate import EverystepState


def test_a_killed_loop_goes_on_exactly(tmp_path: Path) -> None:
    check_resumes_exactly("accelerate_example.py", "accelerate", tmp_path, kill_at=15, epoch=8, last=24)


def make(seed: int, run: everystep.Run) -> tuple[EverystepState, Any, Any]:
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    net = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1))
    return EverystepState(accelerator, run, model=model, optimizer=optimizer), model, optimizer


def train(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()


def test_state_comes_back_into_what_was_prepared_anew(tmp_path: Path) -> None:
    repo = everystep.open(str(tmp_path / "runs"))
    with repo.run("a") as run:
        state, model, optimizer = make(1, run)
        assert state.load_state() == 0
        train(model, optimizer)
        state.accelerator.step = 3
        state.save_state(1, metrics={"loss": 0.5}).wait()
        train(model, optimizer)
        state.save_state(2)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        chance = torch.rand(3)
    with repo.run("a") as run:
        state, model, optimizer = make(2, run)
        assert state.load_state() == 2
        assert torch.equal(torch.rand(3), chance)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert optimizer.optimizer.state[model.weight]["step"] == 2 and state.accelerator.step == 3
        assert state.load_state("1") == 1 and optimizer.optimizer.state[model.weight]["step"] == 1
    assert repo["a"].best("loss").step == 1
    assert sorted(repo["a"].at(1).load()) == ["accelerator", "model", "optimizer", "rng"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prepared_loader_knows_its_place(tmp_path: Path, workers: int) -> None:
    """Also where Accelerate seeds the sampler by the epoch."""
    data = TensorDataset(torch.arange(20.0))

    def loader() -> everystep.ResumableLoader:
        torch.manual_seed(5)
        plain = DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)
        return everystep.ResumableLoader(Accelerator(cpu=True).prepare(plain))

    first = loader()
    seen, states = [], []
    for _ in range(3):
        for (batch,) in first:
            seen.append(batch.tolist())
            states.append((first.state_dict(), torch.get_rng_state()))
    assert first.epochs_done == 3 and len(seen) == 21
    for at in (2, 6, 13):
        again = loader()
        again.load_state_dict(states[at][0])
        torch.set_rng_state(states[at][1])
        found = []
        while again.epochs_done < 3:
            found += [batch.tolist() for (batch,) in again]
        assert found == seen[at + 1 :], at
