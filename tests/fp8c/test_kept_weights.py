"""Weights are quantized once per value: over micro-batches, forward and backward, lengths and modes, and never stale."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fp8c
import fp8c.backends.reference  # noqa: F401  (the CPU's kernels)
from fp8c import driver
from fp8c.kept_weights import WeightStore
from tests.models.harness import count_executed, gradients, loss_of
from tests.models.test_handwritten import BF16, Mlp, features

GEMMS = 3  # of Mlp: gate, up, down


def compiled(model: nn.Module | None = None, **options: bool) -> tuple[nn.Module, WeightStore]:
    step = fp8c.compile(model if model is not None else Mlp(), "deepseek_v3", "cpu", **options)
    return step, driver.session_of(step).weights


def train(step: nn.Module, x: Tensor | None = None) -> Tensor:
    loss = loss_of(step(features() if x is None else x))
    loss.backward()
    return loss.detach()


def quantizes(step: nn.Module) -> Counter[str]:
    return count_executed(lambda: train(step))


def test_once_per_optimizer_step_over_micro_batches() -> None:
    step, store = compiled()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    for done in range(1, 4):
        for _ in range(4):
            train(step)
        assert store.refreshed == GEMMS * done
        optimizer.step()
        optimizer.zero_grad()


def test_the_results_are_those_without() -> None:
    torch.manual_seed(0)
    model = Mlp()
    kept, _ = compiled(copy.deepcopy(model))
    plain, store = compiled(copy.deepcopy(model), keep_weights=False)
    for step in (kept, plain):
        optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for _ in range(3):
            train(step, features())
            optimizer.step()
        train(step, features(length=24))
    assert store.refreshed == 0 and not store.entries
    assert all(torch.equal(a, b) for a, b in zip(gradients(kept).values(), gradients(plain).values(), strict=True))


def test_a_step_without_a_change_quantizes_no_weight() -> None:
    kept, _ = compiled()
    plain, _ = compiled(keep_weights=False)
    for step in (kept, plain):
        train(step)
    # the weights' quantizes of forward, and the last one's of backward: the first two need no gradient of their input
    assert quantizes(plain)["fp8c::quantize"] - quantizes(kept)["fp8c::quantize"] == GEMMS + 1


def test_backward_can_release_what_it_has_read() -> None:
    torch.manual_seed(0)
    model = Mlp()
    kept, _ = compiled(copy.deepcopy(model))
    lean, store = compiled(copy.deepcopy(model), release_weights=True)
    x = features()
    held = []
    for step in (kept, lean):
        loss = loss_of(step(x))
        held.append(driver.session_of(step).weights.size_bytes)
        loss.backward()
    assert held[0] == held[1] > 0
    # What backward reads is gone; the first GEMMs need no gradient of their input, so it reads the last one's only.
    assert len(store.entries) == GEMMS - 1
    assert all(torch.equal(a, b) for a, b in zip(gradients(kept).values(), gradients(lean).values(), strict=True))
    train(lean, x)
    assert store.refreshed == GEMMS + 1


def test_a_new_weight_where_a_freed_one_lay_is_noticed() -> None:
    """An allocator gives freed memory out again: the same address, and a version that counts from the same start."""
    step, store = compiled()
    weight = step.up.weight
    memory = bytearray(weight.nbytes)

    def replaced(factor: float) -> None:
        weight.data = torch.zeros(1, dtype=BF16)  # the old value's storage is gone, the memory is not
        value = torch.frombuffer(memory, dtype=BF16).view(values.shape)
        weight.data = value.copy_(values * factor)

    values = weight.detach().clone()
    replaced(1.0)
    first, address, version = train(step), weight.data_ptr(), weight._version
    before = store.refreshed
    replaced(3.0)
    assert (weight.data_ptr(), weight._version) == (address, version)
    second = train(step)
    assert store.refreshed == before + 1 and not torch.equal(first, second)


def test_weights_made_in_inference_mode_are_quantized_in_every_call() -> None:
    torch.manual_seed(0)
    usual = Mlp()
    with torch.inference_mode():
        step, store = compiled(copy.deepcopy(usual))
        plain, _ = compiled(usual)
        x = features()
        assert torch.equal(step(x), plain(x)) and not store.entries
        for p in step.parameters():
            p.mul_(2)
        assert not torch.equal(step(x), plain(x))


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_are_noticed(fused: bool) -> None:
    step, store = compiled(Mlp(dtype=torch.float32))
    x = features(dtype=torch.float32)
    train(step, x)
    torch.optim.AdamW(step.parameters(), lr=0.1, fused=fused).step()
    before = store.refreshed
    train(step, x)
    assert store.refreshed == before + GEMMS


def test_other_writes_are_noticed() -> None:
    step, store = compiled()
    first, weights = train(step), {k: v.clone() for k, v in step.state_dict().items()}
    with torch.no_grad():
        for p in step.parameters():
            p.mul_(2)
    assert not torch.equal(train(step), first)
    step.load_state_dict(weights)
    assert torch.equal(train(step), first)
    for p in step.parameters():
        p.data = p.data * 2  # another address
    assert not torch.equal(train(step), first)


class Behind(torch.optim.Optimizer):
    """Writes through `.data`, which no version counts."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {})  # type: ignore[arg-type]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(2)


