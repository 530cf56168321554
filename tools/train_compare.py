"""Train a model beside itself in BF16: same seed, same batches, same optimizer, and the gap between the losses.

    python -m fp8c.tools.train_compare examples/moe_transformer.py --steps 40
    python -m fp8c.tools.train_compare examples/moe_transformer.py --steps 300 --seeds 8 --json gaps.json

The model file defines `batches(seed)`, an endless iterator of batches, and optionally `after_step(model)`. The figure is
the mean loss of the last fifth of the steps, as a signed difference in percent of BF16's; over several seeds their mean
with its standard error. Beside it stands BF16 against itself with the sequences of every batch in reverse order: the
same sums in another order, which is what a difference means when nothing differs.

All arms train FP32 master weights with AdamW and copy them to the model's BF16 parameters after every step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fp8c import driver
from fp8c.diagnostics import DiagnosticError, ExitCode, fail
from fp8c.files import output_file, write_file
from fp8c.models import LoadedModel, load_model, load_namespace

BF16, FP8C, REORDERED = "bf16", "fp8c", "bf16 reordered"


@dataclass(frozen=True)
class Settings:
    """lr, weight_decay and clip are those of examples/moe_transformer.py; the warm-up is linear."""

    model: str
    spec: str = "deepseek_v3"
    target: str = "cpu"
    steps: int = 40
    lr: float = 1e-3
    warmup: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Gap:
    """Signed relative differences of the final loss to BF16's, one for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def standard_error(self) -> float:
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.nan

    def text(self) -> str:
        if len(self.values) == 1:
            return f"{self.mean:+.3%}"
        return f"{self.mean:+.3%} +- {self.standard_error:.3%} (standard error over {len(self.values)} seeds)"


def final_loss(losses: Sequence[float]) -> float:
    """Mean over the last fifth of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 5) :])


def train(settings: Settings, seed: int, arm: str) -> Iterator[float]:
    """The loss of every step of one run."""
    loaded = load_model(settings.model, weights="random", seed=seed)
    namespace = load_namespace(settings.model)
    batches: Callable[[int], Iterator[Any]] | None = getattr(namespace, "batches", None)
    if batches is None:
        raise fail(
            "E0804",
            f"{settings.model} has no batches()",
            help="add `def batches(seed):`, an endless iterator of batches like example_inputs()",
            exit_code=ExitCode.MODEL,
        )
    after_step = getattr(namespace, "after_step", None)
    step = compiled_step(loaded, settings) if arm == FP8C else loaded.step()
    optimizer = MasterWeights(loaded.module, settings)
    source = batches(seed)
    for number in range(settings.steps):
        batch = next(source)
        loss = step(reversed_order(batch) if arm == REORDERED else batch)
        loss.backward()
        optimizer.step(number)
        if after_step is not None:
            after_step(loaded.module)
        yield float(loss.detach())


def compiled_step(loaded: LoadedModel, settings: Settings) -> nn.Module:
    from fp8c.prepare import prepare

    prepare(loaded.module, loaded.example_inputs)
    torch._dynamo.reset()
    return driver.compile(loaded.step(), settings.spec, settings.target)


def reversed_order(batch: Any) -> Any:
    """The sequences of a batch in reverse order: the same step, summed in another order."""
    return pytree.tree_map(lambda t: t.flip(0) if isinstance(t, Tensor) and t.dim() else t, batch)


class MasterWeights:
    """AdamW on FP32 copies of the parameters, which the model gets rounded after every step.

    schedule: factor of the learning rate by step number, on top of the linear warm-up
    """

    def __init__(self, module: nn.Module, settings: Settings, schedule: Callable[[int], float] = lambda _: 1.0) -> None:
        self.settings, self.schedule = settings, schedule
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(
            self.masters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )

    @torch.no_grad()
    def step(self, number: int) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = (
                self.settings.lr * self.schedule(number) * min(1.0, (number + 1) / max(1, self.settings.warmup))
            )
        for master, parameter in zip(self.masters, self.parameters):
            # An expert without tokens has no gradient in a loop and a zero one in a grouped GEMM: the same step for both.
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.settings.clip)
        self.adamw.step()
        for master, parameter in zip(self.masters, self.parameters):
            parameter.copy_(master)


def compare(settings: Settings, seeds: int, arms: Sequence[str], every: int) -> dict[str, Gap]:
    """Train the arms side by side, seed after seed, and print their losses as they come."""
    gaps: dict[str, list[float]] = {arm: [] for arm in arms if arm != BF16}
    for seed in range(seeds):
        print(f"seed {seed}\n{'step':>5}" + "".join(f"{arm:>16}" for arm in arms) + f"{'fp8c gap':>12}", flush=True)
        runs = {arm: train(settings, seed, arm) for arm in arms}
        losses: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(settings.steps):
            for arm in arms:
                losses[arm].append(next(runs[arm]))
            if number % every == 0 or number == settings.steps - 1:
                row = "".join(f"{losses[arm][-1]:16.4f}" for arm in arms)
                gap = f"{losses[FP8C][-1] / losses[BF16][-1] - 1:+12.3%}"
                print(f"{number:5}{row}{gap}", flush=True)
        for arm in gaps:
            gaps[arm].append(final_loss(losses[arm]) / final_loss(losses[BF16]) - 1)
        print("last fifth " + ", ".join(f"{arm} {final_loss(losses[arm]):.4f}" for arm in arms), flush=True)
    return {arm: Gap(tuple(values)) for arm, values in gaps.items()}


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train_compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--spec", default="deepseek_v3")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--steps", type=at_least_one, default=40)
    parser.add_argument("--seeds", type=at_least_one, default=1)
    parser.add_argument("--every", type=at_least_one, default=5, help="steps between printed lines")
    parser.add_argument("--no-reordered", action="store_true", help="leave out BF16 against itself")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="also write the gaps to FILE")
    given = parser.parse_args(arguments)
    settings = Settings(given.model, given.spec, given.target, given.steps)
    arms = (BF16, FP8C) if given.no_reordered else (BF16, FP8C, REORDERED)
    started = time.perf_counter()
    try:
        gaps = compare(settings, given.seeds, arms, given.every)
    except DiagnosticError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    print(
        f"\n{given.steps} steps, {given.seeds} seed(s), {time.perf_counter() - started:.0f} s; gap of the last fifth:"
    )
    for arm, gap in gaps.items():
        print(f"  {arm} against bf16: {gap.text()}")
    if given.json:
        found = {
            arm: {"mean": g.mean, "standard_error": g.standard_error, "values": g.values} for arm, g in gaps.items()
        }
        document = {"schema": "fp8c.train-compare/1", "steps": given.steps, "gaps": found}
        write_file(given.json, json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
