"""Loops over experts as people write them: rewritten to grouped GEMMs with the same results, or refused with the line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8c
from fp8c import driver
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, render
from fp8c.prepare import compare_rewrites, needs_comparison, prepare

H, E, K, T = 32, 4, 2, 24


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, 2 * H, bias=False)
        self.up = nn.Linear(H, 2 * H, bias=False)
        self.down = nn.Linear(2 * H, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Biased(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(H, 2 * H), nn.GELU(), nn.LayerNorm(2 * H), nn.Linear(2 * H, H), nn.Dropout(0.0))


class Fused(nn.Module):
    """One up-projection for gate and up, split in the forward, and a parameter of its own per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(H, 4 * H)
        self.down = nn.Linear(2 * H, H)
        self.scale = nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * up) * self.scale  # type: ignore[no-any-return]


class Adapter(nn.Module):
    """A frozen Linear with a low-rank update, as LoRA has it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out, bias=False).requires_grad_(False)
        self.a = nn.Linear(n_in, 4, bias=False)
        self.b = nn.Linear(4, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))  # type: ignore[no-any-return]


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Adapter(H, 2 * H), Adapter(2 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class Base(nn.Module):
    """What every idiom shares: a softmax router that leaves the last expert without tokens, and the experts."""

    def __init__(self, expert: Callable[[], nn.Module] = SwiGLU) -> None:
        super().__init__()
        self.n_experts, self.top_k = E, K
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([expert() for _ in range(E)])
        self.register_buffer("idle", torch.tensor([0.0] * (E - 1) + [-1e4]))

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = (self.gate(x) + self.idle).softmax(-1)
        weights, indices = probabilities.topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), indices


class Enumerated(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            if token.numel() == 0:
                continue
            y[token] += expert(x[token]) * weights[token, slot, None]
        return y


class CountsAsInDeepSeek(Base):
    """DeepSeek-V3's inference/model.py."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.n_experts).tolist()
        for i in range(self.n_experts):
            if counts[i] == 0:
                continue
            expert = self.experts[i]
            idx, top = torch.where(indices == i)
            y[idx] += expert(x[idx]) * weights[idx, top, None]
        return y


class MaskAsInDeepSeekMoE(Base):
    """The training branch of DeepSeekMoE's modeling file: tokens repeated per choice, boolean masks, plain stores."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        flat = indices.view(-1)
        if self.training:
            x = x.repeat_interleave(self.top_k, dim=0)
            y = torch.empty_like(x)
            for i, expert in enumerate(self.experts):
                y[flat == i] = expert(x[flat == i])
            return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        return self.infer(x, flat, weights)

    def infer(self, x: Tensor, flat: Tensor, weights: Tensor) -> Tensor:
        outputs, start = [], 0
        for i, count in enumerate(flat.bincount(minlength=E).tolist()):
            outputs.append(self.experts[i](x[start : start + count]))
            start += count
        return torch.cat(outputs)


class OneHotAsInMixtral(Base):
    """transformers' Mixtral before experts were fused."""

    def forward(self, x: Tensor) -> Tensor:
        weights, selected = self.routed(x)
        final = torch.zeros((x.shape[0], H), dtype=x.dtype, device=x.device)
        expert_mask = torch.nn.functional.one_hot(selected, num_classes=self.n_experts).permute(2, 1, 0)
        for expert_idx in range(self.n_experts):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            current_state = x[None, top_x].reshape(-1, H)
            current = expert_layer(current_state) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(x.dtype))
        return final


class ExpertHit(Base):
    """transformers' Qwen3Moe before experts were fused: only experts that were hit."""

    def forward(self, x: Tensor) -> Tensor:
        weights, selected = self.routed(x)
        final = torch.zeros((x.shape[0], H), dtype=x.dtype, device=x.device)
        with torch.no_grad():
            expert_mask = F.one_hot(selected, num_classes=self.n_experts).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_state = x[None, top_x].reshape(-1, x.shape[-1])
            current = expert_layer(current_state) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(x.dtype))
        return final


