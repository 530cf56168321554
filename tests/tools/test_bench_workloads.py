"""The benchmark's contenders compute the same thing; its classes and bounds read what they should."""

from __future__ import annotations

import pytest
import torch

from fp8c import driver
from fp8c.tools.bench import bounds, workloads
from fp8c.tools.bench.kernel_classes import classify

TINY = {
    **{"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "vocab_size": 128, "head_dim": 32},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 64, "num_experts_per_tok": 2},
}
DEEPSEEK = {
    **{k: v for k, v in TINY.items() if k != "head_dim"},
    **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
}


def tiny(kind: str) -> workloads.Workload:
    overrides = DEEPSEEK if kind == "deepseek_v3" else {**TINY, "num_experts": 4}
    return workloads.step(kind, 2, 32, "cpu", **overrides)


@pytest.mark.parametrize("kind", ["deepseek_v3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_contenders_of_a_step_start_from_the_same_model(kind: str) -> None:
    torch.manual_seed(5)
    losses = {}
    for name in ("bf16", "bf16-causal", "fp8c"):
        contender = workloads.make(tiny(kind), name)
        if name.startswith("bf16"):
            contender.module._compiled_call_impl = None  # the eager model says as much, sooner
        losses[name] = float(contender.run())
        assert all(p.grad is not None for p in contender.module.parameters() if p.requires_grad and p.dim() == 2)
    assert losses["bf16"] == losses["bf16-causal"]
    assert losses["fp8c"] == pytest.approx(losses["bf16"], rel=2**-4)
    session = driver.session_of(contender.module)
    counts = bounds.operations(session.steps[-1])
    layer_tokens = 64
    attention = 2 * 2 * 32 * 32 / 2  # batch, heads, pairs of the causal half
    width = 32 if kind == "deepseek_v3" else 32
    value = 16 if kind == "deepseek_v3" else 32
    assert counts["attention"] == attention * (2 * width + 2 * value + 3 * 2 * width + 2 * 2 * value)
    assert counts["bf16"] >= 3 * 2 * layer_tokens * 128 * 128  # the head
    assert counts["fp8"] > 0


def test_routing_of_the_moe_block_is_even_or_skewed() -> None:
    loads = {}
    for skewed in (False, True):
        workload = workloads.moe_block(256, skewed, "cpu", **{**DEEPSEEK, "num_experts_per_tok": 2})
        torch.manual_seed(0)
        block = workload.build(False)
        x = workload.inputs()[0].detach()
        chosen = [y for y in block.gate(x) if y.dtype is torch.int64][0]
        loads[skewed] = torch.bincount(chosen.flatten(), minlength=8).float()
    assert loads[False].max() < 2 * loads[False].mean()
    assert loads[True].max() > loads[False].max()


def test_kernels_are_sorted_by_name() -> None:
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3": "attention",
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN": "bf16 gemm",
        "void at::native::radixSortKVInPlace<...>": "sort, top-k",
        "triton_poi_fused_mul_silu_3": "fused by inductor",
        "Memcpy DtoD (Device -> Device)": "memory",
        "triton_poi_fused_index_scaled_grouped_mm_9": "gather, scatter",
        "fp8c_gemm": "fp8 gemm",
        "columns_kernel": "quantize",
        "fp8c_requantize_columns": "quantize",
        "backward_rows_kernel": "swiglu, norm",
        "fp8c_swiglu_backward": "swiglu, norm",
        "gather_sum_kernel": "combine",
        "gradient_kernel": "output head",
        "gemm_kernel": "fp8 gemm",
        "something": "other",
    }
    assert {name: classify(name) for name in names} == names


def test_bounds() -> None:
    counts = {"fp8": 6e12, "bf16": 2e12, "attention": 1e12}
    rates = {"fp8_tflop_s": 1200.0, "bf16_tflop_s": 600.0, "copy_gb_s": 4000.0}
    bf16 = {"median_ms": 40.0, "profile": {"classes_us": {"bf16 gemm": 16000.0}}}
    found = bounds.bounds(counts, rates, bf16)
    assert found == {"roofline_ms": 10.0, "amdahl_ms": 34.0, "amdahl_ratio": 1.176}
