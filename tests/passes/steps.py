"""Small captured steps that pass tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8c.tools import opt

BF16 = torch.bfloat16


class Function(nn.Module):
    """A function of (parameters, data) as a module."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, *data: Tensor) -> Any:
        return self.function(*data, **dict(self.named_parameters()))


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def data(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return random(*shape, dtype=dtype).requires_grad_()


def linear(dtype: torch.dtype = BF16) -> opt.JointStep:
    module = Function(lambda x, w: x @ w.t(), w=random(128, 256, dtype=dtype))
    return opt.capture_joint(module, data(256, 256, dtype=dtype))


def two_layers() -> opt.JointStep:
    module = Function(lambda x, w, v: F.silu(x @ w.t()) @ v.t(), w=random(128, 256), v=random(256, 128))
    return opt.capture_joint(module, data(256, 256))


def experts_function(x: Tensor, rows: Tensor, offs: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = F.grouped_mm(x[rows], up.transpose(1, 2), offs=offs).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=offs)


def experts_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the token of each row, and where each of four experts ends; the third has no row."""
    return data(128, 128), torch.randint(128, (256,)), torch.tensor([70, 130, 130, 256], dtype=torch.int32)


def experts_module() -> Function:
    return Function(experts_function, up=random(4, 256, 128), down=random(4, 128, 128))


def experts() -> opt.JointStep:
    return opt.capture_joint(experts_module(), *experts_inputs())


def attention_function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(-1, 256) @ w.t()


def attention() -> opt.JointStep:
    module = Function(attention_function, w=random(128, 256))
    return opt.capture_joint(module, *(data(1, 4, 128, 64) for _ in range(3)))


STEPS: dict[str, Callable[[], opt.JointStep]] = {
    "linear": linear,
    "two_layers": two_layers,
    "experts": experts,
    "attention": attention,
}
