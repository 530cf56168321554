"""`torchrun --nproc-per-node 2 -m fp8c.tools.bench.overlap`: how much of a real all-to-all a schedule hides.

DeepSeek-V3 MoE layers with experts spread over the ranks, micro-batches whose forward and backward run in pairs:

    unscheduled   forward, then backward, every transfer waited for where it is issued
    scheduled     the pair's one graph in the order found for durations measured on the spot

The transfers' thread blocks are limited so that communication takes about as long as compute. Hidden is what the union of
NCCL's kernels has in common with the union of all other kernels, from a profiler trace of scheduled pairs. On a CPU
(gloo) the same code runs at small sizes and times nothing worth quoting; it compares bits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import fp8c
from fp8c import distributed
from fp8c.backends import lowering
from fp8c.backends.costs import load_machine
from fp8c.exchange import all_to_all
from fp8c.graph_costs import WAIT, is_collective, is_control, node_operator, reads_on_host
from fp8c.overlap import exposure, length_us, union
from fp8c.passes.schedule_overlap import issue_order_problem
from fp8c.schedule import Slot, program_order
from fp8c.stage import Stage

#: Communication is asked to take at most this share of compute: beside compute it takes longer than alone.
MOST_COMM = 0.9


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--spec", default="deepseek_v3")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--micro-batches", type=int, default=12)
    parser.add_argument(
        "--thread-blocks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="of NCCL, to choose from"
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="stop measuring further settings after this")
    parser.add_argument("--out", type=Path, default=Path("."))
    return parser.parse_args(given)


# The model -----------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Decoder layers of transformers' DeepseekV3, all with experts: [1, T, H] -> [1, T, H]."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
            DeepseekV3DecoderLayer,
            DeepseekV3RotaryEmbedding,
        )

        widths: dict[str, Any] = {"n_routed_experts": args.experts, "first_k_dense_replace": 0}
        if args.hidden < 7168:  # a rehearsal
            widths |= {"hidden_size": args.hidden, "moe_intermediate_size": 128, "num_attention_heads": 2}
            widths |= {"q_lora_rank": 128, "kv_lora_rank": 128, "num_key_value_heads": 2, "num_experts_per_tok": 2}
            widths |= {"n_group": 2, "topk_group": 1}
        config = DeepseekV3Config(**widths)
        config._attn_implementation = "sdpa"
        config._experts_implementation = "grouped_mm"
        self.rotary = DeepseekV3RotaryEmbedding(config)
        self.layers = nn.ModuleList([DeepseekV3DecoderLayer(config, i).bfloat16() for i in range(args.layers)])
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)[None]
        embedded = self.rotary(x, places)
        for layer in self.layers:
            y = layer(x, position_embeddings=embedded)
            x = y[0] if isinstance(y, tuple) else y
        return x


def skew(module: nn.Module, strength: float) -> None:
    """Bias the router's choice towards the first ranks' experts: `strength` from the first expert to the last."""
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(strength, 0.0, buffer.numel(), device=buffer.device))


# Time ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Milliseconds of device work, by events on a GPU and by the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def time_ms(self, run: Callable[[], object]) -> float:
        """From a barrier to the end of the slowest rank."""
        self.synchronize()
        dist.barrier()
        started = time.perf_counter()
        run()
        self.synchronize()
        took = torch.tensor([(time.perf_counter() - started) * 1e3], dtype=torch.float64)
        took = took.cuda() if self.is_cuda else took
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        return float(took)


class Timed(fx.Interpreter):
    """Runs a graph node by node and takes the time of each: the device is kept busy while a node's kernels are queued,
    so that what is timed is the device's work and not the host's."""

    SLEEP_CYCLES = 1_500_000  # under a millisecond on an H200

    def __init__(self, module: fx.GraphModule, clock: Clock) -> None:
        super().__init__(module)
        self.clock = clock
        self.events: dict[str, tuple[Any, Any]] = {}
        self.wall_us: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        launches = n.op == "call_function" and (is_collective(n) or node_operator(n) is not None)
        if not launches or reads_on_host(n):
            return super().run_node(n)
        if not self.clock.is_cuda:
            started = time.perf_counter()
            found = super().run_node(n)
            if is_collective(n):
                WAIT(found)
            self.wall_us[n.name] = (time.perf_counter() - started) * 1e6
            return found
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(self.SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        first.record()
        found = super().run_node(n)
        if is_collective(n):
            found = WAIT(found)
        last.record()
        self.events[n.name] = first, last
        return found

    def durations_us(self) -> dict[str, float]:
        self.clock.synchronize()
        return self.wall_us | {name: a.elapsed_time(b) * 1e3 for name, (a, b) in self.events.items()}


def measured_durations(
    pair: fx.GraphModule, arguments: Callable[[], list[Any]], clock: Clock, repeats: int = 3
) -> dict[str, float]:
    """Microseconds of every node that launches something, alike on all ranks: compute as the slowest rank has it, the
    least of several runs; transfers as the last rank to arrive sees them."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        dist.barrier()
        timed = Timed(pair, clock)
        timed.run(*arguments())
        runs.append(timed.durations_us())
    best = {name: min(run[name] for run in runs) for name in runs[0]}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, best)
    moves = {n.name for n in pair.graph.nodes if is_collective(n)}
    return {n: (min if n in moves else max)(found[n] for found in everyone) for n in best}


