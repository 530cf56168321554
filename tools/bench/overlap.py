"""`torchrun --nproc-per-node 2 -m fp8c.tools.bench overlap`: how much of a real all-to-all a schedule hides.

DeepSeek-V3 MoE layers with experts spread over the ranks, micro-batches whose forward and backward run in pairs:

    unscheduled   forward, then backward, every transfer waited for where it is issued
    scheduled     the pair's one graph in the order found for durations measured on the spot

A setting is how many thread blocks NCCL may use and how many SMs the GEMMs leave to them. For each, in this order:
durations of every node alone; what compute and transfers cost each other, from transfers that belong to no pair; the
schedule and the makespan these give (`simulated_ms`); and only then the pairs themselves, by the clock and in a trace.
Hidden is what the union of NCCL's kernels has in common with the union of all other kernels, on the rank that hides
least. The best setting then runs longer, `--repeats` times, compares bits, and meets skewed routing, in the order that
leaves room for it and in one that does not.

On a CPU (gloo) the same code runs at small sizes and times nothing worth quoting; it compares bits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import fp8c
from fp8c import distributed
from fp8c.backends import lowering
from fp8c.contention import Interference
from fp8c.graph_costs import is_collective, reads_on_host
from fp8c.overlap import exposure
from fp8c.passes.schedule_overlap import issue_order_problem
from fp8c.schedule import Slot, program_order
from fp8c.stage import ROOM, Stage
from fp8c.tools.bench.overlap_timing import (
    Calibration,
    Clock,
    Timed,
    calibrate,
    hidden,
    host_read_us,
    measured_durations,
)
from fp8c.tools.bench.overlap_work import (
    Layers,
    Work,
    bits_of,
    equal,
    payload_groups,
    send_through,
    sent_bytes,
    skew,
    wire_bytes,
    wire_is_exact,
)

#: Least share of communication that a setting should hide.
HIDDEN = 0.9
#: How much faster than unscheduled it should be.
SPEEDUP = 1.3


@dataclass(frozen=True)
class Setting:
    """Thread blocks of NCCL, and SMs that GEMMs leave alone."""

    blocks: int
    reserved: int

    @classmethod
    def parse(cls, text: str) -> Setting:
        blocks, _, reserved = text.partition(":")
        return cls(int(blocks), int(reserved or blocks))

    def __str__(self) -> str:
        return f"{self.blocks}:{self.reserved}"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--spec", default="deepseek_v3")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[4096],
        help="of a micro-batch; further ones are tried until one setting is good enough",
    )
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--micro-batches", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="how often the best setting is measured")
    parser.add_argument(
        "--skews",
        type=float,
        nargs="*",
        default=[0.05, 0.1, 0.3],
        help="biases of the router from first to last expert",
    )
    parser.add_argument(
        "--settings", type=Setting.parse, nargs="+", default=[Setting(b, b) for b in (1, 2, 4)],
        metavar="BLOCKS:RESERVED", help="NCCL's thread blocks, and SMs that GEMMs leave to them",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=150.0, help="try no further setting after this")
    parser.add_argument("--out", type=Path, default=Path("."))
    return parser.parse_args(given)


class Bench:
    """One stage at one micro-batch size, and what is found about it."""

    def __init__(self, args: argparse.Namespace, tokens: int, note: Callable[..., None]) -> None:
        self.args, self.tokens, self.note = args, tokens, note
        self.device: str = args.device
        self.clock = Clock(self.device)
        self.is_cuda = self.device == "cuda"
        self.deadline = time.perf_counter() + args.seconds
        self.has_traced = False

    def reserve(self, sms: int) -> None:
        if self.is_cuda:
            distributed.limit_gemm_sms(sms)

    def prepare(self, mesh: Any) -> None:
        """Capture the stage, compile its kernels, put its halves into one graph."""
        args, device = self.args, self.device
        torch.manual_seed(0)
        with torch.device(device):
            module: nn.Module = Layers(args)
        self.step = fp8c.compile(module, spec=args.spec, mesh=mesh, target=None if self.is_cuda else "cpu")
        generator = torch.Generator(device).manual_seed(1 + dist.get_rank())

        def rows() -> Tensor:
            return torch.randn(1, self.tokens, args.hidden, device=device, generator=generator).bfloat16()

        count = args.micro_batches
        inputs, gradients = [rows() for _ in range(2)], [rows() * 1e-3 for _ in range(2)]
        inputs, gradients = (inputs * count)[:count], (gradients * count)[:count]
        self.stage = Stage.capture(self.step, (inputs[0],))
        self.halves = (self.stage.forward_graph, self.stage.backward_graph)
        nodes = sum(len(h.graph.nodes) for h in self.halves)
        self.note(captured=nodes, wire_bytes=wire_bytes(self.halves, self.tokens * args.top_k))
        self.work, self.few = Work(self.stage, inputs, gradients), Work(self.stage, inputs[:2], gradients[:2])
        self.few.unscheduled()
        self.clock.synchronize()
        self.note(sent_bytes=sent_bytes(self.few.first(1).unscheduled))
        self.stage.schedule_pair(lambda node: 0.0)
        plain = self.stage.pair_graph
        assert plain is not None
        self.plain = plain
        with torch.no_grad():
            _, kept = self.stage.forward(inputs[0])
            forward, backward = self.stage._forward_inputs((inputs[0],)), self.stage._backward_inputs(kept, gradients)
        self.inputs = [*forward, *backward]
        self.read_us = host_read_us(device)
        self.step.zero_grad()
        self.note(warm=True, host_read_us=self.read_us)

    # --- one setting --------------------------------------------------------------------------------------------------

    def use(self, setting: Setting, group: str | None) -> None:
        if group is not None:
            send_through((*self.halves, self.plain), group)
        self.reserve(setting.reserved)
        self.few.unscheduled()  # a new group is set up

    def plan(self, group: str | None) -> dict[str, Any]:
        """Durations alone, interference, the schedule for them, and its simulated makespan."""
        alone = measured_durations(self.plain, lambda: self.inputs, self.clock, repeats=2)
        moves = {n.name for n in self.plain.graph.nodes if is_collective(n)}
        compute_ms = sum(us for name, us in alone.items() if name not in moves) / 1e3
        comm_ms = sum(us for name, us in alone.items() if name in moves) / 1e3
        found = agreed(calibrate(self.plain, self.inputs, self.clock, group or "", self.args.hidden))
        interference = found.interference
        # Events around each node cost time too, and kernels that follow each other start early.
        scale = found.compute_ms / compute_ms if self.is_cuda else 1.0
        durations = {name: us if name in moves else us * scale for name, us in alone.items()}

        def cost_us(node: fx.Node) -> float:
            return self.read_us if reads_on_host(node) else durations.get(node.name, 0.0)

        before = exposure(program_order(issue_order_problem(self.plain.graph, cost_us)).slots)
        self.costs: tuple[Callable[[fx.Node], float], Interference] = cost_us, interference
        report = self.stage.schedule_pair(cost_us, interference)
        self.slots = report.expected
        after = exposure(report.expected)
        return {
            "compute_ms": found.compute_ms if self.is_cuda else compute_ms,
            "compute_by_node_ms": compute_ms,
            "comm_ms": comm_ms,
            "calibration": asdict(found),
            "slowdown": asdict(interference),
            "program_order_ms": before.makespan_us / 1e3,
            "proven_gap": report.schedule.gap,
            "simulated_ms": after.makespan_us / 1e3,
            "simulated_hidden": after.hidden_share,
        }

    def measure(self, setting: Setting, work: Work, rounds: int) -> dict[str, Any]:
        """Per micro-batch, milliseconds: unscheduled with all SMs and with some reserved, and pairs."""
        count = len(work.inputs)
        times: dict[str, list[float]] = {"unscheduled": [], "unscheduled, reserved": [], "whole": [], "pairs": []}
        _, kept = self.stage.forward(self.work.inputs[0])
        holder = [work.pairs(2, kept)]

        def pairs() -> None:
            holder[0] = work.pairs(count, holder[0])

        for _ in range(rounds):
            self.reserve(0)
            times["unscheduled"].append(self.clock.time_ms(work.unscheduled) / count)
            self.reserve(setting.reserved)
            times["unscheduled, reserved"].append(self.clock.time_ms(work.unscheduled) / count)
            times["pairs"].append(self.clock.time_ms(pairs) / count)
            times["whole"].append(self.clock.time_ms(work.scheduled) / count)
        best = {name: min(found) for name, found in times.items()}
        unscheduled_ms = min(best["unscheduled"], best["unscheduled, reserved"])
        return {
            "per_micro_batch_ms": times,
            "unscheduled_ms": unscheduled_ms,
            "pair_ms": best["pairs"],
            "speedup": unscheduled_ms / best["pairs"],
            "speedup_with_ends": unscheduled_ms / best["whole"],
        }

    def traced(self, pairs: int = 4) -> dict[str, Any]:
        """A trace of pairs; nothing on a CPU."""
        if not self.is_cuda:
            return {}
        _, kept = self.stage.forward(self.work.inputs[0])
        holder = [self.work.pairs(2, kept)]

        def some() -> None:
            holder[0] = self.work.pairs(pairs, holder[0])

        if not self.has_traced:  # a process's first trace holds the ranks up
            self.has_traced = True
            hidden(some, self.args.out)
        return hidden(some, self.args.out)

    def compare(self) -> dict[str, Any]:
        """The same bits, as far as PyTorch's attention has the same bits twice."""
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            control = bits_of(self.few, self.step, self.few.unscheduled)
            again = bits_of(self.few, self.step, self.few.unscheduled)
            paired = bits_of(self.few, self.step, self.few.scheduled)
        except RuntimeError as error:
            return {"equality_failed": str(error)[:500]}
        finally:
            torch.use_deterministic_algorithms(False)
            self.step.zero_grad()
        names = [n for n, p in self.step.named_parameters() if p.requires_grad]
        return {
            "repeated_differs": equal(control, again),
            "scheduled_differs": equal(control, paired),
            "compared": [len(control[0]), len(control[1])],
            "differing": {
                n: float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-30))
                for n, a, b in zip(names, control[1], paired[1])
                if not torch.equal(a, b)
            },
        }

    def skewed(self, setting: Setting) -> None:
        """Traces and times with the router biased, in orders found for even routing: with room for longer transfers and
        without; a bias of 0 comes first in each. Notes what is found."""
        found: dict[str, Any] = {}
        for room in (ROOM, 1.0):
            self.stage.schedule_pair(*self.costs, room=room)
            here = found[f"room {room}"] = {}
            for strength in (0.0, *self.args.skews):
                if not everyone_has_time(self.deadline):
                    break
                skew(self.step, strength)
                here[str(strength)] = {
                    "rows_over_mean_by_rank": self.rows_over_mean(),
                    "trace": self.traced(),
                    **self.measure(setting, self.work.first(4), rounds=1),
                }
                self.note(skew=found)
        skew(self.step, 0.0)

    def rows_over_mean(self) -> list[float]:
        """Rows that come to each rank's experts in the first micro-batch, over what even routing gives."""
        counting = Timed(self.stage.forward_graph, self.clock)
        counting.sleep_cycles = 0
        with torch.no_grad():
            counting.run(*self.stage._forward_inputs(self.work.inputs[:1]))
        arrived = max(rows.shape[0] for name, rows in counting.moved.items() if rows.dtype is torch.uint8)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, arrived / (self.tokens * self.args.top_k))
        return ranks


