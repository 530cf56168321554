"""Train the Mixture-of-Experts transformer under a precision spec: the plain loop, with everything around it.

    python examples/train.py --steps 200 --out runs/a                               FP8 under deepseek_v3
    python examples/train.py --steps 400 --out runs/a                               goes on where the first left off
    torchrun --nproc-per-node 2 examples/train.py --parallel fsdp --out runs/b      FSDP2, layers compiled one by one
    torchrun --nproc-per-node 2 examples/train.py --parallel zero1 --out runs/c     states divided, parameters whole
    torchrun --nproc-per-node 2 examples/train.py --ep 2 --out runs/d               experts spread over the ranks
    python examples/train.py --spec off                                        plain BF16

Every rank trains on its share of each batch. Losses, throughput and memory go to OUT/log.jsonl, and to TensorBoard with
--tensorboard. Interrupted at any moment, the same command goes on, bit for bit on the same machine and ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe_transformer
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fp8c
from fp8c import distributed, dynamo
from fp8c.diagnostics import render
from fp8c.optim import EMA, AdamW, Precision, Telemetry, checkpoint
from fp8c.optim.telemetry import Row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="deepseek_v3", help="a spec, or `off` for plain BF16")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="sequences of one step, over all ranks and micro-batches")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--ema", type=float, default=0.0, help="decay of the moving average; 0 keeps none")
    parser.add_argument("--bf16-first", type=int, default=0, help="steps at the beginning that run in BF16")
    parser.add_argument("--bf16-last", type=int, default=0, help="steps at the end that run in BF16")
    parser.add_argument("--telemetry-every", type=int, default=0, help="read amax, underflow, overflow every N steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=("none", "fsdp", "zero1"), default="none")
    parser.add_argument("--ep", type=int, default=0, help="ranks that share the experts: tokens travel to them")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of log and checkpoints")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--tensorboard", action="store_true")
    args = parser.parse_args()
    parts = args.micro_batches * int(os.environ.get("WORLD_SIZE", "1"))
    if args.micro_batches < 1 or args.batch < 1 or args.batch % parts:
        parser.error(f"a batch of {args.batch} cannot be divided evenly over {parts} ranks and micro-batches")
    if args.tensorboard and not args.out:
        parser.error("--tensorboard writes into the folder of --out")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs its package: pip install tensorboard")
    if args.spec == "off" or args.parallel == "fsdp" or args.ep:
        for option in ("bf16_first", "bf16_last", "telemetry_every"):
            if getattr(args, option):
                parser.error(
                    f"--{option.replace('_', '-')} needs a step that is compiled as a whole, on one rank or zero1"
                )
    return args


def main() -> None:
    args = arguments()
    rank, world, device = setup(args)
    torch.manual_seed(args.seed)
    config = moe_transformer.Config(dim=args.dim, n_layers=args.layers, n_experts=args.experts)
    model = moe_transformer.Transformer(config).to(device)
    step, optimizer = compiled(model, args, world, device)
    ema = EMA(step, args.ema, optimizer=optimizer) if args.ema else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate(i, args))
    data = torch.Generator().manual_seed(args.seed)
    others = {"schedule": schedule, "data": data}
    start = 0
    if args.out:
        found = checkpoint.load(args.out, step, optimizer, ema, **others)
        start = found.number if found else 0
        if found and rank == 0:
            print(f"going on after step {start} ({found.path})", *map(render, found.remarks), sep="\n")
    log = Log(args, rank, world, device)
    # One compiled step can change its precision; pieces of one, and experts on other ranks, keep theirs.
    is_whole = args.spec != "off" and args.parallel != "fsdp" and not args.ep
    precision = Precision(step, first=args.bf16_first, last=args.bf16_last, total=args.steps) if is_whole else None
    telemetry = Telemetry(step, args.telemetry_every) if is_whole and args.telemetry_every else None
    corpus = moe_transformer.read_corpus()
    for number in range(start + 1, args.steps + 1):
        batch = moe_transformer.sample_batch(corpus, args.batch, args.length, data)
        loss = torch.zeros((), device=device)
        in_fp8 = precision is not None and precision.at(number)
        observing = telemetry.at(number) if telemetry is not None and in_fp8 else contextlib.nullcontext()
        with observing:
            for part in shares(batch, args.micro_batches, rank, world):
                output = step(**{name: tensor.to(device, non_blocking=True) for name, tensor in part.items()})
                (output.loss / args.micro_batches).backward()
                loss += output.loss.detach() / args.micro_batches
        if args.ep:
            distributed.reduce_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        update_routers(model, world)
        if ema is not None:
            ema.update()
        log.add(number, loss, optimizer)
        if telemetry is not None and rank == 0:
            log.statistics(telemetry.take())
        if args.out and (number % args.save_every == 0 or number == args.steps):
            checkpoint.save(args.out, number, step, optimizer, ema, **others)
    log.close()
    if ema is not None:
        ema.close()
    if world > 1:
        dist.destroy_process_group()


def setup(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """Rank, world size and device; torchrun sets the environment, without it this is one process."""
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    if world > 1 and not args.ep:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return int(os.environ.get("RANK", "0")), world, device


def compiled(model: nn.Module, args: argparse.Namespace, world: int, device: torch.device) -> tuple[nn.Module, AdamW]:
    """The training step and its optimizer."""
    settings: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay, "max_norm": args.clip}
    settings["spec"] = "bf16" if args.spec == "off" else args.spec
    if args.ep:
        experts = distributed.init_mesh(device.type, ep=args.ep)
        step = fp8c.compile(model, spec=settings["spec"], mesh=experts, main_grad=True)
        return step, AdamW(step, main_grad=True, **settings)
    if args.parallel == "fsdp":
        return sharded(model, args, world, device), AdamW(model, main_grad=args.micro_batches > 1, **settings)
    step = model if args.spec == "off" else fp8c.compile(model, spec=args.spec, main_grad=True)
    mesh = None
    if world > 1:
        mesh = dist.init_device_mesh(device.type, (world,))
    # Without the states divided every rank would still need its gradients summed: zero1 does both.
    return step, AdamW(step, main_grad=True, zero1=mesh, **settings)


def sharded(model: nn.Module, args: argparse.Namespace, world: int, device: torch.device) -> nn.Module:
    """FSDP2. The parameters are FP32 and sharded, which makes them the master weights; each layer gathers a BF16 copy,
    sums its gradients in FP32, and is compiled on its own, so that the gathering stays outside of the graphs."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from fp8c.prepare import prepare

    prepare(model)
    model.float()
    mesh = dist.init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in [*model.layers, model.mtp.layer]:
        if args.spec != "off":
            layer.forward = torch.compile(layer.forward, backend=dynamo.backend, options={"spec": args.spec})
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def rate(i: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    return min(1.0, (i + 1) / max(1, args.warmup)) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, i / args.steps)))


