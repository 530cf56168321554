"""Checkpoints: killed at random moments and resumed, a run ends with the same bits; what does not fit is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fp8c
from fp8c.diagnostics import DiagnosticError
from fp8c.optim import EMA, AdamW, checkpoint

ROOT = Path(__file__).parents[2]


def check_kills(folder: Path, kills: int, seed: int) -> None:
    script = Path(__file__).with_name("resume_run.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(script), str(folder), str(kills), str(seed)]
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found["killed_after_step"]) == kills and len(found["expected"]) == 64
    assert set(found["found"]) == {found["expected"]}, found


def test_a_run_killed_twice_ends_with_the_same_bits(tmp_path: Path) -> None:
    check_kills(tmp_path, 2, 0)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    check_kills(tmp_path, 20, 1)


# --- what does not fit ------------------------------------------------------------------------------------------------


def small(width: int = 128, spec: str = "deepseek_v3") -> tuple[Any, AdamW]:
    torch.manual_seed(0)
    step = fp8c.compile(nn.Sequential(nn.Linear(128, width, bias=False)).bfloat16(), spec, "cpu")
    optimizer = AdamW(step)
    for p in step.parameters():
        p.main_grad = torch.randn(p.shape)  # type: ignore[attr-defined]
    optimizer.step()
    return step, optimizer


def test_a_save_that_breaks_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, optimizer = small()
    checkpoint.save(tmp_path, 1, step, optimizer)
    weights: dict[str, Any] = {n: p.detach().clone() for n, p in step.named_parameters()}
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(tmp_path, 2, step, optimizer)
    found = checkpoint.load(tmp_path, step, optimizer)
    assert found is not None and found.number == 1
    assert all(torch.equal(p, weights[n]) for n, p in step.named_parameters())
    checkpoint.save(tmp_path, 2, step, optimizer)  # what the broken one left is in nobody's way
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000001", "step-00000002"]
    assert not list(tmp_path.glob(".saving*"))


def test_old_ones_are_removed_and_nothing_is_loaded_from_an_empty_folder(tmp_path: Path) -> None:
    step, optimizer = small()
    assert checkpoint.load(tmp_path, step, optimizer) is None
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, number, step, optimizer, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000002", "step-00000003"]


def test_going_back_to_an_older_one_keeps_what_is_saved_from_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step, optimizer = small()
    for number in (10, 20, 30):
        checkpoint.save(tmp_path, number, step, optimizer)
    found = checkpoint.load(tmp_path / "step-00000020", step, optimizer)
    assert found is not None and found.number == 20
    for number in (21, 22, 23):
        assert checkpoint.save(tmp_path, number, step, optimizer).is_dir()
        assert f"step-000000{number} is not the newest" in caplog.messages[-1]
    assert [p.name[-2:] for p in checkpoint.complete(tmp_path)] == ["22", "23", "30"]


def test_histories_of_delayed_scales_go_on(tmp_path: Path) -> None:
    def trained(steps: range, load: bool) -> tuple[Any, AdamW]:
        step, optimizer = small(spec="hybrid_delayed")
        del step[0].weight.main_grad
        if load:
            checkpoint.load(tmp_path, step, optimizer)
        for number in steps:
            x = torch.randn(16, 128, generator=torch.Generator().manual_seed(number)).bfloat16() * (number + 1)
            step(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return step, optimizer

    checkpoint.save(tmp_path, 2, *trained(range(2), False))
    whole, resumed = trained(range(4), False)[0], trained(range(2, 4), True)[0]
    assert torch.equal(whole[0].weight, resumed[0].weight)


def test_a_parameter_without_gradients_so_far_and_numpys_numbers_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    optimizer = AdamW(model, spec="bf16")
    model[0](torch.ones(4)).sum().backward()
    optimizer.step()
    numpy.random.seed(3)
    checkpoint.save(tmp_path, 1, model, optimizer)
    expected = numpy.random.rand(3).tolist()
    assert checkpoint.load(tmp_path, model, AdamW(model, spec="bf16")) is not None
    assert numpy.random.rand(3).tolist() == expected


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "weight_decay": 0.0}]
    checkpoint.save(tmp_path, 1, model, AdamW(groups, spec="bf16"))
    with pytest.raises(
        DiagnosticError, match="E1133.*has 2 parameter groups with settings of their own, this optimizer 1"
    ):
        checkpoint.load(tmp_path, model, AdamW(model, spec="bf16"))


def test_another_spec_is_refused_unless_asked_for(tmp_path: Path) -> None:
    step, optimizer = small()
    checkpoint.save(tmp_path, 1, step, optimizer)
    other, theirs = small(spec="rowwise")
    with pytest.raises(DiagnosticError, match="E1132.*deepseek_v3.*rowwise"):
        checkpoint.load(tmp_path, other, theirs)
    found = checkpoint.load(tmp_path, other, theirs, other_spec=True)
    assert found is not None
    (p,), (q,) = step.parameters(), other.parameters()
    for key in ("exp_avg", "exp_avg_sq", "master"):
        if key in theirs.state[q]:  # in the other spec's precision
            assert torch.equal(theirs.state[q][key], optimizer.state[p][key].to(theirs.state[q][key].dtype))


def test_other_parameters_are_named(tmp_path: Path) -> None:
    step, optimizer = small()
    checkpoint.save(tmp_path, 1, step, optimizer)
    with pytest.raises(DiagnosticError, match=r"E1133.*0\.weight is \[128, 128\] there and \[256, 128\] here"):
        checkpoint.load(tmp_path, *small(256))
    with pytest.raises(DiagnosticError, match=r"E1133.*lacks ema\.0\.weight"):
        checkpoint.load(tmp_path, step, optimizer, EMA(step, 0.9))


def test_a_smaller_model_does_not_take_part_of_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    checkpoint.save(tmp_path, 1, model)
    with pytest.raises(DiagnosticError, match=r"E1133.*the model has no 1\.bias, 1\.weight"):
        checkpoint.load(tmp_path, nn.Sequential(nn.Linear(4, 4)))


def test_experts_in_a_list_do_not_take_a_stack(tmp_path: Path) -> None:
    """What a mesh makes of a list of experts: a run of it goes on with a mesh, of one rank too."""
    stack, experts = nn.Linear(4, 4, bias=False), nn.ModuleList(nn.Linear(4, 2, bias=False) for _ in range(2))
    models = [nn.ModuleDict({"experts": inner}) for inner in (stack, experts)]
    for number, (saved, loaded) in enumerate((models, models[::-1])):
        checkpoint.save(tmp_path / str(number), 1, saved)
        with pytest.raises(DiagnosticError, match="E1133") as caught:
            checkpoint.load(tmp_path / str(number), loaded)
        assert "a mesh makes stacks of experts" in str(caught.value)


def test_states_of_what_has_been_frozen_since_are_left_and_named(tmp_path: Path) -> None:
    def trained(*frozen: int) -> tuple[nn.Module, AdamW, EMA]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for number in frozen:
            model[number].requires_grad_(False)
        return model, AdamW(model, spec="deepseek_v3"), EMA(model, 0.9)

    saved = trained()
    saved[1].init_state()
    checkpoint.save(tmp_path, 1, *saved)
    model, optimizer, ema = trained(1)
    found = checkpoint.load(tmp_path, model, optimizer, ema)
    assert found is not None and [remark.code for remark in found.remarks] == ["W1132"]
    assert "states of 1.bias, 1.weight as well" in found.remarks[0].message
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), saved[0].parameters()))
    for average in (saved[2], ema):
        average.close()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    step, optimizer = small()
    path = checkpoint.save(tmp_path, 1, step, optimizer)
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DiagnosticError, match="E1131.*was cut"):
        checkpoint.load(tmp_path, step, optimizer)
    (path / "checkpoint.json").write_text(json.dumps({"schema": "other"}))
    with pytest.raises(DiagnosticError, match="E1131.*schema"):
        checkpoint.load(tmp_path, step, optimizer)


def test_a_folder_that_cannot_be_written_and_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    step, optimizer = small()
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticError, match="E1130"):
        checkpoint.save(tmp_path / "file", 1, step, optimizer)

    class Odd:
        def state_dict(self) -> object:
            return object()

    with pytest.raises(DiagnosticError, match="E1134.*object"):
        checkpoint.save(tmp_path, 1, step, optimizer, odd=Odd())


def test_pack_and_unpack_are_inverse() -> None:
    value = {"a": [1, 2.5, None, (True, "x")], 3: torch.randn(2, 3), "empty": torch.empty(0, dtype=torch.bfloat16)}
    found = checkpoint.unpack(json.loads(json.dumps(checkpoint.pack(value))))
    assert found["a"] == value["a"] and torch.equal(found[3], torch.as_tensor(value[3]))
    assert found["empty"].dtype == torch.bfloat16 and found["empty"].shape == (0,)
