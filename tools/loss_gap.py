"""Loss gap: train the same byte-level MoE transformer in BF16 and under a spec, many seeds, and compare honestly.

    python -m fp8c.tools.loss_gap --seeds 8 --steps 300
    python -m fp8c.tools.loss_gap --device cuda --seeds 4 --steps 3000 --size 100m --parallel 12   all at once, on a GPU

Each seed trains several times from the same weights on the same batches, under the same optimizer: BF16, the spec, BF16
with every GEMM summed in another order (K reversed), and, where asked for, further specs. The third is the yardstick: a
gap that BF16 has against itself says nothing about FP8. The figure of a run is the mean loss of its last fifth; gaps
are relative, signed, and averaged over seeds with their standard error. Master weights and gradient sums are FP32 and
moments BF16, as the recipe asks (`fp8c.optim.AdamW`); the model's parameters are the masters' BF16 copies.

On a GPU the BF16 runs go through torch.compile. There the yardstick is `bf16-flipped`: every batch in reverse order,
which sums the same gradients in another order.

Results go to a JSON-lines file, one run a line, and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fp8c
from fp8c.optim import AdamW
from fp8c.tools.train_compare import Gap, final_loss

VARIANTS = ("bf16", "spec", "bf16-reversed")
OTHERS = ("bf16-flipped", "blocks")
#: The paper's negative result (appendix B.2): activation gradients in 128x128 blocks instead of 1x128. Of the Linears:
#: grouped GEMMs take activations in rows only, because an expert's tokens start anywhere.
BLOCKS = """version 1;
use "std:deepseek_v3";
format block = e4m3 [128x128] scale fp32 online;
spec block_gradients extends deepseek_v3 {
  override rule blocks for op(linear) & !kind(embedding?, lm_head?, router?) {
    dgrad { dy = block; }
    because "B.2: quantized in blocks, activation gradients made a 16B model diverge";
  }
}
"""
#: Sizes of the model beside the small one that the options give: about 100 M parameters, few layers and wide experts.
SIZES: dict[str, dict[str, Any]] = {
    "": {},
    "100m": dict(
        dim=768, n_layers=3, n_heads=6, n_experts=16, expert_hidden_dim=768, dense_hidden_dim=2304,
        q_lora_rank=256, kv_lora_rank=256,
    ),
}  # fmt: skip
SAVE_EVERY = 250
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
    size: str = ""
    corpus: str = "top"  # "top": the standard library's top-level sources; "all": its packages too


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


def train(
    setup: Setup,
    variant: str,
    seed: int,
    show: Callable[[str], None],
    save: Callable[[list[float]], None] = lambda _: None,
    compiled: Callable[[], None] = lambda: None,
) -> list[float]:
    """Losses of every step of one run. save: called with the losses so far; compiled: after the first step."""
    example = load_example()
    torch.manual_seed(seed)
    shape = {"dim": setup.dim, "n_layers": setup.n_layers, "n_experts": setup.n_experts, **SIZES[setup.size]}
    model = example.Transformer(example.Config(**shape)).to(setup.device)
    from fp8c.prepare import prepare

    batches = Batches(read_corpus(setup, example), setup, seed)
    prepare(model, batches.at(0))  # the same grouped experts on all sides
    step = compiled_call(model, setup, variant)
    optimizer = AdamW(
        step if isinstance(step, torch.nn.Module) else model,
        lr=setup.lr,
        weight_decay=0.1,
        max_norm=1.0,
        spec=setup.spec,
        main_grad=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: cosine(i, setup.steps) * min(1.0, (i + 1) / max(1, setup.warmup))
    )
    losses: list[float] = []
    fresh: list[Tensor] = []  # still on the device, so that no step waits
    started = time.perf_counter()
    for i in range(setup.steps):
        batch = batches.at(i)
        if variant == "bf16-flipped":
            batch = {name: tensor.flip(0) for name, tensor in batch.items()}
        with ReversedSums() if variant == "bf16-reversed" else contextlib.nullcontext():
            output = step(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.update_router_biases()
        fresh.append(output.loss.detach())
        if i == 0:
            losses += [float(fresh.pop())]
            compiled()
            show(f"seed {seed} {variant} first step {time.perf_counter() - started:.1f} s, loss {losses[0]:.4f}")
            started = time.perf_counter()
        elif (i + 1) % SAVE_EVERY == 0 or i + 1 == setup.steps or (i + 1) % 50 == 0 and setup.device == "cpu":
            losses += torch.stack(fresh).tolist() if fresh else []
            fresh.clear()
            save(losses)
            rate = (time.perf_counter() - started) / i * 1e3
            show(f"seed {seed} {variant} step {i + 1} loss {losses[-1]:.4f} {rate:.1f} ms/step")
    return losses


def compiled_call(model: torch.nn.Module, setup: Setup, variant: str) -> Callable[..., Any]:
    if variant == "spec":
        step: Callable[..., Any] = fp8c.compile(model, spec=setup.spec, dynamic=False, main_grad=True)
        return step
    if variant == "blocks":
        folder = Path(tempfile.mkdtemp())
        (folder / "block_gradients.fp8").write_text(BLOCKS)
        step = fp8c.compile(model, spec=folder / "block_gradients.fp8", dynamic=False, main_grad=True)
        return step
    if setup.device == "cuda":
        model.compile(dynamic=False)
    return model


class Batches:
    """Batch `i` of a seed: the same whatever the variant. The text lies on the device, so no step copies anything."""

    def __init__(self, corpus: Tensor, setup: Setup, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(corpus) - setup.length - 1, (setup.steps, setup.batch, 1), generator=generator)
        self.corpus, self.starts = corpus.to(setup.device), starts.to(setup.device)
        self.offsets = torch.arange(setup.length + 1, device=setup.device)

    def at(self, i: int) -> dict[str, Tensor]:
        window = self.corpus[self.starts[i] + self.offsets].long()
        return {"tokens": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}


def read_corpus(setup: Setup, example: ModuleType) -> Tensor:
    if setup.corpus == "top":
        found: Tensor = example.read_corpus()
        return found
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages"} & set(f.parts)]
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def cosine(i: int, steps: int) -> float:
    """Cosine decay to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps))


