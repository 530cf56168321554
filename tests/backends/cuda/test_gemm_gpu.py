"""The Hopper GEMMs on a GPU: every bit against the tensor-core model, over random shapes and group splits."""

import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="no GPU of compute capability 9.0")]

if IS_HOPPER:
    from fp8c.backends.cuda import build, tiles
    from fp8c.backends.cuda.config import Grouping, Output, Scales, one_wide_wave, two_row_waves
    from tests.backends.cuda.accumulator_model import model_product
    from tests.backends.cuda.gemm_cases import CONFIGS, random_case, run_random_cases
    from tests.backends.cuda.test_gemm_instances import policies

RANDOM_CASES = 2200
A_FMT, B_FMT = "e4m3[1x128] fp32", "e4m3[128x128] fp32"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Fill the kernel cache on all cores."""
    build.build_all(CONFIGS)


def test_random_problems_match_the_model_bit_for_bit() -> None:
    seed = int(os.environ.get("FP8C_TEST_SEED", time.time_ns() % 2**31))
    print(f"seed {seed}")
    run_random_cases(seed, RANDOM_CASES, 640)


def test_larger_problems_match_the_model_bit_for_bit() -> None:
    run_random_cases(7, len(CONFIGS), 2300)


def test_a_last_wave_in_halves_adds_each_row_once() -> None:
    """More tiles than blocks, the rest at most half of them; seen as rows that were added twice."""
    rng = random.Random(8)
    for scales in (Scales.PER_ROW, Scales.PER_BLOCK):
        for cluster in (1, 2):
            config = two_row_waves(scales, Grouping.DENSE, Output.FP32_ADD, cluster=cluster)
            random_case(rng, config, 0, sizes=(2304, 2176, 300)).check()


def test_columns_that_stay_in_shared_memory_are_those_of_the_tile() -> None:
    """Blocks with many tiles: columns for each of them and some left over, only some left over, and a K that doesn't fit."""
    rng = random.Random(11)
    config = replace(one_wide_wave(Scales.PER_BLOCK, Grouping.DENSE, Output.BF16), resident_b=True)
    for sizes in ((700, 26_100, 512), (500, 52_000, 130), (5000, 4000, 300), (900, 26_100, 640)):
        random_case(rng, config, 0, sizes=sizes).check()


def test_what_the_rule_chooses_for_large_problems_matches_the_model() -> None:
    rng = random.Random(12)
    problems = [(policy, size) for policy in policies() for size in ((4608, 3840, 500), (4700, 3648, 260))]
    forward = [(Scales.PER_BLOCK, grouping, Output.BF16) for grouping in (Grouping.DENSE, Grouping.ROW_GROUPS)]
    problems += [(policy, size) for policy in forward for size in ((4096, 6144, 1540), (4608, 4672, 1540))]
    for (scales, grouping, output), (m, n, k) in problems:
        shape = tiles.Shape(m, n, k, 1 if grouping is Grouping.DENSE else 4, 132)
        random_case(rng, tiles.choose(shape, scales, grouping, output), 0, sizes=(m, n, k)).check()


def test_scales_of_any_size_are_applied_exactly() -> None:
    """B's 1x128 scales, from FP32's smallest normal numbers on, also beside huge ones; and those that aren't finite stay in their columns."""
    rng = random.Random(9)
    torch.manual_seed(9)
    for cluster in (1, 2):
        config = two_row_waves(Scales.PER_ROW, Grouping.DENSE, Output.FP32, cluster=cluster)
        case = random_case(rng, config, 0, sizes=(300, 392, 700))
        exponents = torch.randint(-126, 90, case.b_scale.shape, device="cuda")
        case.b_scale.copy_(torch.ldexp(1 + torch.rand_like(case.b_scale), exponents))
        case.expected = model_product(case.a, case.a_scale, case.b, case.b_scale, 1)
        assert case.expected.isfinite().all()
        case.check()

        bad = torch.tensor([0, 17, 130, 391], device="cuda")
        case.b_scale[bad, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan], device="cuda")
        out = case.run()
        good = torch.ones(392, dtype=torch.bool, device="cuda")
        good[bad] = False
        assert not out[:, bad].isfinite().any()
        assert torch.equal(out[:, good], case.expected[:, good])


def test_results_are_the_same_every_time() -> None:
    rng = random.Random(3)
    for config in CONFIGS:
        case = random_case(rng, config, 1500)
        first = case.run()
        for _ in range(5):
            assert torch.equal(case.run(), first), config


