"""Loss gap: train the same byte-level MoE transformer in BF16 and under a spec, many seeds, and compare honestly.

    python -m fp8c.tools.loss_gap --seeds 8 --steps 300

Each seed trains three times from the same weights on the same batches: BF16, the spec, and BF16 with every GEMM summed
in another order (K reversed). The third is the yardstick: a gap that BF16 has against itself says nothing about FP8. The
figure of a run is the mean loss of its last fifth; gaps are relative, signed, and averaged over seeds with their
standard error. Master weights are FP32, as the recipe asks; the model's parameters are their BF16 copies.

Results go to a JSON-lines file, one run a line, and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import fp8c
from fp8c.tools.train_compare import Gap, MasterWeights, Settings, final_loss

VARIANTS = ("bf16", "spec", "bf16-reversed")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "moe_transformer.py"


@dataclass(frozen=True)
class Setup:
    """One experiment; runs are compared only within the same setup."""

    spec: str = "deepseek_v3"
    steps: int = 300
    batch: int = 8
    length: int = 128
    lr: float = 1e-3
    warmup: int = 20
    dim: int = 256
    n_layers: int = 2
    n_experts: int = 4
    device: str = "cpu"


class ReversedSums(TorchFunctionMode):
    """Every GEMM over a reversed reduction axis: the same sums in another order."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, *rest = args
            return func(x.flip(-1), weight.flip(-1), *rest, **kwargs)
        if func in (torch._grouped_mm, torch.nn.functional.grouped_mm):
            x, weight, *rest = args
            return func(x.flip(-1), weight.flip(-2), *rest, **kwargs)
        return func(*args, **kwargs)


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moe_transformer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(setup: Setup, variant: str, seed: int, show: Callable[[str], None]) -> list[float]:
    """Losses of every step of one run."""
    example = load_example()
    torch.manual_seed(seed)
    config = example.Config(dim=setup.dim, n_layers=setup.n_layers, n_experts=setup.n_experts)
    model = example.Transformer(config).to(setup.device)
    from fp8c.prepare import prepare

    corpus = example.read_corpus()
    generator = torch.Generator().manual_seed(seed)
    first = {
        k: v.to(setup.device) for k, v in example.sample_batch(corpus, setup.batch, setup.length, generator).items()
    }
    prepare(model, first)  # the same grouped experts on all sides
    step: Callable[..., Any] = model
    if variant == "spec":
        step = fp8c.compile(model, spec=setup.spec, dynamic=False)
    settings = Settings(str(EXAMPLE), setup.spec, setup.device, setup.steps, setup.lr, setup.warmup)
    optimizer = MasterWeights(model, settings, lambda i: cosine(i, setup.steps))
    losses: list[float] = []
    started = time.perf_counter()
    for i in range(setup.steps):
        batch = {
            k: v.to(setup.device) for k, v in example.sample_batch(corpus, setup.batch, setup.length, generator).items()
        }
        if variant == "bf16-reversed":
            with ReversedSums():
                output = step(**batch)
        else:
            output = step(**batch)
        output.loss.backward()
        optimizer.step(i)
        model.update_router_biases()
        losses.append(float(output.loss.detach()))
        if (i + 1) % 50 == 0:
            show(
                f"seed {seed} {variant} step {i + 1} loss {losses[-1]:.4f} {(time.perf_counter() - started) / (i + 1):.2f} s/step"
            )
    return losses


def cosine(i: int, steps: int) -> float:
    """Cosine decay to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps))


def gap(runs: dict[tuple[str, int], float], variant: str) -> Gap:
    """Relative gap of a variant against BF16, seed by seed."""
    seeds = sorted(s for v, s in runs if v == variant and ("bf16", s) in runs)
    return Gap(tuple(runs[variant, s] / runs["bf16", s] - 1 for s in seeds))


def read_runs(path: Path, setup: Setup) -> dict[tuple[str, int], float]:
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {(r["variant"], r["seed"]): r["last_fifth"] for r in lines if r["setup"] == asdict(setup)}


def report(runs: dict[tuple[str, int], float]) -> str:
    lines = []
    for variant, name in (("spec", "spec against BF16"), ("bf16-reversed", "BF16 against itself, sums reversed")):
        found = gap(runs, variant)
        if found.values:
            far = abs(found.mean) > 2 * found.standard_error
            verdict = "" if len(found.values) < 2 else f", {'' if far else 'not '}distinguishable from 0 (two errors)"
            lines.append(f"{name:36} {found.text()}{verdict}")
    return "\n".join(lines)


def main(argv: Iterable[str] | None = None) -> None:
    defaults = Setup()
    parser = argparse.ArgumentParser(description="Loss of a spec against BF16, over seeds.")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("loss_gap.jsonl"))
    args = parser.parse_args(list(argv) if argv is not None else None)
    setup = Setup(**{name: getattr(args, name) for name in asdict(defaults)})
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for variant in args.variants:
            if (variant, seed) in read_runs(args.out, setup):
                continue
            torch._dynamo.reset()
            losses = train(setup, variant, seed, lambda text: print(text, file=sys.stderr, flush=True))
            record = {
                "setup": asdict(setup),
                "variant": variant,
                "seed": seed,
                "last_fifth": final_loss(losses),
                "losses": [round(x, 5) for x in losses],
                "torch": torch.__version__,
            }
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print(report(read_runs(args.out, setup)))


if __name__ == "__main__":
    main()
