"""The MoE blocks of torchtitan's debug models, as model factories: `tests/titan_moe.py:deepseek_v3` and `:qwen3`.

Whole torchtitan language models don't build on a CPU (their attention needs a GPU), the MoE blocks do.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def build(family: str, configuration: str, batch: int = 2, seq: int = 64) -> tuple[nn.Module, tuple[Tensor]]:
    registry = importlib.import_module(f"torchtitan.models.{family}").model_registry
    config = registry(configuration, attn_backend="varlen").model
    layer = next(layer for layer in config.layers if getattr(layer, "moe", None) is not None)
    moe = layer.moe.build()
    moe.init_states(buffer_device=torch.device("cpu"))
    return moe.bfloat16(), (torch.randn(batch, seq, config.dim, dtype=torch.bfloat16),)


def deepseek_v3() -> tuple[nn.Module, tuple[Tensor]]:
    return build("deepseek_v3", "debugmodel")


def qwen3() -> tuple[nn.Module, tuple[Tensor]]:
    return build("qwen3", "debugmodel_moe")


def loss(outputs: Any, batch: tuple[Tensor]) -> Tensor:
    y: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return (y.float() - batch[0].float()).square().mean()
