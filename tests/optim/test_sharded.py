"""FSDP2 and ZeRO-1 on gloo ranks, checkpoints between numbers of ranks, a rank that dies while saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8c.optim import AdamW, checkpoint

ROOT = Path(__file__).parents[2]


def ranks(mode: str, world: int, folder: Path) -> tuple[dict[str, Any], list[int]]:
    """Run every rank; what rank 0 printed, and the exit codes."""
    script = Path(__file__).with_name("sharded_run.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), mode, str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    ended = [process.communicate(timeout=400) for process in started]
    codes = [process.returncode for process in started]
    if mode != "dies":
        assert codes == [0] * world, "\n".join(err[-1500:] for _, err in ended)
    out = ended[0][0].splitlines()
    return (json.loads(out[-1]) if out and codes[0] == 0 else {}), codes


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mode", ["fsdp", "zero1"])
def test_sharded_training_is_training(mode: str, world: int, tmp_path: Path) -> None:
    found, _ = ranks(mode, world, tmp_path)
    trained = 33 * 50 + 50 + 50 * 3 + 3
    # The states once over all ranks: FSDP2's FP32 parameters are their own masters, ZeRO-1 has BF16 ones and masters.
    assert found["bytes"] == trained * (4 if mode == "fsdp" else 8)
    for norm, expected in zip(found["norms"], found["expected"], strict=True):
        # ZeRO-1's parts of a batch are rounded to BF16 each in backward; FSDP2's are FP32.
        assert abs(norm - expected) < expected * (2.0**-7 if mode == "zero1" else 1e-5)
    # A gradient that cancels may take another sign, and a step moves by at most about 1.6 lr: most weights agree, none
    # is further off than four such steps.
    assert found["distance"] < (4 * 1.6 * 1e-2 if mode == "zero1" else 1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_other_ranks_and_another_sharding_loads(tmp_path: Path) -> None:
    saved, _ = ranks("save", 4, tmp_path)
    loaded, _ = ranks("load", 2, tmp_path)
    import torch

    (remark,) = loaded.pop("remarks")
    assert remark.startswith("W1131: the checkpoint is of 4 ranks, this run has 2")
    assert "each rank had its own loader" in remark and loaded.pop("loader") == 99
    assert loaded.pop("rates") == [3, 1e-2 * 0.5**3]  # a schedule that began anew would warm up once more
    generator = torch.Generator().manual_seed(7)
    torch.rand(15, generator=generator)
    assert loaded.pop("draw") == float(torch.rand((), generator=generator))
    assert loaded == saved
    script: dict[str, Any] = {}
    exec(compile((Path(__file__).with_name("sharded_run.py")).read_text(), "sharded_run", "exec"), script)
    model = script["Model"]().bfloat16()
    optimizer = AdamW(model, spec="deepseek_v3")
    assert checkpoint.load(tmp_path / "run", model, optimizer) is not None
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert float(optimizer.state[p]["master"].double().sum()) == saved[name]
            assert torch.equal(p, optimizer.state[p]["master"].bfloat16())


@pytest.mark.slow
def test_a_rank_that_dies_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    _, codes = ranks("dies", 2, tmp_path)
    assert codes[1] == 9 and codes[0] != 0
    assert [p.name for p in checkpoint.complete(tmp_path / "run")] == ["step-00000001"]
    assert checkpoint.model_tensors(tmp_path / "run")
