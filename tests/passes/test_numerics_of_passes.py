"""Every pass computes what it says: the rewritten step against FP64 evaluations of the same quantization chain.

The reference quantizers are the oracle for codes and scales (they are tested bit by bit elsewhere). What is checked here
is the chain: which value is quantized in which format, along which axis, and which pair each GEMM reads. The chain is
written out by hand in FP64 from dequantized operands, so the only difference is FP32 summation: by Higham (Accuracy and
Stability, section 3.1) at most (K + 4) * 2**-24 of the sum of magnitudes, plus one rounding of the output (2**-8 in BF16
with 8 bits of precision, to nearest).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fp8c.backends.reference  # noqa: F401  (the CPU's kernels)
from fp8c import graph as g
from fp8c.backends.reference.check import check_gemm
from fp8c.ops import stored_rows
from fp8c.tools import opt
from tests.passes import steps
from tests.passes.steps import BF16, Function, data, experts_inputs, experts_module, random

ops = torch.ops.fp8c
ACT, ACT_T, BLOCK = "e4m3[1x128] fp32", "e4m3[128x1] fp32", "e4m3[128x128] fp32"
ACT2, ACT2_T, E5M6 = "e4m3[1x128] pow2", "e4m3[128x1] pow2", "e5m6[1x128] pow2"
F64 = torch.float64


def requantized(x: Tensor, src: str, dst: str, offs: Tensor | None = None) -> Tensor:
    """The FP64 value of x after both roundings."""
    cols = x.shape[-1] if src.startswith("e5m6") else None
    pair = ops.requantize(*ops.quantize(x, src), src, dst, offs, cols)
    return in_place(ops.dequantize(*pair, dst, torch.float32), offs, x).to(F64)


def in_place(stored: Tensor, offs: Tensor | None, x: Tensor) -> Tensor:
    """Rows where x has them: groups that restart at each expert move rows."""
    return stored if offs is None else stored[stored_rows(offs, x.shape[0], 128)]


def quantized(x: Tensor, fmt: str, offs: Tensor | None = None) -> Tensor:
    """The FP64 value of x after rounding to `fmt`: dequantizing is one FP32 product of an 8-bit and a 24-bit number."""
    pair = ops.quantize(x, fmt, offs)
    return in_place(ops.dequantize(*pair, fmt, torch.float32), offs, x).to(F64)


def assert_product(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """actual == a @ b up to FP32 summation (and the rounding of dequantizing) and the output's own rounding."""
    k = a.shape[-1]
    magnitude = a.abs() @ b.abs()
    summation = (k + 4) * 2.0**-24 * magnitude
    output = 0.0 if actual.dtype is torch.float32 else 2.0**-8
    exact = a @ b
    bound = summation + output * (exact.abs() + summation) + 2.0**-126
    assert ((actual.to(F64) - exact).abs() <= bound).all()


def run(graph: fx.Graph, *inputs: Tensor) -> list[Any]:
    """Execute a joint graph: parameters, data, tangents."""
    with torch.no_grad():
        interpreter = fx.Interpreter(fx.GraphModule(torch.nn.Module(), graph))
        return list(interpreter.run(*inputs, enable_io_processing=False))


def joint_inputs(module: torch.nn.Module, inputs: tuple[Tensor, ...], *tangents: Tensor) -> list[Tensor]:
    return [*(p.detach() for p in module.parameters()), *(t.detach() for t in inputs), *tangents]


def rewritten(module: torch.nn.Module, inputs: tuple[Tensor, ...], upto: str) -> opt.OptResult:
    order = ["assign-roles", "insert-quantize", "requantize-for-wgrad", "fp8-dispatch", "choose-saved"]
    return opt.run_passes(opt.capture_joint(module, *inputs), passes=order[: order.index(upto) + 1])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("rows", [256, 200])  # 200: the last group along tokens is a partial one
def test_insert_quantize(dtype: torch.dtype, rows: int) -> None:
    module = Function(lambda x, w: x @ w.t(), w=random(128, 384, dtype=dtype))
    x, dy = data(rows, 384, dtype=dtype), random(rows, 128, dtype=dtype)
    result = rewritten(module, (x,), "insert-quantize")
    y, dw, dx = run(result.graph, *joint_inputs(module, (x,), dy))
    w = module.w
    assert_product(y, quantized(x, ACT), quantized(w, BLOCK).T)
    assert_product(dx, quantized(dy, ACT), quantized(w, BLOCK))
    assert_product(dw, quantized(dy, ACT_T).T, quantized(x, ACT_T))


