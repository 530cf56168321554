"""fuse-casts: the same numbers from fewer operators, and nothing where the backend has no such kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fp8c.backends.reference  # noqa: F401
from fp8c import graph as g
from fp8c.formats import Format
from fp8c.ops import fused
from fp8c.passes.fuse_casts import fits_bf16
from fp8c.tools import opt
from tests.passes.steps import STEPS

BEFORE = opt.pass_names()[: opt.pass_names().index("fuse-casts")]


def values(tensors: Any) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for t in tensors:
        if t.dtype is torch.int32:
            yield torch.tensor([70, 130, 130, 256], dtype=torch.int32)
        elif t.dtype is torch.int64:
            yield torch.randint(0, 128, t.shape, generator=generator)
        else:
            yield torch.randn(t.shape, generator=generator).to(t.dtype)


def run(result: opt.OptResult) -> list[torch.Tensor]:
    """Outputs and gradients of both halves on the same random numbers."""
    assert result.halves is not None
    forward, backward = result.halves.forward, result.halves.backward
    count = result.halves.num_fwd_outputs
    outputs = forward(*values(n.meta["val"] for n in forward.graph.find_nodes(op="placeholder")))
    saved, outputs = outputs[count:], outputs[:count]
    tangents = [torch.ones_like(t) * 0.5 for t in outputs]
    gradients = backward(*saved, *tangents)
    return [t for t in (*outputs, *gradients) if t is not None]


@pytest.mark.parametrize("step", list(STEPS))
def test_the_numbers_stay_the_same(step: str) -> None:
    captured = STEPS[step]()
    plain = opt.run_passes(captured, "deepseek_v3", BEFORE, target="h200")
    fused = opt.run_passes(captured, "deepseek_v3", [*BEFORE, "fuse-casts"], target="h200")
    assert fused.changed[-1][1] > 0
    for before, after in zip(run(plain), run(fused), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    "fmt, fits", [("e5m6[1x128] pow2", True), ("e5m6[1x128] e8m0", True), ("e5m6[1x128] fp32", False)]
)
def test_bf16_holds_what_powers_of_two_scale(fmt: str, fits: bool) -> None:
    """Otherwise a dequantized value has more bits than BF16, and wgrad's codes can't be made from it."""
    assert fits_bf16(Format.parse(fmt)) == fits


def test_running_it_again_changes_nothing() -> None:
    result = opt.run_passes(STEPS["experts"](), "deepseek_v3", [*BEFORE, "fuse-casts", "fuse-casts"], target="h200")
    assert result.changed[-2][1] > 0 and result.changed[-1][1] == 0


def test_a_target_without_the_kernels_keeps_the_graph() -> None:
    result = opt.run_passes(STEPS["experts"](), "deepseek_v3", [*BEFORE, "fuse-casts"], target="cpu")
    assert result.changed[-1] == ("fuse-casts", 0)


def test_no_operand_is_left_in_a_layout_that_a_gemm_would_copy() -> None:
    """Every FP8 operand of a GEMM has its reduction innermost, and 1x128 scales their rows."""
    result = opt.run_passes(STEPS["experts"](), "deepseek_v3", [*BEFORE, "fuse-casts"], target="h200")
    assert result.halves is not None
    found = 0
    for half in (result.halves.forward, result.halves.backward):
        for node in g.calls(half.graph, {getattr(torch.ops.fp8c, n).default for n in GEMMS}):
            for data, scale in ((0, 1), (2, 3)):
                q, s = (g.value(node.args[i]) for i in (data, scale))
                assert q.stride(-1) == 1, (node.name, q.stride())
                assert s.dim() == 3 or s.stride(0) == 1, (node.name, s.stride())
                found += 1
    assert found == 12


GEMMS = ("scaled_mm", "scaled_grouped_mm", "scaled_grouped_wgrad")


def test_every_fused_operator_is_known_to_the_verifier() -> None:
    known = {target._schema.name.removeprefix("fp8c::") for target in (*fused.MAKES, *fused.READS)}
    assert set(fused._PLAIN) <= known
