"""Which fused operators a target's backend runs as one kernel: what `fuse-casts` and `fuse-combine` may use. No torch."""

from __future__ import annotations

from fp8c.target_record import TargetRecord

#: `backends/triton`, on every NVIDIA architecture with FP8.
TRITON = frozenset(
    {
        "quantize_both",
        "quantize_weight",
        "quantize_transposed",
        "gather_quantize",
        "gather_quantized",
        "gather_requantized",
        "gather_sum",
        "swiglu_quantize",
        "swiglu_quantize_cached",
        "swiglu_backward_quantize",
        "rms_norm_quantize",
    }
)


def fusions_of(target: TargetRecord | None) -> frozenset[str]:
    """Operator names of `fp8c.ops.fused` and `fp8c.ops.combine`; none for the CPU, where the plain form would only hide what is done."""
    is_gpu = target is not None and target.architecture.startswith("sm")
    return TRITON if is_gpu else frozenset()