def test_an_optimizer_that_writes_data_is_noticed() -> None:
    step, _ = compiled()
    first = train(step)
    Behind(step.parameters()).step()
    assert not torch.equal(train(step), first)


def seen(step: nn.Module, before: Tensor) -> Tensor:
    """The loss after the weights were changed, which is that of weights that were certainly quantized again."""
    loss = train(step)
    assert not torch.equal(loss, before)
    fp8c.weights_changed(step)
    assert torch.equal(train(step), loss)
    return loss


def test_weights_copied_from_the_masters_of_an_optimizer_are_not_stale() -> None:
    """The loop of mixed precision by hand: `p.data.copy_` counts no version, and the optimizer knows the masters alone."""
    step, _ = compiled()
    masters = [p.detach().float() for p in step.parameters()]
    first = train(step)
    optimizer = torch.optim.SGD(masters, lr=1.0)
    for _ in range(2):
        for p, master in zip(step.parameters(), masters):
            master.grad, p.grad = p.grad.float(), None  # type: ignore[union-attr]
        optimizer.step()
        for p, master in zip(step.parameters(), masters):
            p.data.copy_(master)
        first = seen(step, first)


def test_a_loop_without_an_optimizer_is_noticed() -> None:
    step, _ = compiled()
    first = train(step)
    for _ in range(2):
        for p in step.parameters():
            assert p.grad is not None
            p.data -= p.grad
            p.grad = None
        first = seen(step, first)


def test_forwards_before_the_first_backward_share_them() -> None:
    """As the stages of a pipeline run: no gradient yet, and nobody has taken one."""
    step, store = compiled()
    for expected in (GEMMS, 2 * GEMMS):
        losses = [loss_of(step(features())) for _ in range(3)]
        for loss in losses:
            loss.backward()
        assert store.refreshed == expected
        step.zero_grad()


def test_optimizers_of_other_weights_of_the_step_leave_frozen_ones() -> None:
    step, store = compiled()
    gate, *others = step.parameters()
    train(step)
    for optimizer in (torch.optim.SGD([gate], lr=0.1), torch.optim.SGD([gate], lr=0.1)):
        optimizer.step()
    before = store.refreshed
    train(step)
    assert store.refreshed == before + 1 and len(others) == GEMMS - 1


def test_writes_behind_everything_can_be_told() -> None:
    step, _ = compiled()
    first = train(step)
    for p in step.parameters():
        p.data.mul_(2)
    assert torch.equal(train(step), first)  # what nobody says, nobody sees
    fp8c.weights_changed(step)
    assert not torch.equal(train(step), first)


