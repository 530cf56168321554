"""Measuring a GEMM's implementations on the operands of its first call, and the choice that is kept.

A candidate counts when its result agrees with the default implementation's: their distance is at most `AGREEMENT` of the
result's norm. Both are rounded to BF16, at most 2**-8 of each element and so of the norm, which allows 2**-7; the
partial sums that Hopper's tensor core cuts off add at most a tenth of that, and scales read in a wrong place far more.
The fastest is taken if it is at least 3 % faster than the default, which is about what two measurements of the same kernel
differ by.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8c import __version__
from fp8c.backends.cuda.build import source_digest
from fp8c.backends.gemms import candidates, choice
from fp8c.backends.gemms.table import Choice, Table
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.cache import cache_folder
from fp8c.diagnostics import Diagnostic, Severity, render

_LOG = logging.getLogger(__name__)
AGREEMENT = 2.0**-6
WORTH = 0.97
_ROUNDS = 7
_ROUND_US = 1500.0  # of each implementation in each round
_MOST_CALLS = 20
_WAIT_CYCLES_PER_CALL = 400_000  # 0.2 ms: more than a launch took on a busy host


def fastest(op: str, arguments: tuple[Any, ...]) -> str:
    """Implementation to try first; "" for the default order.

    Measures a class of shapes at its first call. While a CUDA graph is captured only what is known counts, and under
    `torch.use_deterministic_algorithms` nothing does.
    """
    if torch.are_deterministic_algorithms_enabled():
        return ""
    shape = choice.shape_class(op, arguments)
    table = table_of(arguments[0].device.index)
    known = table.choices.get(shape.key)
    if known is None and shape.key not in table.unmeasured and choice.may_measure():
        with torch.cuda.device(arguments[0].device):
            found = measure(op, arguments, shape)
        if found is None:
            table.unmeasured.add(shape.key)
        else:
            known = table.remember(shape.key, found)
    return "" if known is None else known.implementation


@cache
def table_of(device_index: int) -> Table:
    return Table.open(cache_folder("gemms"), machine(device_index))


def machine(device_index: int) -> dict[str, str]:
    """Everything that a measured time depends on, besides the shapes."""
    return {
        "device": torch.cuda.get_device_name(device_index),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": version("triton"),
        "deep_gemm": version("deep_gemm"),
        "fp8c": f"{__version__} {source_digest()} {triton_digest()}",
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def driver_version() -> str:
    """As /proc says it, which names the patch level; else the CUDA version that the driver supports."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        return " ".join(line.split())
    except (OSError, IndexError):
        return str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else ""


@cache
def triton_digest() -> str:
    """Of the sources of the Triton GEMMs: another kernel is measured again."""
    folder = Path(__file__).parents[1] / "triton"
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("gemm.py", "gemm_kernel.py")]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def measure(op: str, arguments: tuple[Any, ...], shape: choice.ShapeClass) -> Choice | None:
    """Time every implementation that serves the call and agrees. None when there is none, or memory runs out."""
    try:
        runs = agreeing(op, arguments, (*candidates.DEFAULT, *candidates.OTHERS))
        times = time_in_turn(runs)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        remark(f"no memory to measure {shape.key}, so the default implementation serves it: {reason}")
        return None
    if not times:
        return None
    default = next(iter(runs))
    best = min(times, key=lambda name: times[name])
    return Choice(best if times[best] < WORTH * times[default] else default, times)


def agreeing(op: str, arguments: tuple[Any, ...], names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Calls of the implementations that serve these arguments and agree with the first of them.

    Nothing of the caller's is written: a product that is added is added to zeros.
    """
    runs: dict[str, Callable[[], Any]] = {}
    reference: Tensor | None = None
    for name in names:
        given = (torch.zeros_like(arguments[0]), *arguments[1:]) if op.endswith("_add_") else arguments
        try:
            product = candidates.call(name, op, given)
        except Unsupported:
            continue
        result: Tensor = given[0] if op.endswith("_add_") else product
        if reference is None:
            reference = result.clone() if result is given[0] else result  # timing adds to `given` again
        elif not agree(result, reference):
            remark(f"{name} disagrees with {next(iter(runs))} on fp8c::{op}, and is not taken")
            continue
        runs[name] = functools.partial(candidates.call, name, op, given)
    return runs


def agree(found: Tensor, expected: Tensor) -> bool:
    """The same places are not finite, and the rest differs by at most `AGREEMENT` of its norm."""
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    difference = (found.float() - expected.float()).where(finite, 0.0).norm()
    return bool(difference <= AGREEMENT * expected.float().where(finite, 0.0).norm())


def time_in_turn(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median microseconds of each kernel, run in turns so that the clock of the card favours none.

    The card is kept waiting while the host queues a round, so that the launches of one implementation, which cost the
    host more than a short kernel takes, don't count as its time: in a step they are queued ahead, or captured.
    """
    counts = {}
    for name, run in runs.items():
        run()
        counts[name] = max(1, min(_MOST_CALLS, round(_ROUND_US / max(_elapsed_us(run, 1), 1.0))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            samples[name].append(_elapsed_us(run, counts[name]) / counts[name])
    return {name: round(statistics.median(times), 3) for name, times in samples.items()}


def _elapsed_us(run: Callable[[], Any], count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_WAIT_CYCLES_PER_CALL * count)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end))


def remark(message: str) -> None:
    _LOG.warning("%s", render(Diagnostic("R0437", message, severity=Severity.REMARK)))