# The pieces ----------------------------------------------------------------------------------------------------------


class Work:
    """Micro-batches of one stage, one after another or in pairs; results in `seen` where asked for."""

    def __init__(self, stage: Stage, inputs: list[Tensor], gradients: list[Tensor]) -> None:
        self.stage, self.inputs, self.gradients = stage, inputs, gradients

    def unscheduled(self, seen: list[Any] | None = None) -> None:
        for x, dy in zip(self.inputs, self.gradients):
            outputs, kept = self.stage.forward(x)
            found = self.stage.backward(kept, dy)
            if seen is not None:
                seen += [*outputs, *found]

    def scheduled(self, seen: list[Any] | None = None) -> None:
        outputs, kept = self.stage.forward(self.inputs[0])
        last = outputs
        for at in range(1, len(self.inputs)):
            outputs, kept, found = self.stage.pair((self.inputs[at],), kept, (self.gradients[at - 1],))
            if seen is not None:
                seen += [*last, *found]
            last = outputs
        found = self.stage.backward(kept, self.gradients[-1])
        if seen is not None:
            seen += [*last, *found]

    def pairs(self, count: int, kept: list[Any]) -> list[Any]:
        for at in range(count):
            i = at % len(self.inputs)
            _, kept, _ = self.stage.pair((self.inputs[i],), kept, (self.gradients[i],))
        return kept


def host_read_us(device: str) -> float:
    """Microseconds to copy a few numbers from an idle device to the host: the least of many."""
    numbers = torch.arange(4, device=device)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        numbers.cpu()
        times.append((time.perf_counter() - started) * 1e6)
    return min(times)


