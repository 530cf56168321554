"""Which precision the optimizer keeps each of its tensors in, as a spec's `optimizer` section says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fp8c.formats import Element, Format
from fp8c.specs.load import Spec, load
from fp8c.specs.merge import merge_sections

_DTYPES = {Element.BF16: torch.bfloat16, Element.FP16: torch.float16, Element.FP32: torch.float32}


@dataclass(frozen=True)
class StateTypes:
    """ema: None when the spec says `ema = off`; ema_device: "cpu" or "gpu"."""

    master: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    exp_avg: torch.dtype = torch.float32
    exp_avg_sq: torch.dtype = torch.float32
    ema: torch.dtype | None = torch.float32
    ema_device: str = "cpu"

    @property
    def bytes_per_parameter(self) -> int:
        """Moments, master weight and gradient; the parameter itself is the model's."""
        return sum(t.itemsize for t in (self.master, self.grad, self.exp_avg, self.exp_avg_sq))


#: What torch.optim.AdamW keeps for a parameter in FP32, and what a spec without an `optimizer` section asks for.
FP32 = StateTypes()


def state_types(spec: str | Path | Spec) -> StateTypes:
    """The types of a spec; FP32 for what it does not mention. Raises: DiagnosticError for a spec with mistakes."""
    loaded = spec if isinstance(spec, Spec) else load(spec)
    section = merge_sections(loaded)[0].get("optimizer", {})

    def dtype(key: str, default: torch.dtype) -> torch.dtype:
        decision = section.get(key)
        if decision is None or not isinstance(decision.value, Format):
            return default
        return _DTYPES[decision.value.element]

    ema = section.get("ema")
    device = section.get("ema_device")
    return StateTypes(
        master=dtype("master", FP32.master),
        grad=dtype("grad", FP32.grad),
        exp_avg=dtype("exp_avg", FP32.exp_avg),
        exp_avg_sq=dtype("exp_avg_sq", FP32.exp_avg_sq),
        ema=None if ema is not None and not isinstance(ema.value, Format) else dtype("ema", torch.float32),
        ema_device=str(device.value) if device is not None else "cpu",
    )
