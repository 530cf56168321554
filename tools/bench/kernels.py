"""`python -m fp8c.tools.bench kernels`: what serves the operators here in GB/s beside a copy of the same size, in one process.

Bytes are those that must move: every input read once, every output written once. Each figure is given beside the ratio
to the copy, which is the ceiling.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
import triton
from torch import Tensor

from fp8c.backends.cuda.operators import first_on_hopper
from fp8c.backends.triton import KERNELS
from fp8c.files import output_file
from fp8c.tools.bench.timing import time_in_turn

SCHEMA = "fp8c.bench.kernels/1"
EXPECTED_BYTES_PER_US = 4.0e6  # only sizes the graphs

ops = SimpleNamespace(**{name: first_on_hopper(name, kernel) for name, kernel in KERNELS.items()})

ROWS, COLS = 32768, 7168
EXPERTS, CHOICES, FEATURES = 32, 4, 2048
ACT, ACT_T, ACT2, ACT2_T = "e4m3[1x128] fp32", "e4m3[128x1] fp32", "e4m3[1x128] pow2", "e4m3[128x1] pow2"
WEIGHT, CACHE = "e4m3[128x128] fp32", "e5m6[1x128] pow2"


@dataclass(frozen=True)
class Kernel:
    """One call to time. `wanted` is the share of the copy's rate that it is to reach, 0 where none is stated."""

    name: str
    call: Callable[[], object]
    moved_bytes: int
    wanted: float = 0.0


@dataclass(frozen=True)
class Row:
    kernel: str
    moved_bytes: int
    sustained_us: float
    burst_us: float
    gb_per_s: float
    of_copy: float
    wanted: float


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measured(name: str, call: Callable[[], object], *inputs: Tensor, wanted: float = 0.0) -> Kernel:
    """A kernel whose outputs say how many bytes it writes."""
    results = call()
    outputs = results if isinstance(results, tuple) else (results,)
    written = size_of(*(t for t in outputs if isinstance(t, Tensor)))
    return Kernel(name, call, size_of(*inputs) + written, wanted)


