"""A small Mixture-of-Experts language model in plain BF16 PyTorch, in the shape of DeepSeek-V3.

Multi-head latent attention, a dense first layer, mixture-of-experts layers with a shared expert, sigmoid routing whose
bias steers the choice of experts only, a sequence-wise balance loss, and one multi-token-prediction (MTP) module that
shares the embedding and the output head. Bytes are the vocabulary, so no tokenizer is needed.

    python examples/moe_transformer.py --steps 20

Shapes in comments: B batch, T sequence length, D model width, H heads, E experts, K experts per token, V vocabulary.
Sources: DeepSeek-V2 (arXiv:2405.04434) for the attention, DeepSeek-V3 (arXiv:2412.19437) for routing and MTP.
"""

import argparse
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int = 256  # bytes
    dim: int = 256
    n_layers: int = 4
    n_dense_layers: int = 1
    n_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 64
    dense_hidden_dim: int = 768
    expert_hidden_dim: int = 256
    n_experts: int = 8
    n_shared_experts: int = 1
    experts_per_token: int = 2
    route_scale: float = 1.0
    balance_loss_weight: float = 1e-4  # DeepSeek-V3, section 4.2
    bias_update_speed: float = 1e-3  # DeepSeek-V3, section 4.2
    mtp_loss_weight: float = 0.3  # DeepSeek-V3, section 4.2: 0.3 for the first 10T tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: torch.dtype = torch.bfloat16


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # [B, T, V]


def linear(n_in: int, n_out: int, config: Config) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False, dtype=config.dtype)


def norm(dim: int, config: Config) -> nn.RMSNorm:
    return nn.RMSNorm(dim, eps=config.norm_eps, dtype=config.dtype)


