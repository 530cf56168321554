"""The loops people have: examples/train.py, Hugging Face's Trainer, torchtitan's compile settings."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8c
from fp8c import driver, dynamo
from fp8c.models import load_model
from fp8c.optim import AdamW

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = dict(
    num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=128,
)  # fmt: skip


def train(folder: Path, *arguments: str) -> list[dict[str, float]]:
    small = "--batch 2 --length 128 --dim 128 --layers 1 --experts 2 --log-every 1 --save-every 2".split()
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train.py"), *small, "--out", str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_loop_refuses_what_would_train_nothing_or_be_ignored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    loop = importlib.import_module("train")
    wrong = {
        "--batch 2 --micro-batches 4": "a batch of 2 cannot be divided evenly over 4",
        "--parallel fsdp --bf16-first 5": "--bf16-first needs a step that is compiled as a whole",
        "--ep 2 --telemetry-every 5": "--telemetry-every needs a step that is compiled as a whole",
    }
    for options, message in wrong.items():
        monkeypatch.setattr(sys, "argv", ["train.py", *options.split()])
        with pytest.raises(SystemExit):
            loop.arguments()
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train.py", "--warmup", "0"])
    assert loop.rate(0, loop.arguments()) == 1.0


@pytest.mark.slow
def test_the_plain_loop_trains_logs_and_goes_on_where_it_left_off(tmp_path: Path) -> None:
    options = ("--ema", "0.9", "--bf16-first", "1", "--telemetry-every", "2", "--micro-batches", "2")
    whole = train(tmp_path / "whole", "--steps", "4", "--tensorboard", *options)
    assert [row["step"] for row in whole] == [1, 2, 3, 4] and whole[-1]["loss"] < whole[0]["loss"]
    assert whole[-1]["tokens_per_second"] > 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "telemetry.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4} and all(row["underflow"] < 1 for row in rows)
    assert list((tmp_path / "whole" / "tensorboard").iterdir())
    os.rename(tmp_path / "whole" / "step-00000002", tmp_path / "step-00000002")
    (tmp_path / "again").mkdir()
    os.rename(tmp_path / "step-00000002", tmp_path / "again" / "step-00000002")
    again = train(tmp_path / "again", "--steps", "4", *options)
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in whole[2:]]


def torchrun(folder: Path, ranks: int, *arguments: str) -> list[float]:
    """Losses of examples/train.py on gloo ranks, FP8 layers and two micro-batches."""
    small = "--batch 8 --micro-batches 2 --length 128 --dim 128 --layers 1 --experts 2 --steps 4 --log-every 1".split()
    script = [str(ROOT / "examples" / "train.py"), *small, "--device", "cpu", "--out", str(folder), *arguments]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    run = subprocess.run(
        [sys.executable, *launch, *script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return torchrun(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("parallel", ["fsdp", "zero1"])
def test_sharded_fp8_training_is_the_training_of_one_process(
    parallel: str, ranks: int, alone: list[float], tmp_path: Path
) -> None:
    found = torchrun(tmp_path, ranks, "--parallel", parallel)
    assert found[-1] < found[0]
    # The ranks sum other tokens' gradients and cut other groups along the tokens: a rounding of BF16 (2^-9) or two.
    assert all(abs(a / b - 1) < 2.0**-8 for a, b in zip(found, alone, strict=True)), (found, alone)


def hugging_face(
    folder: Path, steps: int, *, saves: bool = False, resumes: bool = False
) -> tuple[Any, nn.Module, AdamW]:
    """Hugging Face's Trainer for so many of four steps, each of two micro-batches; with checkpoints of its own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    torch.manual_seed(0)
    model = load_model("hf:llama", weights="random", overrides=TINY, seq=128).module
    step = fp8c.compile(model, target="cpu", main_grad=True)
    optimizer = AdamW(step, lr=1e-3, max_norm=1.0)
    ids = torch.randint(128, (16, 128), generator=torch.Generator().manual_seed(0))
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,  # AdamW clips by itself: the gradients are in main_grad
        logging_steps=1,
        save_strategy="steps" if saves else "no",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(
        model=step,
        args=settings,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.9**i)),
        callbacks=[Stop()],
    )
    trainer.train(resume_from_checkpoint=resumes)
    return trainer, step, optimizer


@pytest.mark.slow
def test_hugging_faces_trainer_and_its_own_checkpoints(tmp_path: Path) -> None:
    trainer, step, optimizer = hugging_face(tmp_path / "whole", 4)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and min(losses[1:]) < losses[0]
    assert driver.session_of(step).steps, "the step was compiled"
    assert all(int(optimizer.state[p]["step"]) == 4 for p in optimizer.trained())
    assert all(p.grad is None for p in step.parameters())

    hugging_face(tmp_path / "halves", 2, saves=True)
    again, resumed, other = hugging_face(tmp_path / "halves", 4, saves=True, resumes=True)
    assert [row["loss"] for row in again.state.log_history if "loss" in row] == losses
    for (name, p), q in zip(step.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["master"], other.state[q]["master"]), name


@pytest.mark.slow
def test_torchtitans_compile_settings_take_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = pytest.importorskip("torchtitan.config.configs")
    compile_ = importlib.import_module("torchtitan.distributed.compile")
    specification = importlib.util.spec_from_file_location("titan_moe", ROOT / "tests" / "titan_moe.py")
    assert specification is not None and specification.loader is not None
    titan = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(titan)
    try:
        block, (x,) = titan.qwen3()
    except (ImportError, TypeError, AttributeError) as error:
        pytest.skip(f"this torchtitan does not build its debug model here: {error}")

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"0": block})

    class OneDevice:
        tp_enabled = False

    torch._dynamo.backends.registry.lookup_backend("inductor")  # fills the table of backends
    if "fp8c" not in torch._dynamo.list_backends(None):  # a checkout without an installed entry point
        torch._dynamo.register_backend(dynamo.backend, name="fp8c")
    model = Blocks()
    compile_.apply_compile(
        model, compile_config=configs.CompileConfig(enable=True, backend="fp8c"), parallel_dims=OneDevice()
    )
    optimizer = AdamW(model, lr=1e-4, spec="deepseek_v3", main_grad=True)
    dynamo._sessions.clear()

    def loss() -> Tensor:
        y = model.layers["0"](x)
        y = y[0] if isinstance(y, tuple) else y
        return (y.float() - x.float()).square().mean()

    found = []
    for _ in range(3):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(value))
    assert found[-1] < found[0]
    (session,) = dynamo._sessions.values()
    formats = [use.value("fprop.w") for rewritten in session.steps for use in rewritten.plan.uses.values()]
    assert any(getattr(f, "is_quantized", False) for f in formats)
