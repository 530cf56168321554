"""What `bench layer` and `bench step` run: modules of real widths, and the contenders made of each.

A contender is a module of its own, built from the same seed, and a call that runs forward and backward once.

    bf16          torch.compile of the model as transformers runs it: attention gets a mask tensor
    bf16-causal   the same, attention called with is_causal and no mask
    fp8c          fp8c.compile, everything on
    fp8c-masked   fp8c.compile without causal-attention
    fp8c-main-grad  fp8c.compile with FP32 gradients accumulated by the GEMMs
    fp8c-lean     the same, and FP8 weights are freed as backward reads them

Three more where they are named: their calls return the loss alone, so logits need not exist.

    bf16-loss       bf16-causal, only the loss
    fp8c-loss       fp8c.compile(outputs=("loss",)): the output head is joined with the loss
    fp8c-loss-unfused  the same without fuse-head-loss

Every run counts as one optimizer step of one micro-batch: FP8 weights are quantized in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fp8c
from fp8c import driver

BF16 = torch.bfloat16
CONTENDERS = ("bf16", "bf16-causal", "fp8c", "fp8c-masked", "fp8c-main-grad", "fp8c-lean")
LOSS_ONLY = ("bf16-loss", "fp8c-loss", "fp8c-loss-unfused")
WITHOUT = {"fp8c-masked": ("causal-attention",), "fp8c-loss-unfused": ("fuse-head-loss",)}

#: DeepSeek-V3's widths (transformers' defaults) with 2 MoE layers of 32 experts; 3.8 billion parameters.
DEEPSEEK_V3 = {"num_hidden_layers": 2, "first_k_dense_replace": 0, "n_routed_experts": 32, "vocab_size": 32768}
#: Qwen3-30B-A3B's widths with 6 layers of 64 experts; 2.1 billion parameters.
QWEN3_MOE = {
    **{"num_hidden_layers": 6, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    **{"vocab_size": 32768, "intermediate_size": 6144},
}
LINEARS = ((16384, 4096, 7168), (16384, 7168, 2048), (8192, 8192, 8192))


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    build:      (causal) -> module on the device; `causal` asks for attention without a mask tensor
    forward:    (module, inputs) -> a scalar or a tensor to differentiate
    inputs:     device -> what forward reads; drawn once
    contenders: those that make sense
    is_short:   timed through a CUDA graph of several runs: launches from Python would take longer than the kernels
    """

    name: str
    tokens: int
    build: Callable[[bool], nn.Module]
    forward: Callable[[nn.Module, Any], Tensor]
    inputs: Callable[[], Any]
    contenders: tuple[str, ...] = ("bf16", "fp8c")
    is_short: bool = False


@dataclass
class Contender:
    """A compiled module with its inputs. `run` is one forward and backward with fresh gradients."""

    name: str
    module: nn.Module
    workload: Workload
    inputs: Any
    gradient: Tensor | None = field(default=None, repr=False)

    def forward(self) -> Tensor:
        return self.workload.forward(self.module, self.inputs)

    def backward(self, out: Tensor) -> None:
        if out.dim() == 0:
            out.backward()  # type: ignore[no-untyped-call]
            return
        if self.gradient is None:
            generator = torch.Generator(out.device).manual_seed(7)
            self.gradient = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
        out.backward(self.gradient)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        self.module.zero_grad(set_to_none=True)
        for value in self.inputs if isinstance(self.inputs, (tuple, list)) else ():
            if isinstance(value, Tensor):
                value.grad = None

    def run(self) -> Tensor:
        self.clear()
        session = self.module.__dict__.get("fp8c_session")
        if isinstance(session, driver.Session):
            session.weights.invalidate()
        out = self.forward()
        self.backward(out)
        return out.detach()