def rotary_tables(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()  # [T, dim / 2] each


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of the last axis of x [B, H, T, dim] by the angle of its position."""
    cos, sin = tables
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class LatentAttention(nn.Module):
    """Queries, keys and values come from low-rank latents; a separate rotary part carries the positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_dim, self.kv_rank = config.v_head_dim, config.kv_lora_rank
        self.q_a = linear(config.dim, config.q_lora_rank, config)
        self.q_norm = norm(config.q_lora_rank, config)
        self.q_b = linear(config.q_lora_rank, self.n_heads * (self.nope_dim + self.rope_dim), config)
        self.kv_a = linear(config.dim, config.kv_lora_rank + self.rope_dim, config)
        self.kv_norm = norm(config.kv_lora_rank, config)
        self.kv_b = linear(config.kv_lora_rank, self.n_heads * (self.nope_dim + self.v_dim), config)
        self.out = linear(self.n_heads * self.v_dim, config.dim, config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(batch, length, self.n_heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)

        latent, k_rope = self.kv_a(x).split([self.kv_rank, self.rope_dim], dim=-1)
        kv = self.kv_b(self.kv_norm(latent)).view(batch, length, self.n_heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        k_rope = apply_rotary(k_rope.unsqueeze(1), rotary)  # one rotary key for all heads

        q = torch.cat([q_nope, apply_rotary(q_rope, rotary)], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.n_heads, -1, -1)], dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForward(nn.Module):
    def __init__(self, config: Config, hidden_dim: int) -> None:
        super().__init__()
        self.gate = linear(config.dim, hidden_dim, config)
        self.up = linear(config.dim, hidden_dim, config)
        self.down = linear(hidden_dim, config.dim, config)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Router(nn.Module):
    """Scores every expert with a sigmoid and picks the best K; the bias steers the choice, never the weights."""

    bias: Tensor
    load: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim, dtype=config.dtype))
        self.register_buffer("bias", torch.zeros(config.n_experts))
        self.register_buffer("load", torch.zeros(config.n_experts))  # tokens per expert since the last bias update

    def forward(self, x: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B * T, D] -> weights [B * T, K], indices [B * T, K], balance loss."""
        config = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()  # [B * T, E]
        indices = (scores + self.bias).topk(config.experts_per_token, dim=-1).indices
        weights = scores.gather(1, indices)
        weights = weights / weights.sum(-1, keepdim=True) * config.route_scale

        chosen = F.one_hot(indices, config.n_experts).sum(1).float()  # [B * T, E]
        if self.training:
            self.load += chosen.detach().sum(0)
        # Balance within each sequence: fraction of tokens times mean affinity, summed over experts.
        share = (scores / scores.sum(-1, keepdim=True)).view(batch, -1, config.n_experts).mean(1)
        fraction = chosen.view(batch, -1, config.n_experts).mean(1) * (config.n_experts / config.experts_per_token)
        balance = config.balance_loss_weight * (fraction * share).sum(-1).mean()
        return weights.to(x.dtype), indices, balance

    @torch.no_grad()
    def update_bias(self) -> None:
        """Push the bias of overloaded experts down and of idle ones up; call it between optimizer steps."""
        self.bias += self.config.bias_update_speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class MoE(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = nn.ModuleList([FeedForward(config, config.expert_hidden_dim) for _ in range(config.n_experts)])
        self.shared = FeedForward(config, config.n_shared_experts * config.expert_hidden_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        weights, indices, balance = self.router(x.view(-1, shape[-1]), shape[0])
        x = x.view(-1, shape[-1])
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            if token.numel() == 0:
                continue
            y[token] += expert(x[token]) * weights[token, slot, None]
        return (y + self.shared(x)).view(shape), balance


class Layer(nn.Module):
    def __init__(self, config: Config, dense: bool) -> None:
        super().__init__()
        self.attention_norm = norm(config.dim, config)
        self.attention = LatentAttention(config)
        self.ffn_norm = norm(config.dim, config)
        self.ffn = FeedForward(config, config.dense_hidden_dim) if dense else MoE(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), rotary)
        y = self.ffn(self.ffn_norm(x))
        y, balance = y if isinstance(y, tuple) else (y, x.new_zeros((), dtype=torch.float32))
        return x + y, balance


class MTP(nn.Module):
    """Predicts the token after the next one from the trunk's state and the next token's embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.state_norm = norm(config.dim, config)
        self.token_norm = norm(config.dim, config)
        self.join = linear(2 * config.dim, config.dim, config)
        self.layer = Layer(config, dense=False)
        self.out_norm = norm(config.dim, config)

    def forward(self, x: Tensor, next_embedding: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.join(torch.cat([self.state_norm(x), self.token_norm(next_embedding)], dim=-1))
        x, balance = self.layer(x, rotary)
        return self.out_norm(x), balance


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, dtype=config.dtype)
        self.layers = nn.ModuleList([Layer(config, dense=i < config.n_dense_layers) for i in range(config.n_layers)])
        self.norm = norm(config.dim, config)
        self.head = linear(config.dim, config.vocab_size, config)
        self.mtp = MTP(config)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=config.init_std)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Output:
        """tokens [B, T], labels [B, T] (the tokens that follow) -> loss (None without labels) and logits [B, T, V]."""
        config = self.config
        rotary = rotary_tables(tokens.shape[1], config.qk_rope_head_dim, config.rope_theta, tokens.device)
        x = self.embedding(tokens)
        balance = torch.zeros((), device=tokens.device)
        for layer in self.layers:
            x, layer_balance = layer(x, rotary)
            balance = balance + layer_balance
        logits = self.head(self.norm(x))
        if labels is None:
            return Output(None, logits)

        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        # The MTP module sees the next token and predicts the one after it; the last position has no such label.
        mtp_x, mtp_balance = self.mtp(x, self.embedding(labels), rotary)
        mtp_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        mtp_loss = F.cross_entropy(self.head(mtp_x).flatten(0, 1).float(), mtp_labels.flatten(), ignore_index=-100)
        return Output(loss + config.mtp_loss_weight * mtp_loss + balance + mtp_balance, logits)

    def update_router_biases(self) -> None:
        for module in self.modules():
            if isinstance(module, Router):
                module.update_bias()


def read_corpus() -> Tensor:
    """The Python standard library's own top-level sources, as bytes [N]."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def sample_batch(corpus: Tensor, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    starts = torch.randint(len(corpus) - length - 1, (batch, 1), generator=generator)
    window = corpus[starts + torch.arange(length + 1)].long()
    return {"tokens": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}


def model(**changes: Any) -> Transformer:
    return Transformer(replace(Config(), **changes))


def example_inputs(batch: int = 4, seq: int = 128) -> dict[str, Tensor]:
    return sample_batch(read_corpus(), batch, seq, torch.Generator().manual_seed(0))


def batches(seed: int, batch: int = 4, length: int = 128) -> Iterator[dict[str, Tensor]]:
    """Batches of real text without end, the same for the same seed."""
    corpus, generator = read_corpus(), torch.Generator().manual_seed(seed)
    while True:
        yield sample_batch(corpus, batch, length, generator)


def after_step(transformer: Transformer) -> None:
    transformer.update_router_biases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    transformer = model()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    print(f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.1f} M parameters")
    for step, batch in zip(range(args.steps), batches(args.seed, args.batch, args.length)):
        start = time.perf_counter()
        output = transformer(**batch)
        output.loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step(transformer)
        print(f"step {step:4d}  loss {output.loss.item():.4f}  {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
