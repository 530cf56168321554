"""`python -m fp8c.tools.bench optimizer`: the fused AdamW beside a copy and torch's fused FP32 AdamW; the EMA's cost.

The parameters are those of a Mixture-of-Experts model: some large tensors and many small ones. Bytes that must move are
counted once for each tensor read and once for each written: 22 a parameter for the update (read master, gradient and
moments, write master, moments and parameter), and 4 for the norm where a step is checked or clipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fp8c.files import output_file
from fp8c.optim import EMA, AdamW
from fp8c.optim.ema import PIECE, fold

SCHEMA = "fp8c.bench.optimizer/1"
UPDATE_BYTES, NORM_BYTES = 22, 4  # BF16 parameter and moments, FP32 master and gradient
EMA_ROUNDS, EMA_STEPS = 4, 8
SLEEP_CYCLES = 20_000_000  # some 10 ms
TORCH_BYTES = 28  # FP32 parameter, gradient and moments: all four read, three written


@dataclass(frozen=True)
class Row:
    name: str
    us: float
    spread_us: float  # distance of the quartiles
    bytes: int
    host_us: float  # until the call has returned, the device still busy

    @property
    def tb_per_s(self) -> float:
        return self.bytes / self.us / 1e6


def shapes(layers: int, dim: int, experts: int) -> list[tuple[int, ...]]:
    """A tensor for every weight of such a model: experts fused, norms and routers small."""
    layer: list[tuple[int, ...]] = [(dim,), (dim,), (dim, dim), (dim, 2 * dim), (dim, dim), (experts, dim)]
    layer += [(experts, dim, dim), (experts, dim, dim // 2), (dim, 3), (17,)]
    return [(32000, dim), *(shape for _ in range(layers) for shape in layer)]


def parameters(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> nn.ParameterList:
    made = nn.ParameterList()
    for size in sizes:
        made.append(nn.Parameter(torch.randn(size, device="cuda").to(dtype)))
    return made


def timed(work: Callable[[], object], repeats: int = 15) -> tuple[float, float, float]:
    """Median and distance of the quartiles in microseconds, by events, after three calls; and the host's median.

    The device is kept busy until the host has launched the work, as a backward keeps it busy in front of an optimizer.
    """
    for _ in range(3):
        work()
    found, host = [], []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        began = time.perf_counter()
        work()
        host.append((time.perf_counter() - began) * 1e6)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    quartiles = statistics.quantiles(found, n=4)
    return statistics.median(found), quartiles[2] - quartiles[0], statistics.median(host)


def adamw_rows(sizes: Sequence[tuple[int, ...]]) -> list[Row]:
    count = sum(torch.Size(size).numel() for size in sizes)
    rows = []
    rows.append(copy_row(count * 11 // 4))  # as many bytes read and written as the update's
    for name, options, moved in (
        ("update", {"skip_nonfinite": False}, UPDATE_BYTES),
        ("update, checked and clipped", {"max_norm": 1.0}, UPDATE_BYTES + NORM_BYTES),
        ("update, checked, clipped and cleared", {"max_norm": 1.0, "clears": True}, UPDATE_BYTES + NORM_BYTES + 4),
    ):
        params = parameters(sizes, torch.bfloat16)
        for p in params:
            p.main_grad = torch.randn(p.shape, device="cuda")
        optimizer = AdamW(params, spec="deepseek_v3", **options)
        us, spread, host = timed(optimizer.step)
        rows.append(Row(f"fp8c {name}", us, spread, moved * count, host))
        del params, optimizer
        torch.cuda.empty_cache()
    return rows + torch_rows(sizes)


def copy_row(elements: int) -> Row:
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    us, spread, host = timed(lambda: target.copy_(source))
    return Row("copy", us, spread, 2 * elements * 4, host)


def torch_rows(sizes: Sequence[tuple[int, ...]]) -> list[Row]:
    """torch's fused AdamW on FP32 parameters, alone and behind torch's clipping."""
    count = sum(torch.Size(size).numel() for size in sizes)
    params = parameters(sizes, torch.float32)
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda")
    theirs = torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    us, spread, host = timed(theirs.step)
    rows = [Row("torch fused FP32", us, spread, TORCH_BYTES * count, host)]

    def clipped() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        theirs.step()

    us, spread, host = timed(clipped)
    return [*rows, Row("torch clip_grad_norm_ and fused FP32", us, spread, (TORCH_BYTES + 12) * count, host)]


class EmaLoop:
    """A training loop of one stream: products for `step_ms`, then an optimizer step, then, where asked for, the EMA."""

    def __init__(self, sizes: Sequence[tuple[int, ...]], step_ms: float) -> None:
        params = parameters(sizes, torch.bfloat16)
        for p in params:
            p.main_grad = torch.randn(p.shape, device="cuda")
        self.optimizer = AdamW(params, spec="deepseek_v3", max_norm=1.0)
        self.optimizer.step()
        self.a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        us, *_ = timed(lambda: self.a @ self.a)
        self.products = max(1, round(step_ms * 1e3 / us))
        self.ema = EMA(params, 0.999, optimizer=self.optimizer)
        self.parameters = sum(p.numel() for p in params)

    def round(self, steps: int, *, averages: bool) -> float:
        """Milliseconds a step, as in a long run: the copy behind the step before the first one is under way when the
        clock starts, and the one behind the last, which runs beside the step that would follow, when it stops.
        """
        torch.cuda.synchronize()
        self._step(averages)
        torch.cuda.current_stream().synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self._step(averages)
        torch.cuda.current_stream().synchronize()
        taken = (time.perf_counter() - start) / steps * 1e3
        self.ema.flush()
        return taken

    def _step(self, averages: bool) -> None:
        for _ in range(self.products):
            self.a @ self.a
        self.optimizer.step()
        if averages:
            self.ema.update()


def measure_ema(loop: EmaLoop, rounds: int, steps: int) -> dict[str, float]:
    """Without and with an EMA of every step, by turns, so that a drift of the machine meets both."""
    loop.round(2, averages=True)
    found: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, values in found.items():
            values.append(loop.round(steps, averages=name == "with"))
    ema = loop.ema
    result = {f"{name}_ms": statistics.median(values) for name, values in found.items()}
    result |= {f"{name}_spread_ms": max(values) - min(values) for name, values in found.items()}
    result |= {"waits": float(ema.waits), "updates": float(ema.updates), "parameters": float(loop.parameters)}
    result |= {"copy_ms": copy_ms(ema), "fold_ms": fold_ms(ema)}
    ema.close()
    return result


def fold_ms(ema: EMA) -> float:
    """Milliseconds in which the host folds parameters that have arrived into the average."""
    averages = list(ema.average.values())
    values = [value.bfloat16() for value in averages]
    scratch = torch.empty(PIECE)
    started = time.perf_counter()
    for average, value in zip(averages, values):
        fold(average, value, 0.999, scratch)
    return (time.perf_counter() - started) * 1e3


def copy_ms(ema: EMA) -> float:
    """Milliseconds from the start of a copy of the parameters to their arrival on the host, nothing beside it."""
    ema.flush()
    torch.cuda.synchronize()
    started = time.perf_counter()
    ema.update()
    torch.cuda.synchronize()
    taken = (time.perf_counter() - started) * 1e3
    ema.flush()
    return taken


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fp8c.tools.bench optimizer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--only", choices=("adamw", "ema"))
    parser.add_argument("--ema-step-ms", type=float, default=100.0, help="length of the step that the EMA is beside")
    parser.add_argument("--ema-layers", type=int, default=2)
    parser.add_argument("--json", type=output_file)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU", file=sys.stderr)
        return 5
    found: dict[str, object] = {
        "schema": SCHEMA,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    if args.only != "ema":
        sizes = shapes(args.layers, args.dim, args.experts)
        rows = adamw_rows(sizes)
        count = sum(torch.Size(size).numel() for size in sizes)
        print_rows(rows, count, len(sizes))
        found |= {"tensors": len(sizes), "parameters": count}
        found["rows"] = [asdict(row) | {"tb_per_s": row.tb_per_s} for row in rows]
        write(args.json, found)
    if args.only != "adamw":
        loop = EmaLoop(shapes(args.ema_layers, args.dim, args.experts), args.ema_step_ms)
        ema = measure_ema(loop, EMA_ROUNDS, EMA_STEPS)
        print_ema(ema)
        write(args.json, found | {"ema": ema})
    return 0


def print_rows(rows: Sequence[Row], count: int, tensors: int) -> None:
    print(f"{torch.cuda.get_device_name()}, {count / 1e6:.0f} M parameters in {tensors} tensors")
    for row in rows:
        share = f"{row.tb_per_s / rows[0].tb_per_s:6.1%} of the copy"
        print(
            f"{row.name:42} {row.us:9.1f} us +- {row.spread_us:6.1f}  {row.tb_per_s:5.2f} TB/s  {share}  "
            f"host {row.host_us:7.0f} us",
            flush=True,
        )


def print_ema(ema: dict[str, float]) -> None:
    print(
        f"a step of {ema['without_ms']:.2f} ms takes {ema['with_ms']:.2f} ms with an EMA of "
        f"{ema['parameters'] / 1e6:.0f} M parameters ({ema['with_ms'] / ema['without_ms'] - 1:+.2%}; a copy takes "
        f"{ema['copy_ms']:.0f} ms, a fold {ema['fold_ms']:.0f} ms on the CPU; the host waited {ema['waits']:.0f} of "
        f"{ema['updates']:.0f} times)"
    )


def write(path: Path | None, found: dict[str, object]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
