"""What a half looks like when Inductor's inner compiler gets it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fp8c.backends import lowering
from fp8c.tools import opt

aten = torch.ops.aten


def test_the_gradient_of_a_loss_is_compared_not_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattered, a matrix as large as the logits is filled, written and read again."""
    lowered: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        lowered.append(gm)
        return gm.forward

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", inner)
    logits, labels = torch.randn(8, 32).to(torch.bfloat16).requires_grad_(), torch.randint(32, (8,))
    step = opt.capture_joint(loss, logits, labels)
    result = opt.run_passes(step, "deepseek_v3", opt.pass_names(), target="h200")
    assert result.halves is not None
    backward = result.halves.backward
    given = [n.meta["val"] for n in backward.graph.find_nodes(op="placeholder")]
    lowering.lower_inductor(backward, given, is_inference=False)
    targets = {node.target for node in lowered[0].graph.nodes}
    assert aten.eq.Tensor in targets and not targets & {aten.scatter.value, aten.scatter.src}
