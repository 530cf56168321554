"""AdamW for many tensors in one launch: moments, master weight and gradient are read once and written once.

Legend: `addresses` int64 [6, n] points at parameter, gradient, master, exp_avg, exp_avg_sq and step of n tensors; one
program handles one chunk of one tensor, `chunks` int32 [programs, 2] says which. `corrections` FP32 [n, 2] =
1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) of each tensor's step t, made once a step and not once a program. Arithmetic
is FP32 in registers; each result is rounded once, to nearest even, when it is stored. `control` FP32 [4] = factor of
the gradient, 1 to take the step (0: leave everything as it is), norm, steps left out so far: written on the device, so
no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.backends.reference.adamw import Bucket
from fp8c.diagnostics import fail

#: Elements of one program, and of one trip of its loop.
CHUNK, BLOCK, WARPS = 2048, 1024, 4
ALIGNMENT_BYTES = 16

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def _tensor(addresses, row, n, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer in `addresses[row, tensor]`, typed, with what is known of its alignment."""
    pointer = tl.load(addresses + row * n + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # Four elements a thread whatever the type: loads of 16 and of 8 bytes, and no exchange between threads.
        pointer = tl.multiple_of(pointer, 4 * DTYPE.primitive_bitwidth // 8)
    return pointer


@triton.jit  # type: ignore[untyped-decorator]
def square_sum_kernel(  # type: ignore[no-untyped-def]
    addresses,
    sizes,
    chunks,
    partials,
    n,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[program] = sum of squares of one chunk of one gradient, in FP32."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(sizes + tensor)
    grad = _tensor(addresses, 1, n, tensor, GRAD, ALIGNED)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for trip in tl.static_range(CHUNK // BLOCK):
        at = start + trip * BLOCK + tl.arange(0, BLOCK)
        if start + CHUNK <= size:
            g = tl.load(grad + at).to(tl.float32)
        else:
            g = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
        total += g * g
    tl.store(partials + program, tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator]
def decide_kernel(  # type: ignore[no-untyped-def]
    steps, betas, corrections, square_sum, control, n, grad_scale, max_norm, COUNT: tl.constexpr, CHECKED: tl.constexpr
):
    """From the sum of squares: the norm, the factor of the gradient, whether to step; counts the step of n tensors.

    One program; COUNT >= 1 tensors a trip. CHECKED: a norm that is not finite leaves the step out.
    """
    norm = tl.sqrt_rn(tl.load(square_sum)) * grad_scale
    finite = (norm < float("inf")).to(tl.float32)  # false for NaN as well
    if not CHECKED:
        finite = finite * 0.0 + 1.0
    factor = tl.where(norm > max_norm, max_norm / (norm + 1e-6), 1.0)  # as torch.nn.utils.clip_grad_norm_
    skipped = tl.load(control + 3)
    tl.store(control, factor * grad_scale)
    tl.store(control + 1, finite)
    tl.store(control + 2, norm)
    tl.store(control + 3, skipped + (1.0 - finite))
    for trip in range(0, n, COUNT):
        tensor = trip + tl.arange(0, COUNT)
        inside = tensor < n
        step = tl.load(steps + tensor, mask=inside, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(step, mask=inside, other=0.0) + finite
        tl.store(step, t, mask=inside)
        # In FP64, because 1 - beta^t cancels: in FP32 it would lose four digits at beta 0.999.
        beta1 = tl.load(betas + 2 * tensor, mask=inside, other=0.5)
        beta2 = tl.load(betas + 2 * tensor + 1, mask=inside, other=0.5)
        kept1 = tl.exp(t.to(tl.float64) * tl.log(beta1))
        kept2 = tl.exp(t.to(tl.float64) * tl.log(beta2))
        tl.store(corrections + 2 * tensor, (1.0 / (1.0 - kept1)).to(tl.float32), mask=inside)
        tl.store(corrections + 2 * tensor + 1, (1.0 / tl.sqrt(1.0 - kept2)).to(tl.float32), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def adamw_kernel(  # type: ignore[no-untyped-def]
    addresses,
    sizes,
    chunks,
    control,
    corrections,
    n,
    lr,
    gain1,
    kept2,
    gain2,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER_TYPE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    CLEARS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor: m, v, master and parameter after this step; the gradient becomes 0 where CLEARS."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(sizes + tensor)
    param = _tensor(addresses, 0, n, tensor, PARAM, ALIGNED)
    grad = _tensor(addresses, 1, n, tensor, GRAD, ALIGNED)
    master = _tensor(addresses, 2, n, tensor, MASTER_TYPE, ALIGNED)
    first = _tensor(addresses, 3, n, tensor, FIRST, ALIGNED)
    second = _tensor(addresses, 4, n, tensor, SECOND, ALIGNED)
    step_size = lr * tl.load(corrections + 2 * tensor)
    root2 = tl.load(corrections + 2 * tensor + 1)
    factor = tl.load(control)
    takes = tl.zeros([BLOCK], dtype=tl.float32) + tl.load(control + 1) != 0.0
    for trip in tl.static_range(CHUNK // BLOCK):
        at = start + trip * BLOCK + tl.arange(0, BLOCK)
        # A mask that ends anywhere keeps loads from being 16 bytes wide, so only a tensor's last chunk has one.
        if start + CHUNK <= size:
            inside = tl.full([BLOCK], True, dtype=tl.int1)
            _elements(
                param + at, grad + at, master + at, first + at, second + at, inside, takes, factor,
                gain1, gain2, kept2, step_size, root2, lr, eps, weight_decay,
                PARAM, GRAD, MASTER_TYPE, FIRST, SECOND, HAS_MASTER, CLEARS, BLOCK,
            )  # fmt: skip
        else:
            _elements(
                param + at, grad + at, master + at, first + at, second + at, at < size, takes & (at < size), factor,
                gain1, gain2, kept2, step_size, root2, lr, eps, weight_decay,
                PARAM, GRAD, MASTER_TYPE, FIRST, SECOND, HAS_MASTER, CLEARS, BLOCK,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _elements(  # type: ignore[no-untyped-def]
    param, grad, master, first, second, inside, stored, factor,
    gain1, gain2, kept2, step_size, root2, lr, eps, weight_decay,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER_TYPE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    HAS_MASTER: tl.constexpr, CLEARS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: read where `inside`, write where `stored`."""
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32) * factor
    m = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second, mask=inside, other=0.0).to(tl.float32)
    if HAS_MASTER:
        w = tl.load(master, mask=inside, other=0.0).to(tl.float32)
    else:
        w = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    m = m + (g - m) * gain1
    v = v * kept2 + (g * g) * gain2
    w = w * (1.0 - lr * weight_decay)
    w = w - step_size * (m / (tl.sqrt_rn(v) * root2 + eps))
    tl.store(first, m.to(FIRST), mask=stored)
    tl.store(second, v.to(SECOND), mask=stored)
    if HAS_MASTER:
        w = w.to(MASTER_TYPE)
        tl.store(master, w, mask=stored)
    tl.store(param, w.to(PARAM), mask=stored)
    if CLEARS:
        tl.store(grad, tl.zeros([BLOCK], dtype=GRAD), mask=inside)


@dataclass
class Tables:
    """What the kernels read on the device, made again only when an address has changed."""

    key: tuple[int, ...]
    addresses: Tensor
    sizes: Tensor
    chunks: Tensor
    partials: Tensor
    is_aligned: bool


@dataclass
class StepTable:
    """Step counters of all tensors of a step: where they are, the betas they go with, what `decide` makes of both."""

    key: tuple[object, ...]
    addresses: Tensor
    betas: Tensor
    corrections: Tensor


def tables_of(bucket: Bucket, old: Tables | None = None) -> Tables:
    """Device tables of a bucket; the old ones when nothing has moved since.

    Raises: DiagnosticError E1110 for tensors that do not belong together.
    """
    rows = bucket.rows()
    key = tuple(t.data_ptr() for row in rows for t in row)
    if old is not None and old.key == key:
        return old
    for row in rows[:5]:
        for tensor, param in zip(row, bucket.params, strict=True):
            if tensor.shape != param.shape or tensor.stride() != param.stride() or tensor.device != param.device:
                raise fail(
                    "E1110",
                    f"AdamW got a tensor {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device} for a "
                    f"parameter {list(param.shape)} with strides {param.stride()} on {param.device}",
                    help="gradients and states must lie in memory as their parameter does",
                )
    device, n = bucket.params[0].device, len(bucket.params)
    sizes = torch.tensor([p.numel() for p in bucket.params], dtype=torch.int64)
    counts = (sizes + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(n), counts)
    chunk = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    chunks = torch.stack([tensor, chunk], dim=1).to(torch.int32)
    return Tables(
        key=key,
        addresses=_to_device(torch.tensor(key, dtype=torch.int64).view(6, n), device),
        sizes=_to_device(sizes, device),
        chunks=_to_device(chunks, device),
        partials=torch.empty(len(chunks), dtype=torch.float32, device=device),
        is_aligned=all(address % ALIGNMENT_BYTES == 0 for address in key[: 5 * n]),
    )


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """Without waiting: pinned memory is kept until the copy is done."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def step_table(
    steps: Sequence[Tensor], betas: Sequence[tuple[float, float]], old: StepTable | None = None
) -> StepTable:
    """steps: FP32 scalars; betas: of each. The old table when nothing has changed."""
    addresses = [step.data_ptr() for step in steps]
    key = (*addresses, *betas)
    if old is not None and old.key == key:
        return old
    device = steps[0].device
    return StepTable(
        key,
        _to_device(torch.tensor(addresses, dtype=torch.int64), device),
        _to_device(torch.tensor(betas, dtype=torch.float64), device),
        torch.empty(len(steps), 2, dtype=torch.float32, device=device),
    )


def square_sum(bucket: Bucket, tables: Tables) -> Tensor:
    """Sum of squares of the bucket's gradients, FP32 [], the same bits for the same gradients."""
    if len(tables.partials):
        square_sum_kernel[(len(tables.partials),)](
            tables.addresses,
            tables.sizes,
            tables.chunks,
            tables.partials,
            len(bucket.params),
            GRAD=TRITON_DTYPES[bucket.grads[0].dtype],
            ALIGNED=tables.is_aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return tables.partials.sum()


def decide(table: StepTable, total: Tensor, control: Tensor, scale: float, max_norm: float, checked: bool) -> None:
    """`fp8c.backends.reference.adamw.decide` on the device."""
    decide_kernel[(1,)](
        table.addresses,
        table.betas,
        table.corrections,
        total,
        control,
        len(table.addresses),
        float(scale),
        float(max_norm),
        COUNT=128,
        CHECKED=checked,
    )


def update(
    bucket: Bucket,
    tables: Tables,
    control: Tensor,
    corrections: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clears: bool = False,
) -> None:
    """`fp8c.backends.reference.adamw.update` in one launch. The caller raises the parameters' version counters.

    corrections: FP32 [n, 2], this bucket's rows of the step table's
    """
    if not len(tables.partials):
        return
    masters = bucket.masters or bucket.params
    adamw_kernel[(len(tables.partials),)](
        tables.addresses,
        tables.sizes,
        tables.chunks,
        control,
        corrections,
        len(bucket.params),
        float(lr),
        1.0 - betas[0],
        float(betas[1]),
        1.0 - betas[1],
        float(eps),
        float(weight_decay),
        PARAM=TRITON_DTYPES[bucket.params[0].dtype],
        GRAD=TRITON_DTYPES[bucket.grads[0].dtype],
        MASTER_TYPE=TRITON_DTYPES[masters[0].dtype],
        FIRST=TRITON_DTYPES[bucket.first[0].dtype],
        SECOND=TRITON_DTYPES[bucket.second[0].dtype],
        HAS_MASTER=bucket.masters is not None,
        CLEARS=clears,
        ALIGNED=tables.is_aligned,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
