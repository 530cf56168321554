"""`python -m fp8c.tools.bench gemm`: the Hopper GEMMs beside Triton's, cuBLASLt, DeepGEMM, and others with --peer.

A peer is a Python file with `contenders(problem, operands) -> dict[str, Callable[[], object]]`; it stays outside fp8c.
Shapes are DeepSeek-V3's projections at 4096 tokens, two square and long ones, its experts, and short and odd ones.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8c.backends.cuda import tiles
from fp8c.backends.cuda.build import build_all
from fp8c.backends.cuda.config import BLOCK_K, GemmConfig, Grouping, Output, Scales, one_wide_wave, two_row_waves
from fp8c.backends.cuda.launch import launch, multiprocessors
from fp8c.backends.gemms import candidates
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.files import output_file
from fp8c.tools.bench.timing import time_in_turn

SCHEMA = "fp8c.bench.gemm/1"
EXPECTED_FLOPS = 1.1e15  # a second; only sizes the graphs
SHORTEST_US = 5.0


@dataclass(frozen=True)
class Problem:
    """`m` rows of A and `n` rows of B with reduction `k`, for each of `groups`: m-grouped has groups * m rows of A,
    k-grouped reduces over groups * k. Ragged groups have the same total."""

    kind: str  # fprop, wgrad, m-grouped, k-grouped
    m: int
    n: int
    k: int
    groups: int = 1
    is_ragged: bool = False

    @property
    def name(self) -> str:
        groups = f"{self.groups} x " if self.groups > 1 else ""
        return f"{self.kind} {groups}{self.m} x {self.n} x {self.k}{' ragged' if self.is_ragged else ''}"

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.m * self.n * self.k

    @property
    def splits(self) -> list[int]:
        each = self.m if self.kind == "m-grouped" else self.k
        if not self.is_ragged:
            return [each] * self.groups
        rng = random.Random(self.groups)
        weights = [rng.uniform(0.2, 1.8) for _ in range(self.groups)]
        ends = [round(self.groups * each * w / sum(weights)) for w in accumulate(weights)]
        return [end - start for start, end in zip([0, *ends], ends)]


FPROP = (
    (4096, 2112, 7168),
    (4096, 24576, 1536),
    (4096, 32768, 512),
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 7168, 2048),
    (8192, 8192, 8192),
    (16384, 4096, 7168),
)
SHORT = tuple((m, n, k) for m in (1, 16, 64, 128) for n, k in ((2112, 7168), (576, 7168), (7168, 2048), (4096, 7168)))
WGRAD = (
    (2112, 7168, 4096),
    (24576, 1536, 4096),
    (32768, 512, 4096),
    (7168, 16384, 4096),
    (4096, 7168, 4096),
    (7168, 2048, 4096),
    (8192, 8192, 8192),
    (4096, 7168, 16384),
)
EXPERTS = ((4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (8, 4096, 7168, 2048))


def problems() -> Iterator[Problem]:
    yield from (Problem("fprop", *s) for s in FPROP)
    yield from (Problem("wgrad", *s) for s in WGRAD)
    for groups, tokens, n, k in EXPERTS:
        yield from (Problem("m-grouped", tokens, n, k, groups, ragged) for ragged in (False, True))
        yield from (Problem("k-grouped", n, k, tokens, groups, ragged) for ragged in (False, True))
    yield Problem("fprop", 4096, 576, 7168)
    yield from (Problem("fprop", *s) for s in SHORT)


@dataclass(frozen=True)
class Operands:
    """As `launch` takes them. Wgrad kinds also have 128x128 scales for B, the recipe's option for activations."""

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor
    b_block_scale: Tensor
    offs: Tensor | None
    out: Tensor


def make_operands(p: Problem) -> Operands:
    rows, tokens = (
        (p.m * p.groups if p.kind == "m-grouped" else p.m),
        (p.k * p.groups if p.kind == "k-grouped" else p.k),
    )
    blocks = math.ceil(p.k / BLOCK_K)
    if p.kind == "k-grouped":  # each expert's tokens in whole blocks
        blocks = tokens // BLOCK_K + p.groups
        tokens = blocks * BLOCK_K
    leading = (p.groups,) if p.kind == "m-grouped" else ()
    block_scale = _scales(*leading, math.ceil(p.n / BLOCK_K), blocks)
    is_wgrad = p.kind in ("wgrad", "k-grouped")
    offs = torch.tensor(list(accumulate(p.splits)), dtype=torch.int32, device="cuda") if "grouped" in p.kind else None
    out_shape = (p.groups, p.m, p.n) if p.kind == "k-grouped" else (rows, p.n)
    return Operands(
        _payload(rows, tokens),
        _row_scales(rows, blocks),
        _payload(*leading, p.n, tokens),
        _row_scales(p.n, blocks) if is_wgrad else block_scale,
        block_scale,
        offs,
        torch.zeros(out_shape, device="cuda", dtype=torch.float32 if is_wgrad else torch.bfloat16),
    )