def test_insert_quantize_with_a_bias_and_a_weight_stored_kn() -> None:
    module = Function(
        lambda x, b, w: torch.addmm(b, x, w),
        b=random(128, dtype=torch.float32),
        w=random(384, 128, dtype=torch.float32),
    )
    x, dy = data(256, 384, dtype=torch.float32), random(256, 128, dtype=torch.float32)
    result = rewritten(module, (x,), "insert-quantize")
    by_name = dict(zip(result.ctx.inputs.values(), joint_inputs(module, (x,), dy)))
    assert set(by_name) == {"b", "w", ""}
    y, db, dw, dx = run(result.graph, *joint_inputs(module, (x,), dy))
    product = quantized(x, ACT) @ quantized(module.w, BLOCK)
    bound = (384 + 4) * 2.0**-24 * (quantized(x, ACT).abs() @ quantized(module.w, BLOCK).abs() + module.b.abs())
    assert ((y.to(F64) - (product + module.b.to(F64))).abs() <= bound).all()
    assert_product(dw, quantized(x, ACT_T).T, quantized(dy, ACT_T))
    assert_product(dx, quantized(dy, ACT), quantized(module.w, BLOCK).T)
    assert_product(db[None], torch.ones(1, 256, dtype=F64), dy.to(F64))


def test_requantize_for_wgrad() -> None:
    module = Function(lambda x, w: x @ w.t(), w=random(128, 384))
    x, dy = data(256, 384), random(256, 128)
    result = rewritten(module, (x,), "requantize-for-wgrad")
    y, dw, dx = run(result.graph, *joint_inputs(module, (x,), dy))
    assert_product(y, quantized(x, ACT), quantized(module.w, BLOCK).T)
    assert_product(dw, quantized(dy, ACT_T).T, requantized(x, ACT, ACT_T))


def test_requantize_after_attention_reads_the_twelve_bit_copy() -> None:
    module = Function(steps.attention_function, w=random(128, 256))
    inputs = tuple(data(1, 4, 128, 64) for _ in range(3))
    dy = random(128, 128)
    result = rewritten(module, inputs, "requantize-for-wgrad")
    values = joint_inputs(module, inputs, dy)
    y, dw, *_ = run(result.graph, *values)
    q, k, v = (t.detach() for t in inputs)
    out = ops.attention(q, k, v, None, True, None, False)[0].transpose(1, 2).reshape(128, 256)
    assert_product(y, quantized(out, ACT2), quantized(module.w, BLOCK).T)
    assert_product(dw, quantized(dy, ACT_T).T, requantized(out, E5M6, ACT2_T))


def test_fp8_dispatch_is_exact() -> None:
    """Moving quantizes in front of the gather changes no bit of any result."""
    module, inputs = experts_module(), experts_inputs()
    dy = random(256, 128)
    values = joint_inputs(module, inputs, dy)
    before = run(rewritten(module, inputs, "requantize-for-wgrad").graph, *values)
    after = run(rewritten(module, inputs, "fp8-dispatch").graph, *values)
    moved = dict(rewritten(module, inputs, "fp8-dispatch").changed)
    assert moved["fp8-dispatch"] == 1
    for a, b in zip(before, after):
        assert (a is None and b is None) or torch.equal(a, b)


def test_experts_follow_the_chain_of_the_recipe() -> None:
    """Each expert on its own rows: groups along tokens start again at its first row.

    What lies between two GEMMs is taken from the operators themselves, each checked against FP64 in its own right, so
    that no rounding to BF16 that falls the other way is quantized into a different code.
    """
    module, inputs = experts_module(), experts_inputs()
    x, rows, offs = (t.detach() for t in inputs)
    dy = random(256, 128)
    y, d_up, d_down, *_ = run(rewritten(module, inputs, "fp8-dispatch").graph, *joint_inputs(module, inputs, dy))
    up, down, tokens = quantized(module.up, BLOCK), quantized(module.down, BLOCK), x[rows]
    pair, block = ops.quantize(tokens, ACT2), ops.quantize(module.up.detach(), BLOCK)
    hidden = ops.scaled_grouped_mm(*pair, *block, offs, ACT2, BLOCK, 128, BF16)
    dy_pair, turned = ops.quantize(dy, ACT2), [t.transpose(1, 2) for t in ops.quantize(module.down.detach(), BLOCK)]
    d_activated = ops.scaled_grouped_mm(*dy_pair, *turned, offs, ACT2, BLOCK, 128, BF16)
    leaf = hidden.requires_grad_()
    gate, value = leaf.chunk(2, -1)
    activated = F.silu(gate) * value
    (d_hidden,) = torch.autograd.grad(activated, leaf, d_activated)
    activated, hidden = activated.detach(), hidden.detach()
    start = 0
    for e, end in enumerate(offs.tolist()):
        part, start = slice(start, end), end
        assert_product(hidden[part], quantized(tokens[part], ACT2), up[e].T)
        assert_product(y[part], quantized(activated[part], ACT), down[e].T)
        assert_product(d_activated[part], quantized(dy[part], ACT2), down[e])
        assert_product(d_down[e], quantized(dy[part], ACT2_T).T, quantized(activated[part], ACT_T))
        assert_product(d_up[e], quantized(d_hidden[part], ACT_T).T, requantized(tokens[part], ACT2, ACT2_T))