def make(workload: Workload, name: str, spec: str = "deepseek_v3", **options: Any) -> Contender:
    """Build and compile one contender; nothing is captured before its first run."""
    torch.manual_seed(0)
    module = workload.build(name in ("bf16-causal", "bf16-loss"))
    outputs = ("loss",) if name in LOSS_ONLY else ()
    if name.startswith("bf16"):
        call = driver.only_fields(module._call_impl, outputs) if outputs else module._call_impl
        module._compiled_call_impl = torch.compile(call, fullgraph=True, dynamic=False)
    else:
        is_lean, without = name == "fp8c-lean", WITHOUT.get(name, ())
        module = fp8c.compile(
            module,
            spec,
            dynamic=False,
            without=without,
            main_grad=is_lean or name == "fp8c-main-grad",
            release_weights=is_lean,
            outputs=outputs,
            **options,
        )
    return Contender(name, module, workload, workload.inputs())


# --- layers --------------------------------------------------------------------------------------------------------


def linear(m: int, n: int, k: int, device: str = "cuda") -> Workload:
    def build(_: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(k, n, bias=False, dtype=BF16, device=device))

    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(m, k, dtype=BF16, device=device).requires_grad_(),)

    return Workload(f"linear {m} x {n} x {k}", m, build, lambda module, x: module(*x), inputs, is_short=True)


def moe_block(tokens: int, skewed: bool, device: str = "cuda", **overrides: Any) -> Workload:
    """The MoE block of HF DeepseekV3: 32 experts, top-8, real widths, with its shared expert.

    skewed: a bias on the router's choice, rising over the experts, sends the most loaded expert several times the mean
    """

    def build(_: bool) -> nn.Module:
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

        config = DeepseekV3Config(**(DEEPSEEK_V3 | overrides))
        config._experts_implementation = "grouped_mm"
        with torch.device(device):
            block: nn.Module = DeepseekV3MoE(config).to(BF16)
        with torch.no_grad():
            for p in block.parameters():
                p.normal_(0.0, 0.02)
            bias = block.get_buffer("gate.e_score_correction_bias")
            steps = torch.linspace(-1, 1, bias.numel(), device=device)[torch.randperm(bias.numel(), device=device)]
            bias.copy_(0.35 * steps if skewed else torch.zeros_like(steps))
        return block

    def inputs() -> tuple[Tensor, ...]:
        width = int(overrides.get("hidden_size", 7168))
        return (torch.randn(4, tokens // 4, width, dtype=BF16, device=device).requires_grad_(),)

    kind = "skewed" if skewed else "even"
    return Workload(f"moe block {kind}", tokens, build, lambda module, x: module(*x), inputs)


# --- steps ---------------------------------------------------------------------------------------------------------


def causal_implementation() -> str:
    """Register transformers' SDPA under a name without a mask function, so that models build no mask for it."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    return "sdpa_causal"


def step(kind: str, batch: int, length: int, device: str = "cuda", **overrides: Any) -> Workload:
    """A causal language model of transformers: forward, loss and backward."""
    defaults = {"deepseek_v3": DEEPSEEK_V3, "qwen3_moe": QWEN3_MOE}[kind]

    def build(causal: bool) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(kind, **(defaults | overrides))
        implementation = causal_implementation() if causal else "sdpa"
        with torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation=implementation)
        model.train()
        return model

    def inputs() -> dict[str, Tensor]:
        vocabulary = (defaults | overrides)["vocab_size"]
        ids = torch.randint(vocabulary, (batch, length), device=device)
        return {"input_ids": ids, "labels": ids}

    def forward(module: nn.Module, given: dict[str, Tensor]) -> Tensor:
        loss: Tensor = module(**given, use_cache=False).loss
        return loss

    return Workload(f"{kind} step", batch * length, build, forward, inputs, CONTENDERS)


def names(given: Sequence[str] | None, workload: Workload) -> list[str]:
    return [n for n in workload.contenders if not given or n in given] + [
        n for n in given or () if n in LOSS_ONLY and n not in workload.contenders and "step" in workload.name
    ]
