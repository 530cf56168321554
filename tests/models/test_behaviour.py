"""A compiled step behaves as the model did: modes, copies, lengths, empty and broken inputs, frozen and FP32 parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fp8c
from fp8c import driver, grouped
from fp8c.diagnostics import DiagnosticError
from tests.models.harness import check, gradients, loss_of, train_both
from tests.models.test_handwritten import BF16, Block, D, Dropouts, FusedQkv, Lm, Lora, Mlp, features, ids, rms

F32 = torch.float32


def small_lm(**options: Any) -> Lm:
    return Lm([Block(rms, FusedQkv, Mlp)], **options)


def compiled(model: nn.Module) -> nn.Module:
    return fp8c.compile(model, "deepseek_v3", "cpu")


def use_of(outcome: Any, suffix: str) -> Any:
    return next(p for key, p in outcome.rewritten.plan.uses.items() if key.endswith(suffix))


# --- parameters ------------------------------------------------------------------------------------------------------


def test_fp32_parameters_under_autocast() -> None:
    def call(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", BF16):
            return loss_of(model(features(dtype=F32)))

    outcome = train_both(Mlp(dtype=F32), call)
    check(outcome)
    assert all(grad.dtype is F32 for grad in outcome.grads_fp8.values())
    # the weight is quantized from the FP32 master, not from its BF16 copy
    quantized = [n.args[0] for n in outcome.rewritten.halves.forward.graph.nodes if n.target is QUANTIZE]
    assert {n.meta["val"].dtype for n in quantized if n.op == "placeholder"} == {F32}


QUANTIZE = torch.ops.fp8c.quantize.default


def test_fp32_parameters_without_autocast() -> None:
    outcome = train_both(Mlp(dtype=F32), lambda m: loss_of(m(features(dtype=F32))))
    check(outcome)
    assert outcome.counts["fprop"] == {"total": 3, "fp8": 3, "kept": 0}


def test_tied_embeddings() -> None:
    outcome = train_both(small_lm(tied=True), lambda m: m(ids()))
    check(outcome)
    assert use_of(outcome, "embed").use.kinds == {"lm_head"}  # the head goes by the parameter's one name
    assert outcome.counts["fprop"] == {"total": 6, "fp8": 5, "kept": 1}


def test_frozen_embeddings() -> None:
    model = small_lm()
    model.embed.requires_grad_(False)
    outcome = train_both(model, lambda m: m(ids()))
    check(outcome)
    assert "embed.weight" not in outcome.grads_fp8


def test_frozen_first_layers() -> None:
    model = Lm([Block(rms, FusedQkv, Mlp), Block(rms, FusedQkv, Mlp)])
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    outcome = train_both(model, lambda m: m(ids()))
    check(outcome)
    first = use_of(outcome, "blocks.0.mlp.up").use
    assert first.no_dgrad == "input needs no gradient" and first.no_wgrad == "weight is frozen"
    assert outcome.counts["wgrad"]["total"] == 6


def test_lora_adapters_train_and_the_base_does_not() -> None:
    model = nn.Sequential(Lora(), nn.ReLU(), nn.Linear(256, D, bias=False, dtype=BF16))
    outcome = train_both(model, lambda m: loss_of(m(features().requires_grad_())))
    check(outcome)
    assert set(outcome.grads_fp8) == {"0.a.weight", "0.b.weight", "2.weight"}
    base = use_of(outcome, "0.base").use
    assert base.no_wgrad == "weight is frozen" and not base.no_dgrad
    # rank 16 is a partial group: the spec pads it, so adapters run in FP8 as well
    assert outcome.counts["fprop"] == {"total": 4, "fp8": 4, "kept": 0}


def test_partial_groups_are_kept_in_bf16_where_the_spec_says_so(tmp_path: Any) -> None:
    spec = tmp_path / "keep.fp8"
    spec.write_text(
        'version 1;\nuse "std:deepseek_v3" as v3;\nspec keep extends v3 { override pad { partial_group = keep; } }\n'
    )
    outcome = train_both(Lora(), lambda m: loss_of(m(features().requires_grad_())), spec)
    check(outcome)
    for which in ("fprop", "dgrad", "wgrad"):
        assert use_of(outcome, "base").gemm(which).is_fp8
    assert not use_of(outcome, "a").gemm("fprop").is_fp8  # n = 16
    assert not use_of(outcome, "b").gemm("fprop").is_fp8  # k = 16


def spec_file(folder: Any, body: str) -> Any:
    """A spec that extends the recipe."""
    path = folder / "own.fp8"
    path.write_text(f'version 1;\nuse "std:deepseek_v3" as v3;\n{body}\n')
    return path


def test_a_copy_is_kept_for_wgrad_where_only_wgrad_runs_in_fp8(tmp_path: Any) -> None:
    own = spec_file(
        tmp_path,
        "spec own extends v3 { override rule kept for op(linear) "
        "{ fprop { x = bf16; w = bf16; } dgrad { dy = bf16; w = bf16; } } }",
    )
    outcome = train_both(Mlp(), lambda m: loss_of(m(features())), own)
    check(outcome)
    assert outcome.counts["fprop"]["fp8"] == 0 and outcome.counts["wgrad"]["fp8"] == 3


def test_a_copy_in_wgrads_own_format_is_kept_as_it_is(tmp_path: Any) -> None:
    own = spec_file(
        tmp_path,
        "format along_tokens = e4m3 [128x1] scale fp32 online;\n"
        "spec own extends v3 { override rule direct for op(linear) { cache x as along_tokens; } }",
    )
    outcome = train_both(Mlp(), lambda m: loss_of(m(features())), own)
    check(outcome)
    assert outcome.executed["fp8c::requantize"] == 0  # one rounding instead of two


# --- modes and copies ------------------------------------------------------------------------------------------------


def test_no_grad_evaluation_is_the_training_forward() -> None:
    step = compiled(small_lm())
    with torch.no_grad():
        evaluated = step(ids())
    trained = step(ids())
    assert not evaluated.requires_grad and trained.requires_grad
    assert torch.equal(evaluated, trained)


def test_eval_switches_dropout_off() -> None:
    model = Dropouts()
    step = compiled(model)
    assert not torch.equal(step(features()), step(features()))
    step.eval()
    assert torch.equal(step(features()), step(features()))
    assert not step.mlp.training  # type: ignore[union-attr]
    step.train()
    assert not torch.equal(step(features()), step(features()))


def test_state_dict_round_trip() -> None:
    model = small_lm()
    step = compiled(model)
    assert type(step) is Lm and list(step.state_dict()) == list(model.state_dict())
    before = step(ids())
    saved = {name: value.clone() for name, value in step.state_dict().items()}
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(step(ids()), before)
    step.load_state_dict(saved)
    assert torch.equal(step(ids()), before)
    assert all(a is b for a, b in zip(model.parameters(), step.parameters()))


def test_a_deep_copy_is_compiled_too() -> None:
    step = compiled(small_lm())
    loss = step(ids())
    other = copy.deepcopy(step)
    assert torch.equal(other(ids()), loss)  # FP8 as well: BF16 gives another number
    assert not torch.equal(small_lm()(ids()), loss) and driver.session_of(other) is not driver.session_of(step)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(step(ids()), loss)


def test_a_pickled_step_is_the_model() -> None:
    step = compiled(Mlp())
    step(features())
    other = pickle.loads(pickle.dumps(step))
    assert type(other) is Mlp and all(torch.equal(a, b) for a, b in zip(step.parameters(), other.parameters()))
    with pytest.raises(TypeError, match="was not returned by fp8c.compile"):
        driver.session_of(other)
    assert torch.equal(compiled(other)(features()), step(features()))


def test_gradients_accumulate_over_micro_batches() -> None:
    step = compiled(Mlp())
    loss_of(step(features())).backward()
    once = gradients(step)
    loss_of(step(features())).backward()
    assert all(torch.equal(grad, 2 * once[name]) for name, grad in gradients(step).items())


def test_module_hooks_still_run() -> None:
    step = compiled(Mlp())
    seen: list[torch.Size] = []
    step.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    step(features())
    assert seen == [torch.Size([2, 64, D])]


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_changing_lengths_recompile_once() -> None:
    model = small_lm()
    step = compiled(model)
    for batch, length in ((2, 64), (3, 48), (4, 40), (2, 65), (5, 7)):
        expected = model(ids(batch, length))
        loss = step(ids(batch, length))
        loss.backward()
        # five GEMMs in front of the head: the harness's bound
        assert abs(loss.item() - expected.item()) <= 2 * 5**0.5 * 2**-4 * abs(expected.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in step.parameters())
    assert len(driver.session_of(step).steps) == 2


def test_dynamic_shapes_give_what_static_ones_give() -> None:
    static, dynamic = compiled(Mlp()), None
    dynamic = fp8c.compile(copy.deepcopy(static.__class__()), "deepseek_v3", "cpu", dynamic=True)
    dynamic.load_state_dict(static.state_dict())
    for length in (64, 96, 17):
        x = features(length=length)
        torch._dynamo.mark_dynamic(x, 1)
        a, b = loss_of(static(x.clone())), loss_of(dynamic(x))
        static.zero_grad()
        dynamic.zero_grad()
        a.backward(), b.backward()
        assert torch.equal(a, b)
        assert all(torch.equal(p, q) for p, q in zip(gradients(static).values(), gradients(dynamic).values()))


@pytest.mark.slow
def test_inductor_takes_any_length_in_one_graph() -> None:
    """That 192 rows fill rows of multiples of 16 says nothing about 131."""
    model = Mlp()
    step = fp8c.compile(model, "deepseek_v3", "cpu", lowering="inductor", dynamic=True)
    other = fp8c.compile(copy.deepcopy(model), "deepseek_v3", "cpu", lowering="reference", dynamic=True)
    for length in (192, 160, 131, 257, 77, 130):
        x = features(batch=1, length=length)
        for compiled_once in (step, other):
            compiled_once.zero_grad()
            loss_of(compiled_once(x)).backward()
        found, expected = gradients(step), gradients(other)
        for name, grad in expected.items():  # Inductor rounds SwiGLU once, the graph as written four times
            assert (found[name] - grad).norm() <= 4 * 2**-4 * grad.norm(), (name, length)
    assert len(driver.session_of(step).steps) == 1


def test_empty_batch() -> None:
    step = compiled(Mlp())
    y = step(features(batch=0))
    y.sum().backward()
    assert y.shape == (0, 64, D)
    assert all(not grad.any() for grad in gradients(step).values())


class Experts(nn.Module):
    """Four experts as grouped GEMMs; the routing is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 256, D).to(BF16) * 0.1)
        self.down = nn.Parameter(torch.randn(4, D, D).to(BF16) * 0.1)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        rows = grouped.route(choice, 4)
        h = grouped.matmul(x[rows.order], self.up.transpose(1, 2), rows)
        gate, up = h.chunk(2, -1)
        y = grouped.matmul(F.silu(gate) * up, self.down.transpose(1, 2), rows)
        return torch.zeros_like(x).index_add(0, rows.order, y)


