"""Gradient checkpointing: the regions the user marks are computed again, and only what enters them is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8c import graph as g
from fp8c.tools import opt
from tests.models import hf
from tests.models.harness import Outcome, check, loss_of, train_both
from tests.models.test_handwritten import Block, Dropouts, FusedQkv, Mlp, features, on_features, rms


class Checkpointed(nn.Module):
    def __init__(self, blocks: list[nn.Module], use_reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)  # type: ignore[assignment]
        return x


def on_leaf(model: nn.Module) -> Tensor:
    return loss_of(model(features().requires_grad_()))


def saved(outcome: Outcome) -> list[str]:
    """Types of what crosses to backward, inputs left out."""
    return [g.type_text(g.value(n)) for n in outcome.rewritten.halves.saved() if n.op != "placeholder"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_only_region_inputs_are_kept(use_reentrant: bool) -> None:
    model = Checkpointed([Block(rms, FusedQkv, Mlp) for _ in range(2)], use_reentrant)
    outcome = train_both(model, on_leaf)
    check(outcome)
    assert saved(outcome) == [
        "bf16[2, 64, 128]"
    ]  # the stream between the two blocks; the first one's input is an input
    # 10 fprops, 10 dgrads, 10 wgrads; again: 4 of each block, whose last GEMM no gradient needs
    assert outcome.executed["fp8c::scaled_mm"] == 30 + 8


def test_random_numbers_are_not_drawn_again() -> None:
    outcome = train_both(Checkpointed([Dropouts()]), on_features)
    check(outcome)
    # Another mask in backward would leave the last wgrad uncorrelated: an error of order 1.
    assert max(outcome.errors().values()) < 4 * 2**-4 * 2  # four GEMMs in series, two operands each


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_hf_gradient_checkpointing(use_reentrant: bool) -> None:
    model: Any = hf.build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    outcome = train_both(model, hf.loss)
    check(outcome, depth=14)
    layers = [t for t in saved(outcome) if t == "bf16[2, 64, 128]"]
    assert len(layers) == 2  # what enters layer 1 and the final norm; the embedding is looked up again


def test_plan_tags_survive_the_rewrite() -> None:
    """The quantize and the scaled GEMM that stand for a checkpointed GEMM are in the same region."""
    step = opt.capture_joint(Checkpointed([Mlp()]), features().requires_grad_())
    result = opt.run_passes(step, passes=["assign-roles", "insert-quantize"])
    forward = [n for n in g.calls(result.graph, {torch.ops.fp8c.scaled_mm.default}) if not g.is_backward(n)]
    assert len(forward) == 3
    assert all("ac_graph_id" in n.meta and n.meta.get("recompute") is not None for n in forward)
