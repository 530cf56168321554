"""Time contenders in turn, step by step, and read the allocator."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fp8c.tools.bench.workloads import Contender

GIB = 1 << 30


def captured(contender: Contender) -> Callable[[], object]:
    """A CUDA graph of one run."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    contender.clear()
    with torch.cuda.graph(graph):
        contender.run()
    return graph.replay


def time_steps(contenders: Sequence[Contender], seconds: float, rounds: int = 2) -> dict[str, list[float]]:
    """Milliseconds of every step; each contender runs `seconds` back to back in each round, then the next one does."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    runs = {c.name: captured(c) if c.workload.is_short else c.run for c in contenders}
    for _ in range(rounds):
        for c in contenders:
            run = runs[c.name]
            for _ in range(2):
                run()
            torch.cuda.synchronize()
            events = [torch.cuda.Event(enable_timing=True)]  # type: ignore[no-untyped-call]
            events[0].record()
            started = time.perf_counter()
            while time.perf_counter() - started < seconds or len(events) < 4:
                run()
                events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
                events[-1].record()
                if len(events) % 4 == 0:
                    events[-2].synchronize()  # the host must not run far ahead of the clock
            events[-1].synchronize()
            times[c.name] += [a.elapsed_time(b) for a, b in zip(events, events[1:])]
            c.clear()
    return times


def summary(times_ms: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(times_ms, n=4) if len(times_ms) > 1 else [times_ms[0]] * 3
    return {
        "median_ms": round(statistics.median(times_ms), 3),
        "quartiles_ms": [round(quarters[0], 3), round(quarters[2], 3)],  # type: ignore[dict-item]
        "steps": len(times_ms),
    }


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


def memory(contender: Contender, before_bytes: int) -> dict[str, float]:
    """Bytes of one step in GiB, as the allocator sees them; `before_bytes` were allocated before the contender was built.

    resident: weights and what is kept with them;  saved: allocated between forward and backward beyond that
    peak:     most of all, gradients included
    """
    contender.run()
    contender.clear()
    resident = allocated()
    torch.cuda.reset_peak_memory_stats()
    out = contender.forward()
    torch.cuda.synchronize()
    between = int(torch.cuda.memory_allocated())
    contender.backward(out)
    torch.cuda.synchronize()
    peak = int(torch.cuda.max_memory_allocated())
    del out
    contender.clear()
    figures = {"resident": resident - before_bytes, "saved": between - resident, "peak": peak - before_bytes}
    return {f"{name}_gib": round(value / GIB, 3) for name, value in figures.items()}


def add_fp32_gradients(module: nn.Module) -> list[Any]:
    """Accumulate every parameter's gradient into an FP32 `main_grad` as soon as it is there; returns the hooks."""

    def accumulate(p: torch.Tensor) -> None:
        assert p.grad is not None
        p.main_grad.add_(p.grad)  # type: ignore[attr-defined]
        p.grad = None

    hooks = []
    for p in module.parameters():
        if p.requires_grad and not hasattr(p, "main_grad"):
            p.main_grad = torch.zeros_like(p, dtype=torch.float32)  # type: ignore[attr-defined]
            hooks.append(p.register_post_accumulate_grad_hook(accumulate))  # type: ignore[no-untyped-call]
    return hooks


def drop_fp32_gradients(module: nn.Module, hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    for p in module.parameters():
        if hasattr(p, "main_grad"):
            del p.main_grad


def machine_rates() -> dict[str, float]:
    """What this machine does at best, measured: copy in GB/s, a BF16 and an FP8 product of 8192^3 in TFLOP/s."""
    from triton.testing import do_bench

    n = 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(n, n, dtype=torch.bfloat16, device="cuda")
    flops = 2 * n**3
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def median_ms(call: Any) -> float:
        return float(do_bench(call, warmup=100, rep=400, return_mode="median"))

    rates = {
        "copy_gb_s": 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6,
        "bf16_tflop_s": flops / median_ms(lambda: a @ b.t()) / 1e9,
    }
    try:
        ops = torch.ops.fp8c
        act, weight = "e4m3[1x128] fp32", "e4m3[128x128] fp32"
        qa, sa = ops.quantize(a, act)
        qb, sb = ops.quantize(b, weight)
        rates["fp8_tflop_s"] = (
            flops / median_ms(lambda: ops.scaled_mm(qa, sa, qb, sb, act, weight, 128, torch.bfloat16)) / 1e9
        )
    except Exception as error:  # noqa: BLE001 - the other figures still stand
        rates["fp8_error"] = str(error).splitlines()[0]  # type: ignore[assignment]
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in rates.items()}
