"""Tiny Hugging Face models: two layers, hidden 128."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_BASE = dict(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    max_position_embeddings=128,
    use_cache=False,
    pad_token_id=None,
)
_ROUTED = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(_BASE),
    "mixtral": dict(_BASE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(_BASE, **_ROUTED, head_dim=32, decoder_sparse_step=1, mlp_only_layers=[]),
    "qwen2_moe": dict(_BASE, **_ROUTED, shared_expert_intermediate_size=256),
    "olmoe": dict(_BASE, num_experts=8, num_experts_per_tok=2),
    "deepseek_v3": dict(
        _BASE,
        num_key_value_heads=4,
        moe_intermediate_size=128,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=1,
    ),
    "glm4_moe": dict(
        _BASE,
        head_dim=32,
        moe_intermediate_size=128,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "gpt_oss": dict(_BASE, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=32),
}


def build(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**CONFIGS[name], **changes})
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def tokens(batch: int = 2, length: int = 64) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(7))


def loss(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    ids = tokens() if ids is None else ids
    result: Tensor = model(input_ids=ids, labels=ids).loss
    return result