def test_replays_in_a_cuda_graph_on_another_stream() -> None:
    rng = random.Random(4)
    for config in CONFIGS[:: len(CONFIGS) // 6]:
        case = random_case(rng, config, 600)
        case.check()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = case.run()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, case.expected)


def test_nan_of_one_expert_stays_with_it() -> None:
    config = two_row_waves(Scales.PER_ROW, Grouping.REDUCTION_GROUPS, Output.FP32)
    case = random_case(random.Random(5), config, 900)
    while case.offs is None or case.offs.shape[0] < 4 or bool((case.offs.diff() % 128 == 0).any()):
        case = random_case(random.Random(time.time_ns()), config, 900)
    count = int(case.offs[1]) - int(case.offs[0])
    start = 128 * (int(case.offs[0]) // 128 + 1)
    end = start + count
    case.a.view(torch.uint8)[:, start:end] = 0x7F
    case.b.view(torch.uint8)[:, start:end] = 0x7F
    out = case.run()
    others = [e for e in range(case.offs.shape[0]) if e != 1]
    assert out[1].isnan().all()
    assert torch.equal(out[others], case.expected[others])


def test_operators_agree_with_the_cpu_reference() -> None:
    """Through torch.ops, with the layouts a graph has: contiguous scales, K no multiple of 16."""
    import fp8c.backends.gemms.dispatch
    import fp8c.backends.reference  # noqa: F401
    from fp8c.backends.reference import accumulator

    torch.manual_seed(0)
    a, b = torch.randn(70, 200), torch.randn(136, 200)
    qa, qb = torch.ops.fp8c.quantize(a, A_FMT), torch.ops.fp8c.quantize(b, B_FMT)
    arguments = (*qa, *qb)
    with accumulator("hopper"):
        expected = torch.ops.fp8c.scaled_mm(*arguments, A_FMT, B_FMT, 128, torch.float32)
    out = torch.ops.fp8c.scaled_mm(*(t.cuda() for t in arguments), A_FMT, B_FMT, 128, torch.float32)
    assert torch.equal(out.cpu(), expected)

    offs = torch.tensor([13, 13, 50], dtype=torch.int32)
    weights = torch.ops.fp8c.quantize(torch.randn(3, 136, 200), B_FMT)
    grouped = (*qa, *weights, offs)
    with accumulator("hopper"):
        expected = torch.ops.fp8c.scaled_grouped_mm(*grouped, A_FMT, B_FMT, 128, torch.float32)
    out = torch.ops.fp8c.scaled_grouped_mm(*(t.cuda() for t in grouped), A_FMT, B_FMT, 128, torch.float32)
    assert torch.equal(out.cpu(), expected)

    offs = torch.tensor([13, 13, 64], dtype=torch.int32)
    columns = "e4m3[128x1] fp32"
    (da, sa), (db, sb) = (torch.ops.fp8c.quantize(x, columns, offs) for x in (a, torch.randn(70, 96)))
    wgrad = (da.t(), sa.t(), db.t(), sb.t(), offs)
    with accumulator("hopper"):
        expected = torch.ops.fp8c.scaled_grouped_wgrad(*wgrad, A_FMT, A_FMT, 128, torch.float32)
    out = torch.ops.fp8c.scaled_grouped_wgrad(*(t.cuda() for t in wgrad), A_FMT, A_FMT, 128, torch.float32)
    assert torch.equal(out.cpu(), expected)
    torch.ops.fp8c.scaled_grouped_wgrad_add_(out, *(t.cuda() for t in wgrad), A_FMT, A_FMT, 128)
    assert torch.equal(out.cpu(), expected + expected)

    acc = torch.ones(70, 136, device="cuda")
    torch.ops.fp8c.scaled_mm_add_(acc, *(t.cuda() for t in arguments), A_FMT, B_FMT, 128)
    with accumulator("hopper"):
        product = torch.ops.fp8c.scaled_mm(*arguments, A_FMT, B_FMT, 128, torch.float32)
    assert torch.equal(acc.cpu(), product + 1)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_is_content(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    count = str(len(CONFIGS)) if tool == "memcheck" else str(len(CONFIGS) // 2)
    program = ["-m", "tests.backends.cuda.gemm_cases", "1", count, "200"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, *program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
