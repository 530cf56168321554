"""Where a step's GPU time goes: kernels of a profile sorted into classes by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

#: First match wins.
CLASSES: tuple[tuple[str, str], ...] = (
    ("gather, scatter", r"^triton_(poi|red|per)_.*(index|embedding)"),
    ("fused by inductor", r"^triton_(poi|red|per)_"),
    ("attention", r"flash|fmha|attention|sdpa|compute_dot_do_o|convert_dq|cudnn_generated"),
    ("fp8 gemm", r"^(fp8c_gemm|gemm_kernel)|nvjet.*(qq|e4m3)"),
    ("bf16 gemm", r"nvjet|gemm|cutlass|cublas|xmma|wgmma"),
    ("swiglu, norm", r"^(forward|backward_rows|backward_columns|norm)_kernel|^fp8c_(swiglu|rms_norm)"),
    ("quantize", r"^(row|rows|column|columns|both|block|gather|dequantize|transpose)_kernel|^fp8c_\w*quantize"),
    ("combine", r"^gather_sum_kernel"),
    ("output head", r"^(denominator|gradient)_kernel"),
    ("memory", r"memcpy|memset|fillfunctor|copy_kernel|catarray"),
    ("sort, top-k", r"sort|topk|radix|scan|histogram|searchsorted|cub"),
    ("gather, scatter", r"index|gather|scatter|embedding|compute_grad_weight"),
    ("elementwise", r"elementwise|reduce_kernel|softmax|vectorized"),
)


def classify(kernel: str) -> str:
    return next((name for name, pattern in CLASSES if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile_kernels(run: Callable[[], object], steps: int = 2, top: int = 40) -> dict[str, Any]:
    """Microseconds of one step by class, and the longest kernels.

    `busy_us` sums kernels; streams that overlap count twice.
    """
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profile.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            entry = times[event.name]
            entry[0] += event.device_time_total / steps
            entry[1] += 1 / steps
    classes: dict[str, float] = defaultdict(float)
    for name, (us, _) in times.items():
        classes[classify(name)] += us
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:top]
    return {
        "busy_us": round(sum(classes.values()), 1),
        "kernels": round(sum(count for _, count in times.values())),
        "classes_us": {k: round(v, 1) for k, v in sorted(classes.items(), key=lambda item: -item[1])},
        "longest": [
            {"name": name[:160], "us": round(us, 1), "calls": count, "class": classify(name)}
            for name, (us, count) in longest
        ],
    }
