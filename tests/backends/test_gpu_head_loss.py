"""The fused output head in a step under Inductor on the GPU: the same gradients, less memory, no wait of the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8c
from fp8c import driver
from fp8c.models import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

#: A vocabulary much larger than the model, so that the head is what its peak memory is made of.
SIZES = {
    **{"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "vocab_size": 32768, "head_dim": 128},
}


def trained(without: tuple[str, ...], length: int = 1024, **options: Any) -> tuple[Any, dict[str, Tensor], float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    loaded = load_model("hf:llama", overrides=SIZES, weights="random", batch=2, seq=length)
    step = fp8c.compile(loaded.module.cuda(), "bf16", outputs=("loss",), without=without, dynamic=False, **options)
    tokens = torch.randint(SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1)).cuda()
    for _ in range(2):
        step.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.zero_grad()
        loss = step(input_ids=tokens, labels=tokens, use_cache=False).loss
        (loss / 3).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fused = {r.name: r.changed for r in driver.session_of(step).steps[-1].records}.get("fuse-head-loss", 0)
    assert fused == (0 if without else 1)
    gradients = {n: p.main_grad if options.get("main_grad") else p.grad for n, p in step.named_parameters()}
    return loss.detach(), gradients, peak


#: Values rounded to BF16 between the loss and the first norm's weight: head 2, norm 1, MLP 6, norm 1, residual 1, output
#: projection 1, attention 1, rotation 2, projections and their sum 3.
ROUNDINGS = 18
#: A value and a value that differs a little round apart by up to a unit in the last place, 2^-8; such differences of
#: different operators are independent, and add up as their squares.
BOUND = math.sqrt(ROUNDINGS) * 2.0**-8


@pytest.mark.parametrize("main_grad", [False, True])
def test_the_same_gradients_in_less_memory(main_grad: bool) -> None:
    loss, gradients, peak = trained((), main_grad=main_grad)
    expected, others, plain_peak = trained(("fuse-head-loss",), main_grad=main_grad)
    torch.testing.assert_close(loss, expected, rtol=2.0**-14, atol=0.0)
    for name, found in gradients.items():
        error = (found.float() - others[name].float()).norm() / others[name].float().norm()
        assert error < BOUND, (name, float(error))
    print(f"peak {peak:.0f} MiB, {plain_peak:.0f} MiB without fuse-head-loss")
    assert peak < 0.8 * plain_peak