def routed(choice: Tensor) -> Any:
    tokens = features()[0]
    return lambda model: loss_of(model(tokens, choice))


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    choice = torch.randint(3, (64,))
    choice[choice == 1] = 3  # experts 0, 2, 3
    outcome = train_both(Experts(), routed(choice))
    check(outcome)
    for name in ("up", "down"):
        grad = outcome.grads_fp8[name]
        assert [bool(grad[e].any()) for e in range(4)] == [True, False, True, True]


def test_all_tokens_at_one_expert() -> None:
    outcome = train_both(Experts(), routed(torch.full((64,), 2)))
    check(outcome)
    assert [bool(outcome.grads_fp8["up"][e].any()) for e in range(4)] == [False, False, True, False]


class Gated(nn.Module):
    """A step size of each position behind a softplus, read with positions last, as state space layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(D, 8, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.step(x)).transpose(1, 2) * x.new_ones(x.shape[0], 8, x.shape[1])


def test_an_operator_may_lay_out_its_result_otherwise_than_captured() -> None:
    """softplus_backward does on the CPU: `view size is not compatible` in backward of Qwen3-Next and Doge."""
    check(train_both(Gated(), lambda model: loss_of(model(features()))))


class Biased(nn.Module):
    """Attention with a learned bias of each pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False, dtype=BF16)
        self.bias = nn.Parameter(torch.zeros(1, 1, 64, 64, dtype=BF16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)


def test_attention_with_a_learned_bias_is_left_to_pytorch() -> None:
    """fp8c's attention gives its mask no gradient: E0522 ended the capture of Doge."""
    outcome = train_both(Biased(), lambda model: loss_of(model(features())))
    check(outcome)
    assert outcome.counts["fprop"]["fp8"] == 1 and outcome.errors()["bias"] < 0.5


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_input_stays_broken_and_stays_in_its_row(value: float) -> None:
    step = compiled(Mlp())
    x = features()
    clean = step(x)
    x[1, 7, 30] = value
    y = step(x)
    assert not y[1, 7].isfinite().any()
    others = torch.ones(2, 64, dtype=torch.bool)
    others[1, 7] = False
    assert torch.equal(y[others], clean[others])
    y.sum().backward()
    # wgrad sums over tokens: the whole feature is lost in the weights that read it
    assert step.gate.weight.grad[:, 30].isnan().all()  # type: ignore[union-attr, index]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_shows(value: float) -> None:
    model = nn.Linear(D, 256, bias=False, dtype=BF16)
    with torch.no_grad():
        model.weight[3, 5] = value
    y = compiled(model)(features())
    assert not y[..., :128].isfinite().any()  # its 128x128 block
    assert y[..., 128:].isfinite().all()


def test_an_all_zero_tile_is_exact() -> None:
    step = compiled(Mlp())
    x = features()
    x[0, :32] = 0
    x.requires_grad_()
    y = step(x)
    assert not y[0, :32].any()
    y.sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(step).values()) and x.grad.isfinite().all()  # type: ignore[union-attr]


