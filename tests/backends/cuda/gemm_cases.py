"""Random GEMM problems and their exact results, for the GPU tests and for runs under compute-sanitizer.

Run as a program, `python -m tests.backends.cuda.gemm_cases SEED COUNT LARGEST` checks COUNT random problems.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fp8c.backends.cuda.config import GemmConfig, Grouping, Output, Scales, one_wide_wave, two_row_waves
from fp8c.backends.cuda.launch import launch
from tests.backends.cuda.accumulator_model import model_product

BLOCK, ROW, TENSOR = Scales.PER_BLOCK, Scales.PER_ROW, Scales.PER_TENSOR
DENSE, ROWS, REDUCTION = Grouping.DENSE, Grouping.ROW_GROUPS, Grouping.REDUCTION_GROUPS
BF16, FP32, ADD = Output.BF16, Output.FP32, Output.FP32_ADD
DTYPE = {BF16: torch.bfloat16, FP32: torch.float32, ADD: torch.float32}

CONFIGS = (
    *(two_row_waves(BLOCK, DENSE, out, cluster=c) for out in Output for c in (1, 2)),
    *(GemmConfig(BLOCK, DENSE, BF16, waves_n=1, wave_n=n) for n in (16, 64, 144, 192)),
    GemmConfig(BLOCK, DENSE, BF16, waves_n=1, wave_n=192, cluster=2),
    GemmConfig(BLOCK, DENSE, BF16),
    GemmConfig(BLOCK, DENSE, FP32, waves_n=3, wave_n=64),
    GemmConfig(BLOCK, DENSE, BF16, warpgroups=1, waves_n=1, wave_n=16, flight=4, staging_bytes=2048),
    GemmConfig(BLOCK, DENSE, FP32, warpgroups=1, waves_n=1, wave_n=56, flight=4),
    GemmConfig(BLOCK, DENSE, BF16, warpgroups=1, waves_n=1, wave_n=112, flight=2),
    GemmConfig(BLOCK, DENSE, BF16, warpgroups=1, waves_n=1, wave_n=32, flight=4, staging_bytes=2048, cluster=2),
    GemmConfig(BLOCK, DENSE, BF16, waves_n=1, wave_n=64, flight=4, staging_bytes=2048),
    *(one_wide_wave(BLOCK, DENSE, BF16, cluster=c, narrow=n) for c, n in ((1, 0), (1, 64), (2, 0), (2, 64))),
    replace(one_wide_wave(BLOCK, DENSE, BF16, cluster=2), narrow=64, early=False),
    replace(one_wide_wave(BLOCK, DENSE, BF16, cluster=2), narrow=64, column_bands=True, band=2),
    *(replace(one_wide_wave(BLOCK, DENSE, out), resident_b=True) for out in (BF16, ADD)),
    *(replace(two_row_waves(BLOCK, DENSE, BF16, cluster=c), lead=0, early=True, held_stages=c - 1) for c in (1, 2)),
    *(
        replace(two_row_waves(BLOCK, g, BF16, cluster=2), lead=0, early=True, held_stages=0, column_bands=c, band=2)
        for g in (DENSE, ROWS)
        for c in (False, True)
    ),
    *(replace(one_wide_wave(BLOCK, DENSE, out, cluster=2), narrow=64, band=2) for out in (BF16, ADD)),
    replace(one_wide_wave(BLOCK, DENSE, BF16, cluster=2), early=False, lead=1),
    GemmConfig(BLOCK, DENSE, BF16, cluster=2, shares_b=True),
    GemmConfig(BLOCK, DENSE, FP32, waves_n=1, wave_n=144, cluster=2, shares_b=True),
    *(replace(two_row_waves(BLOCK, DENSE, BF16, cluster=c), lead=0) for c in (1, 2)),
    replace(two_row_waves(BLOCK, DENSE, BF16, cluster=2), held_stages=0),
    replace(two_row_waves(BLOCK, DENSE, BF16), held_stages=0, lead=0),
    replace(two_row_waves(ROW, DENSE, ADD, cluster=2), staging_bytes=8192),
    *(two_row_waves(ROW, DENSE, out, cluster=c) for out in Output for c in (1, 2)),
    GemmConfig(ROW, DENSE, ADD, waves_n=1, wave_n=64, unroll=False),
    GemmConfig(ROW, DENSE, BF16, warpgroups=1, waves_n=1, wave_n=32, unroll=False),
    two_row_waves(TENSOR, DENSE, BF16),
    two_row_waves(TENSOR, DENSE, FP32, promote=False),
    *(two_row_waves(BLOCK, ROWS, BF16, cluster=c) for c in (1, 2)),
    *(one_wide_wave(BLOCK, ROWS, BF16, cluster=c, narrow=n) for c, n in ((1, 0), (1, 64), (2, 64))),
    replace(one_wide_wave(BLOCK, ROWS, BF16, cluster=2), band=2),
    replace(one_wide_wave(BLOCK, ROWS, BF16, cluster=2), narrow=64, column_bands=True, band=2),
    replace(two_row_waves(BLOCK, ROWS, BF16), lead=0, early=True),
    replace(one_wide_wave(BLOCK, ROWS, FP32, cluster=2), narrow=64),
    GemmConfig(BLOCK, ROWS, BF16),
    GemmConfig(BLOCK, ROWS, FP32, waves_n=1, wave_n=192, cluster=2),
    GemmConfig(BLOCK, ROWS, BF16, warpgroups=1, waves_n=1, wave_n=64, flight=4, staging_bytes=2048),
    replace(two_row_waves(BLOCK, ROWS, BF16, cluster=2), lead=0),
    replace(two_row_waves(BLOCK, ROWS, BF16, cluster=2), held_stages=0, lead=0, staging_bytes=8192),
    *(two_row_waves(ROW, REDUCTION, out, cluster=c) for out in Output for c in (1, 2)),
    *(two_row_waves(BLOCK, REDUCTION, out, cluster=2) for out in (BF16, ADD)),
    GemmConfig(ROW, REDUCTION, ADD, waves_n=1, wave_n=128, unroll=False),
)


@dataclass
class Case:
    """One problem: operands as `launch` takes them, what the output holds before, what it has to hold after."""

    config: GemmConfig
    label: str
    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor
    offs: Tensor | None
    before: Tensor
    expected: Tensor

    def run(self) -> Tensor:
        out = self.before.clone()
        launch(self.config, self.a, self.a_scale, self.b, self.b_scale, out, self.offs)
        return out

    def check(self) -> None:
        out = self.run()
        wrong = int((out != self.expected).sum())  # NaN, the poison, differs from everything
        assert wrong == 0, f"{wrong} of {out.numel()} elements differ: {self.label}\n{self.config}"


def random_case(
    rng: random.Random, config: GemmConfig, largest: int, sizes: tuple[int, int, int] | None = None
) -> Case:
    """Sizes up to `largest`, half of them multiples of 128, or m, n, k as given; payloads of any finite code or like
    quantized normals."""

    def size() -> int:
        n = rng.randint(1, largest)
        return n if rng.random() < 0.5 else -(-n // 128) * 128

    m, n, k = sizes or (size(), size(), size())
    splits = _random_splits(rng, k if config.grouping is REDUCTION else m)
    experts = len(splits)
    offs = (
        None if config.grouping is DENSE else torch.tensor(list(accumulate(splits)), dtype=torch.int32, device="cuda")
    )
    rows_past_end = rng.choice((0, 0, 7)) if config.grouping is ROWS else 0
    if config.grouping is REDUCTION:  # each expert's tokens in whole blocks of 128 (`fp8c.ops`)
        a, b = (_in_blocks(_payload(rng, rows, k), splits) for rows in (m, n))
    else:
        a = _payload(rng, m + rows_past_end, k)
        b = _payload(rng, experts * n if config.grouping is ROWS else n, k)
    blocks = k // 128 + experts if config.grouping is REDUCTION else -(-k // 128)
    a_scale = _row_scales(a.shape[0], blocks)
    block_rows = -(-n // 128)
    b_scale = _row_scales(n, blocks) if config.scales is ROW else _uniform(experts * block_rows, blocks)
    b_rows = 1 if config.scales is ROW else 128
    if config.scales is TENSOR:
        a_scale, b_scale = _uniform(1), _uniform(1)

    match config.grouping:
        case Grouping.DENSE if config.scales is TENSOR:
            ones = torch.ones(1, 1, device="cuda").expand(max(m, n), blocks)
            product = model_product(a, ones, b, ones, 1, config.promote) * (a_scale * b_scale)
        case Grouping.DENSE:
            product = model_product(a, a_scale, b, b_scale, b_rows)
        case Grouping.ROW_GROUPS:
            b = b.as_strided((experts, n, k), (n * b.stride(0), b.stride(0), 1))
            b_scale = b_scale.view(experts, block_rows, blocks)
            product = torch.zeros(a.shape[0], n, device="cuda")
            for e, (start, end) in enumerate(_ranges(splits)):
                product[start:end] = model_product(a[start:end], a_scale[start:end], b[e], b_scale[e], b_rows)
        case Grouping.REDUCTION_GROUPS:
            parts = []
            for e, (start, end) in enumerate(_ranges(splits)):
                block = start // 128 + e
                tokens = slice(block * 128, block * 128 + end - start)
                scales_a, scales_b = a_scale[:, block:], b_scale[:, block:]
                parts.append(model_product(a[:, tokens], scales_a, b[:, tokens], scales_b, b_rows))
            product = torch.stack(parts)
    if config.output is ADD:
        before = torch.randn(product.shape, device="cuda")
        expected = before + product
    else:
        before = torch.full(product.shape, torch.nan, device="cuda", dtype=DTYPE[config.output])
        expected = product.to(before.dtype)
    label = f"m={m} n={n} k={k} splits={splits if offs is not None else None} rows past the end={rows_past_end}"
    return Case(config, label, a, a_scale, b, b_scale, offs, before, expected)


def _random_splits(rng: random.Random, total: int) -> list[int]:
    """1 to 9 sizes that add up to `total`, some of them 0, some of them multiples of 16."""
    cuts = sorted(rng.randint(0, total) for _ in range(rng.randint(0, 8)))
    cuts = [c // 16 * 16 if rng.random() < 0.3 else c for c in cuts]
    edges = [0, *sorted(cuts), total]
    return [end - start for start, end in zip(edges, edges[1:])]


def _ranges(splits: list[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(splits))
    return list(zip([0, *ends], ends))


def _payload(rng: random.Random, rows: int, k: int) -> Tensor:
    """E4M3 [rows, k] with rows of a multiple of 16 bytes; what lies past k is NaN, which must not be read as data."""
    padded = -(-k // 16) * 16
    if rng.random() < 0.5:
        codes = torch.randint(0, 256, (rows, padded), dtype=torch.uint8, device="cuda")
        codes[(codes & 0x7F) == 0x7F] = 0
    else:
        codes = (
            (torch.randn(rows, padded, device="cuda") * 140).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        )
    codes[:, k:] = 0x7F
    return codes.view(torch.float8_e4m3fn)[:, :k]


def _in_blocks(payload: Tensor, splits: list[int]) -> Tensor:
    """[rows, 128 * (K // 128 + E)]: expert e's columns from 128 * (start // 128 + e) on, zeros in between."""
    blocks = payload.shape[1] // 128 + len(splits)
    out = torch.zeros(payload.shape[0], blocks * 128, dtype=torch.uint8, device=payload.device)
    for e, (start, end) in enumerate(_ranges(splits)):
        first = 128 * (start // 128 + e)
        out[:, first : first + end - start] = payload.view(torch.uint8)[:, start:end]
    return out.view(torch.float8_e4m3fn)


def _uniform(*shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") * 2e-3 + 1e-4


def _row_scales(rows: int, blocks: int) -> Tensor:
    """[rows, blocks] with the rows innermost and padded to a multiple of 4."""
    return _uniform(blocks, -(-rows // 4) * 4).t()[:rows]


def run_random_cases(seed: int, count: int, largest: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for i in range(count):
        random_case(rng, CONFIGS[i % len(CONFIGS)], largest).check()


if __name__ == "__main__":
    run_random_cases(*(int(x) for x in sys.argv[1:4]))
    print("all equal")
