"""What is saved: a model and the state of its Adam optimizer, changed by a real step between saves."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

PARAMETERS_PER_LAYER = 2
COPIES = 3  # of each parameter in the state: itself and Adam's two averages
CONTEXT, WIDTH, HEADS, LAYERS, BATCH, WORDS = 128, 256, 4, 6, 8, 1024


class Training:
    """A model under AdamW. Adam's step counters come on top of its averages: one scalar tensor per parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.steps = 0
        self.step()

    def loss(self) -> torch.Tensor:
        raise NotImplementedError

    def step(self) -> None:
        """One update: after it, every byte of weights and averages is a new one."""
        self.optimizer.zero_grad(set_to_none=False)
        self.loss().backward()
        self.optimizer.step()
        self.steps += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state by a flat name."""
        names = {id(value): name for name, value in self.model.named_parameters()}
        found = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        for parameter, entries in self.optimizer.state.items():
            found |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in entries.items()}
        return found

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors().values())


class Layers(Training):
    """A chain of linear layers of about `mb` MB of state in about `leaves` arrays: nearly no work per byte."""

    def __init__(self, mb: float, leaves: int) -> None:
        torch.manual_seed(0)
        layers = max(1, round(leaves / COPIES / PARAMETERS_PER_LAYER))
        width = max(1, math.isqrt(int(mb * 1e6 / 4 / COPIES / layers)))
        self._batch = torch.randn(8, width)
        super().__init__(nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))))

    def loss(self) -> torch.Tensor:
        output = self._batch
        for layer in self.model:
            output = F.layer_norm(output + torch.tanh(layer(output)), output.shape[1:])
        return (output - self._batch.roll(1, 0)).square().mean()


class Language(Training):
    """A small transformer that predicts the next word of drawn sentences: the work per byte of a real training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self._mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        super().__init__(
            nn.ModuleDict(
                {
                    "words": nn.Embedding(WORDS, WIDTH),
                    "places": nn.Embedding(CONTEXT, WIDTH),
                    "blocks": nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False),
                    "head": nn.Linear(WIDTH, WORDS),
                }
            )
        )

    def loss(self) -> torch.Tensor:
        first = torch.randint(WORDS, (BATCH, 1))
        text = (first * 7 + torch.arange(CONTEXT + 1) * 31) % WORDS
        hidden = self.model["words"](text[:, :-1]) + self.model["places"].weight
        hidden = self.model["blocks"](hidden, mask=self._mask, is_causal=True)
        return F.cross_entropy(self.model["head"](hidden).flatten(0, 1), text[:, 1:].flatten())
