"""Loss gap: train the same byte-level MoE transformer in BF16 and under a spec, many seeds, and compare honestly.

    python -m fp8c.tools.loss_gap --seeds 8 --steps 300
    python -m fp8c.tools.loss_gap --device cuda --seeds 4 --steps 3000 --size 100m --parallel 12   all at once, on a GPU
    python -m fp8c.tools.loss_gap ... --steps 3750 --shared 750       the sides of a seed branch off one BF16 run

Each seed trains several times from the same weights on the same batches, under the same optimizer: BF16, the spec, BF16
with every GEMM summed in another order (K reversed), and, where asked for, further specs. The third is the yardstick: a
gap that BF16 has against itself says nothing about FP8. The figure of a run is the mean loss of its last fifth; gaps
are relative, signed, and averaged over seeds with their standard error. Master weights and gradient sums are FP32 and
moments BF16, as the recipe asks (`fp8c.optim.AdamW`); the model's parameters are the masters' BF16 copies.

Two runs from the same weights drift apart early, and stay apart, by more than FP8 costs. With `--shared N` the BF16 run
of a seed is saved after N steps, and the other variants go on from there.

On a GPU the BF16 runs go through torch.compile. There the yardsticks are `bf16-flipped` (every batch in reverse order,
which sums the same gradients in another order) and `bf16-again`.

Results go to a JSON-lines file, one run a line, and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fp8c.files import output_file
from fp8c.optim.checkpoint import newest
from fp8c.tools.loss_run import SPECS, Run, Setup, train
from fp8c.tools.rounded_gemms import Errors, text_of
from fp8c.tools.train_compare import Gap, final_loss

VARIANTS = ("bf16", "spec", "bf16-reversed")
OTHERS = ("bf16-flipped", "bf16-again", "bf16-launched", *SPECS)

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


def read_records(path: Path, setup: Setup) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return [record for record in records if {**asdict(Setup()), **record["setup"]} == asdict(setup)]


def read_runs(path: Path, setup: Setup) -> Runs:
    """The runs of a setup in a file, those that were stopped early included."""
    return {(r["variant"], r["seed"]): r["losses"] for r in read_records(path, setup)}


def gradient_report(records: Iterable[dict[str, Any]]) -> str:
    """What groups of either shape do to the activation gradients of the finished BF16 runs, mean over seeds."""
    found = [record["gradients"] for record in records if record["variant"] == "bf16" and record.get("gradients")]
    if not found:
        return ""
    means: dict[str, dict[str, Errors]] = {}
    for kind, groups in found[0].items():
        for group, first in groups.items():
            columns = {name: [run[kind][group][name] for run in found] for name in first}
            mean: dict[str, Any] = {
                name: None if None in values else statistics.fmean(values) for name, values in columns.items()
            }
            means.setdefault(kind, {})[group] = Errors(**mean)
    return f"activation gradients in groups, {len(found)} finished BF16 runs\n{text_of(means)}"


def report(runs: Runs) -> str:
    lines = []
    for variant, base, name in (
        ("spec", "bf16", "spec against BF16"),
        ("bf16-reversed", "bf16", "BF16 against itself, sums reversed"),
        ("bf16-flipped", "bf16", "BF16 against itself, batches flipped"),
        ("bf16-again", "bf16", "BF16 against itself, a second run"),
        ("bf16-launched", "bf16", "BF16 against itself, no CUDA graph"),
        ("blocks", "bf16", "128x128 gradients against BF16"),
        ("blocks", "spec", "128x128 gradients against 1x128"),
        ("forward", "bf16", "fprop alone in FP8"),
        ("backward", "bf16", "dgrad and wgrad alone in FP8"),
        ("dgrad", "bf16", "dgrad alone in FP8"),
    ):
        found, steps = gap(runs, variant, base)
        if found.values:
            far = abs(found.mean) > 2 * found.standard_error
            verdict = "" if len(found.values) < 2 else f", {'' if far else 'not '}distinguishable from 0 (two errors)"
            lines.append(f"{name:36} {found.text()}{verdict}, {steps} steps")
    return "\n".join(lines)


def record_of(setup: Setup, variant: str, seed: int, run: Run) -> dict[str, Any]:
    return {
        "setup": asdict(setup),
        "variant": variant,
        "seed": seed,
        "last_fifth": final_loss(run.losses),
        "losses": [round(x, 5) for x in run.losses],
        "fresh": {name: round(x, 5) for name, x in run.fresh.items()},
        "gradients": {kind: {g: asdict(e) for g, e in found.items()} for kind, found in run.gradients.items()},
        "torch": torch.__version__,
    }


def run_one(setup: Setup, variant: str, seed: int, place: Path, starts: Path) -> None:
    """One run, its record in `place` as it grows. A file beside it says that the first step is done."""

    def save(run: Run) -> None:
        scratch = place.with_suffix(".new")
        scratch.write_text(json.dumps(record_of(setup, variant, seed, run)) + "\n")
        os.replace(scratch, place)

    def show(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    train(setup, variant, seed, show, save, place.with_suffix(".compiled").touch, starts)


def run_parallel(
    setup: Setup, wanted: Sequence[tuple[str, int]], parallel: int, out: Path, limit_s: float, starts: Path
) -> None:
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
                    "--starts",
                    str(starts),
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
    parser.add_argument(
        "--starts", type=Path, help="folder of what the variants of a seed share; beside OUT unless given"
    )
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "SEED", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=output_file, default=Path("loss_gap.jsonl"))
    args = parser.parse_args(list(argv) if argv is not None else None)
    setup = Setup(**{name: getattr(args, name) for name in asdict(defaults)})
    if args.one:
        run_one(setup, args.one[0], int(args.one[1]), Path(args.one[2]), args.starts)
        return
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    known = read_runs(args.out, setup)
    finished = {run for run, losses in known.items() if len(losses) >= setup.steps}
    wanted = [(variant, seed) for seed in seeds for variant in args.variants if (variant, seed) not in finished]
    starts = args.starts or args.out.with_suffix(".starts")
    if setup.shared:
        others = {seed for variant, seed in wanted if variant != "bf16"} - {s for v, s in wanted if v == "bf16"}
        if lacking := sorted(seed for seed in others if newest(starts / f"seed-{seed}") is None):
            parser.error(f"no start of seeds {lacking} in {starts}: train their BF16 runs together with the others")
    if args.parallel:
        run_parallel(setup, wanted, args.parallel, args.out, args.limit_s, starts)
    else:
        for variant, seed in wanted:
            torch._dynamo.reset()
            run = train(setup, variant, seed, lambda text: print(text, file=sys.stderr, flush=True), starts=starts)
            with args.out.open("a") as file:
                file.write(json.dumps(record_of(setup, variant, seed, run)) + "\n")
    print(report(read_runs(args.out, setup)))
    if text := gradient_report(read_records(args.out, setup)):
        print(text)


if __name__ == "__main__":
    main()