def agreed(mine: Calibration) -> Calibration:
    """The mean over ranks, so that all ranks schedule alike."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, asdict(mine))
    return Calibration(**{key: sum(one[key] for one in everyone) / len(everyone) for key in everyone[0]})


def best_of(found: dict[str, dict[str, Any]]) -> str:
    """The fastest setting among those that hide enough, among all where none does."""
    enough = {name: one for name, one in found.items() if one.get("trace", {}).get("hidden_share", 1.0) >= HIDDEN}
    return max(enough or found, key=lambda name: float(found[name]["speedup"]))


def is_good(found: dict[str, Any]) -> bool:
    """Whether a setting hides enough and is fast enough."""
    return bool(found["trace"].get("hidden_share", 1.0) >= HIDDEN and found["speedup"] >= SPEEDUP)


def run(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    results: dict[str, Any] = {
        "schema": "fp8c.bench.overlap/2",
        "arguments": {k: str(v) for k, v in vars(args).items()},
    }
    mesh = distributed.init_mesh(args.device, ep=int(os.environ["WORLD_SIZE"]))
    lowering.register_kernels(args.device)
    group = mesh.get_group().group_name
    results |= {"torch": torch.__version__, "wire": wire_is_exact(args.device, group, args.hidden), "tokens": {}}
    names = payload_groups({s.blocks for s in args.settings}) if args.device == "cuda" else {}
    for tokens in args.tokens:
        if any(is_good(one["final"]) for one in results["tokens"].values()) or not everyone_has_time(
            started + args.seconds
        ):
            break
        here: dict[str, Any] = results["tokens"].setdefault(str(tokens), {"settings": {}})

        def note(**found: Any) -> None:
            here.update(found)
            if dist.get_rank() == 0:
                brief = {k: {x: y for x, y in v.items() if x != "classes"} if isinstance(v, dict) else v
                         for k, v in found.items()}  # fmt: skip
                print(f"[{time.perf_counter() - started:6.1f} s]", json.dumps(brief), flush=True)
                (args.out / "overlap.json").write_text(json.dumps(results, indent=1))

        bench = Bench(args, tokens, note)
        bench.deadline = started + args.seconds
        bench.prepare(mesh)
        for setting in args.settings if bench.is_cuda else args.settings[:1]:
            if here["settings"] and not everyone_has_time(bench.deadline):
                break
            bench.use(setting, names.get(setting.blocks))
            found = bench.plan(names.get(setting.blocks))
            note(planned={str(setting): found})  # before anything of the schedule has run
            found |= bench.measure(setting, bench.few if not bench.is_cuda else bench.work.first(4), rounds=2)
            found["trace"] = bench.traced()
            found["simulated_over_measured"] = found["simulated_ms"] / found["pair_ms"]
            here["settings"][str(setting)] = found
            note(last={k: v for k, v in found.items() if k != "trace"}, last_trace=found["trace"])
        chosen = best_of(here["settings"])
        setting = Setting.parse(chosen)
        bench.use(setting, names.get(setting.blocks))
        here["repeats"] = []
        for _ in range(args.repeats):
            if here["repeats"] and not everyone_has_time(bench.deadline):
                break
            final = bench.plan(names.get(setting.blocks))
            if dist.get_rank() == 0:
                (args.out / "schedule.json").write_text(json.dumps(_slots(bench.slots)))
            final |= bench.measure(setting, bench.work, rounds=2)
            final["simulated_over_measured"] = final["simulated_ms"] / final["pair_ms"]
            final["trace"] = bench.traced(6)
            here["repeats"].append(final)
            note(chosen=chosen, final=here["repeats"][0], last={k: v for k, v in final.items() if k != "trace"},
                 last_trace=final["trace"])  # fmt: skip
        bench.skewed(setting)
        note(**bench.compare())
        note(seconds=time.perf_counter() - started)
    return results


def everyone_has_time(deadline: float) -> bool:
    """Whether no rank's clock is past the deadline: all ranks go on, or none."""
    late: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(late, time.perf_counter() > deadline)
    return not any(late)


def _slots(slots: Sequence[Slot]) -> list[list[Any]]:
    return [[s.task.name, s.task.resource, s.start_us, s.end_us] for s in slots]


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    args.out.mkdir(parents=True, exist_ok=True)
    run(args)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
