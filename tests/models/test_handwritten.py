"""Hand-written modules: every way of writing a GEMM that ordinary models use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.harness import check, loss_of, train_both

BF16 = torch.bfloat16
D = 128


class Mlp(nn.Module):
    def __init__(self, bias: bool = False, dtype: torch.dtype = BF16, width: int = 256) -> None:
        super().__init__()
        self.gate = nn.Linear(D, width, bias=bias, dtype=dtype)
        self.up = nn.Linear(D, width, bias=bias, dtype=dtype)
        self.down = nn.Linear(width, D, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FusedQkv(nn.Module):
    """Fused projection, grouped-query attention: 4 query heads share 2 key heads."""

    def __init__(self, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 128 + 64 + 64, bias=bias, dtype=BF16)
        self.out = nn.Linear(D, D, bias=bias, dtype=BF16)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).split([128, 64, 64], dim=-1)
        q, k, v = (y.view(b, t, -1, 32).transpose(1, 2) for y in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(b, t, D))


class BmmAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False, dtype=BF16)
        self.out = nn.Linear(D, D, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 32).transpose(1, 2).reshape(b * 4, t, 32) for y in self.qkv(x).chunk(3, -1))
        scores = torch.bmm(q, k.transpose(1, 2)) * 32**-0.5
        p = scores.softmax(-1)
        return self.out(torch.bmm(p, v).view(b, 4, t, 32).transpose(1, 2).reshape(b, t, D))


class MatmulAttention(BmmAttention):
    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 32).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        p = torch.softmax((q @ k.transpose(-1, -2)).float() * 32**-0.5, -1).to(x.dtype)
        return self.out((p @ v).transpose(1, 2).reshape(b, t, D))


class Block(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], attention: Callable[[], nn.Module], mlp: Callable[[], nn.Module]):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(), attention(), norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def rms() -> nn.Module:
    return nn.RMSNorm(D, dtype=BF16)


def layer_norm() -> nn.Module:
    return nn.LayerNorm(D, dtype=BF16)


class Lm(nn.Module):
    """Embedding, blocks, output head, cross entropy."""

    def __init__(self, blocks: list[nn.Module], tied: bool = False, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, D, dtype=dtype)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(D, dtype=dtype)
        self.head = nn.Linear(D, 256, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


class StoredKN(nn.Module):
    """Weights stored [in, out], multiplied from the right without a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(D, 256, dtype=BF16) * 0.1)
        self.w2 = nn.Parameter(torch.randn(256, D, dtype=BF16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.w1) @ self.w2


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.linear(x)))


class Transposed(nn.Module):
    """One weight used as itself and transposed: an autoencoder with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(256, D, dtype=BF16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.w.t()) @ self.w


class Lora(nn.Module):
    """A frozen projection with a trained low-rank branch of width 16."""

    def __init__(self, rank: int = 16) -> None:
        super().__init__()
        self.base = nn.Linear(D, 256, bias=False, dtype=BF16).requires_grad_(False)
        self.a = nn.Linear(D, rank, bias=False, dtype=BF16)
        self.b = nn.Linear(rank, 256, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.last = nn.Linear(D, D, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.mlp(x), 0.3, self.training))


def features(batch: int = 2, length: int = 64, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(3)).to(dtype)


def on_features(model: nn.Module) -> Tensor:
    return loss_of(model(features()))


def ids(batch: int = 2, length: int = 64) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(7))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear_bias": lambda: nn.Linear(D, 256, dtype=BF16),
    "mlp": Mlp,
    "mlp_bias": lambda: Mlp(bias=True),
    "fused_qkv_gqa": FusedQkv,
    "fused_qkv_bias": lambda: FusedQkv(bias=True),
    "attention_dropout": lambda: FusedQkv(dropout=0.2),
    "bmm_attention": BmmAttention,
    "matmul_attention": MatmulAttention,
    "stored_kn": StoredKN,
    "used_twice": UsedTwice,
    "transposed_too": Transposed,
    "lora": Lora,
    "dropout": Dropouts,
    "width_96": lambda: Mlp(width=96),
    "width_200": lambda: Mlp(width=200),
    "layer_norm_block": lambda: Block(layer_norm, FusedQkv, Mlp),
    "rms_block": lambda: Block(rms, FusedQkv, Mlp),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    torch.manual_seed(0)
    check(train_both(MODULES[name](), on_features, spec_of(name), fullgraph=True))


def spec_of(name: str) -> str:
    return "deepseek_v3"
