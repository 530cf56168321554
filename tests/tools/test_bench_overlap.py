"""What the overlap benchmark makes of a trace, and its graph without transfers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from fp8c.tools.bench.overlap import Setting, best_of
from fp8c.tools.bench.overlap_timing import Calibration, Kernel, exposed_share, transfer_times_us, without_transfers

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


def test_the_committed_run_says_what_the_documentation_does() -> None:
    """The figures of docs/expert_parallel.md, from the raw results."""
    found = json.loads((ROOT / "tools/bench/results/h200_x2_overlap_2026-11-22.json").read_text())
    final = found["tokens"]["4096"]["final"]
    page = (ROOT / "docs/expert_parallel.md").read_text()
    assert f"{final['trace']['hidden_share']:.1%}".replace("%", " %") in page
    assert f"{final['speedup']:.2f}x" in page
    assert f"{final['simulated_over_measured']:.2f}" in page
