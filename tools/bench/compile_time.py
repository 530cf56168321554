"""`fp8c bench compile`: what the first step takes, in a process that finds nothing compiled and in the next one.

Each contender runs in processes of its own with caches of its own (fp8c's, Triton's, Inductor's, the CUDA driver's), in a
folder that is gone afterwards. A figure is the time of the first forward and backward, everything that is compiled for it
included; importing and building the model come before. Contenders run at the same time unless `--in-turn` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fp8c.backends.lowering import register_kernels
from fp8c.files import output_file
from fp8c.tools.bench import workloads
from fp8c.tools.bench.gemm import environment

SCHEMA = "fp8c.bench.compile/2"
CACHES = ("FP8C_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
TEMPERATURES = ("cold", "warm")
CONTENDERS = (*workloads.CONTENDERS, *workloads.LOSS_ONLY)


def size(text: str) -> tuple[str, int]:
    """`n_routed_experts=16`. Raises: ValueError for anything else."""
    name, _, number = text.partition("=")
    return name, int(number)


def first_step(options: argparse.Namespace) -> dict[str, Any]:
    """In the process that is measured."""
    if options.device == "cuda":
        register_kernels("cuda")
    workload = workloads.step(options.model, options.batch, options.length, options.device, **dict(options.set))
    contender = workloads.make(workload, options.child)

    def synchronize() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    synchronize()
    started, cpu = time.perf_counter(), time.process_time()
    loss = contender.run()
    synchronize()
    found = {"first_step_s": round(time.perf_counter() - started, 2), "process_s": round(time.process_time() - cpu, 2)}
    return {**found, "result": float(loss), "environment": environment() if options.device == "cuda" else {}}


def start(contender: str, folder: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """A process that takes its first step with the caches in `folder`, which it fills."""
    variables = {**os.environ, **{name: str(folder / contender / name) for name in CACHES}}
    command = [sys.executable, "-m", "fp8c.tools.bench", "compile", "--child", contender, *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process found, or the end of what it said."""
    out, error = process.communicate()
    lines = out.splitlines()
    if process.returncode or not lines:
        return {"error": error[-4000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(contenders: Sequence[str], arguments: Sequence[str], in_turn: bool) -> dict[str, dict[str, Any]]:
    """First steps by temperature and contender."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fp8c-bench-") as folder:
        for temperature in TEMPERATURES:
            if in_turn:
                found[temperature] = {name: answer(start(name, Path(folder), arguments)) for name in contenders}
                continue
            processes = {name: start(name, Path(folder), arguments) for name in contenders}
            found[temperature] = {name: answer(process) for name, process in processes.items()}
    return found


def ratios(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Cold over the first contender's, and each one's warm start over its own cold one."""
    seconds = {t: {n: e["first_step_s"] for n, e in found[t].items() if "first_step_s" in e} for t in TEMPERATURES}
    base = next(iter(found["cold"]))
    cold, warm = seconds["cold"], seconds["warm"]
    over = {f"cold {n} over {base}": round(s / cold[base], 3) for n, s in cold.items() if n != base and base in cold}
    return over | {f"warm over cold, {n}": round(warm[n] / cold[n], 3) for n in cold if n in warm}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [f"{'contender':14} {'cold s':>8} {'warm s':>8}"]
    for name in found["cold"]:
        cells = [str(found[t][name].get("first_step_s", "failed")) for t in TEMPERATURES]
        lines.append(f"{name:14} {cells[0]:>8} {cells[1]:>8}")
    return "\n".join([*lines, *(f"  {name}: {ratio}" for name, ratio in ratios(found).items())])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fp8c bench compile", description=__doc__)
    parser.add_argument("--model", default="deepseek_v3", choices=("deepseek_v3", "qwen3_moe"))
    default = [("n_routed_experts", 16)]
    parser.add_argument(
        "--set", nargs="*", type=size, default=default, metavar="NAME=NUMBER", help="sizes of its config"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument(
        "--contender", nargs="*", default=["bf16-causal", "fp8c"], choices=CONTENDERS, help="first is base"
    )
    parser.add_argument("--in-turn", action="store_true", help="one process after the other")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=output_file, help="write JSON here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(first_step(options)), flush=True)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU on this machine", file=sys.stderr)
        return 5
    sizes = [f"{name}={number}" for name, number in options.set]
    forwarded = ["--model", options.model, "--set", *sizes, "--batch", str(options.batch)]
    forwarded += ["--length", str(options.length), "--device", options.device]
    found = measure(options.contender, forwarded, options.in_turn)
    environments = [e.pop("environment", {}) for entries in found.values() for e in entries.values()]
    document = {
        **{"schema": SCHEMA, **next((e for e in environments if e), {})},
        **{"model": options.model, "set": sizes, "tokens": options.batch * options.length},
        **{"together": not options.in_turn, **found, "ratios": ratios(found)},
    }
    print(table(found), flush=True)
    for name, entry in ((n, e) for t in TEMPERATURES for n, e in found[t].items() if "error" in e):
        print(f"{name}: {entry['error']}", file=sys.stderr)
    if options.out:
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all("error" not in e for t in TEMPERATURES for e in found[t].values()) else 1
