"""Meshes that can't be: what is said before any rank waits for another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from fp8c import distributed
from fp8c.diagnostics import DiagnosticError
from fp8c.distributed import compare_facts
from fp8c.ops.exchange import chunks
from fp8c.prepare.expert_parallel import expert_mesh
from fp8c.tools.compile_command import Request, parse_mesh, planned_mesh


def code_of(call: Any) -> str:
    with pytest.raises(DiagnosticError) as caught:
        call()
    return caught.value.diagnostics[0].code


def test_a_mesh_is_names_with_sizes() -> None:
    assert parse_mesh("ep=64,pp=16") == (("ep", 64), ("pp", 16))
    assert parse_mesh(None) == ()
    for text in ("ep", "ep=0", "64", "ep=2,ep=2", "ep=2;pp=2"):
        assert code_of(lambda text=text: parse_mesh(text)) == "E0866"
    assert code_of(lambda: planned_mesh(Request("model.py", mesh=(("ep", 2),), verify=True))) == "E0866"


def test_a_mesh_wider_than_the_ranks_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DiagnosticError) as caught:
        distributed.init_mesh("cpu", ep=8)
    assert caught.value.diagnostics[0].code == "E0862"
    assert "ep=8 has 8 ranks, but 2 are running" in caught.value.diagnostics[0].message


def test_a_mesh_without_ep() -> None:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
        assert code_of(lambda: expert_mesh(mesh)) == "E0860"
    finally:
        dist.destroy_process_group()


def test_experts_are_dealt_as_dtensor_deals_them() -> None:
    for experts in range(1, 20):
        for ranks in range(1, 8):
            cut = [len(c) for c in torch.arange(experts).chunk(ranks)]
            assert list(chunks(experts, ranks)) == cut + [0] * (ranks - len(cut))


def test_ranks_compare_facts_through_the_store() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        same = [pool.submit(compare_facts, store, {"spec": "a"}, r, (0, 3), 30.0, 0) for r in (0, 3)]
        assert [job.result() for job in same] == [None, None]
        other = [pool.submit(compare_facts, store, {"spec": t}, r, (0, 3), 30.0, 1) for r, t in ((0, "a"), (3, "b"))]
        for job in other:
            with pytest.raises(DiagnosticError) as caught:
                job.result()
            assert "ranks 0 and 3 differ in spec" in caught.value.diagnostics[0].message
    with pytest.raises(DiagnosticError) as missing:
        compare_facts(store, {"spec": "a"}, 0, (0, 3), 0.2, 2)
    assert "rank 3 has not come" in missing.value.diagnostics[0].message


def test_a_graph_without_collectives_needs_no_agreement() -> None:
    from fp8c.passes.schedule_overlap import agree

    agree(fx.Graph())
