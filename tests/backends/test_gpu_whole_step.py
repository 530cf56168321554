"""The whole step on the GPU: no host synchronization, no recompile, CUDA graphs, checkpointing, autocast, FSDP2.

One tiny DeepSeek-V3 with an MoE layer serves all; what the kernels compute is compared in test_gpu_step.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

import fp8c
from fp8c import driver, step_cache
from fp8c.models import load_model
from tests.backends.test_gpu_step import MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LENGTH = 128


def model(**overrides: Any) -> nn.Module:
    loaded = load_model(
        "hf:deepseek_v3",
        overrides={**MODELS["deepseek_v3"], "num_hidden_layers": 1, "first_k_dense_replace": 0, **overrides},
        weights="random",
        batch=2,
        seq=LENGTH,
    )
    return loaded.module.cuda()


def ids(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(512, (batch, length), device="cuda")


def train(step: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = step(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


@pytest.fixture(scope="module")
def step() -> Iterator[nn.Module]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = fp8c.compile(model(), dynamic=True)
    train(compiled, ids())
    yield compiled


def test_the_host_never_waits(step: nn.Module) -> None:
    tokens = ids()
    train(step, tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(step, tokens)
        with torch.no_grad():
            for p in step.parameters():
                p.mul_(0.99)
        train(step, tokens)  # with weights to quantize again
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lengths_and_loads_need_no_new_graph(step: nn.Module) -> None:
    session = driver.session_of(step)
    train(step, ids())  # the graph: every test starts from a fresh Dynamo, which has forgotten the fixture's
    graphs = len(session.steps)
    with torch._dynamo.config.patch(error_on_recompile=True):  # names the guard
        for length in (192, 160, 144, 256, 131, 77, 33):
            assert torch.isfinite(train(step, ids(length)))
        train(step, torch.zeros_like(ids()))  # every token alike: a few experts get everything
    assert len(session.steps) == graphs


def test_masks_are_dropped_and_weights_kept(step: nn.Module) -> None:
    session = driver.session_of(step)
    assert "R0840" in {r.code for r in session.remarks}
    before = session.weights.refreshed
    train(step, ids())
    train(step, ids())
    assert session.weights.refreshed - before <= len(session.weights.entries)
    assert session.weights.size_bytes > 0


def test_the_step_can_be_captured_in_a_cuda_graph() -> None:
    """Replays follow the parameters: a captured graph quantizes its weights by itself."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = fp8c.compile(model(), dynamic=False)
    tokens = ids()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compiled.zero_grad(set_to_none=True)
            train(compiled, tokens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    compiled.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = train(compiled, tokens)
    losses = []
    for _ in range(3):
        graph.replay()
        captured = {n: p.grad.clone() for n, p in compiled.named_parameters() if p.grad is not None}
        losses.append(float(loss))
        with torch.no_grad():
            for p in compiled.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.5)
    assert losses[0] > losses[1] > losses[2]
    assert captured


def test_checkpointing() -> None:
    """As close to BF16 as without. It is not the same: a value that is computed again in backward is read in BF16 where
    the plain step reads the FP8 copy it cached, and quantizes it along another axis than from that copy."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain: Any = model()
    other, exact = copy.deepcopy(plain), copy.deepcopy(plain)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = ids()
    losses = [float(train(fp8c.compile(m.train(), dynamic=False), tokens)) for m in (plain, other)]
    losses.append(float(train(exact.train(), tokens)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[1] == pytest.approx(losses[2], rel=1e-2)
    for name, wanted in exact.named_parameters():
        if wanted.grad is not None:
            errors = [error_of(m.get_parameter(name), wanted) for m in (plain, other)]
            assert errors[1] < 1.25 * errors[0] + 2.0**-6, (name, errors)


def error_of(p: nn.Parameter, exact: nn.Parameter) -> float:
    """Of a gradient, over the norm of the exact one."""
    assert p.grad is not None and exact.grad is not None
    return float((p.grad.float() - exact.grad.float()).norm() / exact.grad.float().norm().clamp_min(1e-30))


def test_autocast_over_fp32_parameters() -> None:
    torch._dynamo.reset()
    compiled = fp8c.compile(model().float(), dynamic=False)
    tokens = ids()
    with torch.autocast("cuda", torch.bfloat16):
        loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in compiled.parameters())


def test_main_grad_is_the_gradient_in_fp32() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain: Any = model()
    other: Any = copy.deepcopy(plain)
    tokens = ids()
    train(fp8c.compile(plain, dynamic=False), tokens)
    step = fp8c.compile(other, dynamic=False, main_grad=True)
    train(step, tokens)
    for (name, p), q in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        if p.grad is None:
            continue
        error = (p.grad.float() - q[1].main_grad).norm() / q[1].main_grad.norm().clamp_min(1e-30)
        assert q[1].grad is None and error < 2**-5, (name, float(error))


def test_fsdp2_layer_by_layer() -> None:
    """One rank: each layer compiled by itself and sharded; the backend quantizes the gathered weights in every step."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch._dynamo.reset()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    try:
        torch.manual_seed(0)
        sharded: Any = model()
        from fp8c.dynamo import backend
        from fp8c.prepare import prepare

        prepare(sharded)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in sharded.model.layers:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
            fully_shard(layer, mp_policy=policy)
        fully_shard(sharded, mp_policy=policy)
        tokens = ids()
        losses = []
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.5)
        for _ in range(3):
            losses.append(float(train(sharded, tokens)))
            optimizer.step()
            optimizer.zero_grad()
        assert losses[0] > losses[1] > losses[2]
    finally:
        dist.destroy_process_group()


def test_a_compiled_step_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another process: the halves come from the cache, for other lengths too, and give the same bits.

    After an update of fp8c the step is compiled anew; Inductor finds its code, and again the step is kept.
    """
    found = []
    with functorch_config.patch(enable_autograd_cache=True), torch.compiler.config.patch(cache_key_tag=str(tmp_path)):
        for version in ("1", "1", "2", "2"):
            monkeypatch.setattr(step_cache, "source_digest", lambda version=version: version)
            torch._dynamo.reset()
            counters.clear()
            torch.manual_seed(0)
            compiled = fp8c.compile(model(), dynamic=True)
            losses = [train(compiled, ids(length)) for length in (LENGTH, LENGTH + 9)]
            gradients = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
            found.append((dict(counters["aot_autograd"]), losses, gradients, counters["inductor"]["fxgraph_cache_hit"]))
    seen, all_losses, all_gradients, inductor = zip(*found)
    assert [counts.get("autograd_cache_saved", 0) for counts in seen] == [1, 0, 1, 0]
    assert [counts.get("autograd_cache_hit", 0) for counts in seen] == [0, 1, 0, 1]
    assert inductor[2] >= 2, "both halves' code was found"
    for losses, gradients in zip(all_losses[1:], all_gradients[1:]):
        assert all(map(torch.equal, all_losses[0], losses))
        assert gradients.keys() == all_gradients[0].keys()
        assert all(torch.equal(gradients[name], all_gradients[0][name]) for name in gradients)