@pytest.mark.parametrize("step", steps.STEPS)
def test_partition_changes_no_value(step: str) -> None:
    """Forward, then backward from what crossed, give the joint graph's results bit by bit."""
    captured = steps.STEPS[step]()
    order = ["assign-roles", "insert-quantize", "requantize-for-wgrad", "fp8-dispatch", "choose-saved", "partition"]
    result = opt.run_passes(captured, passes=order)
    values = example_values(result.graph)
    expected = run(result.graph, *values)
    assert result.halves is not None
    tangents = [v for n, v in zip(result.graph.find_nodes(op="placeholder"), values) if "tangents" in str(n.target)]
    primals = values[: len(values) - len(tangents)]
    forward = run(result.halves.forward.graph, *primals)
    count = captured.num_fwd_outputs
    backward = run(result.halves.backward.graph, *forward[count:], *tangents)
    for a, b in zip([*forward[:count], *backward], expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("step", steps.STEPS)
def test_every_gemm_of_the_halves_is_within_its_bound(step: str) -> None:
    """Operator by operator against FP64, on the operands the step itself makes."""
    captured = steps.STEPS[step]()
    result = opt.run_passes(captured)
    values = example_values(result.graph)
    assert result.halves is not None
    checked = 0

    class Checking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal checked
            out = super().run_node(n)
            name = g.target_text(n.target).removeprefix("fp8c.")
            if name in ("scaled_mm", "scaled_grouped_mm", "scaled_grouped_wgrad"):
                args, _ = self.fetch_args_kwargs_from_env(n)
                assert check_gemm(name, args, out).is_within_bound, g.node_text(n)
                checked += 1
            return out

    tangents = [v for n, v in zip(result.graph.find_nodes(op="placeholder"), values) if "tangents" in str(n.target)]
    with torch.no_grad():
        forward = Checking(result.halves.forward).run(*values[: len(values) - len(tangents)])
        Checking(result.halves.backward).run(*forward[captured.num_fwd_outputs :], *tangents)
    gemms = len([u for u in result.ctx.uses.values() if u.is_gemm])
    assert checked == 3 * gemms


def example_values(graph: fx.Graph) -> list[Tensor]:
    """Random values of the inputs' types; whole numbers are row numbers and expert ends of the shared steps."""
    values = []
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta["val"]
        if val.dtype is torch.int64:
            values.append(torch.randint(128, val.shape))
        elif val.dtype is torch.int32:
            values.append(torch.tensor([70, 130, 130, 256], dtype=torch.int32))
        else:
            values.append(torch.randn(val.shape).to(val.dtype))
    return values


def test_compress_saved_carries_the_stated_format() -> None:
    """Backward computes with the dequantized copy: the gradients are those of the chain written out."""
    module, inputs = experts_module(), experts_inputs()
    result = opt.run_passes(opt.capture_joint(module, *inputs))
    assert result.halves is not None
    x, rows, offs = (t.detach() for t in inputs)
    dy = random(256, 128)
    forward = run(result.halves.forward.graph, *joint_inputs(module, inputs))
    _, d_down, *_ = run(result.halves.backward.graph, *forward[1:], dy)
    hidden = ops.scaled_grouped_mm(
        *ops.quantize(x[rows], ACT2), *ops.quantize(module.up.detach(), BLOCK), offs, ACT2, BLOCK, 128, BF16
    )
    kept = ops.dequantize(*ops.quantize(hidden, ACT), ACT, BF16)
    gate, value = kept.chunk(2, -1)
    activated = F.silu(gate) * value
    start = 0
    for e, end in enumerate(offs.tolist()):
        part, start = slice(start, end), end
        assert_product(d_down[e], quantized(dy[part], ACT2_T).T, quantized(activated[part], ACT_T))
