"""GEMMs with operands rounded to E4M3 in plain PyTorch: what FP8 costs a model, whatever compiled it.

`RoundedOperands` rounds what a forward multiplies. `GradientGroups` looks at the paper's negative result: DeepSeek-V3
(arXiv:2412.19437, appendix B.2) saw a model diverge when the activation gradients of Dgrad were quantized in blocks, and
supposes that gradients are unbalanced between tokens: a block has one scale, so a token with small gradients loses what
its neighbours' large ones need. Entered around an ordinary forward and backward it rounds the gradient of every Linear
and of every expert in rows and in blocks, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

GROUPS = {"1x128": (1, 128), "128x128": (128, 128)}
GEMMS = (nn.functional.linear, torch._grouped_mm, nn.functional.grouped_mm)


@dataclass(frozen=True)
class Errors:
    """What rounding dy to E4M3 in groups of one shape costs; all are shares, means over modules and batches.

    dy:      |rounded - dy| / |dy|, norms of the whole tensor
    token:   the same of each token, their mean: a token counts as much as any other
    lost:    values that were not 0 and became 0
    dx:      error of the Dgrad's result dy @ w, whole tensor; None for experts, whose products are not repeated
    dx_token: the same of each token
    """

    dy: float
    token: float
    lost: float
    dx: float | None
    dx_token: float | None


class RoundedOperands(TorchFunctionMode):
    """The forward of every Linear and expert with operands rounded to E4M3: activations in 1x128, weights in 128x128.

    What FP8 costs a model whatever compiled it: plain operators, and BF16 products of the rounded values.
    high: weights that stay as they are (the output head); so does what is not BF16 (the router)
    """

    def __init__(self, high: Sequence[Tensor], *, activations: bool = True, weights: bool = True) -> None:
        super().__init__()
        self.high, self.activations, self.weights = {id(w) for w in high}, activations, weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in GEMMS and id(args[1]) not in self.high and args[1].dtype is torch.bfloat16:
            x, weight, *rest = args
            x = rounded(x, (1, 128)) if self.activations else x
            args = (x, rounded(weight, (128, 128)) if self.weights else weight, *rest)
        return func(*args, **(kwargs or {}))


class GradientGroups(TorchFunctionMode):
    """Errors of the gradients that pass through while it is entered.

    high: weights that stay out of it (the output head); so does what is not BF16 (the router)
    """

    def __init__(self, high: Sequence[Tensor]) -> None:
        super().__init__()
        self.high = {id(w) for w in high}
        self.rows: dict[str, list[tuple[bool, Tensor]]] = {name: [] for name in GROUPS}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        is_linear = func is nn.functional.linear
        is_gemm = func in GEMMS and id(args[1]) not in self.high and args[1].dtype is torch.bfloat16
        if not is_gemm or not y.requires_grad:
            return y
        weight = args[1].detach() if is_linear else None
        y.register_hook(lambda dy: self.look(dy, weight))
        return y

    @torch.no_grad()
    def look(self, dy: Tensor, weight: Tensor | None) -> None:
        """dy BF16 [..., N]; weight of a Linear BF16 [N, K], None for experts, whose products are not repeated."""
        rows = dy.reshape(-1, dy.shape[-1]).float()
        some = rows.abs().amax(1) > 0  # padding, and the last tokens of some losses, have no gradient
        for name, group in GROUPS.items():
            off = (rounded(rows, group) - rows)[some]
            value = rows[some]
            lost = ((value != 0) & (off == -value)).sum() / (value != 0).sum()
            dx = off.new_full((2,), torch.nan)
            if weight is not None:
                dx = relative(off @ weight.float(), value @ weight.float())
            found = torch.cat([relative(off, value), lost[None], dx])
            self.rows[name].append((weight is not None, found))

    def errors(self) -> dict[str, dict[str, Errors]]:
        """Of Linears and of experts, by groups; what a model does not have is left out."""
        found: dict[str, dict[str, Errors]] = {}
        for kind, is_linear in (("linears", True), ("experts", False)):
            for name, rows in self.rows.items():
                if chosen := [values for linear, values in rows if linear == is_linear]:
                    dy, token, lost, *dx = torch.stack(chosen).double().mean(0).tolist()
                    found.setdefault(kind, {})[name] = Errors(dy, token, lost, *(dx if is_linear else (None, None)))
        return found


def relative(error: Tensor, value: Tensor) -> Tensor:
    """FP32 [2]: error / value by their norms, whole and as the mean over rows [T, N]."""
    by_row = error.norm(dim=1) / value.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack([error.norm() / value.norm(), by_row.mean()])


def rounded(x: Tensor, group: tuple[int, int]) -> Tensor:
    """x [..., rows, columns] rounded to E4M3 with one FP32 scale for each group of rows x columns."""
    rows, columns = x.shape[-2:]
    high, wide = group
    padded = torch.nn.functional.pad(x.float(), (0, -columns % wide, 0, -rows % high))
    below, beside = padded.shape[-2] // high, padded.shape[-1] // wide
    tiles = padded.reshape(*x.shape[:-2], below, high, beside, wide)
    scale = tiles.abs().amax((-3, -1), keepdim=True) / 448
    scale = torch.where(scale == 0, 1.0, scale)
    values = (tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    result: Tensor = values.reshape(padded.shape)[..., :rows, :columns].to(x.dtype)
    return result


def text_of(found: Mapping[str, Mapping[str, Errors]]) -> str:
    """One line for each kind of GEMM and shape of groups."""
    lines = [f"{'':22} {'dy':>8} {'a token':>8} {'lost':>8} {'dx':>8} {'a token':>8}"]
    for kind, by_group in found.items():
        for name, e in by_group.items():
            values = (e.dy, e.token, e.lost, e.dx, e.dx_token)
            lines.append(f"{kind + ' ' + name:22} " + " ".join(f"{v:8.3%}" for v in values if v is not None))
    return "\n".join(lines)
