"""What a run holds in memory does not grow, and what was saved is what was there when `save` returned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _train import new_repository, one_thread
from torch import nn

from everystep import Run

__all__ = ["one_thread"]
SAVES, STATE_MIB, WARM = 200, 100, 20


def test_two_hundred_saves_hold_no_more_than_twenty() -> None:
    """Resident memory, threads and open files of a program that trains and saves."""
    program = Path(__file__).with_name("_memory.py")
    done = subprocess.run(
        [sys.executable, str(program), str(SAVES), str(STATE_MIB)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["checkpoints"] == SAVES
    # At least the momentum and the weights are stored anew each time; a save that stored nothing would prove nothing.
    assert found["stored"] > SAVES * (STATE_MIB << 20) * 0.1
    early, late = max(found["rss"][:WARM]), max(found["rss"][WARM:])
    assert late < 1.05 * early, f"{early >> 20} MiB after {WARM} saves, {late >> 20} MiB after {SAVES}"
    assert max(found["threads"][WARM:]) <= max(found["threads"][:WARM])
    assert max(found["files"][WARM:]) <= max(found["files"][:WARM])
    assert late < (STATE_MIB << 20) * 8, "more than the state, its gradients, two copies and what is on its way"


# --------------------------------------------------------------------------- changed the moment save returns


class Changing:
    """A model of a few megabytes, its optimizer, and ways to change them all in place."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(700, 700), nn.BatchNorm1d(700), nn.Linear(700, 9))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 700)).sum().backward()
        self.optimizer.step()

    def by_data(self) -> None:
        for param in self.model.parameters():
            param.data.mul_(2).add_(1)

    def by_numpy(self) -> None:
        for value in self.model.state_dict().values():
            value.numpy()[...] = 7

    def by_set(self) -> None:
        for param in self.model.parameters():
            param.data = torch.zeros_like(param)

    def by_load(self) -> None:
        self.model.load_state_dict({k: torch.full_like(v, 3) for k, v in self.model.state_dict().items()})
        for state in self.optimizer.state.values():
            for value in state.values():
                value.fill_(5)

    def bytes(self) -> dict[str, bytes]:
        found = {f"model/{name}": value.numpy().tobytes() for name, value in self.model.state_dict().items()}
        names = {id(param): name for name, param in self.model.named_parameters()}
        for param, state in self.optimizer.state.items():
            for key, value in state.items():
                found[f"optimizer/state/model.{names[id(param)]}/{key}"] = value.numpy().tobytes()
        return found


CHANGES: dict[str, Callable[[Changing], None]] = {
    "optimizer": Changing.step,
    ".data": Changing.by_data,
    "NumPy view": Changing.by_numpy,
    "another tensor": Changing.by_set,
    "load_state_dict": Changing.by_load,
}


def loaded(run: Run, step: int, paths: list[str]) -> dict[str, bytes]:
    return {path: array.tobytes() for path, array in run.at(step).load(only=paths).items()}


@pytest.mark.parametrize("how", CHANGES)
def test_what_changes_when_save_has_returned_is_not_in_it(how: str) -> None:
    job = Changing()
    run = new_repository().run("r").track(model=job.model, optimizer=job.optimizer)
    before = []
    for step in range(1, 5):
        before.append(job.bytes())
        saved = run.save(step)
        CHANGES[how](job)
        if step % 2:
            saved.wait()
        job.step()
    run.close()
    for step, expected in enumerate(before, 1):
        assert loaded(run, step, list(expected)) == expected, f"step {step}"
    assert before[0] != before[1]


def test_arrays_of_numpy_may_change_too() -> None:
    shared = np.arange(2 << 20, dtype=np.float64).reshape(1 << 10, -1)
    state: dict[str, Any] = {"w": shared, "turned": shared.T, "every other": shared[::2, ::3], "list": [1, 2]}
    run = new_repository().run("r")
    expected = {name: np.array(state[name]) for name in ("w", "turned", "every other")}
    saved = run.save(1, state=state)
    shared[:] = -1
    state["list"].append(3)
    state["new"] = 1
    back = saved.wait().load()
    assert back["list"] == [1, 2] and back.keys() == {*expected, "list", "rng"} - {"rng"} | (back.keys() & {"rng"})
    for name, array in expected.items():
        assert back[name].shape == array.shape and back[name].tobytes() == array.tobytes()
    run.close()


def test_metrics_are_what_they_were_when_recorded() -> None:
    run = new_repository().run("r")
    loss, acc = torch.tensor(1.0), np.array(0.5)
    run.record(loss=loss, acc=acc)
    loss.fill_(9)
    acc[...] = 9
    assert run.save(1, state={"a": 1}).wait().metrics == {"loss": 1.0, "acc": 0.5}
    run.close()
