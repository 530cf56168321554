"""A gated MLP language model: the smallest step that has every kind of decision but experts."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, dtype=torch.bfloat16)
        self.gate, self.up, self.down = (nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x_normed = self.norm(x)
        return x + self.down(F.silu(self.gate(x_normed)) * self.up(x_normed))


class Tiny(nn.Module):
    def __init__(self, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False, dtype=torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model(width: int = 128, layers: int = 2) -> Tiny:
    return Tiny(width, layers)


def example_inputs(batch: int = 2, seq: int = 64) -> dict[str, Tensor]:
    tokens = torch.randint(256, (batch, seq))
    return {"tokens": tokens, "labels": tokens.clone()}


def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1).float(), batch["labels"].flatten())


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """Counting modulo 256 from random starts: learned within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = (torch.randint(256, (4, 1), generator=generator) + torch.arange(33)) % 256
        yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].contiguous()}
