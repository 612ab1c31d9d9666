"""What is saved: a model and the state of its Adam optimizer, changed by a real step between saves."""

from __future__ import annotations

import math

import torch

PARAMETERS_PER_LAYER = 2
COPIES = 3  # of each parameter in the state: itself and Adam's two averages


class Training:
    """A chain of linear layers under AdamW, of about `mb` MB of state in about `leaves` arrays.

    Adam's step counters come on top: one scalar tensor per parameter, as in every state of PyTorch's Adam.
    """

    def __init__(self, mb: float, leaves: int) -> None:
        torch.manual_seed(0)
        layers = max(1, round(leaves / COPIES / PARAMETERS_PER_LAYER))
        width = max(1, math.isqrt(int(mb * 1e6 / 4 / COPIES / layers)))
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._batch = torch.randn(8, width)
        self.steps = 0
        self.step()

    def step(self) -> None:
        """One update: after it, every byte of weights and averages is a new one."""
        self.optimizer.zero_grad(set_to_none=False)
        output = self._batch
        for layer in self.model:
            output = torch.nn.functional.layer_norm(output + torch.tanh(layer(output)), output.shape[1:])
        (output - self._batch.roll(1, 0)).square().mean().backward()
        self.optimizer.step()
        self.steps += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state by a flat name."""
        found = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
        names = {id(value): name for name, value in self.model.named_parameters()}
        for parameter, entries in self.optimizer.state.items():
            found |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in entries.items()}
        return found

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors().values())