def test_lengths_and_inference_share_them() -> None:
    step, store = compiled()
    train(step)
    train(step, features(length=48))
    with torch.no_grad():
        step(features())
    with torch.inference_mode():
        step(features())
    assert store.refreshed == GEMMS


def test_inference_first_then_training() -> None:
    step, store = compiled()
    with torch.inference_mode():
        step(features())
    train(step)
    assert store.refreshed == GEMMS and all(p.grad is not None for p in step.parameters())


def test_frozen_weights_are_quantized_once() -> None:
    model = Mlp()
    for p in list(model.parameters())[:1]:
        p.requires_grad_(False)
    step, store = compiled(model)
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        train(step)
        optimizer.step()
    assert store.refreshed == GEMMS + 2 * (GEMMS - 1)


def test_a_copy_keeps_its_own() -> None:
    step, store = compiled()
    train(step)
    other = copy.deepcopy(step)
    theirs = driver.session_of(other).weights
    assert theirs is not store and not theirs.entries
    train(other)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert float(train(step)) != float(train(other))


def test_a_model_that_nobody_has_any_more_is_freed() -> None:
    """Dynamo keeps what it compiled: parameters and FP8 weights of every model of a process stayed in memory."""

    def trained() -> tuple[weakref.ref[Tensor], WeightStore]:
        step, store = compiled()
        train(step)
        assert store.entries
        return weakref.ref(next(step.parameters())), store

    parameter, store = trained()
    gc.collect()
    assert parameter() is None and not store.entries


def test_memory_is_counted_and_freed() -> None:
    step, store = compiled()
    train(step)
    numbers = sum(p.numel() for p in step.parameters() if p.dim() == 2)
    assert numbers <= store.size_bytes <= 1.01 * numbers + 4 * 128  # a byte each, and a scale for each 128x128
    alive = [v.data_ptr() for e in store.entries.values() for v in e.values]
    assert len(set(alive)) == len(alive)
    held = weakref.ref(next(iter(store.entries.values())).values[0])
    del step, store
    torch._dynamo.reset()
    gc.collect()
    assert held() is None


def test_bf16_weights_of_a_tied_model_are_no_quantized_ones() -> None:
    step, store = compiled()
    train(step)
    assert all(v.dtype in (torch.float8_e4m3fn, torch.float32) for e in store.entries.values() for v in e.values)
    assert BF16 not in {v.dtype for e in store.entries.values() for v in e.values}


def test_a_transposed_copy_is_made_of_the_kept_one() -> None:
    """Backward's transposed weight (fuse-casts) shares the forward's quantize instead of keeping a second copy."""
    pytest.importorskip("fp8c.ops.fused")
    from torch import fx
    from torch.fx.experimental.proxy_tensor import make_fx

    from fp8c.kept_weights import split_weights

    ops, fmt = torch.ops.fp8c, "e4m3[128x128] fp32"
    w, x = torch.randn(256, 128).to(BF16), torch.randn(256, 4)

    def half(name: str) -> fx.GraphModule:
        def run(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            if name == "forward":
                q, s = ops.quantize(w, fmt)
                return q.float() @ x.new_ones(128, 4) * s[0, 0], s
            qt, s = ops.quantize_transposed(w, fmt)
            return qt.float() @ x, s

        gm = make_fx(run, tracing_mode="fake")(w, x)
        gm.graph.find_nodes(op="placeholder")[0].meta["fp8c_name"] = "w"
        return gm

    store = WeightStore()
    with torch.no_grad():
        for name in ("forward", "backward"):
            gm = half(name)
            main, chains = split_weights(gm)
            (chain,) = chains
            values = store.values(chain, [w])
            found = main(w, x, *(values[i] for i in chain.reads))
            assert all(torch.equal(a, b) for a, b in zip(found, gm(w, x), strict=True))
    assert store.refreshed == 1 and len(store.entries) == 1
    assert sum(v.numel() for e in store.entries.values() for v in e.values) == w.numel() + 2
