"""Compare a rewritten module with the original, on numbers: outputs and every gradient, in FP64.

The rewrite reorders sums and nothing else, so the two agree to FP64 rounding wherever the model computes in the dtype
it is given. Where it casts by itself (a router in FP32) the bound is that dtype's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fp8c.prepare.loops import original_class

#: A module above this size, in FP64, isn't copied just to be checked.
CHECK_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class Call:
    """The arguments of one forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """What differs most, relative to its norm, and the bound it must keep."""

    what: str
    error: float
    bound: float

    @property
    def is_equal(self) -> bool:
        return self.error <= self.bound


class _Dtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the floating-point types that computations result in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.seen.add(leaf.dtype)
        return out


@contextmanager
def recorded_calls(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """The first call of each module inside the block."""
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in calls:
            detached = pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (args, kwargs))
            calls[module] = Call(*detached)

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def compare(module: nn.Module, rewritten_class: type[nn.Module], call: Call, seed: int = 0) -> Difference:
    """The largest difference between the module as it was written and as `rewritten_class`.

    The two run on copies with the same fresh random parameters (zero-initialized ones would hide everything behind
    them) and on the recorded inputs: integers as they were, numbers randomized around them.
    """
    generator = torch.Generator().manual_seed(seed)
    original = _double(module, generator)
    original.__class__ = original_class(module)
    rewritten = copy.deepcopy(original)
    rewritten.__class__ = rewritten_class
    call = _randomized(call, generator)
    dtypes = _Dtypes()
    with dtypes:
        want = _run(original, call)
    got = _run(rewritten, call)
    bound = _bound(module, dtypes.seen)
    worst = Difference("nothing", 0.0, bound)
    if want.keys() != got.keys():
        missing = sorted(want.keys() ^ got.keys())
        return Difference(missing[0], float("inf"), bound)
    scale = max((float(t.norm()) for name, t in want.items() if name.startswith("gradient")), default=0.0)
    for name, a in want.items():
        b = got[name]
        if a.shape != b.shape:
            return Difference(name, float("inf"), bound)
        # A gradient that cancels to nearly nothing is compared with the others' size.
        norm = max(
            float(a.norm()), scale * 1e-3 if name.startswith("gradient") else 0.0, torch.finfo(torch.float64).tiny
        )
        error = float((a - b).norm()) / norm
        if not error <= worst.error:
            worst = Difference(name, error, bound)
    return worst


def _bound(module: nn.Module, dtypes: set[torch.dtype]) -> float:
    """How far two orders of the same sums may be apart, in the coarsest type that takes part.

    A sum of n terms collects about sqrt(n) roundings of its accumulator; BF16 and FP16 results are accumulated in FP32
    and rounded once. The factor 8 is for the few roundings that follow each other through the experts and back.
    """
    eps = max((torch.finfo(d).eps for d in dtypes), default=torch.finfo(torch.float64).eps)
    terms = max((max(p.shape, default=1) for p in module.parameters()), default=1)
    return float(8 * eps * (terms**0.5 if eps < 2**-12 else 1))


def can_check(module: nn.Module) -> bool:
    """Whether copies of the module in FP64 are affordable."""
    size = sum(p.numel() * 8 for p in module.parameters())
    return size <= CHECK_LIMIT_BYTES


def _run(module: nn.Module, call: Call) -> dict[str, Tensor]:
    """Outputs and gradients by name; an error is the caller's to report."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args, kwargs = pytree.tree_map(_leaf, (call.args, call.kwargs))
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        outputs = module(*_unleaf(args), **_unleaf(kwargs))
    found: dict[str, Tensor] = {}
    loss: Tensor | None = None
    for i, out in enumerate(o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)):
        found[f"output {i}"] = out.detach().double()
        if out.is_floating_point() and out.requires_grad:
            # Another weight for every entry, so that no two errors cancel.
            weights = torch.linspace(0.5, 1.5, max(out.numel(), 1), dtype=torch.float64, device=out.device)
            weights = weights[: out.numel()].view(out.shape)
            part = (out.double() * weights).sum() + (out.double() ** 2).sum()
            loss = part if loss is None else loss + part
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]
    for i, leaf in enumerate(leaves):
        if leaf.grad is not None:
            found[f"gradient of input {i}"] = leaf.grad.double()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:  # the loop leaves an unused expert's gradient unset, the rewrite makes it zero
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            found[f"gradient of {name}"] = gradient.double()
    for name, buffer in module.named_buffers():
        found[f"buffer {name}"] = buffer.detach().double()
    return found


def _leaf(value: Any) -> Any:
    return value.clone().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value


def _unleaf(value: Any) -> Any:
    """Inputs as they come in a model: results of computations, which may be written to in place."""
    return pytree.tree_map(lambda t: t * 1 if isinstance(t, Tensor) and t.requires_grad else t, value)


def _double(module: nn.Module, generator: torch.Generator) -> nn.Module:
    copied = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(1 + 0.1 * noise if bool((parameter == 1).all()) else 0.1 * noise)
    for part in copied.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # the two draw different numbers
    return copied.train(module.training)


def _randomized(call: Call, generator: torch.Generator) -> Call:
    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        if not bool(value.any()):
            return noise
        # Around the recorded numbers: zeros (unchosen experts of a sparse table) stay zeros, signs stay signs.
        return value.double() * (1 + 0.1 * noise.clamp(-3, 3))

    args, kwargs = pytree.tree_map(fresh, (call.args, call.kwargs))
    return Call(args, kwargs)
