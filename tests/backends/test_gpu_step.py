"""A compiled step on the GPU against the oracle, operator by operator.

Comparing whole gradients says little: a value that lands on the other side of a rounding boundary moves everything
behind it. So every fp8c operator of the real step is run on the GPU, and the CPU reference gets the very same inputs:
quantizers must agree bit for bit, GEMMs with FP64 within the bound of FP32 summation, attention within its own bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx

from fp8c import driver
from fp8c.backends.reference import rounding_check
from fp8c.backends.reference.attention_check import evaluate_attention
from fp8c.backends.reference.check import GEMMS, check_gemm
from fp8c.backends.reference.rounding_check import strides
from fp8c.models import load_model
from fp8c.prepare import prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **SMALL,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
}


def to_cpu(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, value)


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """The values in row-major order, whatever the layout: one row's scales are a column to `contiguous`, too."""
    return torch.empty(t.shape, dtype=t.dtype).copy_(t).view(torch.uint8)


@dataclass
class Compared:
    """What was compared, and what did not agree."""

    count: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class ComparingInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, compared: Compared) -> None:
        super().__init__(gm)
        self.compared = compared

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        target = n.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "fp8c":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            name = target._schema.name.split("::")[1]
            self.compared.count[name] = self.compared.count.get(name, 0) + 1
            problem = other_layout(result, n.meta["val"])
            problem = problem or disagreement(name, target, to_cpu(args), to_cpu(kwargs), result)
            if problem:
                self.compared.wrong.append(f"%{n.name} {name}: {problem}")
        return result


def other_layout(result: Any, promised: Any) -> str:
    """Shapes, types and strides of the kernels' results are those of the fake implementation."""
    for found, fake in zip(*(torch.utils._pytree.tree_leaves(v) for v in (result, promised)), strict=True):
        same = found.shape == fake.shape and found.dtype == fake.dtype and strides(found) == strides(fake)
        if not same:
            return f"{found.dtype} {found.shape} {found.stride()}, promised {fake.dtype} {fake.shape} {fake.stride()}"
    return ""


def disagreement(name: str, target: Any, args: Any, kwargs: Any, result: Any) -> str:
    if name in GEMMS:
        # Our GEMMs on Hopper sum in its truncating accumulator, promoted every 128 terms; other machines' sum in FP32.
        is_hopper = torch.cuda.get_device_capability() == (9, 0)
        check = check_gemm(name, args, result, "hopper" if is_hopper else "fp32")
        # The portable grouped GEMM multiplies BF16 copies on a GPU and rounds its result: two operands and the output,
        # 2**-8 of each value at most.
        within = check.is_within_bound if name == "scaled_mm" else check.relative_error <= 3 * 2.0**-8
        ok = within and not check.nonfinite
        return "" if ok else str(check)
    if name == "attention":
        q, k, v, mask, is_causal, scale, _ = args
        with torch.enable_grad():  # the evaluation differentiates in FP64
            ones = torch.ones_like(result[0])
            evaluation = evaluate_attention(ones, q, k, v, mask, is_causal, scale, rounds_probabilities=True)
        ratios = evaluation.worst_ratios(result[0].cpu())
        return "" if max(ratios) <= 1.0 else f"error over bound {ratios}"
    if name == "attention_backward":
        expected = target(*args, **kwargs)
        for which, found, exact in zip(("dq", "dk", "dv"), to_cpu(result), expected):
            error = float((found.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-30))
            if not error <= 2.0**-6:  # BF16 probabilities and products against FP32: 2**-8 each, summed with signs
                return f"{which} is off by {error:.3g} of its norm"
        return ""
    expected = target(*args, **kwargs)
    if name.startswith("swiglu_"):
        return swiglu_disagreement(name, args, result, expected)
    if name == "rms_norm_quantize":
        return norm_disagreement(args, to_cpu(result))
    if name == "linear_cross_entropy":
        return head_disagreement(args, to_cpu(result), expected)
    result = to_cpu(result)
    pairs = zip(result, expected) if isinstance(result, tuple) else [(result, expected)]
    return "" if all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in pairs) else "bits differ from the reference"


