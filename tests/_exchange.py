"""Old folders, and a file system that may only be read, for the tests of import and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from everystep import exchange
from everystep.errors import Error
from everystep.seam import Files, Seam


class OnlyReading(Files):
    """Whatever would change a file or folder fails the test."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def _refused(self, *given: Any) -> Any:
        raise AssertionError(f"an import writes: {given}")

    create = write = rename = link = unlink = mkdir = fsync = fsync_folder = _refused

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        taken = super().read(fd, into, offset)
        self.read_bytes += taken
        return taken


def survey(path: Path) -> exchange.Survey:
    return exchange.survey(str(path), Seam(OnlyReading()))


def imported(path: Path) -> dict[int, exchange.Imported]:
    """What is in each file that was found; an error fails the test."""
    made = {}
    for found, answer in exchange.each(survey(path), Seam(OnlyReading())):
        assert isinstance(answer, exchange.Imported), f"{found.path}: {answer}"
        made[found.step] = answer
    return made


def refused(path: Path) -> dict[int, Error]:
    answers = exchange.each(survey(path), Seam(OnlyReading()))
    return {found.step: answer for found, answer in answers if isinstance(answer, Error)}


def skipped(path: Path) -> dict[str, tuple[str, str]]:
    """Name within the folder -> (kind, why)."""
    return {Path(one.path).relative_to(path).as_posix(): (one.kind, one.why) for one in survey(path).skipped}


class Trained:
    """A model of bf16 and float32, with tied weights, that learns a little at each call."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2), "norm": nn.BatchNorm1d(3)})
        self.model["small"] = nn.Linear(3, 2).bfloat16()
        self.model["tied"] = self.model["a"]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        hidden = self.model["norm"](self.model["a"](torch.randn(8, 4)))
        loss = self.model["b"](hidden).pow(2).mean() + self.model["small"](hidden.bfloat16()).float().pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def plain_loop(folder: Path, epochs: int, name: Callable[[int], str] = "checkpoint_{}.pth".format) -> list[Any]:
    """What a plain loop saves, file by file, as torch loads it again."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Trained()
    kept = []
    for epoch in range(epochs):
        state = {
            "epoch": epoch,
            "loss": work.step(),
            "model_state_dict": work.model.state_dict(),
            "optimizer_state_dict": work.optimizer.state_dict(),
        }
        torch.save(state, folder / name(epoch))
        kept.append(torch.load(folder / name(epoch), weights_only=True))
    return kept


def weights(value: float, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((3,), float(value)) for name in names or ("fc.weight",)}


def save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
