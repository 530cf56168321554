"""What the overlap benchmark makes of a trace, and its graph without transfers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx

from fp8c.ops.exchange import all_to_all
from fp8c.tools.bench.overlap import HIDDEN, SPEEDUP, Setting, best_of
from fp8c.tools.bench.overlap_timing import Calibration, Kernel, exposed_share, transfer_times_us, without_transfers
from fp8c.tools.bench.overlap_work import sent_bytes

ROOT = Path(__file__).parents[2]
c10d = torch.ops._c10d_functional


def test_exposed_is_what_no_other_kernel_covers() -> None:
    kernels = [
        Kernel("gemm", "7", 0.0, 10.0),
        Kernel("ncclDevKernel_SendRecv", "20", 5.0, 15.0),  # 5 us alone
        Kernel("ncclDevKernel_SendRecv", "24", 12.0, 18.0),  # 3 more
        Kernel("gemm", "7", 18.0, 20.0),
    ]
    found = exposed_share(kernels)
    assert (found["comm_ms"], found["exposed_ms"], found["compute_ms"]) == pytest.approx((0.013, 0.008, 0.012))
    assert found["hidden_share"] == pytest.approx(5.0 / 13.0)


def test_waiting_for_a_rank_is_no_transfer() -> None:
    """This rank's kernel runs 10 us, the other's 4: it waited 6, which fall into its compute."""
    mine = [Kernel("gemm", "7", 0.0, 3.0), Kernel("nccl", "20", 0.0, 10.0), Kernel("gemm", "7", 9.0, 12.0)]
    theirs = [Kernel("nccl", "20", 100.0, 104.0)]
    found = exposed_share(mine, [transfer_times_us(mine), transfer_times_us(theirs)])
    assert (found["comm_ms"], found["exposed_ms"]) == pytest.approx((0.004, 0.003))


def test_a_graph_without_its_transfers_computes_the_same() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    doubled = graph.call_function(torch.ops.aten.add.Tensor, (x, x))
    sent = graph.call_function(c10d.all_to_all_single.default, (doubled, [2], [2], "0"), name="sent")
    waited = graph.call_function(c10d.wait_tensor.default, (sent,))
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (waited, x)),))
    module = without_transfers(fx.GraphModule(torch.nn.Module(), graph), ["sent"])
    assert not [n for n in module.graph.nodes if "c10d" in str(n.target)]
    value, moved = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])
    assert torch.equal(module(value, moved)[0], moved * value)


def test_interference_is_never_below_one() -> None:
    """A calibration whose second run happened to be faster."""
    found = Calibration(10.0, 9.0, 2.0, 3.0).interference
    assert (found.compute, found.comm) == (1.0, 1.5)


def test_the_best_setting_hides_enough_before_it_is_fast() -> None:
    def one(hidden: float, speedup: float) -> dict[str, Any]:
        return {"trace": {"hidden_share": hidden}, "speedup": speedup}

    assert best_of({"1:1": one(0.8, 1.5), "2:2": one(0.95, 1.4), "4:4": one(0.99, 1.1)}) == "2:2"
    assert best_of({"1:1": one(0.8, 1.5), "4:4": one(0.7, 1.1)}) == "1:1"
    assert Setting.parse("4") == Setting(4, 4) and str(Setting.parse("2:4")) == "2:4"


def committed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "tools/bench/results" / name).read_text())["tokens"]["4096"]
    return found


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def test_the_committed_run_says_what_the_documentation_does() -> None:
    """The figures of docs/expert_parallel.md, from the raw results."""
    page = (ROOT / "docs/expert_parallel.md").read_text()
    runs = committed("h200_x2_overlap_2026-11-22.json")["repeats"]
    assert len(runs) == 3
    assert ", ".join(percent(run["trace"]["hidden_share"]) for run in runs) in page
    assert ", ".join(f"{run['speedup']:.2f}x" for run in runs) in page
    assert ", ".join(f"{run['simulated_over_measured']:.2f}" for run in runs) in page
    assert min(run["trace"]["hidden_share"] for run in runs) >= HIDDEN
    assert min(run["speedup"] for run in runs) >= SPEEDUP


def test_the_committed_skewed_run_says_what_the_documentation_does() -> None:
    page = (ROOT / "docs/expert_parallel.md").read_text()
    even = max(run["trace"]["hidden_share"] for run in committed("h200_x2_overlap_2026-11-22.json")["repeats"])
    roomy = committed("h200_x2_skew_2026-11-22.json")["skew"]["room 1.2"]
    for bias in ("0.05", "0.1"):
        ranks = [rank["hidden_share"] for rank in roomy[bias]["trace"]["by_rank"]]
        assert ", ".join(percent(share) for share in ranks) in page
        assert even - min(ranks) < 0.05


def test_bytes_that_travel_are_counted_as_they_are_sent(tmp_path: Path) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        group: Any = dist.group.WORLD
        rows, counts = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)

        def run() -> None:
            all_to_all(rows, [4], [4], group.group_name)
            all_to_all(counts, [4], [4], group.group_name)

        assert sent_bytes(run) == {"uint8 x [8]": 32}
    finally:
        dist.destroy_process_group()