def kernels() -> Iterator[Kernel]:
    """Activations at 32768 x 7168 in BF16; weights and experts of DeepSeek-V3's sizes."""
    x = torch.randn(ROWS, COLS, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    yield Kernel("copy", lambda: y.copy_(x), 2 * size_of(x))
    yield measured("quantize 1x128", lambda: ops.quantize(x, ACT), x, wanted=0.97)
    yield measured("quantize 1x128 pow2", lambda: ops.quantize(x, ACT2), x, wanted=0.97)
    gain = torch.randn(COLS, device="cuda", dtype=torch.bfloat16)
    yield measured("RMSNorm + quantize 1x128", lambda: ops.rms_norm_quantize(x, gain, 1e-6, ACT), x, gain, wanted=0.92)
    yield measured("quantize 1x32 e8m0", lambda: ops.quantize(x, "e4m3[1x32] e8m0"), x)
    yield measured("quantize 1x128 e5m6", lambda: ops.quantize(x, CACHE), x)
    yield measured("quantize 128x1 transposed", lambda: ops.quantize(x, ACT_T), x, wanted=0.90)
    yield measured("quantize both", lambda: ops.quantize_both(x, ACT, ACT_T), x, wanted=0.85)
    ends = ragged_ends(ROWS, EXPERTS)
    yield measured("quantize 128x1, experts", lambda: ops.quantize(x, ACT_T, ends), x)
    yield measured("quantize both, experts", lambda: ops.quantize_both(x, ACT, ACT_T, ends), x)
    w = x.view(32, 1024, COLS)
    yield measured("quantize 128x128", lambda: ops.quantize(w, WEIGHT), w)
    yield measured("quantize 128x128 both ways", lambda: ops.quantize_weight(w, WEIGHT), w)
    pair, pair2 = ops.quantize(x, ACT), ops.quantize(x, ACT2)
    packed = ops.quantize(x, CACHE)
    yield measured("dequantize 1x128", lambda: ops.dequantize(*pair, ACT, torch.bfloat16), *pair)
    yield measured("requantize to 128x1", lambda: ops.requantize(*pair, ACT, ACT_T), *pair)
    yield measured("requantize to 128x1 pow2", lambda: ops.requantize(*pair2, ACT2, ACT2_T), *pair2)
    yield measured("requantize e5m6 to 128x1 pow2", lambda: ops.requantize(*packed, CACHE, ACT2_T, None, COLS), *packed)
    tokens = x[: ROWS // CHOICES]
    rows = torch.randint(0, len(tokens), (ROWS,), device="cuda").sort().values
    rows = rows[torch.randperm(ROWS, device="cuda")]
    few = ops.quantize(tokens, ACT2)
    yield measured("gather 1x128", lambda: ops.gather_quantized(*few, rows, ACT2), *few, wanted=0.85)
    yield measured(
        "gather + requantize 128x1, experts",
        lambda: ops.gather_requantized(*few, rows, ACT2, ACT2_T, ends),
        *few,
        wanted=0.85,
    )
    yield measured(
        "gather + quantize 128x1, experts", lambda: ops.gather_quantize(tokens, rows, ACT2_T, ends), tokens,
        wanted=0.85,
    )  # fmt: skip


def activations() -> Iterator[Kernel]:
    """SwiGLU of 2048 features with a router's weight, and the combine of 8 rows for each token with a shared expert."""
    gate_up = torch.randn(ROWS, 2 * FEATURES, device="cuda", dtype=torch.bfloat16)
    dh = torch.randn(ROWS, FEATURES, device="cuda", dtype=torch.bfloat16)
    weight, ends = torch.rand(ROWS, device="cuda"), ragged_ends(ROWS, EXPERTS)
    gate, up = gate_up.chunk(2, -1)
    yield measured("SwiGLU + quantize", lambda: ops.swiglu_quantize(gate, up, weight, ACT), gate_up, wanted=0.92)
    yield measured(
        "SwiGLU + quantize + cache",
        lambda: ops.swiglu_quantize_cached(gate_up, weight, ACT, ACT),
        gate_up,
        wanted=0.92,
    )
    pair = ops.quantize(gate_up, ACT)
    yield measured(
        "SwiGLU backward, experts",
        lambda: ops.swiglu_backward_quantize(dh, *pair, weight, ends, ACT, ACT_T, ACT, ACT_T),
        *(dh, *pair),
        wanted=0.85,
    )
    rows = torch.randn(ROWS, COLS, device="cuda", dtype=torch.bfloat16)
    order, shared = torch.randperm(ROWS, device="cuda"), rows[: ROWS // 8].clone()
    yield measured("combine", lambda: ops.gather_sum(rows, order, 8, shared), rows, shared, wanted=0.85)


def ragged_ends(rows: int, experts: int) -> Tensor:
    """Cumulative ends of experts with unequal numbers of rows, none a multiple of 128."""
    shares = torch.rand(experts, generator=torch.Generator().manual_seed(0)) + 0.2
    ends = (shares.cumsum(0) / shares.sum() * rows).round().to(torch.int32)
    ends[-1] = rows
    return ends.cuda()


def run(seconds: float, idle_seconds: float, only: str = "") -> list[Row]:
    found = [k for k in itertools.chain(kernels(), activations()) if k.name == "copy" or only in k.name]
    rows: list[Row] = []
    copy_rate = 0.0
    for kernel in found:
        expected_us = kernel.moved_bytes / EXPECTED_BYTES_PER_US
        timing = time_in_turn({kernel.name: kernel.call}, expected_us, seconds, idle_seconds).get(kernel.name)
        if timing is None:
            continue
        rate = kernel.moved_bytes / timing.sustained_us * 1e-3
        copy_rate = copy_rate or rate
        row = Row(
            kernel.name, kernel.moved_bytes, timing.sustained_us, timing.burst_us, rate, rate / copy_rate, kernel.wanted
        )
        wanted = f" (wanted {row.wanted:.2f})" if row.wanted else ""
        print(
            f"{row.kernel:38} {row.sustained_us:8.1f} us {row.gb_per_s:6.0f} GB/s {row.of_copy:5.2f} of copy{wanted}",
            flush=True,
        )
        rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fp8c.tools.bench kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of back-to-back runs of each kernel")
    parser.add_argument("--idle", type=float, default=0.2, help="seconds of rest before the burst measurement")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("-o", "--output", type=output_file, help="write the figures here as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA GPU here", file=sys.stderr)
        return 5
    rows = run(options.seconds, options.idle, options.only)
    if options.output:
        document = {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "rows": [asdict(row) for row in rows],
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0
