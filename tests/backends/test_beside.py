"""A step's kernels are compiled while Inductor works: the first calls find them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx

pytest.importorskip("triton", reason="triton compiles the kernels")

import triton
from triton.runtime.jit import JITFunction

import fp8c
from fp8c.backends import beside, lowering, prebuilt
from fp8c.backends.cuda import build
from fp8c.backends.triton import KERNELS, ahead
from fp8c.target_record import TargetRecord
from tests.backends.test_prebuilt import H200, Linears, launcher, linear_halves, needs_compiler

__all__ = ["launcher"]  # a fixture


def test_a_job_that_fails_is_left_to_the_call() -> None:
    done: list[int] = []
    jobs: list[Callable[[], object]] = [lambda: 1 // 0, *(lambda i=i: done.append(i) for i in range(5))]  # type: ignore[misc]
    for thread in beside.run_beside(jobs, threads=1):
        thread.join()
    assert done == [0, 1, 2, 3, 4]


def test_ranks_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert beside.threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert beside.threads() == 1


def test_only_this_threads_launches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's kernel must run: nobody would make its launch again."""
    made: list[Any] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **kwargs: made.append(kernel))
    launches: dict[str, ahead.Launch] = {}
    with ahead.recording(launches):
        other = threading.Thread(target=lambda: JITFunction.run("a kernel", grid=(1,), warmup=False))
        other.start()
        other.join()
    assert made == ["a kernel"] and not launches


@needs_compiler
def test_the_first_calls_compile_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: Counter[bool],  # noqa: F811
) -> None:
    """Through the driver: Dynamo's fake tensors are about when the step is planned."""
    monkeypatch.setenv("FP8C_CACHE_DIR", str(tmp_path / "fp8c"))
    monkeypatch.setattr("fp8c.session._device", lambda inputs: "cuda")
    order: list[str] = []
    monkeypatch.setattr("torch._inductor.async_compile.maybe_warm_pool", lambda: order.append("Inductor's processes"))
    graphs: list[fx.Graph] = []

    def compile_beside(found: list[fx.Graph], target: TargetRecord) -> None:
        graphs.extend(found)
        order.append("fp8c's threads")
        for thread in beside.run_beside(beside.jobs_of(found, target), threads=2):
            thread.join()

    monkeypatch.setattr("fp8c.session.compile_beside", compile_beside)
    monkeypatch.setattr(lowering, "lower", lambda gm, inputs, how, **options: make_boxed_func(gm))
    step = fp8c.compile(Linears(), target="h200", lowering="inductor", dynamic=False)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        step(torch.randn(128, 256, dtype=torch.bfloat16)).backward()
        assert len(graphs) == 2 and order == ["Inductor's processes", "fp8c's threads"]
        monkeypatch.setattr(build, "compile_cubin", lambda config: pytest.fail(f"compiled again: {config}"))
        served, fused = prebuilt.serve_gemms(graphs, H200), prebuilt.serve_fused(graphs, H200)
        for who in (*served.values(), *fused.values()):
            assert not isinstance(who, str) and build.cubin(who)[:4] == b"\x7fELF"
        launcher.clear()
        for node in (node for graph in graphs for node in graph.nodes if node not in fused):
            kernel: Any = KERNELS.get(ahead.operator_name(node))
            if kernel is not None:
                kernel(*fx.map_arg(node.args, ahead.as_meta), **fx.map_arg(node.kwargs, ahead.as_meta))
    assert served and launcher[True] >= 2 and launcher[False] == 0, launcher


@needs_compiler
def test_accumulators_have_instances_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main_grad=True` makes other GEMMs of the backward half than the graph that was captured has."""
    monkeypatch.setattr("fp8c.session._device", lambda inputs: "cuda")
    monkeypatch.setattr("torch._inductor.async_compile.maybe_warm_pool", lambda: None)
    operators: list[str] = []
    monkeypatch.setattr(
        "fp8c.session.compile_beside",
        lambda graphs, target: operators.extend(ahead.operator_name(n) for graph in graphs for n in graph.nodes),
    )
    monkeypatch.setattr(lowering, "lower", lambda gm, inputs, how, **options: make_boxed_func(gm))
    step = fp8c.compile(Linears(), target="h200", lowering="inductor", dynamic=False, main_grad=True)
    step(torch.randn(128, 256, dtype=torch.bfloat16))
    assert operators.count("scaled_mm_add_") == 2


def test_nothing_is_started_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(beside, "run_beside", lambda jobs, threads: pytest.fail("compiles"))
    beside.compile_beside([half.graph for half in linear_halves("deepseek_v3", "h200")], H200)


def test_another_gpu_than_the_targets_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(beside, "run_beside", lambda jobs, threads: pytest.fail("compiles"))
    beside.compile_beside([], H200)
