"""`fp8c bench step`, `fp8c bench layer`: forward and backward against torch.compile BF16 in one process.

Contenders run in turn, each for `--seconds` back to back, in two rounds; the figure is the median of all its steps.
Memory is the allocator's, for one step, with gradients as PyTorch leaves them and with FP32 ones on both sides.
`docs/gpu_step.md` explains the columns and holds the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fp8c import driver
from fp8c.files import output_file
from fp8c.tools.bench import bounds, turns, workloads
from fp8c.tools.bench.gemm import environment
from fp8c.tools.bench.kernel_classes import profile_kernels
from fp8c.tools.bench.workloads import Contender, Workload

SCHEMA = "fp8c.bench.step/1"


def run_workload(workload: Workload, options: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Everything about one workload. What fails is recorded as text and left out of the turns."""
    record: dict[str, Any] = {"workload": workload.name, "tokens": workload.tokens, "contenders": {}}
    ready: list[Contender] = []
    for name in workloads.names(options.contender, workload):
        entry: dict[str, Any] = {}
        record["contenders"][name] = entry
        try:
            before = turns.allocated()
            started = time.perf_counter()
            contender = workloads.make(workload, name, options.spec)
            loss = contender.run()
            torch.cuda.synchronize()
            entry["first_step_s"] = round(time.perf_counter() - started, 1)
            entry["result"] = float(loss.float().mean())
            entry["memory"] = turns.memory(contender, before)
            ready.append(contender)
        except Exception as error:  # noqa: BLE001 - one contender's failure is a result of its own
            entry["error"] = "".join(traceback.format_exception(error))[-4000:]
            torch.cuda.empty_cache()
        report(f"{workload.name} {name}: {json.dumps({k: v for k, v in entry.items() if k != 'error'})}"[:400])
        if "error" in entry:
            report(entry["error"][-1500:])
    for name, times in turns.time_steps(ready, options.seconds).items():
        record["contenders"][name] |= turns.summary(times)
    for contender in ready:
        entry = record["contenders"][contender.name]
        if not options.no_profile:
            entry["profile"] = profile_kernels(contender.run)
        if options.fp32_gradients:
            hooks = turns.add_fp32_gradients(contender.module)
            gradients = sum(p.numel() * 4 for p in contender.module.parameters() if p.requires_grad)
            contender.clear()
            entry["memory_fp32_gradients"] = turns.memory(contender, _others(ready, contender, gradients))
            turns.drop_fp32_gradients(contender.module, hooks)
        contender.clear()
    add_ratios(record, ready, rates)
    return record


def _others(ready: list[Contender], contender: Contender, gradients: int) -> int:
    """What is allocated at rest beside this contender's own weights, kept weights and FP32 gradients."""
    own = sum(t.numel() * t.element_size() for t in (*contender.module.parameters(), *contender.module.buffers()))
    session = contender.module.__dict__.get("fp8c_session")
    kept = session.weights.size_bytes if isinstance(session, driver.Session) else 0
    return turns.allocated() - own - kept - gradients


def add_ratios(record: dict[str, Any], ready: list[Contender], rates: dict[str, float]) -> None:
    timed = {n: e for n, e in record["contenders"].items() if "median_ms" in e}
    record["speedup"] = {
        f"{ours} over {base}": round(timed[base]["median_ms"] / timed[ours]["median_ms"], 3)
        for ours in timed
        for base in timed
        if ours.startswith("fp8c") and base.startswith("bf16")
    }
    for contender in ready:
        session = contender.module.__dict__.get("fp8c_session")
        if not isinstance(session, driver.Session) or not session.steps:
            continue
        entry = timed[contender.name]
        counts = bounds.operations(session.steps[-1])
        base = timed.get("bf16-causal") or timed.get("bf16")
        entry["operations"] = {k: f"{v:.4g}" for k, v in counts.items()}
        entry["bounds"] = bounds.bounds(counts, rates, base)
        entry["kept_weights_gib"] = round(session.weights.size_bytes / turns.GIB, 3)
        entry["remarks"] = [f"{r.code} {r.message}" for r in session.remarks]
        entry["rewrites"] = {r.name: r.changed for r in session.steps[-1].records}


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def layers(options: argparse.Namespace) -> Iterator[Workload]:
    wanted = options.only or ("linear", "moe")
    if "linear" in wanted:
        yield from (workloads.linear(*shape) for shape in workloads.LINEARS)
    if "moe" in wanted:
        yield from (workloads.moe_block(options.tokens, skewed) for skewed in (False, True))


def steps(options: argparse.Namespace) -> Iterator[Workload]:
    overrides = {"vocab_size": options.vocabulary} if options.vocabulary else {}
    for kind in options.only or ("deepseek_v3", "qwen3_moe"):
        batch = {"deepseek_v3": 2, "qwen3_moe": 4}[kind]
        yield workloads.step(kind, batch, options.length, **overrides)


def table(record: dict[str, Any]) -> str:
    """One line for each contender."""
    lines = [f"{record['workload']}, {record['tokens']} tokens"]
    for name, entry in record["contenders"].items():
        if "median_ms" not in entry:
            lines.append(f"  {name:12} failed")
            continue
        found = entry["memory"]
        lines.append(
            f"  {name:12} {entry['median_ms']:9.3f} ms   peak {found['peak_gib']:.2f} GiB, saved {found['saved_gib']:.2f}"
            f"   first step {entry['first_step_s']} s   {entry.get('bounds', '')}"
        )
    lines += [f"  {name}: {ratio}x" for name, ratio in record["speedup"].items()]
    return "\n".join(lines)


def main(what: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"fp8c bench {what}", description=__doc__)
    parser.add_argument("--only", nargs="*", help="linear, moe" if what == "layer" else "deepseek_v3, qwen3_moe")
    parser.add_argument("--contender", nargs="*", choices=(*workloads.CONTENDERS, *workloads.LOSS_ONLY))
    parser.add_argument("--spec", default="deepseek_v3")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contender's turn")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--fp32-gradients", action="store_true", help="also measure memory with FP32 gradients")
    parser.add_argument("--out", type=output_file, help="write JSON here")
    if what == "layer":
        parser.add_argument("--tokens", type=int, default=16384, help="of the MoE block")
    else:
        parser.add_argument("--length", type=int, default=4096)
        parser.add_argument("--vocabulary", type=int, help="another vocabulary than 32768, DeepSeek-V3's 129280 say")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA GPU on this machine", file=sys.stderr)
        return 5
    from fp8c.backends.lowering import register_kernels

    register_kernels("cuda")
    rates = turns.machine_rates()
    document: dict[str, Any] = {"schema": SCHEMA, **environment(), "rates": rates, "results": []}
    for workload in (layers if what == "layer" else steps)(options):
        torch._dynamo.reset()
        record = run_workload(workload, options, rates)
        document["results"].append(record)
        print(table(record), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
        torch.cuda.empty_cache()
    return 0