# --- diagnostics -----------------------------------------------------------------------------------------------------


def test_a_spec_the_model_breaks_is_reported_as_it_is(tmp_path: Any) -> None:
    spec = tmp_path / "strict.fp8"
    spec.write_text(
        'version 1;\nuse "std:deepseek_v3" as v3;\nspec strict extends v3 { expect op(linear) matches == 7; }\n'
    )
    step = fp8c.compile(Mlp(), spec, "cpu")
    with pytest.raises(DiagnosticError) as caught:
        step(features())
    assert [d.code for d in caught.value.diagnostics if d.severity.value == "error"] == ["E0304"]


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum().item() > 0:
            y = y * 2
        return y


def test_a_graph_break_names_the_line() -> None:
    step = compiled(Breaks())
    with pytest.raises(DiagnosticError) as caught:
        step(features())
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E0833" and diagnostic.span is not None
    assert "y.sum().item()" in diagnostic.span.text


class Batched(nn.Module):
    """Experts as one batched product, as Llama 4 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, D, bias=False, dtype=BF16)
        self.weight = nn.Parameter(torch.randn(2, D, D).to(BF16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x, self.weight)
        return self.out(hidden)


def test_a_batched_product_with_a_weight_does_not_stay_in_bf16_without_a_word() -> None:
    """Llama 4 trained two thirds of its GEMMs in BF16, and nothing said so."""
    outcome = train_both(Batched(), lambda model: loss_of(model(features().requires_grad_())))
    (remark,) = (r for r in outcome.session.remarks if r.code == "R0848")
    assert remark.span is not None and "torch.bmm(x, self.weight)" in remark.span.text


#: What a Linear may read that has no gradient although it is made of a value that has one.
WITHOUT_GRADIENT: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": torch.no_grad()(lambda h: h * 2),
    "ones_like": torch.ones_like,
    "new_zeros": lambda h: h.new_zeros(h.shape) + 1,
    "detach": lambda h: h.detach(),
}


@pytest.mark.parametrize("how", WITHOUT_GRADIENT)
def test_a_linear_may_read_what_has_no_gradient(how: str) -> None:
    """Zaya's delayed projection reads zeros: E0830, `0 dgrad GEMMs where 1 is expected`."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(D, D, bias=False, dtype=BF16) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y: Tensor = self.second(WITHOUT_GRADIENT[how](h))
            return h + y

    outcome = train_both(Reads(), lambda model: loss_of(model(features().requires_grad_())))
    check(outcome)
    second = use_of(outcome, "second").use
    assert second.no_dgrad == "input needs no gradient" and not second.no_wgrad