Runs = dict[tuple[str, int], list[float]]  # (variant, seed) -> losses


def gap(runs: Runs, variant: str, base: str = "bf16") -> tuple[Gap, int]:
    """Relative gap of a variant against another, seed by seed, over the last fifth of the steps; and how many steps.

    Of runs that were stopped early so many steps count as three seeds (or all, when there are fewer) have reached.
    """
    both = [s for v, s in runs if v == variant and (base, s) in runs]
    reached = {s: min(len(runs[variant, s]), len(runs[base, s])) for s in sorted(both)}
    steps = sorted(reached.values(), reverse=True)[:3][-1] if reached else 0
    seeds = [s for s, count in reached.items() if count >= steps]
    last = {(v, s): final_loss(runs[v, s][:steps]) for v in (variant, base) for s in seeds}
    return Gap(tuple(last[variant, s] / last[base, s] - 1 for s in seeds)), steps


def read_runs(path: Path, setup: Setup) -> Runs:
    """The runs of a setup in a file, those that were stopped early included."""
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {(r["variant"], r["seed"]): r["losses"] for r in lines if {**asdict(Setup()), **r["setup"]} == asdict(setup)}


def report(runs: Runs) -> str:
    lines = []
    for variant, base, name in (
        ("spec", "bf16", "spec against BF16"),
        ("bf16-reversed", "bf16", "BF16 against itself, sums reversed"),
        ("bf16-flipped", "bf16", "BF16 against itself, batches flipped"),
        ("blocks", "bf16", "128x128 gradients against BF16"),
        ("blocks", "spec", "128x128 gradients against 1x128"),
    ):
        found, steps = gap(runs, variant, base)
        if found.values:
            far = abs(found.mean) > 2 * found.standard_error
            verdict = "" if len(found.values) < 2 else f", {'' if far else 'not '}distinguishable from 0 (two errors)"
            lines.append(f"{name:36} {found.text()}{verdict}, {steps} steps")
    return "\n".join(lines)


