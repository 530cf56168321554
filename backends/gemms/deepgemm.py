"""DeepGEMM (package `deep_gemm`), where it is installed: dense products on compute capability 9.0.

Its grouped products take groups aligned to 128 rows and an expert index for each row, which fp8c's ragged groups and
device offsets are not, so they are no candidates. Interface: `deep_gemm.fp8_gemm_nt` of its public repository.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.formats import Element
from fp8c.ops import quantized_format
from fp8c.ops.operands import Operands, takes_operands

_ROW, _BLOCK = (1, 128), (128, 128)
_HOPPER = (9, 0)


@takes_operands
def scaled_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [N, K].T -> [M, N]; schema as `fp8c.ops`."""
    recipe = _recipe(x.a_fmt, x.b_fmt, x.promote_every, x.a.device.index)
    wanted = torch.bfloat16 if recipe == (1, 128, 128) else torch.float32
    if out_dtype is not wanted:
        raise Unsupported(f"it writes {wanted} from {x.a_fmt} by {x.b_fmt}")
    out = x.a.new_empty((x.a.shape[0], x.b.shape[0]), dtype=out_dtype)
    _multiply(recipe, x, out, None)
    return out


@takes_operands
def scaled_mm_add_(acc: Tensor, x: Operands) -> None:
    """acc f32 [M, N] += a @ b.T."""
    recipe = _recipe(x.a_fmt, x.b_fmt, x.promote_every, x.a.device.index)
    if recipe != (1, 1, 128) or acc.dtype is not torch.float32:
        raise Unsupported("it adds to FP32 from 1x128 by 1x128")
    _multiply(recipe, x, acc, acc)


def _multiply(recipe: tuple[int, int, int], x: Operands, out: Tensor, c: Tensor | None) -> None:
    a, a_scale, b, b_scale = x[:4]
    for data, scale, groups in ((a, a_scale, _ROW), (b, b_scale, (recipe[1], 128))):
        rows, k = data.shape
        if k % 128 or data.stride(1) != 1 or data.stride(0) % 16:
            raise Unsupported("it reads K in whole groups of 128, innermost")
        is_laid_out = (
            scale.stride() == (1, -(-rows // 4) * 4) if groups[0] == 1 else scale.is_contiguous() and rows % 128 == 0
        )
        if scale.dtype is not torch.float32 or not is_laid_out:
            raise Unsupported("its scales lie otherwise")
    if not out.is_contiguous():
        raise Unsupported("it writes dense matrices")
    try:
        _package().fp8_gemm_nt((a, a_scale), (b, b_scale), out, c=c, recipe=recipe)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # it checks before it starts a kernel
        raise Unsupported(f"it refuses: {str(error).splitlines()[0]}") from None


@cache
def _recipe(a_fmt: str, b_fmt: str, promote_every: int, device_index: int) -> tuple[int, int, int]:
    left, right = quantized_format(a_fmt), quantized_format(b_fmt)
    if left.group != _ROW or right.group not in (_ROW, _BLOCK) or promote_every not in (0, 128):
        raise Unsupported(f"it has no product of {a_fmt} by {b_fmt}")
    if {left.element, right.element} != {Element.E4M3}:
        raise Unsupported("it reads E4M3")
    if torch.cuda.get_device_capability(device_index) != _HOPPER:
        raise Unsupported("its FP32 scales are for compute capability 9.0")
    return (1, 128, 128) if right.group == _BLOCK else (1, 1, 128)


@cache
def _package() -> ModuleType:
    import deep_gemm  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return deep_gemm  # type: ignore[no-any-return, unused-ignore]