def shares(batch: dict[str, Tensor], micro_batches: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
    """This rank's part of each micro-batch."""
    for number in range(micro_batches):
        yield {name: tensor[number * world + rank :: micro_batches * world] for name, tensor in batch.items()}


def update_routers(model: nn.Module, world: int) -> None:
    if world > 1:
        for router in (m for m in model.modules() if isinstance(m, moe_transformer.Router)):
            dist.all_reduce(router.load)
    model.update_router_biases()


class Log:
    """Losses stay on the device until a line is due, so that the loop does not wait for every step."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.losses: list[tuple[int, Tensor]] = []
        self.since = time.perf_counter()
        self.file = self.board = None
        if rank == 0 and args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            self.file = (args.out / "log.jsonl").open("a", encoding="utf-8")
        if rank == 0 and args.tensorboard and args.out:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(args.out / "tensorboard"))

    def add(self, number: int, loss: Tensor, optimizer: AdamW) -> None:
        self.losses.append((number, loss))
        if number % self.args.log_every and number != self.args.steps:
            return
        values = torch.stack([value for _, value in self.losses])
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        found = values.tolist()  # here the host waits for the device
        now = time.perf_counter()
        seconds = (now - self.since) / len(found)
        self.since = now
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        rates = {
            "grad_norm": float(optimizer.norm),
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_second": self.args.batch * self.args.length / seconds,
            "peak_gib": peak / 2**30,
            "skipped": optimizer.skipped,
        }
        if self.rank == 0:
            self.write(found, rates, seconds)
        self.losses.clear()

    def write(self, losses: list[float], rates: dict[str, float], seconds: float) -> None:
        number = self.losses[-1][0]
        left = (self.args.steps - number) * seconds
        print(
            f"step {number:6}/{self.args.steps}  loss {losses[-1]:.4f}  norm {rates['grad_norm']:.3f}  "
            f"{rates['tokens_per_second']:,.0f} tokens/s  {rates['peak_gib']:.2f} GiB  {seconds * 1e3:.1f} ms/step  "
            f"{left / 60:.1f} min left",
            flush=True,
        )
        for (at, _), loss in zip(self.losses, losses):
            if self.file is not None:
                line = {"step": at, "loss": loss, **(rates if at == number else {})}
                self.file.write(json.dumps(line) + "\n")
            if self.board is not None:
                self.board.add_scalar("loss", loss, at)
        if self.file is not None:
            self.file.flush()
        if self.board is not None:
            for name, value in rates.items():
                self.board.add_scalar(name, value, number)

    def statistics(self, rows: list[Row]) -> None:
        """Telemetry: every tensor to a file, the worst of a layer to TensorBoard."""
        if rows and self.args.out:
            with (self.args.out / "telemetry.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        if self.board is not None:
            for path in sorted({row.path for row in rows}):
                of_path = [row for row in rows if row.path == path]
                self.board.add_scalar(f"amax/{path}", max(row.amax for row in of_path), of_path[0].step)
                self.board.add_scalar(f"underflow/{path}", max(row.underflow for row in of_path), of_path[0].step)

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()


if __name__ == "__main__":
    main()
