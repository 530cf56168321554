"""One rank of a sharded training check: `sharded_run.py MODE RANK WORLD FOLDER`; rank 0 prints JSON.

fsdp, zero1: losses, the gradient norm and the final weights against a run without sharding, bytes of the states.
save:        saves step 1 under WORLD ranks with ZeRO-1, for `load` with another number.
load:        loads it under FSDP2 and prints what it found.
dies:        saves step 1, then rank 1 dies inside the save of step 2.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fp8c.optim import AdamW, checkpoint
from fp8c.optim.adamw import local

SETTINGS: dict[str, Any] = {"lr": 1e-2, "max_norm": 0.5, "spec": "deepseek_v3"}


class Model(nn.Module):
    """Sizes that divide by no number of ranks, one that is smaller than four, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(33, 50)
        self.down = nn.Linear(50, 3)
        self.frozen = nn.Linear(33, 33)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.frozen(x)).tanh())
        return y.float().square().mean()


def batch(number: int) -> Tensor:
    return torch.randn(16, 33, generator=torch.Generator().manual_seed(number))


def run(model: nn.Module, optimizer: AdamW, rank: int, world: int, steps: int) -> list[float]:
    dtype = torch.bfloat16 if next(model.parameters()).dtype == torch.bfloat16 else torch.float32
    norms = []
    for number in range(steps):
        for half in batch(number).to(dtype).chunk(2):
            loss = model(half[rank::world]) / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(optimizer.norm))
    return norms


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(mode: str, mesh: Any) -> tuple[nn.Module, AdamW]:
    model = Model().bfloat16() if mode == "zero1" else Model()
    if mode == "zero1":
        return model, AdamW(model, main_grad=True, zero1=mesh, **SETTINGS)
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model, AdamW(model, main_grad=True, **SETTINGS)


def others_of(optimizer: AdamW, own: int) -> dict[str, Any]:
    """What a loop saves besides: a schedule and a generator that all ranks have alike, and a loader of each rank's own."""
    return {
        "schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i),
        "data": torch.Generator().manual_seed(7),
        "loader": torch.Generator().manual_seed(own),
    }


def compare(mode: str, rank: int, world: int, mesh: Any) -> dict[str, Any]:
    alone = Model().bfloat16() if mode == "zero1" else Model()
    reference = AdamW(alone, main_grad=True, **SETTINGS)
    expected = run(alone, reference, 0, 1, 4)
    model, optimizer = sharded(mode, mesh)
    norms = run(model, optimizer, rank, world, 4)
    distance = []
    for (_, p), (_, q) in zip(model.named_parameters(), alone.named_parameters()):
        if p.requires_grad:
            mine = whole(optimizer.state[p].get("master", p)).float()
            theirs = reference.state[q].get("master", q).float()
            distance.append(float((mine - theirs).abs().max()))
    state_bytes = [
        sum(local(t).numel() * t.element_size() for name, t in state.items() if name != "step")
        for state in optimizer.state.values()
    ]
    total = torch.tensor(float(sum(state_bytes)))
    dist.all_reduce(total)
    return {"norms": norms, "expected": expected, "distance": max(distance), "bytes": float(total)}


def main(mode: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch._C._distributed_c10d.FileStore(str(folder / f"store-{mode}-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=40))
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    match mode:
        case "fsdp" | "zero1":
            found = compare(mode, rank, world, mesh)
        case "save":
            model, optimizer = sharded("zero1", mesh)
            run(model, optimizer, rank, world, 3)
            others = others_of(optimizer, rank)
            for _ in range(3):
                others["schedule"].step()
                torch.rand(5, generator=others["data"])
            checkpoint.save(folder / "run", 1, model, optimizer, **others)
            masters = {n: whole(optimizer.state[p]["master"]) for n, p in model.named_parameters() if p.requires_grad}
            found = {name: float(value.double().sum()) for name, value in masters.items()}
        case "load":
            model = Model().bfloat16()
            fully_shard(model, mesh=mesh)
            optimizer = AdamW(model, **SETTINGS)
            others = others_of(optimizer, 99)
            loaded = checkpoint.load(folder / "run", model, optimizer, **others)
            assert loaded is not None
            masters = {n: whole(optimizer.state[p]["master"]) for n, p in model.named_parameters() if p.requires_grad}
            found = {name: float(value.double().sum()) for name, value in masters.items()}
            found["remarks"] = [f"{remark.code}: {remark.message}" for remark in loaded.remarks]
            found["rates"] = [others["schedule"].last_epoch, optimizer.param_groups[0]["lr"]]
            found["draw"] = float(torch.rand((), generator=others["data"]))
            found["loader"] = others["loader"].initial_seed()
        case "dies":
            model, optimizer = sharded("zero1", mesh)
            run(model, optimizer, rank, world, 1)
            checkpoint.save(folder / "run", 1, model, optimizer)
            run(model, optimizer, rank, world, 1)
            if rank == 1:
                setattr(checkpoint, "save_tensors", lambda *_, **__: os._exit(9))
            checkpoint.save(folder / "run", 2, model, optimizer)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
