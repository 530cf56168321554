"""The graphs made for a GPU, run on the CPU by their operators' plain forms, give the bits of the CPU's own graphs.

So whatever is done for a GPU (fused casts, transposed weights, kept weights, FP32 accumulation) is exact by itself; what
remains to be compared there are kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fp8c
from fp8c import driver
from fp8c.models import load_model
from tests.backends.test_gpu_step import MODELS

LAYER = {**MODELS["deepseek_v3"], "num_hidden_layers": 1, "first_k_dense_replace": 0}


def gradients_of(target: str, **options: Any) -> tuple[dict[str, Tensor], driver.Session]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = load_model("hf:deepseek_v3", overrides=LAYER, weights="random", batch=2, seq=128).module
    step = fp8c.compile(model, target=target, lowering="reference", dynamic=False, **options)
    ids = torch.randint(512, (2, 128), generator=torch.Generator().manual_seed(1))
    step(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {}
    for name, p in step.named_parameters():
        grad = p.main_grad.to(p.dtype) if options.get("main_grad") and p.requires_grad else p.grad
        if grad is not None:
            found[name] = grad
    return found, driver.session_of(step)


@pytest.mark.slow
@pytest.mark.parametrize("main_grad", [False, True])
def test_a_deepseek_layer(main_grad: bool) -> None:
    plain, _ = gradients_of("cpu")
    found, session = gradients_of("h200", main_grad=main_grad)
    assert set(found) == set(plain)
    for name in plain:
        if (
            main_grad and name == "model.embed_tokens.weight"
        ):  # a word's rows are added in FP32, not in BF16 as on the CPU
            error = (found[name].float() - plain[name].float()).norm() / plain[name].float().norm()
            assert error < 2.0**-8
        else:
            assert torch.equal(found[name], plain[name]), name
    rewrites = {r.name: r.changed for r in session.steps[-1].records}
    assert rewrites["fuse-casts"] > 0 and rewrites["causal-attention"] == 2
    assert (
        session.weights.refreshed == len(session.weights.entries) > 0
    )  # backward's transposed weights are no second copy
