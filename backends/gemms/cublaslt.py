"""cuBLASLt through `torch.nn.functional.scaled_mm`: dense products whose operands already lie as it reads them.

It reads 1x128 scales with the rows innermost and unpadded, and 128x128 scales in rows padded to a multiple of four, which
is how fp8c stores them where M % 4 == 0 and K % 512 == 0. Block scales on compute capability 9.0 only; one scale a tensor
or a row from 8.9 on. It promotes partial sums itself, unless it is asked for fast accumulation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.formats import WHOLE
from fp8c.ops import quantized_format
from fp8c.ops.operands import Operands, takes_operands

_ROW, _BLOCK, _TENSOR, _WHOLE_ROW = (1, 128), (128, 128), (WHOLE, WHOLE), (1, WHOLE)
_HOPPER = (9, 0)
_ALIGNMENT = 16  # of K and N


@takes_operands
def scaled_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [N, K].T -> [M, N]; schema as `fp8c.ops`."""
    a, a_scale, b, b_scale = x[:4]
    recipes = _recipes(x.a_fmt, x.b_fmt, x.promote_every, a.device.index)
    (m, k), n = a.shape, b.shape[0]
    if m == 0 or k % _ALIGNMENT or n % _ALIGNMENT or k == 0 or n == 0:
        raise Unsupported(f"it takes K and N in multiples of {_ALIGNMENT}")
    if a.stride(1) != 1 or b.stride(1) != 1 or a.stride(0) != k or b.stride(0) != k:
        raise Unsupported("it reads dense operands with K innermost")
    if a.dtype is torch.float8_e5m2 and b.dtype is torch.float8_e5m2:
        raise Unsupported("it multiplies no two E5M2 operands")
    if a_scale.dtype is not torch.float32 or b_scale.dtype is not torch.float32:
        raise Unsupported("it reads FP32 scales")
    left, right = _scales(a_scale, recipes[0], m, k), _scales(b_scale, recipes[1], n, k)
    if recipes[1] == "RowWise":
        right = right.t()
        if out_dtype is not torch.bfloat16:
            raise Unsupported("it writes BF16 where each row has a scale")
    if "BlockWise" in recipes[0] and out_dtype is not torch.bfloat16 and out_dtype is not torch.float32:
        raise Unsupported(f"it does not write {out_dtype}")
    functional: Any = torch.nn.functional
    kinds = [getattr(functional.ScalingType, name) for name in recipes]
    fast = x.promote_every == 0 and recipes[0] in ("TensorWise", "RowWise")
    try:
        out: Tensor = functional.scaled_mm(
            a, b.t(), left, kinds[0], right, kinds[1], output_dtype=out_dtype, use_fast_accum=fast
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # what this version of cuBLASLt has no algorithm for
        raise Unsupported(f"it refuses: {str(error).splitlines()[0]}") from None
    return out


@cache
def _recipes(a_fmt: str, b_fmt: str, promote_every: int, device_index: int) -> tuple[str, str]:
    """Names of `torch.nn.functional.ScalingType`. Raises: `Unsupported` for what it has no recipe for."""
    if not hasattr(torch.nn.functional, "scaled_mm"):
        raise Unsupported(f"torch {torch.__version__} has no torch.nn.functional.scaled_mm")
    groups = quantized_format(a_fmt).group, quantized_format(b_fmt).group
    if promote_every not in (0, 128):
        raise Unsupported(f"it does not promote every {promote_every} of K")
    names = {
        (_ROW, _BLOCK): ("BlockWise1x128", "BlockWise128x128"),
        (_ROW, _ROW): ("BlockWise1x128", "BlockWise1x128"),
        (_TENSOR, _TENSOR): ("TensorWise", "TensorWise"),
        (_WHOLE_ROW, _WHOLE_ROW): ("RowWise", "RowWise"),
    }.get(groups)  # type: ignore[arg-type]
    if names is None:
        raise Unsupported(f"it has no recipe for {a_fmt} by {b_fmt}")
    if "BlockWise" in names[0] and torch.cuda.get_device_capability(device_index) != _HOPPER:
        raise Unsupported("its block scales are for compute capability 9.0")
    return names


def _scales(scale: Tensor, recipe: str, rows: int, k: int) -> Tensor:
    """The scales as it takes them, a view. Raises: `Unsupported` when they lie otherwise."""
    match recipe:
        case "TensorWise":
            return scale.reshape(())
        case "RowWise":
            return scale
        case "BlockWise1x128":
            if k % 128 == 0 and (scale.stride(0) == 1 or rows == 1) and (scale.stride(1) == rows or k == 128):
                return scale
            raise Unsupported("it reads 1x128 scales with M innermost and unpadded: M is a multiple of 4")
        case _:
            if rows % 128 == 0 and k % 512 == 0 and scale.is_contiguous():
                return scale.t()
            raise Unsupported("it reads 128x128 scales in rows of a multiple of four: K is a multiple of 512")
