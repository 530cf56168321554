"""`python -m fp8c.tools.bench telemetry`: what reading amax, underflow and overflow of every N-th step costs.

The step is that of the loss gap's model (`fp8c.tools.loss_run`): forward, backward and optimizer, launched as an
ordinary loop launches them. Observed steps and plain ones alternate, so that a drift of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch

from fp8c.files import output_file
from fp8c.optim import Telemetry
from fp8c.tools.loss_run import Setup, Trainer

SCHEMA = "fp8c.bench.telemetry/1"


@dataclass(frozen=True)
class Cost:
    """plain_ms, observed_ms: medians of a step; tensors: how many an observed step reads; tokens: of a step."""

    plain_ms: float
    observed_ms: float
    tensors: int
    tokens: int

    def share(self, every: int) -> float:
        """Of a step, when every so many is observed."""
        return max(0.0, self.observed_ms / self.plain_ms - 1) / every

    @property
    def least_every(self) -> int:
        """The shortest interval that costs at most 1 %."""
        return max(1, math.ceil(100 * (self.observed_ms / self.plain_ms - 1)))


class Loop:
    """A training loop whose steps can be observed."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.trainer = Trainer(setup, "spec", 0)
        self.telemetry = Telemetry(self.trainer.compiled, 1, dynamic=False)
        self.tensors = 0

    def step(self, number: int, *, observed: bool) -> float:
        """Milliseconds of one step, with what telemetry found taken."""
        started = self._now()
        batch = self.trainer.batches.at(number)
        if observed:
            with self.telemetry.at(number):
                self.trainer.loss(batch)
        else:
            self.trainer.loss(batch)
        self.trainer.update()
        if observed:
            self.tensors = len(self.telemetry.take())
        return (self._now() - started) * 1e3

    def _now(self) -> float:
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def warm(loop: Loop) -> None:
    """Both kinds compile at their first call; the second fills caches."""
    for number in (0, 1):
        loop.step(number, observed=False)
        loop.step(number, observed=True)


def measure(loop: Loop, rounds: int) -> Cost:
    """`rounds` observed steps, with four plain ones for each."""
    plain, observed = [], []
    for number in range(rounds):
        plain += [loop.step(2 + number, observed=False) for _ in range(4)]
        observed.append(loop.step(2 + number, observed=True))
    setup = loop.setup
    return Cost(statistics.median(plain), statistics.median(observed), loop.tensors, setup.batch * setup.length)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fp8c.tools.bench telemetry", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="", help="100m, or nothing for the small model of --dim and --n-layers")
    for name, value in (("batch", 8), ("length", 256), ("dim", 256), ("n-layers", 2), ("n-experts", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--json", type=output_file)
    args = parser.parse_args(arguments)
    setup = Setup(
        steps=args.rounds + 2,
        batch=args.batch,
        length=args.length,
        dim=args.dim,
        n_layers=args.n_layers,
        n_experts=args.n_experts,
        device=args.device,
        size=args.size,
    )
    loop = Loop(setup)
    warm(loop)
    cost = measure(loop, args.rounds)
    print(
        f"a step of {cost.tokens} tokens takes {cost.plain_ms:.1f} ms, one whose {cost.tensors} quantized tensors are "
        f"read {cost.observed_ms:.1f} ms: {cost.share(args.every):.2%} at every {args.every}th, at most 1 % from every "
        f"{cost.least_every}th on"
    )
    if args.json:
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        record = {"schema": SCHEMA, "device": device, "torch": torch.__version__, "every": args.every}
        args.json.write_text(json.dumps(record | asdict(cost) | {"setup": asdict(setup)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
