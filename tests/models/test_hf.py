"""Hugging Face models, unchanged: every GEMM in the planned precision, and roles found from data flow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import hf
from tests.models.harness import check, train_both

#: FP8 GEMMs of each kind among all: two layers; head and routers are kept.
FP8_GEMMS = {
    "llama": (14, 15),
    "mixtral": (12, 15),
    "qwen3_moe": (12, 15),
    "qwen2_moe": (18, 23),  # the shared expert's gate is gating too
    "olmoe": (12, 15),
    "deepseek_v3": (18, 20),
    "glm4_moe": (16, 18),
    "gpt_oss": (12, 15),
}


QUICK = ("deepseek_v3", "qwen2_moe", "gpt_oss")  # between them: MLA, shared experts and their gate, biases, [E, K, N]


def autocast_loss(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return hf.loss(model)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("llama", marks=pytest.mark.slow)])
def test_fp32_parameters_under_autocast(name: str) -> None:
    """Rotary embedding leaves queries and keys in FP32; attention under autocast takes them in BF16."""
    outcome = train_both(hf.build(name, torch.float32), autocast_loss)
    check(outcome, depth=14)
    assert outcome.counts["fprop"]["fp8"] == FP8_GEMMS[name][0]


@pytest.mark.slow
def test_router_logits_of_a_cold_model() -> None:
    outcome = train_both(hf.build("mixtral", output_router_logits=True), hf.loss)
    check(outcome, depth=14)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in hf.CONFIGS])
def test_model_trains_in_fp8(name: str) -> None:
    outcome = train_both(hf.build(name), hf.loss)
    check(outcome, depth=14)
    fp8, total = FP8_GEMMS[name]
    assert {w: (c["fp8"], c["total"]) for w, c in outcome.counts.items()} == dict.fromkeys(
        ("fprop", "dgrad", "wgrad"), (fp8, total)
    )
