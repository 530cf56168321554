"""`fp8c.load`: a build runs only as what it describes, and says what else it found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

import fp8c
from fp8c import cli
from fp8c.build import read_build
from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.driver import session_of
from fp8c.models import load_model
from fp8c.reload import count_changes, decision_changes, load, operators

TINY = Path(__file__).parent / "tools" / "models" / "tiny.py"
SPEC = """version 1;
use "std:deepseek_v3" as base;
spec mine extends base {
  override rule last for layers(-1) & op(linear) {
    precision = bf16;
    because "a test";
  }
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    shutil.copy(TINY, folder / "tiny.py")
    (folder / "mine.fp8").write_text(SPEC)
    old = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.main(["compile", "tiny.py", "--spec", "mine.fp8", "--target", "cpu", "--no-baseline"]) == 0
    finally:
        os.chdir(old)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the build with its model and spec beside it, as the current folder."""
    shutil.copytree(built, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def call(step: Any, batch: Any) -> Any:
    torch._dynamo.reset()
    return step(batch)


def test_the_step_of_a_build_trains(folder: Path) -> None:
    step = fp8c.load("build")
    loss = call(step, step.example_inputs)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in step.module.parameters())
    gemms = session_of(step).steps[-1].plan.uses
    assert gemms["layers.0.gate"].gemm("fprop").is_fp8 and not gemms["layers.1.gate"].gemm("fprop").is_fp8


@pytest.mark.slow
def test_a_step_that_was_compared_once_is_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By who loads the same build; another build of the same model is compared, and compiled, anew."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    losses, found = [], []
    with functorch_config.patch(enable_autograd_cache=True):
        for _ in range(3):
            counters.clear()
            step = fp8c.load("build", lowering="inductor")
            losses.append(call(step, step.example_inputs).item())
            found.append(counters["aot_autograd"].get("autograd_cache_hit", 0))
            if len(found) == 2:
                command = ["compile", "tiny.py", "--spec", "std:deepseek_v3", "--target", "cpu", "--no-baseline"]
                assert cli.main(command) == 0
    assert found == [0, 1, 0]
    assert losses[0] == losses[1] != losses[2]


def test_other_lengths_run_under_the_same_decisions(folder: Path) -> None:
    step = fp8c.load("build")
    batch = {k: v[:, :32] for k, v in step.example_inputs.items()}
    assert call(step, batch).isfinite()
    with torch.no_grad():
        assert step(batch).isfinite()


def test_a_model_of_the_callers_shares_its_parameters(folder: Path) -> None:
    own = load_model("tiny.py")
    step = load("build", own.module, loss=own.loss)
    call(step, own.example_inputs).backward()
    assert step.module is own.module and own.module.head.weight.grad is not None  # type: ignore[union-attr]
    with pytest.raises(DiagnosticError, match="(?s)E0613.*pass the function as loss="):
        load("build", own.module)


def test_changed_parameters_are_named(folder: Path) -> None:
    own = load_model("tiny.py", overrides={"width": 256})
    with pytest.raises(DiagnosticError) as caught:
        load("build", own.module, loss=own.loss)
    assert caught.value.exit_code is ExitCode.MODEL
    assert "head.weight is bf16[256, 256], in the build bf16[256, 128]" in str(caught.value)


def test_a_frozen_parameter_is_a_change(folder: Path) -> None:
    own = load_model("tiny.py")
    own.module.get_parameter("head.weight").requires_grad_(False)
    with pytest.raises(DiagnosticError, match="head.weight is bf16.256, 128. frozen, in the build"):
        load("build", own.module, loss=own.loss)


def test_another_computation_is_refused_at_the_first_call(folder: Path) -> None:
    source = Path("tiny.py").read_text()
    Path("tiny.py").write_text(source.replace("x + self.down", "2 * x + self.down"))
    step = fp8c.load("build")
    with pytest.raises(DiagnosticError) as caught:
        call(step, step.example_inputs)
    assert "E0613" in str(caught.value) and "the captured graph differs" in str(caught.value)
    assert "aten.mul" in str(caught.value)


def test_another_gemm_is_named(folder: Path) -> None:
    source = Path("tiny.py").read_text()
    Path("tiny.py").write_text(source.replace("self.gate(x_normed)", "self.up(x_normed)"))
    step = fp8c.load("build")
    with pytest.raises(DiagnosticError, match=r"layers\.0\.gate of the build is gone"):
        call(step, step.example_inputs)


def test_a_changed_spec_is_refused_with_its_rule(folder: Path) -> None:
    Path("mine.fp8").write_text(SPEC.replace("layers(-1)", "layers(0)"))
    with pytest.raises(DiagnosticError) as caught:
        fp8c.load("build")
    assert caught.value.exit_code is ExitCode.SPEC
    text = str(caught.value)
    assert text.startswith("mine.fp8:4: error[E0614]: rule last is not what the build was made with")
    assert "it was `override rule last for layers(-1) & op(linear) {`" in text


def test_without_the_spec_file_the_builds_copy_is_used(folder: Path) -> None:
    Path("mine.fp8").unlink()
    assert session_of(fp8c.load("build")).spec.name == "mine"


def test_a_tampered_build_is_refused(folder: Path) -> None:
    lock = Path("build/plan.lock.json")
    lock.write_text(lock.read_text().replace('"e4m3[1x128] fp32"', '"e5m2[1x128] fp32"', 1))
    with pytest.raises(DiagnosticError, match="E0612.*plan.lock.json was changed after the build"):
        fp8c.load("build")


def test_decisions_that_differ_are_listed_with_their_rule() -> None:
    def lock(value: str, k: int) -> dict[str, Any]:
        return {"a.b": {"shape": {"k": k}, "fields": {"fprop.x": {"value": value, "reason": {"rule": "r1"}}}}}

    lines = decision_changes(lock("bf16", 128), {**lock("e4m3[1x128] fp32", 256), "c": {}})
    assert lines == [
        "c is not in the build",
        "a.b fprop.x is e4m3[1x128] fp32 (rule r1), in the build bf16",
        "a.b shape.k is 256, in the build 128",
    ]


@pytest.mark.slow
def test_two_hash_seeds_give_the_same_bytes(tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "tiny.py")
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "fp8c", "compile", "tiny.py", "--target", "cpu", "-o", f"build{seed}"]
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    first, second = (dict(read_build(tmp_path / f"build{seed}").manifest) for seed in "12")
    assert first.pop("run") != second.pop("run")
    assert first == second  # the hashes of all other files among them


def test_a_build_of_one_device_takes_no_mesh(folder: Path) -> None:
    mesh: Any = SimpleNamespace(mesh_dim_names=("ep",), shape=(2,))
    with pytest.raises(DiagnosticError) as caught:
        load(folder / "build", mesh=mesh)
    (found,) = caught.value.diagnostics
    assert found.code == "E0866" and found.message == "the build is for one device, found ep=2"


def test_graphs_of_a_mesh_differ_where_gemms_casts_or_transfers_do() -> None:
    text = """graph forward
  %q = fp8c.quantize(%x, 'e4m3[1x128] fp32') : (e4m3[4, 128], f32[4, 1])   # fprop a
  %sent = _c10d_functional.all_to_all_single(%q, [2], [2], '0') : u8[2, 128]
  %y = aten.mm(%a, %b) : bf16[4, 4]
  %z = aten.mul.Tensor(%y, %y) : bf16[4, 4]
"""
    counts = operators(text)
    assert counts == {"fp8c.quantize": 1, "_c10d_functional.all_to_all_single": 1, "aten.mm": 1}
    assert count_changes(counts, operators(text.replace("[2], [2]", "[%n], [%m]"))) == []
    fewer = operators(text.replace("fp8c.quantize", "aten.clone"))
    assert count_changes(counts, fewer) == ["0 of fp8c.quantize, in the build 1"]