def wire_is_exact(device: str, group: str, hidden: int) -> dict[str, bool]:
    """FP8 rows sent as bytes with their scales against rows rounded to FP8 and sent in BF16; and float8 sent as such."""
    fmt = "e4m3[1x128] pow2"
    x = torch.randn(512, hidden, device=device).bfloat16()
    data, scale = torch.ops.fp8c.quantize(x, fmt)
    even = [x.shape[0] // dist.get_world_size()] * dist.get_world_size()

    def moved(t: Tensor) -> Tensor:
        return all_to_all(t, even, even, group)

    as_bytes = moved(data.view(torch.uint8)).view(data.dtype)
    here = torch.ops.fp8c.dequantize(as_bytes, moved(scale), fmt, torch.bfloat16)
    there = moved(torch.ops.fp8c.dequantize(data, scale, fmt, torch.bfloat16))
    found = {"bytes and scales": torch.equal(here, there)}
    if device == "cuda":  # gloo refuses float8
        found["float8"] = torch.equal(moved(data).view(torch.uint8), as_bytes.view(torch.uint8))
    return found


def wire_bytes(graphs: Sequence[fx.GraphModule], rows: int) -> dict[str, int]:
    """Bytes that each kind of payload transfer takes in, by dtype, with `rows` rows each; counts are left out."""
    found: dict[str, int] = {}
    for module in graphs:
        for node in module.graph.nodes:
            if is_collective(node) and not is_control(node):
                val = node.meta["val"]
                size = rows * val.dtype.itemsize * int(torch.Size(val.shape[1:]).numel())
                name = f"{val.dtype} x {list(val.shape[1:])}".replace("torch.", "")
                found[name] = found.get(name, 0) + size
    return found


def payload_groups(args: argparse.Namespace) -> dict[int, str]:
    """Process groups with so many thread blocks each, by that number."""
    found: dict[int, str] = {}
    for blocks in args.thread_blocks:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.min_ctas = options.config.max_ctas = blocks
        group = dist.new_group(list(range(dist.get_world_size())), backend="nccl", pg_options=options)
        _KEEP.append(group)
        found[blocks] = group.group_name
    return found


_KEEP: list[Any] = []


def send_through(graphs: Sequence[fx.GraphModule], name: str) -> None:
    """Let payloads of these graphs travel in another group."""
    for module in graphs:
        for node in module.graph.nodes:
            if is_collective(node) and not is_control(node):
                node.args = (*node.args[:-1], name)
        module.recompile()


def traced(run: Callable[[], object], out: Path, rank: int) -> dict[str, float]:
    """Share of NCCL's kernels hidden behind others, from a trace of `run`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    file = out / f"overlap_rank{rank}.json"
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    payload = [e for e in kernels if "nccl" in e["name"].lower()]
    moved = [(e["ts"], e["ts"] + e["dur"]) for e in payload]
    computed = [(e["ts"], e["ts"] + e["dur"]) for e in kernels if "nccl" not in e["name"].lower()]
    comm, compute = length_us(union(moved)), length_us(union(computed))
    exposed = length_us(union([*moved, *computed])) - compute
    span = max(e["ts"] + e["dur"] for e in kernels) - min(e["ts"] for e in kernels)
    file.unlink()
    return {
        "comm_ms": comm / 1e3,
        "compute_ms": compute / 1e3,
        "exposed_ms": exposed / 1e3,
        "span_ms": span / 1e3,
        "hidden_share": 1.0 - exposed / comm if comm else 1.0,
    }


def bits_of(work: Work, module: nn.Module, run: Callable[[list[Any]], None]) -> tuple[list[Tensor], list[Tensor]]:
    module.zero_grad()
    seen: list[Any] = []
    run(seen)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in gradients]
    return [t.clone() for t in seen if t is not None], [t.clone() for t in local]


def equal(a: tuple[list[Tensor], list[Tensor]], b: tuple[list[Tensor], list[Tensor]]) -> list[int]:
    """How many results and gradients differ."""
    return [sum(not torch.equal(x, y) for x, y in zip(one, two, strict=True)) for one, two in zip(a, b)]


# The benchmark -------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    results: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    mesh = distributed.init_mesh(args.device, ep=int(os.environ["WORLD_SIZE"]))
    rank, device = dist.get_rank(), args.device

    def note(**found: Any) -> None:
        results.update(found)
        if rank == 0:
            print(f"[{time.perf_counter() - started:6.1f} s]", json.dumps(found), flush=True)
            (args.out / "overlap.json").write_text(json.dumps(results, indent=1))

    clock = Clock(device)
    lowering.register_kernels(device)
    read_us = host_read_us(device)
    note(host_read_us=read_us, wire=wire_is_exact(device, mesh.get_group().group_name, args.hidden))
    torch.manual_seed(0)
    with torch.device(device):
        module: nn.Module = Layers(args)
    step = fp8c.compile(module, spec=args.spec, mesh=mesh, target=None if device == "cuda" else "cpu")
    generator = torch.Generator(device).manual_seed(1 + rank)

    def rows() -> Tensor:
        return torch.randn(1, args.tokens, args.hidden, device=device, generator=generator).bfloat16()

    count = args.micro_batches
    inputs, gradients = [rows() for _ in range(2)], [rows() * 1e-3 for _ in range(2)]
    inputs, gradients = (inputs * count)[:count], (gradients * count)[:count]
    stage = Stage.capture(step, (inputs[0],))
    halves = (stage.forward_graph, stage.backward_graph)
    note(captured=sum(len(h.graph.nodes) for h in halves), wire_bytes=wire_bytes(halves, args.tokens * 8))
    work = Work(stage, inputs, gradients)
    first = Work(stage, inputs[:2], gradients[:2])
    first.unscheduled()
    clock.synchronize()
    note(warm=True)

    # Compute alone decides how many thread blocks the transfers get.
    blocks = 0
    reserve: Callable[[int], None] = distributed.limit_gemm_sms if device == "cuda" else lambda n: None
    stage.schedule_pair(lambda node: 0.0)
    plain = stage.pair_graph
    assert plain is not None

    def pair_arguments() -> list[Any]:
        _, kept = stage.forward(inputs[0])
        return [*stage._forward_inputs((inputs[0],)), *stage._backward_inputs(kept, (gradients[0],))]

    def total_us(found: dict[str, float], which: str) -> float:
        moves = {n.name for n in plain.graph.nodes if is_collective(n)}
        return sum(us for name, us in found.items() if (name in moves) == (which == "comm"))

    if device == "cuda":
        names = payload_groups(args)
        tried: dict[int, tuple[float, float]] = {}
        for blocks, name in names.items():
            send_through((stage.forward_graph, stage.backward_graph, plain), name)
            reserve(blocks)
            first.unscheduled()  # the group is set up
            found = measured_durations(plain, pair_arguments, clock, repeats=1)
            tried[blocks] = total_us(found, "compute") / 1e3, total_us(found, "comm") / 1e3
            if tried[blocks][1] < MOST_COMM * tried[blocks][0]:
                break
        note(thread_blocks={b: {"compute_ms": c, "comm_ms": m} for b, (c, m) in tried.items()})
        blocks = max(tried)
        send_through((stage.forward_graph, stage.backward_graph, plain), names[blocks])
        reserve(blocks)
    durations = measured_durations(plain, pair_arguments, clock)
    note(blocks=blocks, compute_ms=total_us(durations, "compute") / 1e3, comm_ms=total_us(durations, "comm") / 1e3)

    machine = load_machine("h200")

    def cost(node: fx.Node) -> float:
        if reads_on_host(node):
            return read_us
        beside = machine.comm_slowdown_combine if is_collective(node) and not is_control(node) else 1.0
        return durations.get(node.name, 0.0) * beside

    before = exposure(program_order(issue_order_problem(plain.graph, cost)).slots)
    report = stage.schedule_pair(cost)
    note(
        predicted_ms=report.schedule.makespan_us / 1e3,
        proven_gap=report.schedule.gap,
        predicted_hidden=report.after.hidden_share,
        program_order_ms=before.makespan_us / 1e3,
        program_order_hidden=before.hidden_share,
    )
    if rank == 0:
        (args.out / "schedule.json").write_text(json.dumps(_slots(report.schedule.slots)))

    # The same bits, as far as PyTorch's attention has the same bits twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        control = bits_of(first, step, first.unscheduled)
        again = bits_of(first, step, first.unscheduled)
        paired = bits_of(first, step, first.scheduled)
        paired_again = bits_of(first, step, first.scheduled)
        names_of = [n for n, p in step.named_parameters() if p.grad is not None]
        note(
            repeated_differs=equal(control, again),
            scheduled_differs=equal(control, paired),
            scheduled_repeated_differs=equal(paired, paired_again),
            compared=[len(control[0]), len(control[1])],
            differing={
                n: float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-30))
                for n, a, b in zip(names_of, control[1], paired[1])
                if not torch.equal(a, b)
            },
        )
        del control, again, paired, paired_again
    except RuntimeError as error:
        note(equality_failed=str(error)[:500])
    torch.use_deterministic_algorithms(False)
    step.zero_grad()

    # Speed: the baseline leaves all SMs to its GEMMs.
    times: dict[str, list[float]] = {"unscheduled": [], "unscheduled, SMs reserved": [], "scheduled": []}
    for _ in range(3):
        reserve(0)
        times["unscheduled"].append(clock.time_ms(work.unscheduled) / count)
        reserve(blocks)
        times["unscheduled, SMs reserved"].append(clock.time_ms(work.unscheduled) / count)
        times["scheduled"].append(clock.time_ms(work.scheduled) / count)
    note(per_micro_batch_ms=times, speedup=min(times["unscheduled"]) / min(times["scheduled"]))
    _, kept = stage.forward(inputs[0])
    kept = work.pairs(2, kept)
    holder = [kept]

    def six_pairs() -> None:
        holder[0] = work.pairs(6, holder[0])

    pair_ms = clock.time_ms(six_pairs) / 6
    note(pair_ms=pair_ms, predicted_over_measured=report.schedule.makespan_us / 1e3 / pair_ms)
    if device == "cuda":
        note(trace=traced(six_pairs, args.out, rank))
        for strength in (0.1, 0.3):
            if time.perf_counter() - started > args.seconds:
                break
            skew(step, strength)
            _, kept = stage.forward(inputs[0])
            arrived = max(v.shape[0] for v in kept if isinstance(v, Tensor) and v.ndim > 0)
            holder[0] = work.pairs(2, kept)
            rows_here = torch.tensor([float(arrived)], device=device)
            dist.all_reduce(rows_here, op=dist.ReduceOp.MAX)
            note(**{f"skew_{strength}": {"largest": float(rows_here), **traced(six_pairs, args.out, rank)}})
        skew(step, 0.0)
        for other in sorted(set(tried) - {blocks}):  # how the share of SMs matters
            if time.perf_counter() - started > args.seconds:
                break
            send_through((*halves, plain), names[other])
            reserve(other)
            durations = measured_durations(plain, pair_arguments, clock, repeats=2)
            alone_ms = clock.time_ms(first.unscheduled) / 2
            report = stage.schedule_pair(cost)
            _, kept = stage.forward(inputs[0])
            holder[0] = work.pairs(2, kept)
            found = {"pair_ms": clock.time_ms(six_pairs) / 6, "predicted_ms": report.schedule.makespan_us / 1e3}
            found |= {"unscheduled_ms": alone_ms, **traced(six_pairs, args.out, rank)}
            note(**{f"thread_blocks_{other}": found})
    note(seconds=time.perf_counter() - started)
    return results


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
