"""What quantization does to each tensor of a step: its largest value, and how much of it underflows or saturates.

    telemetry = fp8c.optim.Telemetry(step, every=500)
    for number, batch in enumerate(batches, 1):
        with telemetry.at(number):
            step(**batch).loss.backward()
        for row in telemetry.take():
            print(row.path, row.phase, row.format, row.amax, row.underflow)

Every `every`-th step runs operator by operator, without fused casts, so that each quantized tensor is there to be read
once more; all other steps are untouched. So the cost is that step's extra time over `every` steps, which `every` makes
as small as one likes. The step's own result may differ from the fused one's by BF16 roundings between operators.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn

from fp8c import driver, ops
from fp8c import graph as g
from fp8c.diagnostics import ExitCode, fail
from fp8c.formats import Element, Format
from fp8c.ops import fused
from fp8c.optim.precision import Variant, settings_of, variant_of
from fp8c.passes.fuse_casts import FuseCasts

_HIGHEST_CODE = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


@dataclass(frozen=True)
class Row:
    """One quantized tensor of one step.

    phase:     "forward" or "backward"; operand: the tensor's name in the graph
    amax:      largest magnitude before quantization; NaN or Inf when a value was
    underflow: share of the values that were not 0 and became 0
    saturated: share of the codes that are the largest finite one: one of each group where scales are made online, more
               where values were cut off
    """

    step: int
    path: str
    phase: str
    operand: str
    format: str
    amax: float
    underflow: float
    saturated: float

    @property
    def is_overflow(self) -> bool:
        return not math.isfinite(self.amax)


@dataclass
class _Pending:
    names: list[tuple[str, str, str, str]]
    values: list[Tensor]  # FP32 [4]: amax, values not 0 before, after, saturated share


@dataclass
class ObservedSession(driver.Session):
    """A session whose graphs run operator by operator and report each quantization."""

    pending: _Pending | None = None

    def _lower(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        assert self.pending is not None
        pending = self.pending

        def run(*args: Any) -> Any:
            return Recorder(gm, pending).run(*args)

        return self.scales.around(make_boxed_func(run))


class Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, pending: _Pending) -> None:
        super().__init__(gm)
        self.pending = pending

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n.target in _QUANTIZES:
            args, _ = self.fetch_args_kwargs_from_env(n)
            for format_at, data_at, scale_at in _QUANTIZES[n.target]:
                fmt = str(args[format_at])
                phase = "backward" if g.is_backward(n) else "forward"
                self.pending.names.append((g.module_path(n), phase, str(n.args[0]), fmt))
                self.pending.values.append(statistics_of(args[0], result[data_at], result[scale_at], fmt))
        return result


#: Operators that quantize their first argument: where the format is among the arguments, data and scale in the result.
_QUANTIZES: dict[Any, tuple[tuple[int, int, int], ...]] = {
    ops.QUANTIZE: ((1, 0, 1),),
    ops.QUANTIZE_DELAYED: ((1, 0, 1),),
    fused.QUANTIZE_BOTH: ((1, 0, 1), (2, 2, 3)),
    fused.QUANTIZE_WEIGHT: ((1, 0, 2),),
}


@torch.no_grad()
def statistics_of(x: Tensor, data: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """FP32 [4]: amax, count of values not 0 before and after, share of largest codes. Nothing waits for the device."""
    before = torch.count_nonzero(x)
    if Format.parse(fmt).element is Element.E5M6:  # packed: eight values in twelve bytes
        values = torch.ops.fp8c.dequantize(data, scale, fmt, torch.float32, None, x.shape[-1])
        after, saturated = torch.count_nonzero(values), torch.full((), float("nan"), device=x.device)
    else:
        codes = data.view(torch.uint8) & 0x7F
        after = torch.count_nonzero(codes)
        saturated = (codes == _HIGHEST_CODE[data.dtype]).sum() / max(1, x.numel())
    amax = x.abs().amax() if x.numel() else torch.zeros((), device=x.device)
    return torch.stack([amax.float(), before.float(), after.float(), saturated.float()])


class Telemetry:
    """Statistics of every `every`-th step of a compiled module.

    options: of torch.compile, as `fp8c.compile` was given them
    """

    def __init__(self, step: nn.Module, every: int, **options: Any) -> None:
        if every < 1:
            raise fail("E1151", f"telemetry got every = {every}", help="1 is every step", exit_code=ExitCode.USAGE)
        self.step, self.every = step, every
        self.options = {"fullgraph": True, **options}
        self._session = driver.session_of(step)
        self._pending = _Pending([], [])
        self._variant: Variant | None = None
        self._ready: list[tuple[int, list[tuple[str, str, str, str]], Tensor]] = []

    @contextlib.contextmanager
    def at(self, number: int) -> Iterator[bool]:
        """Around forward and backward of step `number`; whether it is observed."""
        if number % self.every:
            yield False
            return
        if self._variant is None:
            fields = settings_of(self._session)
            fields["keep_weights"] = False  # weights are quantized in the graph, where they are seen
            fields["without"] = self._session.without | {FuseCasts.name}  # a fused cast never writes what it quantizes
            session = ObservedSession(**fields, pending=self._pending)
            self._variant = variant_of(self.step, session, self.options)
        usual = self.step._compiled_call_impl
        self.step._compiled_call_impl = self._variant.run
        try:
            yield True
        finally:
            self.step._compiled_call_impl = usual
        if self._pending.values:
            stacked = torch.stack(self._pending.values).to("cpu", non_blocking=True)
            self._ready.append((number, list(self._pending.names), stacked))
        self._pending.names.clear()
        self._pending.values.clear()

    def take(self) -> list[Row]:
        """Rows of the observed steps since the last call; waits for the device when there are any."""
        if self._ready and torch.cuda.is_available():
            torch.cuda.synchronize()
        rows = [row for number, names, values in self._ready for row in rows_of(number, names, values)]
        self._ready.clear()
        return rows


def rows_of(number: int, names: Sequence[tuple[str, str, str, str]], values: Tensor) -> Iterator[Row]:
    for (path, phase, operand, fmt), (amax, before, after, saturated) in zip(names, values.tolist(), strict=True):
        lost = 1.0 - after / before if before else 0.0
        yield Row(number, path, phase, operand, fmt, amax, max(0.0, lost), saturated)