class AnyMask(Base):
    """makeMoE and its many copies: masks over tokens, a dense table of gates, batch and time kept apart."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        gates = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(-1, indices, weights).view(2, -1, E)
        x, indices = x.view(2, -1, H), indices.view(2, -1, K)
        final = torch.zeros_like(x)
        flat_x, flat_gates = x.view(-1, H), gates.view(-1, E)
        for i, expert in enumerate(self.experts):
            expert_mask = (indices == i).any(dim=-1)
            flat_mask = expert_mask.view(-1)
            if flat_mask.any():
                expert_output = expert(flat_x[flat_mask])
                scores = flat_gates[flat_mask, i].unsqueeze(1)
                final[expert_mask] += expert_output * scores
        return final.view(-1, H)


class Nonzero(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = indices == i
            if not mask.any():
                continue
            found = mask.nonzero()
            out[found[:, 0]] = out[found[:, 0]] + expert(x[found[:, 0]]) * weights[found[:, 0], found[:, 1]].unsqueeze(
                -1
            )
        return out


class FlatNonzero(Base):
    """Positions in the flattened decision; the token is computed from them."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        flat, flat_weights = indices.flatten(), weights.flatten()
        out = torch.zeros_like(x)
        for i in range(len(self.experts)):
            at = (flat == i).nonzero(as_tuple=True)[0]
            if at.shape[0] > 0:
                token = at // self.top_k
                out = out.index_add(0, token, self.experts[i](x[token]) * flat_weights[at][:, None])
        return out


class PerSlot(Base):
    """A loop over choices around the loop over experts."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.n_experts):
                mask = indices[:, k] == e
                if mask.sum() == 0:
                    continue
                out[mask] += weights[mask, k].unsqueeze(-1) * self.experts[e](x[mask])
        return out


class SlotInside(Base):
    """A loop over choices inside the loop over experts."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            for k in range(self.top_k):
                token = torch.nonzero(indices[:, k].eq(e)).squeeze(-1)
                out.index_add_(dim=0, index=token, source=expert(x[token]) * weights[token, k].unsqueeze(-1))
        return out


class IntoView(Base):
    """Adds through a view of the output that is returned."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        out = torch.zeros(1, *x.shape, dtype=x.dtype)
        rows = out.view(-1, H)
        for i, expert in enumerate(self.experts):
            token, slot = (indices == i).nonzero(as_tuple=True)
            rows[token] += expert(x[token]) * weights[token, slot].unsqueeze(-1)
        return out.view(-1, H)


class Appended(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        outputs: list[Tensor] = []
        tokens: list[Tensor] = []
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            outputs.append(expert(x[token]) * weights[token, slot, None])
            tokens.append(token)
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), torch.cat(outputs))


class InlineBody(Base):
    """The expert's layers called by the loop itself."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i in range(self.n_experts):
            token, slot = torch.where(indices == i)
            h = x[token]
            h = F.silu(self.experts[i].gate(h)) * self.experts[i].up(h)  # type: ignore[operator]
            y[token] += weights[token, slot, None] * self.experts[i].down(h)  # type: ignore[operator]
        return y


