"""Prepare Hugging Face models: experts as grouped GEMMs, and hooks that capture can't install itself.

transformers keeps experts as fused 3-D parameters and picks their code by name from a registry. Its own `grouped_mm`
falls back to an opaque FP32 operator with a host synchronization when parameters are FP32 under autocast, so fp8c
registers an implementation of its own, equal to it otherwise.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from fp8c import grouped
from fp8c.diagnostics import Diagnostic, Severity

IMPLEMENTATION = "fp8c"


def prepare_hf(module: nn.Module) -> list[Diagnostic]:
    """Switch every transformers model inside `module` to fp8c's experts, and install its output-capturing hooks."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    remarks: list[Diagnostic] = []
    whole = {m for model in module.modules() if isinstance(model, PreTrainedModel) for m in model.modules()}
    for name, expert in module.named_modules():
        if expert not in whole and is_hf_experts(expert) and expert.config._experts_implementation != IMPLEMENTATION:
            remarks.append(_switched(1, name, expert.config._experts_implementation))
            expert.config._experts_implementation = IMPLEMENTATION
    for name, model in module.named_modules():
        if not isinstance(model, PreTrainedModel):
            continue
        # A cold model takes a lock for this in its first forward, which a full graph can't.
        maybe_install_capturing_hooks(model)
        experts = [
            m for m in model.modules() if is_hf_experts(m) and m.config._experts_implementation != IMPLEMENTATION
        ]
        if not experts:
            continue
        before = experts[0].config._experts_implementation
        model.set_experts_implementation(IMPLEMENTATION)
        for expert in experts:  # a part with a configuration object of its own
            expert.config._experts_implementation = IMPLEMENTATION
        remarks.append(_switched(len(experts), name or type(model).__name__, before))
    return remarks


def _switched(count: int, name: str, before: str | None) -> Diagnostic:
    return Diagnostic(
        "R0822",
        f"{count} expert modules of {name} use grouped GEMMs (experts implementation '{before}' -> '{IMPLEMENTATION}')",
        severity=Severity.REMARK,
    )


def is_hf_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward through its experts registry."""
    layout = ("has_gate", "has_bias", "is_transposed", "_apply_gate")  # what use_experts_implementation() adds
    registered = hasattr(getattr(module, "config", None), "_experts_implementation")
    return registered and all(hasattr(module, name) for name in layout)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of transformers as two grouped GEMMs.

    Shapes:  hidden_states [T, H], top_k_index i64 [T, K], top_k_weights [T, K] -> [T, H], in hidden_states' dtype
    Source:  transformers.integrations.moe.grouped_mm_experts_forward, whose parameter layouts it reads.
    """
    if getattr(self, "_is_expert_parallel", False):
        # Entries beyond the local experts: only transformers' own code masks them.
        from transformers.integrations.moe import grouped_mm_experts_forward

        result: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return result

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        return grouped.matmul(x, weight if self.is_transposed else weight.transpose(-2, -1), rows, bias)

    rows = grouped.route(top_k_index, self.num_experts, getattr(self, "fp8c_ranks", None))
    x = grouped.sent(hidden_states[rows.order // top_k_index.shape[-1]], rows)
    if self.has_gate:
        x = self._apply_gate(project(x, "gate_up_proj"))
    else:
        x = self.act_fn(project(x, "up_proj"))
    x = project(x, "down_proj")
    if getattr(self, "has_post_expert_norm", False):  # later than 5.17
        x = self.post_expert_norm(x)
    x = x * grouped.sent(top_k_weights.reshape(-1)[rows.order], rows).unsqueeze(-1)
    return grouped.total(x, rows, (0,), like=hidden_states)