def record_of(setup: Setup, variant: str, seed: int, losses: Sequence[float]) -> dict[str, Any]:
    return {
        "setup": asdict(setup),
        "variant": variant,
        "seed": seed,
        "last_fifth": final_loss(losses),
        "losses": [round(x, 5) for x in losses],
        "torch": torch.__version__,
    }


def run_one(setup: Setup, variant: str, seed: int, place: Path) -> None:
    """One run, its record in `place` as it grows. A file beside it says that the first step is done."""

    def save(losses: list[float]) -> None:
        scratch = place.with_suffix(".new")
        scratch.write_text(json.dumps(record_of(setup, variant, seed, losses)) + "\n")
        os.replace(scratch, place)

    def show(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    train(setup, variant, seed, show, save, place.with_suffix(".compiled").touch)


def run_parallel(setup: Setup, wanted: Sequence[tuple[str, int]], parallel: int, out: Path, limit_s: float) -> None:
    """All runs as processes on one GPU, at most `parallel` at a time. The first of each variant compiles alone, so that
    the others find its kernels in the caches. What is unfinished after `limit_s` is stopped and kept as far as it
    got.
    """
    folder = Path(tempfile.mkdtemp())
    options = [part for name, value in asdict(setup).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    started, waiting = time.perf_counter(), list(wanted)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    leaders: dict[str, Path] = {}
    while (waiting or running) and time.perf_counter() - started < limit_s:
        for run in list(waiting):
            variant, seed = run
            place = folder / f"{variant}-{seed}.json"
            leader = leaders.setdefault(variant, place)
            ready = leader == place or leader.with_suffix(".compiled").exists()
            if len(running) < parallel and ready:
                command = [
                    sys.executable,
                    "-m",
                    "fp8c.tools.loss_gap",
                    "--one",
                    variant,
                    str(seed),
                    str(place),
                    *options,
                ]
                running[run] = subprocess.Popen(command, env=environment)
                waiting.remove(run)
        for run, process in list(running.items()):
            if process.poll() is not None:
                del running[run]
                if not leaders[run[0]].with_suffix(".compiled").exists():  # it failed: the others would as well
                    waiting = [other for other in waiting if other[0] != run[0]]
        time.sleep(0.2)
    for process in running.values():
        process.terminate()
    with out.open("a") as file:
        for place in sorted(folder.glob("*.json")):
            file.write(place.read_text())


def main(argv: Iterable[str] | None = None) -> None:
    defaults = Setup()
    parser = argparse.ArgumentParser(description="Loss of a spec against BF16, over seeds.")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--variants", nargs="*", choices=(*VARIANTS, *OTHERS), default=VARIANTS)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=0, help="run this many processes at a time")
    parser.add_argument("--limit-s", type=float, default=1e9, help="with --parallel: stop what is unfinished then")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "SEED", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("loss_gap.jsonl"))
    args = parser.parse_args(list(argv) if argv is not None else None)
    setup = Setup(**{name: getattr(args, name) for name in asdict(defaults)})
    if args.one:
        run_one(setup, args.one[0], int(args.one[1]), Path(args.one[2]))
        return
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    known = read_runs(args.out, setup)
    finished = {run for run, losses in known.items() if len(losses) >= setup.steps}
    wanted = [(variant, seed) for seed in seeds for variant in args.variants if (variant, seed) not in finished]
    if args.parallel:
        run_parallel(setup, wanted, args.parallel, args.out, args.limit_s)
    else:
        for variant, seed in wanted:
            torch._dynamo.reset()
            losses = train(setup, variant, seed, lambda text: print(text, file=sys.stderr, flush=True))
            with args.out.open("a") as file:
                file.write(json.dumps(record_of(setup, variant, seed, losses)) + "\n")
    print(report(read_runs(args.out, setup)))


if __name__ == "__main__":
    main()