class Visits(nn.Module):
    """A loop over the experts that have tokens, in no form that becomes grouped GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4 * D, D).to(BF16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in (x[..., :4].sum((0, 1)) > 0).nonzero():
            y = y + x @ self.weight.view(4, D, D)[expert[0]]
        return y


def test_a_loop_that_runs_as_often_as_data_says_is_named() -> None:
    """DBRX's experts: `Could not extract specialized integer from data-dependent expression u0` helped nobody."""
    with pytest.raises(DiagnosticError) as caught:
        compiled(Visits())(features())
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E0833" and diagnostic.message.endswith("how often this loop runs depends on data")
    assert diagnostic.span is not None and diagnostic.span.text.startswith("for expert in")


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_experts_in_another_type_than_bf16_are_named(dtype: torch.dtype) -> None:
    """A model that was built without `dtype=`: `RuntimeError when making fake tensor call` was all there was."""
    with pytest.raises(DiagnosticError) as caught:
        compiled(Experts().to(dtype))(features(dtype=dtype)[0], torch.randint(4, (64,)))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E0833" and diagnostic.message.endswith(f"here they read {str(dtype)[6:]}")
    assert "autocast" in diagnostic.help


@pytest.mark.skipif(torch.__version__ < "2.12", reason="PyTorch 2.11 can't log the setting")
@pytest.mark.parametrize("method", ["warning_once", "info_once"])
def test_what_transformers_remarks_once_breaks_no_graph(method: str) -> None:
    """GPT-2 says in every forward that it has no loss type, and could not be compiled as one graph."""
    logger = transformers.utils.logging.get_logger("transformers.test")

    class Remarks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            getattr(logger, method)("`loss_type=None` was set in the config")
            return super().forward(x)

    loss_of(compiled(Remarks(D, D, dtype=BF16))(features())).backward()
    assert not torch._dynamo.config.ignore_logging_functions  # nothing global stays changed


def test_a_graph_break_is_allowed_without_fullgraph() -> None:
    outcome = train_both(Breaks(), lambda m: loss_of(m(features())), fullgraph=False)
    assert set(outcome.grads_fp8) == set(outcome.grads_bf16)
    assert outcome.executed["fp8c::scaled_mm"] == 2  # fprop and wgrad; the input needs no gradient


def test_an_error_of_the_model_says_what_was_raised_and_where() -> None:
    class Raises(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != D:
                raise ValueError(f"expected {D} features")
            return super().forward(x)

    step = compiled(Raises(D, D, dtype=BF16))
    with pytest.raises(DiagnosticError) as caught:
        step(torch.zeros(2, 7, dtype=BF16))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E0803" and f"ValueError('expected {D} features')" in diagnostic.message
    assert diagnostic.span is not None and "raise ValueError" in diagnostic.span.text
