"""Runs the fused AdamW kernel beside PyTorch's operators and prints the differences as JSON.

    TRITON_INTERPRET=1 python tests/optim/adamw_kernel_check.py cpu          under Triton's interpreter
    python tests/optim/adamw_kernel_check.py cuda

Each figure is an error over its bound: the same FP32 arithmetic in another order may differ by a few units of FP32, and
then by one rounding of the type that is stored.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET"):
    # Triton's interpreter truncates FP32 to BF16; PyTorch rounds, as the hardware does.
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return original(x, source, target, rounding)
        bits = torch.from_numpy(np.ascontiguousarray(x).view(np.uint32).view(np.int32).copy())
        rounded = bits.view(torch.float32).to(torch.bfloat16).view(torch.int16)
        return rounded.numpy().view(np.uint16).reshape(x.shape)

    interpreter._convert_float = convert_float

from fp8c.backends.reference import adamw as portable
from fp8c.backends.reference.adamw import Bucket
from fp8c.backends.triton import adamw as fused

BF16, FP32 = torch.bfloat16, torch.float32
#: Relative distance of two FP32 results of the same formula: a handful of roundings, cancellation in the update.
FP32_BOUND = 64 * 2.0**-24
UNIT = {BF16: 2.0**-7, torch.float16: 2.0**-10, FP32: 0.0}  # a last bit that falls the other way


def bucket(sizes: list[tuple[int, ...]], param: Any, grad: Any, moment: Any, device: str, seed: int) -> Bucket:
    generator = torch.Generator().manual_seed(seed)

    def make(dtype: Any, scale: float = 1.0) -> list[Tensor]:
        return [(torch.randn(s, generator=generator) * scale).to(device, dtype) for s in sizes]

    masters = make(FP32)
    params = [m.to(param) for m in masters]
    second = [v.abs() + 1e-4 for v in make(moment, 0.1)]
    steps = [torch.tensor(3.0, device=device) for _ in sizes]
    return Bucket(params, make(grad), masters if param != FP32 else None, make(moment, 0.1), second, steps)


def clone(b: Bucket) -> Bucket:
    copies = [[t.clone() for t in row] for row in b.rows()]
    return Bucket(copies[0], copies[1], copies[2] if b.masters is not None else None, *copies[3:])


def over(found: Tensor, expected: Tensor) -> float:
    """Error over its bound; infinite where one is NaN and the other is not."""
    a, b = found.double(), expected.double()
    bound = (FP32_BOUND + UNIT[found.dtype]) * torch.maximum(b.abs(), torch.tensor(1e-3).to(b)) + 1e-30
    error = torch.where(a.isnan() & b.isnan(), torch.zeros_like(a), (a - b).abs() / bound)
    return float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0


def compare(b: Bucket, limit: float, clears: bool, scale: float = 1.0) -> dict[str, float]:
    """Two steps by both, each from the same states."""
    settings: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clears=clears)
    a, control_a = clone(b), torch.zeros(4, device=b.params[0].device)
    control_b = control_a.clone()
    tables = steps = None
    for _ in range(2):
        for row, reached in zip(b.rows(), a.rows()):
            for tensor, value in zip(row, reached):
                tensor.copy_(value)
        control_b.copy_(control_a)
        portable.decide(a.steps, portable.square_sum(a), control_a, scale, limit, True)
        portable.update(a, control_a, **settings)
        tables = fused.tables_of(b, tables)
        steps = fused.step_table(b.steps, [settings["betas"]] * len(b.steps), steps)
        fused.decide(steps, fused.square_sum(b, tables), control_b, scale, limit, True)
        fused.update(b, tables, control_b, steps.corrections, **settings)
    names = ("params", "grads", "masters", "first", "second", "steps")
    found = {n: max(over(x, y) for x, y in zip(xs, ys)) for n, xs, ys in zip(names, b.rows(), a.rows())}
    return found | {"control": over(control_b, control_a)}


def main(device: str) -> dict[str, dict[str, float]]:
    sizes: list[tuple[int, ...]] = [(1,), (3, 5), (2049,), (8192,), (5, 1700), (0,)]
    results = {
        "recipe": compare(bucket(sizes, BF16, FP32, BF16, device, 0), 1.0, False),
        "bf16 gradients": compare(bucket(sizes, BF16, BF16, BF16, device, 1), float("inf"), False),
        "fp32 parameters": compare(bucket(sizes, FP32, FP32, BF16, device, 2), 1e9, False, 0.25),
        "all fp32": compare(bucket(sizes, FP32, FP32, FP32, device, 3), 0.5, False),
        "clears": compare(bucket(sizes, BF16, FP32, BF16, device, 4), 1.0, True),
    }
    broken = bucket(sizes, BF16, FP32, BF16, device, 5)
    broken.grads[2][7] = float("nan")
    results["not finite"] = compare(broken, 1.0, False)
    odd = bucket([(4097,)], BF16, FP32, BF16, device, 6)  # addresses that are no multiples of 16 bytes
    rows = [[t[1:] for t in row] for row in odd.rows()[:5]]
    results["unaligned"] = compare(Bucket(rows[0], rows[1], rows[2], rows[3], rows[4], odd.steps), 1.0, False)
    turned = bucket([(40, 60)], BF16, FP32, BF16, device, 7)
    rows = [[t.t() for t in row] for row in turned.rows()[:5]]
    results["transposed"] = compare(Bucket(rows[0], rows[1], rows[2], rows[3], rows[4], turned.steps), 1.0, False)
    return results


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
