"""A small FP8 training run, killed with SIGKILL at random moments and gone on with: `resume_run.py FOLDER KILLS SEED`.

The step is compiled once; each life of the run is a fork that loads the newest checkpoint, trains, and saves every second
step. Prints JSON: the hash over parameters, states and average of an undisturbed run, those of the killed runs, and after
how many saves each kill came.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with a GPU, autograd has threads that a fork loses

import torch
from torch import Tensor, nn

import fp8c
from fp8c.optim import EMA, AdamW, checkpoint


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 256, bias=False)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.drop(self.up(x).relu()))
        return (y - x).float().square().mean()


STEPS = 24


def train(step: nn.Module, folder: Path) -> str:
    torch.manual_seed(0)
    step.load_state_dict(Model().bfloat16().state_dict())
    optimizer = AdamW(step, lr=1e-2, max_norm=1.0, main_grad=True)
    ema = EMA(step, 0.9, optimizer=optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    data = torch.Generator().manual_seed(1)
    found = checkpoint.load(folder, step, optimizer, ema, schedule=schedule, data=data)
    for number in range((found.number if found else 0) + 1, STEPS + 1):
        for _ in range(2):
            step(torch.randn(128, 128, generator=data).bfloat16()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update()
        if number % 2 == 0:
            checkpoint.save(folder, number, step, optimizer, ema, schedule=schedule, data=data)
    tensors, _ = checkpoint.state_of(step, optimizer, ema)
    digest = hashlib.sha256()
    for part in sorted(tensors):
        for name in sorted(tensors[part]):
            digest.update(tensors[part][name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def life(step: nn.Module, folder: Path, kill_after: float | None) -> str | None:
    """One process of the run; None when it was killed before its end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.write(writer, b"s")
        os.write(writer, train(step, folder).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        pipe.read(1)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said or None


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    step = fp8c.compile(Model().bfloat16(), target="cpu", lowering="reference")
    step(torch.randn(128, 128).bfloat16())  # compiles forward and backward
    began = time.perf_counter()
    expected = life(step, folder / "whole", None)
    seconds = time.perf_counter() - began
    generator = random.Random(seed)
    moments: list[int] = []
    found: list[str | None] = []
    killed = folder / "killed"
    while len(moments) < kills:
        ended = life(step, killed, generator.uniform(0.0, 0.6 * seconds))
        if ended is None:
            moments.append(len(checkpoint.complete(killed)) and int(checkpoint.complete(killed)[-1].name[5:]))
            if moments[-1] < STEPS:
                continue
        found.append(ended or life(step, killed, None))  # it had come to its end: the next one begins anew
        shutil.rmtree(killed)
    found.append(life(step, killed, None))
    print(json.dumps({"expected": expected, "found": found, "killed_after_step": moments}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