def _payload(*shape: int) -> Tensor:
    """Codes distributed as 1x128 groups of normal values have them; constants would draw less power."""
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
    for part in torch.split(out.flatten(), 1 << 28):
        part.copy_((torch.randn(part.shape, device="cuda") * 140).clamp_(-448, 448))
    return out


def _scales(*shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") * 2e-3 + 1e-4


def _row_scales(rows: int, blocks: int) -> Tensor:
    return _scales(blocks, math.ceil(rows / 4) * 4).t()[:rows]


GROUPING = {"m-grouped": Grouping.ROW_GROUPS, "k-grouped": Grouping.REDUCTION_GROUPS}


def chosen(p: Problem, scales: Scales) -> GemmConfig:
    """The instance that fp8c's cost rule takes."""
    rows, tokens = (
        (p.m * p.groups if p.kind == "m-grouped" else p.m),
        (p.k * p.groups if p.kind == "k-grouped" else p.k),
    )
    shape = tiles.Shape(rows, p.n, tokens, p.groups, multiprocessors(torch.cuda.current_device()))
    output = Output.FP32_ADD if p.kind in ("wgrad", "k-grouped") else Output.BF16
    return tiles.choose(shape, scales, GROUPING.get(p.kind, Grouping.DENSE), output)


def own_configs(p: Problem, with_candidates: bool) -> dict[str, GemmConfig]:
    scales = Scales.PER_ROW if p.kind in ("wgrad", "k-grouped") else Scales.PER_BLOCK
    configs = {"fp8c": chosen(p, scales)}
    if scales is Scales.PER_ROW:
        configs["fp8c 128x128 activations"] = chosen(p, Scales.PER_BLOCK)
    if with_candidates:
        for name, rule in list(configs.items()):
            for config in _candidates(rule, p):
                if config not in configs.values():
                    configs[f"{name} {label(config)}"] = config
    return configs


def own_contenders(
    p: Problem, x: Operands, with_candidates: bool
) -> dict[str, tuple[GemmConfig, Callable[[], object]]]:
    calls = {}
    for name, config in own_configs(p, with_candidates).items():
        b_scale = x.b_block_scale if config.scales is Scales.PER_BLOCK else x.b_scale
        calls[name] = (config, _caller(config, x, b_scale))
    return calls


def _caller(config: GemmConfig, x: Operands, b_scale: Tensor) -> Callable[[], object]:
    return lambda: launch(config, x.a, x.a_scale, x.b, b_scale, x.out, x.offs)


def label(config: GemmConfig) -> str:
    waves = f"{config.waves_m}x{config.waves_n} waves" if config.waves_m * config.waves_n > 1 else "one wave"
    more = f", {config.flight} in flight" if config.flight > 1 else ""
    band = f"band {config.band}{' columns' if config.column_bands else ''}"
    kept = ", B resident" if config.resident_b else ""
    return (
        f"{config.tile_m}x{config.tile_n}, {waves}{more}, cluster {config.cluster}, {band}, "
        f"{config.stages} stages{kept}"
    )


def _candidates(rule: GemmConfig, p: Problem) -> Iterator[GemmConfig]:
    """Neighbours of the rule's choice, to check it by measurement."""
    one = GemmConfig(rule.scales, rule.grouping, rule.output, waves_n=1, promote=rule.promote, unroll=rule.unroll)
    if p.m * p.groups <= 128:
        for groups, n in ((1, 16), (1, 32), (1, 64), *(((2, 64),) if p.m > 64 else ())):
            yield replace(one, warpgroups=groups, wave_n=n, flight=4, staging_bytes=2048)
        if p.m > 64:
            yield from (replace(one, warpgroups=1, wave_n=n, flight=2) for n in (112, 128))
        return
    yield from (two_row_waves(rule.scales, rule.grouping, rule.output, cluster=c) for c in (1, 2))
    if rule.scales is Scales.PER_BLOCK and rule.output is Output.BF16:
        narrow = 64 if 0 < p.n % 192 <= 64 else 0
        yield from (one_wide_wave(rule.scales, rule.grouping, rule.output, c, narrow) for c in (1, 2))
    if rule.scales is Scales.PER_BLOCK and p.n < 4096:
        yield from (replace(one, wave_n=n) for n in (192, 144))


def cublaslt_contender(p: Problem, x: Operands) -> dict[str, Callable[[], object]]:
    """torch's block-scaled matrix product; dense only, N a multiple of 128, BF16 output also for wgrad."""
    if p.groups > 1 or p.n % BLOCK_K or p.m < 16:
        return {}
    from torch.nn.functional import ScalingType, scaled_mm

    blocks = p.k // BLOCK_K
    if p.kind == "wgrad":
        scale, kind = x.b_scale, ScalingType.BlockWise1x128
    else:
        padded = torch.zeros(p.n // BLOCK_K, math.ceil(blocks / 4) * 4, device="cuda")
        padded[:, :blocks] = x.b_scale
        scale, kind = padded.t(), ScalingType.BlockWise128x128
    return {"cublaslt": lambda: scaled_mm(x.a, x.b.t(), x.a_scale, ScalingType.BlockWise1x128, scale, kind)}


def operator_arguments(p: Problem, x: Operands) -> tuple[str, tuple[Any, ...]]:
    """The problem as an operator of fp8c: its name and arguments."""
    row, block = "e4m3[1x128] fp32", "e4m3[128x128] fp32"
    operands = x.a, x.a_scale, x.b, x.b_scale
    match p.kind:
        case "fprop":
            return "scaled_mm", (*operands, row, block, BLOCK_K, torch.bfloat16)
        case "wgrad":
            return "scaled_mm_add_", (x.out, *operands, row, row, BLOCK_K)
        case "m-grouped":
            return "scaled_grouped_mm", (*operands, x.offs, row, block, BLOCK_K, torch.bfloat16)
        case _:
            return "scaled_grouped_wgrad_add_", (x.out, *operands, x.offs, row, row, BLOCK_K)


def candidate_contenders(p: Problem, x: Operands) -> dict[str, Callable[[], object]]:
    """fp8c's other implementations, those that serve the problem (`backends.gemms.candidates`)."""
    op, arguments = operator_arguments(p, x)
    calls: dict[str, Callable[[], object]] = {}
    for name in ("triton", "deepgemm"):
        try:
            candidates.call(name, op, arguments)
        except Unsupported:
            continue
        calls[name] = functools.partial(candidates.call, name, op, arguments)
    return calls


def per_tensor_contender(p: Problem, x: Operands) -> dict[str, Callable[[], object]]:
    """cuBLASLt with one scale a tensor and no promotion: other numerics, and a measure of what power and clock allow."""
    if p.kind != "fprop" or p.m < 1024:
        return {}
    one = torch.ones((), device="cuda")
    return {
        "cublaslt per tensor": lambda: torch._scaled_mm(
            x.a, x.b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    }


def measure(p: Problem, peers: list[Any], with_candidates: bool, seconds: float, idle_seconds: float) -> dict[str, Any]:
    x = make_operands(p)
    own = own_contenders(p, x, with_candidates)
    calls: dict[str, Callable[[], object]] = {}
    for peer in peers:
        calls |= peer.contenders(p, x)
    calls |= candidate_contenders(p, x)
    calls |= cublaslt_contender(p, x) | per_tensor_contender(p, x) | {name: call for name, (_, call) in own.items()}
    times = time_in_turn(calls, max(SHORTEST_US, p.flops / EXPECTED_FLOPS * 1e6), seconds, idle_seconds)
    contenders = {}
    for name, t in times.items():
        entry = asdict(t) | {
            f"{kind}_tflops": p.flops / us / 1e6 for kind, us in (("sustained", t.sustained_us), ("burst", t.burst_us))
        }
        contenders[name] = entry | ({"tile": label(own[name][0])} if name in own else {})
    return {"problem": asdict(p), "name": p.name, "contenders": contenders}


def _load_peer(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fp8c.tools.bench gemm", description=__doc__)
    parser.add_argument("--kind", nargs="*", help="only these kinds: fprop wgrad m-grouped k-grouped")
    parser.add_argument(
        "--peer", action="append", default=[], help="a Python file with contenders() of another library"
    )
    parser.add_argument("--most-rows", type=int, default=1 << 31, help="only problems with no more rows of A")
    parser.add_argument("--candidates", action="store_true", help="time other tile shapes beside the rule's choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each sustained measurement")
    parser.add_argument("--idle", type=float, default=0.6, help="seconds of rest before a burst")
    parser.add_argument("--out", type=output_file, help="write JSON here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA GPU on this machine", file=sys.stderr)
        return 5
    peers = [_load_peer(path) for path in options.peer]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        **environment(),
        "seconds": options.seconds,
        "idle_seconds": options.idle,
    }
    document["results"] = []
    chosen_problems = [
        p for p in problems() if (not options.kind or p.kind in options.kind) and p.m * p.groups <= options.most_rows
    ]
    build_all({c for p in chosen_problems for c in own_configs(p, options.candidates).values()})
    for p in chosen_problems:
        is_short = p.m * p.groups <= 128
        result = measure(
            p,
            peers,
            options.candidates,
            options.seconds / (4 if is_short else 1),
            options.idle / (4 if is_short else 1),
        )
        document["results"].append(result)
        cells = [f"{n}: {c['sustained_tflops']:.5g} ({c['burst_tflops']:.5g})" for n, c in result["contenders"].items()]
        print(f"{p.name} | " + " | ".join(cells), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
    return 0