class SeparateLists(Base):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.w1 = nn.ModuleList([nn.Linear(H, 2 * H) for _ in range(E)])
        self.w2 = nn.ModuleList([nn.Linear(2 * H, H) for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i, (w1) in enumerate(self.w1):
            token, slot = torch.where(indices == i)
            y[token] += weights[token, slot, None] * self.w2[i](F.relu(w1(x[token])))
        return y


class StackedParameters(Base):
    """3-D parameters indexed by the loop, with biases and a list of parameters beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.w1 = nn.Parameter(torch.randn(E, 2 * H, H) / 6)
        self.b1 = nn.Parameter(torch.randn(E, 2 * H))
        self.w2 = nn.ParameterList([nn.Parameter(torch.randn(2 * H, H) / 8) for _ in range(E)])
        self.b2 = nn.Parameter(torch.randn(E, H))

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i in range(self.n_experts):
            token, slot = torch.where(indices == i)
            h = F.relu(F.linear(x[token], self.w1[i], self.b1[i]))
            y[token] += weights[token, slot, None] * (h @ self.w2[i] + self.b2[i])
        return y


class Dictionary(Base):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{i}": SwiGLU() for i in range(E)})  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i in range(self.n_experts):
            token, slot = torch.where(indices == i)
            y[token] += weights[token, slot, None] * self.experts[f"expert_{i}"](x[token])  # type: ignore[call-overload]
        return y


class InHelper(Base):
    """The loop in a method with a private name, and zero-argument super() beside it."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        return self.__mix(x, indices, weights=weights)

    def __mix(self, x: Tensor, indices: Tensor, *, weights: Tensor) -> Tensor:
        assert super().extra_repr() == ""
        y = x.new_zeros(x.shape)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            if len(token) == 0:
                continue
            y[token] += expert(x[token]).mul(weights[token, slot].unsqueeze(1))
        return y


class RunsAsInDeepSeek(Base):
    """moe_infer of DeepSeek-V3's modeling file: tokens sorted once, running bounds, outputs put back in order."""

    def forward(self, x: Tensor) -> Tensor:
        weights, topk_ids = self.routed(x)
        counts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        counts.scatter_(1, topk_ids, 1)
        tokens_per_expert = counts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        tokens_per_expert = tokens_per_expert.cpu().numpy()  # type: ignore[assignment]
        outputs: list[Tensor] = []
        start_idx = 0
        for i, num_tokens in enumerate(tokens_per_expert):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            expert = self.experts[i]
            tokens_for_this_expert = sorted_tokens[start_idx:end_idx]
            outputs.append(expert(tokens_for_this_expert))
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return (new_x.view(*topk_ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class RunningSum(Base):
    """The same with counts by bincount, the bound moved at the end, and stores into runs of the output."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        order = indices.flatten().argsort(stable=True)
        counts = torch.bincount(indices.flatten(), minlength=self.n_experts)
        counts = counts.tolist()  # type: ignore[assignment]
        rows = x[order // self.top_k]
        done = torch.zeros_like(rows)
        start = 0
        for e in range(self.n_experts):
            done[start : start + counts[e]] = self.experts[e](rows[start : start + counts[e]])
            start += counts[e]  # type: ignore[assignment]
        return torch.zeros_like(x).index_add(0, order // self.top_k, done * weights.flatten()[order, None])


class SplitAsInTorchtitan(Base):
    """torchtitan's for-loop experts: tokens split by counts, 3-D parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.w1 = nn.Parameter(torch.randn(E, 2 * H, H) / 6)
        self.w2 = nn.Parameter(torch.randn(E, H, 2 * H) / 8)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        num_tokens_per_expert = F.one_hot(indices, E).sum((0, 1))
        order = indices.flatten().argsort(stable=True)
        x_splits = torch.split(x[order // K], split_size_or_sections=num_tokens_per_expert.tolist(), dim=0)
        out_splits: list[Tensor] = []
        for expert_idx, x_expert in enumerate(x_splits):
            h = F.silu(torch.matmul(x_expert, self.w1[expert_idx].transpose(-2, -1)))
            out_splits.append(torch.matmul(h, self.w2[expert_idx].transpose(-2, -1)))
        out = torch.cat(out_splits, dim=0) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, out)


class ZipAsInMegatron(Base):
    """Megatron's SequentialMLP: experts and their tokens side by side."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        order = indices.flatten().argsort(stable=True)
        permuted = x[order // K]
        tokens_per_expert = indices.flatten().bincount(minlength=E).tolist()
        tokens_list = permuted.split(tokens_per_expert)  # type: ignore[no-untyped-call]
        outputs: list[Tensor] = []
        for expert, tokens in zip(self.experts, tokens_list, strict=True):
            output = expert(tokens)
            outputs.append(output)
        out = torch.cat(outputs, dim=0) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, out)


IDIOMS: list[type[Base]] = [
    Enumerated,
    CountsAsInDeepSeek,
    MaskAsInDeepSeekMoE,
    OneHotAsInMixtral,
    ExpertHit,
    AnyMask,
    Nonzero,
    FlatNonzero,
    PerSlot,
    SlotInside,
    IntoView,
    Appended,
    InlineBody,
    SeparateLists,
    StackedParameters,
    Dictionary,
    InHelper,
    RunsAsInDeepSeek,
    RunningSum,
    SplitAsInTorchtitan,
    ZipAsInMegatron,
]


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients; a parameter that got none has zeros."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad, **found}


def assert_same(want: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Equal up to the order of FP64 sums of at most 2**12 terms."""
    assert want.keys() == got.keys()
    for name, a in want.items():
        bound = 2.0**-53 * 2**12 * max(float(a.norm()), 1e-3)
        assert float((a - got[name]).norm()) <= bound, name


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda c: c.__name__)
def test_rewritten_loop_has_the_loops_gradients_and_one_graph(idiom: type[Base]) -> None:
    torch.manual_seed(0)
    original = idiom().double()
    x = torch.randn(T, H, dtype=torch.float64)
    module = copy.deepcopy(original)
    remarks = prepare(module, x)
    assert [r.code for r in remarks] == ["R0820"]
    assert remarks[0].severity is Severity.REMARK and remarks[0].notes[0].startswith("same outputs and gradients")
    assert_same(gradients(original, x), gradients(module, x))
    assert list(module.state_dict()) == list(original.state_dict())
    assert prepare(module, x) == []  # nothing is left to do

    torch._dynamo.reset()
    module = module.bfloat16()
    compiled = torch.compile(module, backend="eager", fullgraph=True)  # raises at a graph break
    compiled(x.bfloat16())


@pytest.mark.parametrize("expert", [Biased, Fused, Adapted], ids=lambda c: c.__name__)
def test_experts_of_other_shapes_are_lifted(expert: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    original = Enumerated(expert).double()
    x = torch.randn(T, H, dtype=torch.float64)
    module = copy.deepcopy(original)
    assert [r.code for r in prepare(module, x)] == ["R0820"]
    assert_same(gradients(original, x), gradients(module, x))
    frozen = [p for name, p in module.named_parameters() if ".base." in name]
    assert all(not p.requires_grad and p.grad is None for p in frozen)


def test_lora_experts_train_only_their_adapters_under_compile() -> None:
    torch.manual_seed(0)
    module = Enumerated(Adapted).bfloat16()
    x = torch.randn(T, H, dtype=torch.bfloat16)
    prepare(module, x)
    torch._dynamo.reset()
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (".base." in name), name


def test_what_has_an_effect_stays_when_the_loop_needs_it_no_more() -> None:
    class Counting(Base):
        calls = 0

        def count(self, indices: Tensor) -> list[int]:
            self.calls += 1
            return [1] * E

        def forward(self, x: Tensor) -> Tensor:
            weights, indices = self.routed(x)
            counts = self.count(indices)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                if counts[i] == 0:
                    continue
                token, slot = torch.where(indices == i)
                y[token] += expert(x[token]) * weights[token, slot, None]
            return y

    module = Counting()
    prepare(module, torch.randn(T, H))
    before = module.calls
    module(torch.randn(T, H))
    assert module.calls == before + 1


def test_only_the_given_instance_changes() -> None:
    first, second = Enumerated(), Enumerated()
    prepare(first, torch.randn(T, H))
    assert type(first).forward is not Enumerated.forward and type(second).forward is Enumerated.forward
    assert isinstance(first, Enumerated) and type(first).__name__ == "Enumerated"
    assert type(copy.deepcopy(first)) is type(first)


def test_stack_traces_lead_to_the_loops_own_lines() -> None:
    module = Enumerated().bfloat16()
    prepare(module, torch.randn(T, H, dtype=torch.bfloat16))
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(T, H, dtype=torch.bfloat16))
    traces = [n.meta["stack_trace"] for n in graphs[0].graph.nodes if "grouped_mm" in str(n.target)]
    assert len(traces) == 3
    assert all("y[token] += expert(x[token])" in trace for trace in traces)  # the loop's line
    assert all("return self.down(F.silu(self.gate(x)) * self.up(x))" in trace for trace in traces)  # the expert's


def test_bf16_sums_choices_with_one_rounding() -> None:
    """The loop rounds once per choice; the rewrite must not be worse than it against FP64."""
    torch.manual_seed(0)
    original = Enumerated()
    x = torch.randn(T, H)
    exact = copy.deepcopy(original).double()(x.double())
    module = copy.deepcopy(original).bfloat16()
    loop = module(x.bfloat16()).double()
    prepare(module, x.bfloat16())
    assert (module(x.bfloat16()).double() - exact).norm() <= 1.02 * (loop - exact).norm()


def test_dense_experts_and_layers_are_left_alone() -> None:
    class Dense(Base):
        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                y = y + expert(x) * weights[:, i : i + 1]
            return y

    class Layers(Base):
        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.experts):
                x = x + layer(x) if i == 0 else layer(x)
            return x

    assert prepare(Dense(), torch.randn(T, H)) == []
    assert prepare(Layers(), torch.randn(T, H)) == []


# --- refused ----------------------------------------------------------------------------------------------------------


class Capacity(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            token, slot = token[:4], slot[:4]  # capacity
            y[token] += expert(x[token]) * weights[token, slot, None]
        return y


class Carried(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y, scale = torch.zeros_like(x), 1.0
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            y[token] += scale * expert(x[token]) * weights[token, slot, None]
            scale = scale * 0.5
        return y


class OwnRank(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i in range(2, 4):
            token, slot = torch.where(indices == i)
            y[token] += self.experts[i](x[token]) * weights[token, slot, None]
        return y


class SpecialExpert(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            scale = 2.0 if i == 0 else 1.0
            y[token] += scale * expert(x[token]) * weights[token, slot, None]
        return y


class IdleExpertActs(Base):
    idle_experts = 0

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(indices == i)
            if token.numel() > 0:
                y[token] += expert(x[token]) * weights[token, slot, None]
            else:
                self.idle_experts += 1
        return y


class HostSync(Base):
    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.routed(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, _ = torch.where(indices == i)
            for t in token.tolist():
                y[t] += expert(x[t]) * weights[t].sum()
        return y


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        (Capacity, "token, slot = token[:4], slot[:4]", "`token[:4]` has no known meaning for all experts at once"),
        (Carried, "y[token] += scale * expert(x[token])", "'scale' carries a value from one expert to the next"),
        (OwnRank, "for i in range(2, 4):", "the loop covers experts 2 to 4 of 4"),
        (SpecialExpert, "scale = 2.0 if i == 0 else 1.0", "expert 0 is treated differently from the others"),
        (
            IdleExpertActs,
            "self.idle_experts += 1",
            "an expert without tokens does something of its own here",
        ),
        (HostSync, "for t in token.tolist():", "has no known meaning for all experts at once"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_unknown_loops_are_refused_at_their_line(module: type[Base], line: str, message: str) -> None:
    made = module()
    with pytest.raises(DiagnosticError) as caught:
        prepare(made, torch.randn(T, H))
    assert caught.value.exit_code is ExitCode.MODEL
    (found,) = caught.value.diagnostics
    assert found.code == "E0820" and message in found.message, render(found)
    assert found.span is not None and line in found.span.text, render(found)
    assert found.help
    assert type(made) is module


def test_without_fullgraph_an_unknown_loop_stays_a_loop() -> None:
    """SwitchTransformers, whose experts drop tokens at a capacity, could not be compiled in pieces either."""
    torch.manual_seed(0)
    modules = nn.ModuleList([Capacity(), Enumerated()]).bfloat16()
    model = nn.Sequential(*modules)
    x = torch.randn(T, H, dtype=torch.bfloat16)
    plain = copy.deepcopy(model)
    step = fp8c.compile(model, spec="bf16", target="cpu", fullgraph=False)
    for called in (plain, step):
        called(x).float().square().mean().backward()
    (stays,) = (r for r in driver.session_of(step).remarks if r.code == "R0823")
    assert "`token[:4]` has no known meaning" in stays.message and stays.severity is Severity.REMARK
    assert type(modules[0]) is Capacity and type(modules[1]) is not Enumerated  # what can be rewritten, is
    for name, p in plain.named_parameters():
        grad = model.get_parameter(name).grad
        if p.grad is not None:  # an expert that no token chose: None from the loop, zeros from the grouped GEMM
            assert grad is not None
            torch.testing.assert_close(grad, p.grad, rtol=2**-4, atol=2**-6 * p.grad.abs().max().item())


def only(module: nn.Module, x: Tensor) -> Diagnostic:
    with pytest.raises(DiagnosticError) as caught:
        prepare(module, x)
    (found,) = caught.value.diagnostics
    return found


def test_experts_that_differ_are_refused() -> None:
    module = Enumerated()
    module.experts[2] = Biased()
    found = only(module, torch.randn(T, H))
    assert found.code == "E0820"
    assert "expert 2 (Biased) is built differently from expert 0" in found.message


def test_an_expert_with_a_hook_is_refused() -> None:
    module = Enumerated()
    module.experts[1].register_forward_hook(lambda *_: None)
    assert "expert 1 has a hook" in only(module, torch.randn(T, H)).message


def test_an_expert_that_branches_on_data_is_refused() -> None:
    class Branching(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    found = only(Enumerated(Branching), torch.randn(T, H))
    assert "the experts can't run as one: Branching.forward can't be traced" in found.message


def test_an_expert_that_mixes_its_tokens_is_found_by_the_check() -> None:
    class Mixing(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0, keepdim=True))

    found = only(Enumerated(Mixing), torch.randn(T, H))
    assert found.code == "E0821" and "differs from the loop's" in found.message


def test_dropped_tokens_are_found_by_the_check() -> None:
    class Dropping(Base):
        def forward(self, x: Tensor) -> Tensor:
            weights, indices = self.routed(x)
            indices = indices.masked_fill(weights < 0.4, -1)  # a dropped choice is nobody's
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                token, slot = torch.where(indices == i)
                y[token] += expert(x[token]) * weights[token, slot, None]
            return y

    found = only(Dropping(), torch.randn(T, H))
    assert found.code == "E0821"
    assert found.span is not None and "for i, expert in enumerate(self.experts)" in found.span.text


def test_zero_initialized_experts_do_not_hide_a_difference() -> None:
    """With down-projections at zero every output is zero: the check must use parameters of its own."""

    class Mixing(SwiGLU):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.down.weight)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * x.norm())

    assert only(Enumerated(Mixing), torch.randn(T, H)).code == "E0821"


def test_a_model_without_weights_is_rewritten_and_says_it_was_not_compared() -> None:
    with torch.device("meta"):
        module = Enumerated().bfloat16()
        x = torch.randn(T, H, dtype=torch.bfloat16)
    (remark,) = prepare(module, x)
    assert remark.notes == ("not compared with the original: it has no weights",)
    assert module(x).shape == (T, H)


def test_without_a_batch_the_comparison_waits_for_the_first_call() -> None:
    module, x = Enumerated(), torch.randn(T, H)
    (remark,) = prepare(module)
    assert remark.notes[0] == "not compared with the original: there are no example inputs"
    assert needs_comparison(module)
    (remark,) = compare_rewrites(module, x)
    assert remark.notes[0].startswith("same outputs and gradients")
    assert not needs_comparison(module)


def test_a_comparison_that_fails_late_brings_the_loop_back() -> None:
    class Mixing(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0, keepdim=True))

    module, x = Enumerated(Mixing), torch.randn(T, H)
    want = module(x)
    prepare(module)
    with pytest.raises(DiagnosticError, match="E0821"):
        compare_rewrites(module, x)
    assert type(module) is Enumerated and torch.equal(module(x), want)


def test_compile_compares_on_the_first_training_call() -> None:
    torch.manual_seed(0)
    module = Enumerated().bfloat16()
    step = fp8c.compile(module, spec="bf16", target="cpu")
    x = torch.randn(T, H, dtype=torch.bfloat16)
    with torch.no_grad():
        step(x)
    (remark,) = [r for r in driver.session_of(step).remarks if r.code == "R0820"]
    assert remark.notes[0].startswith("not compared")
    step(x).float().square().mean().backward()
    (remark,) = [r for r in driver.session_of(step).remarks if r.code == "R0820"]
    assert remark.notes[0].startswith("same outputs and gradients")
    assert all(p.grad is not None for p in module.parameters())