def swiglu_disagreement(name: str, args: Any, result: Any, expected: Any) -> str:
    """They go through exp. What is cached of their inputs, and quantized as it is, has the oracle's bits."""
    if name == "swiglu_quantize_cached":
        if not all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(result[2:], expected[2:])):
            return "cached inputs differ from the reference"
        return rounding_check.disagreement(result[:2], expected[:2], args[2])
    formats = args[6:9] if name == "swiglu_backward_quantize" else args[3:4]
    for i, fmt in enumerate(formats):
        problem = rounding_check.disagreement(result[2 * i : 2 * i + 2], expected[2 * i : 2 * i + 2], fmt)
        if problem:
            return f"{fmt}: {problem}"
    if name == "swiglu_backward_quantize" and args[3] is not None:
        # Terms dh * product summed in FP32; two BF16 roundings of a product may go the other way.
        gate, up = torch.ops.fp8c.dequantize(*args[1:3], args[5], args[0].dtype).chunk(2, -1)
        terms = args[0].float() * (torch.nn.functional.silu(gate) * up)
        if not ((result[6].cpu() - expected[6]).abs() <= 2 * 2.0**-7 * terms.abs().sum(1, keepdim=True)).all():
            return "the gradient of the router's weight is off"
    return ""


def norm_disagreement(args: Any, result: Any) -> str:
    """The factor is an FP32 sum in an order of its own; what follows has the oracle's bits, given the factor."""
    x, weight, eps, fmt = args
    rows = x.reshape(-1, x.shape[-1])
    exact = torch.rsqrt(rows.double().square().mean(1, keepdim=True) + eps)
    if not ((result[2].double() - exact).abs() <= (rows.shape[1] / 2 + 8) * 2.0**-24 * exact).all():
        return "the factor is off"
    expected = torch.ops.fp8c.quantize(weight * (rows.float() * result[2]).to(x.dtype), fmt)
    same = all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(result, expected))
    return "" if same else "bits differ from the reference"


def head_disagreement(args: Any, result: Any, expected: Any) -> str:
    """Sums of the logits in another order move some by one rounding to their type, 2**-8 of the largest at most."""
    x, w = args[:2]
    largest = float((x.float() @ w.float().t()).abs().max())
    if not abs(float(result[0]) - float(expected[0])) <= 2 * 2.0**-8 * largest:
        return f"loss {float(result[0])}, expected {float(expected[0])}"
    for which, found, exact in zip(("dx", "dw"), result[1:], expected[1:]):
        error = float((found.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-30))
        if not error <= 2.0**-6:  # BF16 logits, their gradients and the products: 2**-8 each
            return f"{which} is off by {error:.3g} of its norm"
    return ""


class ComparingSession(driver.Session):
    compared: Compared

    def _lower(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return make_boxed_func(ComparingInterpreter(gm, self.compared).run)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_every_operator_of_a_step_agrees_with_the_oracle(name: str) -> None:
    loaded = load_model(f"hf:{name}", overrides=MODELS[name], weights="random", batch=2, seq=128)
    step = loaded.step().cuda()
    batch = {k: v.cuda() for k, v in loaded.example_inputs.items()}
    plain = driver.new_session("deepseek_v3")
    session = ComparingSession(plain.spec, plain.target)
    session.compared = Compared()
    prepare(step, batch)
    torch._dynamo.reset()
    loss = torch.compile(step, backend=driver.guarded(session), fullgraph=True, dynamic=False)(batch)
    loss.backward()
    print(name, float(loss), session.compared.count)
    assert {"quantize", "requantize", "dequantize", "scaled_mm", "attention_backward"} <= set(session.compared.count)
    assert not session.compared.wrong, "\n".join(session.compared.wrong)


#: An error of half a gradient's norm, more than FP8 makes in any parameter's here, if it is orthogonal to the gradient, leaves
#: this share of a step's progress.
PROGRESS = 1.0 / math.sqrt(1.0 + 0.5**2)


def losses_of(step: Any, parameters: Any, batch: dict[str, Tensor], count: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(count):
        loss = step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_inductor_trains_on_the_gpu_and_takes_other_lengths() -> None:
    """The same model lowered by Inductor: the loss falls as in eager BF16, and another length runs without a new graph being
    wrong."""
    loaded = load_model("hf:deepseek_v3", overrides=MODELS["deepseek_v3"], weights="random", batch=2, seq=128)
    step = loaded.step().cuda()
    eager = copy.deepcopy(step)
    batch = {k: v.cuda() for k, v in loaded.example_inputs.items()}
    compiled = driver.compile(step)
    expected = losses_of(eager, eager.parameters(), batch)
    losses = losses_of(compiled, step.parameters(), batch)
    print(losses, expected)
    assert losses[0] - losses[-1] > PROGRESS * (expected[0] - expected[-1]) > 0
    longer = {k: torch.cat([v, v], 1)[:, :192] for k, v in batch.items()}
    assert torch.isfinite(compiled(longer))
