"""choose-saved: what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fp8c
from fp8c.diagnostics import DiagnosticError
from fp8c.driver import capture_step, new_session
from fp8c.models import load_model
from fp8c.prepare import prepare
from fp8c.specs.load import loads
from fp8c.tools.loss_run import EXAMPLE, SPECS

SMALL = {"dim": 128, "n_layers": 2, "n_heads": 2, "n_experts": 2, "q_lora_rank": 128, "kv_lora_rank": 128}

SPEC = """version 1;
use "std:bf16" as b;
spec t extends b {
  rule again for op(attention) { recompute out; }
}
"""


def test_a_value_that_may_neither_be_kept_nor_computed_again_is_named() -> None:
    """Attention is never run twice, so a rule that forbids keeping its output leaves backward without it: E0502."""
    small = {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    loaded = load_model("hf:llama", overrides=small, weights="meta", batch=1, seq=16)
    with pytest.raises(DiagnosticError) as raised:
        capture_step(loaded.step(), loaded.example_inputs, new_session(loads(SPEC), "cpu"))
    (found,) = raised.value.diagnostics
    assert found.code == "E0502"
    assert found.message.startswith("backward needs %") and "recompute" in found.message
    assert found.span is not None and "attention" in found.span.text


@pytest.mark.parametrize("variant", ("forward", "dgrad"))
def test_what_a_spec_keeps_in_bf16_is_not_quantized(variant: str) -> None:
    """`cache gate as bf16` has no scales: E0421 came out of a pass for it."""
    loaded = load_model(str(EXAMPLE), weights="meta", batch=1, seq=128, overrides=SMALL)
    prepare(loaded.module)
    spec = loads(SPECS[variant])
    rewritten = capture_step(loaded.step(), loaded.example_inputs, new_session(spec, "cpu"))
    kept = [saved for saved in rewritten.ctx.saved.values() if "cache gate" in saved.why]
    assert kept and all(saved.format is None for saved in kept)


#: PyTorch's generators of random numbers, each giving values like x.
GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "multinomial": lambda x: torch.multinomial(torch.ones(x.shape), x.shape[-1]).to(x.dtype),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "rand_like": torch.rand_like,
    "randint_like": lambda x: torch.randint_like(x, 7),
    "randperm": lambda x: torch.randperm(x.numel()).view(x.shape).to(x.dtype),
    "uniform_": lambda x: torch.empty_like(x).uniform_(0.5, 2.0),
}


def test_backward_reads_the_random_numbers_that_forward_drew() -> None:
    """The gradient of sum(x * noise) is the noise. A router that draws its experts (PhiMoE) got the gradients of others."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterDict({name: nn.Parameter(torch.ones(16, 128)) for name in GENERATORS})

        def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
            # what is made of them elementwise is cheaper to compute again than to keep
            noises = {name: draw(self.scales[name].detach()).abs().log1p() for name, draw in GENERATORS.items()}
            return sum((self.scales[name] * noise).sum() for name, noise in noises.items()), noises  # type: ignore[return-value]

    model = Noisy()
    loss, noises = fp8c.compile(model, "bf16", "cpu")()
    loss.backward()
    assert [name for name in GENERATORS if not torch.equal(model.scales[name].grad, noises[name])] == []  # type: ignore[arg-type]
