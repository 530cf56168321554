"""`main_grad`: every trained parameter's gradient, accumulated in FP32 by the GEMM that computes it."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fp8c
from fp8c import driver
from fp8c.diagnostics import DiagnosticError
from fp8c.driver import refuse_lost_gradients, session_of
from fp8c.graph import aten
from fp8c.main_grad import accumulator_of, split_gradients
from fp8c.stage import Stage
from tests.models.harness import count_executed, gradients, loss_of
from tests.models.test_handwritten import BF16, D, Mlp, features
from tests.passes.steps import experts_function, random


class Norm(nn.Module):
    """A bias, a norm's weight and a matrix stored [K, N] beside a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, 256, bias=True, dtype=BF16)
        self.scale = nn.Parameter(torch.ones(256, dtype=BF16))
        self.stored_kn = nn.Parameter(random(256, D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + 1e-6).to(BF16) * self.scale
        return h @ self.stored_kn


class Experts(nn.Module):
    """Grouped GEMMs; the third expert gets no row."""

    rows: Tensor
    offs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(random(4, 256, 128) * 0.1)
        self.down = nn.Parameter(random(4, 128, 128) * 0.1)
        self.register_buffer("rows", torch.randint(128, (256,), generator=torch.Generator().manual_seed(0)))
        self.register_buffer("offs", torch.tensor([70, 130, 130, 256], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return experts_function(x.reshape(-1, 128), self.rows, self.offs, self.up, self.down)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(128, 128, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


MODELS: dict[str, Any] = {"mlp": Mlp, "norm": Norm, "experts": Experts}


def compiled(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return fp8c.compile(MODELS[name](), "deepseek_v3", "cpu", **options)


def batches() -> list[Tensor]:
    return [torch.randn(1, 128, D, generator=torch.Generator().manual_seed(i)).to(BF16) for i in range(3)]


def fp32_gradients(name: str, x: Tensor) -> dict[str, Tensor]:
    """One micro-batch's gradients before they are rounded to BF16, from main_grad of a fresh copy."""
    step = compiled(name, main_grad=True)
    loss_of(step(x)).backward()
    return {n: p.main_grad.clone() for n, p in step.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_add_up_in_fp32(name: str) -> None:
    step = compiled(name, main_grad=True)
    total: dict[str, Tensor] = {}
    for x in batches():
        loss_of(step(x)).backward()
        for n, grad in fp32_gradients(name, x).items():
            total[n] = total[n] + grad if n in total else grad
    for n, p in step.named_parameters():
        assert p.grad is None and p.main_grad.dtype is torch.float32
        # the same FP32 products; the GEMM adds them to the accumulator in one rounding
        assert torch.equal(p.main_grad, total[n]), n


@pytest.mark.parametrize("name", MODELS)
def test_one_micro_batch_rounds_to_the_usual_gradient(name: str) -> None:
    x = batches()[0]
    plain = compiled(name)
    loss_of(plain(x)).backward()
    for n, grad in fp32_gradients(name, x).items():
        assert torch.equal(grad.to(BF16), gradients(plain)[n]), n


def test_the_gemm_accumulates() -> None:
    step = compiled("mlp", main_grad=True)
    loss_of(step(features())).backward()  # compiles
    counts = count_executed(lambda: loss_of(step(features())).backward())
    assert counts["fp8c::scaled_mm_add_"] == 3 and counts["fp8c::scaled_mm"] == 3 + 1  # forward, and down's dgrad
    experts = compiled("experts", main_grad=True)
    loss_of(experts(batches()[0])).backward()
    counts = count_executed(lambda: loss_of(experts(batches()[0])).backward())
    assert counts["fp8c::scaled_grouped_wgrad_add_"] == 2 and counts["fp8c::scaled_grouped_wgrad"] == 0


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 128, dtype=BF16)
        self.up = nn.Linear(128, 128, bias=False, dtype=BF16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.words(ids))


def test_an_embedding_adds_the_rows_of_its_words() -> None:
    """In FP32 and without a gradient as large as the table; PyTorch's is the same sum, rounded to BF16."""
    torch.manual_seed(0)
    model = Words()
    plain = fp8c.compile(copy.deepcopy(model), "deepseek_v3", "cpu")
    step = fp8c.compile(model, "deepseek_v3", "cpu", main_grad=True)
    ids = torch.randint(8, (2, 64))
    for compiled_step in (plain, step):
        loss_of(compiled_step(ids)).backward()
    half, _ = split_gradients(session_of(step).steps[-1].halves.backward)
    targets = [n.target for n in half.graph.nodes]
    assert aten.embedding_dense_backward.default not in targets and targets.count(aten.index_put_.default) == 1
    found, usual = step.words.weight.main_grad, plain.words.weight.grad.float()
    assert not found[8:].any() and found[:8].any()
    # up to 32 terms for a word, which the CPU's operator adds in BF16
    torch.testing.assert_close(found, usual, rtol=2.0**-3, atol=32 * 2.0**-9 * float(usual.abs().max()))


def test_zero_grad_and_new_accumulators() -> None:
    step = compiled("mlp", main_grad=True)
    p = step.gate.weight
    address = p.main_grad.data_ptr()
    loss_of(step(features())).backward()
    assert p.main_grad.any()
    step.zero_grad()
    assert not p.main_grad.any() and p.main_grad.data_ptr() == address
    flat = torch.zeros(p.numel())  # Megatron-LM's way: a view of one flat buffer
    p.main_grad = flat.view_as(p)
    loss_of(step(features())).backward()
    assert flat.any()
    p.main_grad = None
    loss_of(step(features())).backward()
    assert torch.equal(p.main_grad.flatten(), flat)


def test_a_parameter_that_was_replaced_gets_the_gradient() -> None:
    step = compiled("mlp", main_grad=True)
    loss_of(step(features())).backward()
    old = step.gate.weight
    first = old.main_grad.clone()
    step.gate.weight = nn.Parameter(old.detach().clone())
    loss_of(step(features())).backward()
    assert torch.equal(old.main_grad, first) and torch.equal(step.gate.weight.main_grad, first)
    loss_of(step.gate(features())).backward()  # and its gradients from outside are moved over
    assert step.gate.weight.grad is None and not torch.equal(step.gate.weight.main_grad, first)


def test_a_deep_copy_accumulates_as_its_model_does() -> None:
    step = copy.deepcopy(compiled("mlp", main_grad=True))
    loss_of(step.down(features().repeat(1, 1, 2))).backward()
    assert step.down.weight.grad is None and step.down.weight.main_grad.any()


def test_a_step_outlives_the_module_it_was_called_on() -> None:
    torch.manual_seed(0)
    model: Any = Mlp()
    loss = loss_of(fp8c.compile(model, "deepseek_v3", "cpu", main_grad=True)(features()))
    gc.collect()
    loss.backward()
    assert model.gate.weight.main_grad.any()


@pytest.mark.parametrize("options", [{}, {"main_grad": True}])
def test_many_models_of_one_class_are_compiled_and_freed(options: dict[str, bool]) -> None:
    """More than Dynamo's eight graphs of one piece of code, as in a sweep or a notebook; none of them stays in memory."""
    parameters, stores = [], []
    for number in range(10 if options else 2):
        step = fp8c.compile(Small(), "deepseek_v3", "cpu", **options)
        loss_of(step(torch.ones(4, 128, dtype=BF16))).backward()
        parameters.append(weakref.ref(step.only.weight))
        stores.append(session_of(step).weights)
    del step
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)
    assert not any(store.size_bytes for store in stores)


def test_what_autograd_is_not_asked_for_is_not_accumulated() -> None:
    """The gradient of an input, as for an adversarial example, leaves every parameter's alone."""
    step = compiled("mlp", main_grad=True)
    x = features().requires_grad_()
    (usual,) = torch.autograd.grad(loss_of(step(x)), x)
    assert usual.any() and not any(p.main_grad.any() for p in step.parameters())
    loss_of(step(x)).backward(inputs=[x, step.up.weight])
    assert x.grad is not None and torch.equal(x.grad, usual)
    assert {n for n, p in step.named_parameters() if p.main_grad.any()} == {"up.weight"}
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(loss_of(step(x)), step.gate.weight)
    assert {n for n, p in step.named_parameters() if p.main_grad.any()} == {"up.weight"}


def test_gradients_from_outside_are_moved_over() -> None:
    step = compiled("mlp", main_grad=True)
    loss_of(step.down(features().repeat(1, 1, 2))).backward()  # a part of it, called uncompiled
    assert step.down.weight.grad is None and step.down.weight.main_grad.any()


def test_gradients_of_a_stage_are_moved_over() -> None:
    """Stages and pipelines run the graphs past autograd, whose hooks they call themselves."""
    torch.manual_seed(0)
    step = fp8c.compile(Norm(), "bf16", "cpu", main_grad=True)
    plain = fp8c.compile(copy.deepcopy(driver.uncompiled(step)), "bf16", "cpu")
    x, dy = random(128, D), random(128, D)
    stage = Stage.capture(step, (x,))
    for _ in range(2):
        _, kept = stage.forward(x)
        stage.backward(kept, dy)
        plain(x).backward(dy)
    for p, q in zip(step.parameters(), plain.parameters()):
        assert p.grad is None and q.grad is not None
        assert (p.main_grad - q.grad.float()).norm() <= 2**-8 * q.grad.float().norm()  # type: ignore[attr-defined]


def test_tied_and_frozen_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(128, D, dtype=BF16)
            self.body = nn.Linear(D, D, bias=False, dtype=BF16)
            self.head = nn.Linear(D, 128, bias=False, dtype=BF16)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(self.table(ids)))

    model = Tied()
    frozen = copy.deepcopy(model)
    plain = fp8c.compile(copy.deepcopy(model), "deepseek_v3", "cpu")
    step = fp8c.compile(model, "deepseek_v3", "cpu", main_grad=True)
    ids = torch.randint(128, (2, 64), generator=torch.Generator().manual_seed(0))
    for m in (plain, step):
        F.cross_entropy(m(ids).float().flatten(0, 1), ids.flatten()).backward()
    assert torch.equal(step.table.weight.main_grad.to(BF16), plain.table.weight.grad)
    frozen.body.weight.requires_grad_(False)
    step = fp8c.compile(frozen, "deepseek_v3", "cpu", main_grad=True)
    F.cross_entropy(step(ids).float().flatten(0, 1), ids.flatten()).backward()
    assert getattr(step.body.weight, "main_grad", None) is None and step.table.weight.main_grad.any()


def test_an_accumulator_of_another_kind_is_refused() -> None:
    p: Any = nn.Parameter(torch.zeros(4, 8))
    p.main_grad = torch.zeros(4, 8, dtype=BF16)
    with pytest.raises(DiagnosticError, match=r"main_grad is bf16\[4, 8\], expected f32\[4, 8\]"):
        accumulator_of(p)


def test_ddp_that_would_sum_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel sums `grad`, and would leave every rank with a main_grad of its own."""
    step, plain = compiled("mlp", main_grad=True), compiled("mlp")
    wrapper = SimpleNamespace(process_group=SimpleNamespace(size=lambda: 2))
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", wrapper)
    with pytest.raises(DiagnosticError, match=r"error\[E0867\]: 'gate.weight' has a main_grad"):
        step(features())
    with torch.no_grad():
        refuse_lost_gradients(step)
    refuse_lost_gradients(plain)
    inside_out = DistributedDataParallel.__new__(DistributedDataParallel)
    with pytest.raises(DiagnosticError, match="E0867"):
        fp8c.compile(inside_out, "deepseek_v3", "cpu")


def test_an_optimizer_that_would_train_nothing_is_remarked(caplog: pytest.LogCaptureFixture) -> None:
    step, plain = compiled("mlp", main_grad=True), compiled("mlp")
    for trained in (step, plain):
        loss_of(trained(features())).backward()
    fp8c.optim.AdamW(step).step()
    torch.optim.AdamW(plain.parameters()).step()
    assert "W0843" not in caplog.text
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.step()
    assert caplog.text.count("W0843: SGD reads `grad`") == 1


def test_a_hook_that_would_see_no_gradient_is_refused() -> None:
    step = compiled("mlp", main_grad=True)
    seen: list[bool] = []
    step.gate.weight.register_post_accumulate_grad_hook(lambda p: seen.append(bool(p.main_grad.any())))
    loss_of(step(features())).backward()
    assert seen == [True]
    step.up.weight.register_hook(lambda grad: grad * 10)
    with pytest.raises(DiagnosticError, match=r"E0843.*\[256, 128\] has a hook of register_hook"):
        loss_of(step(features())).backward()


def test_a_module_of_torchs_own() -> None:
    """Dynamo reaches its parameters through a bound method, so they have other names."""
    step = fp8c.compile(
        nn.Sequential(nn.Linear(128, 128, bias=False, dtype=BF16)), "deepseek_v3", "cpu", main_grad=True
    )
    loss_of(step(torch.randn(4, 128).to(BF16))).backward()
    assert step[0].weight.main_grad.any() and step[0].weight.grad is None
