"""Every diagnostic code is explained, raised somewhere, and shown by a failing example whose text is checked.

Most examples stand where their part is tested: a `# E:` line of tests/diagnostics, or the code in a test. Those of codes
that no other test shows are here.
"""

from __future__ import annotations

import ctypes
import logging
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fp8c import driver, main_grad
from fp8c import graph as g
from fp8c.cli import main
from fp8c.diagnostics import Diagnostic, DiagnosticError
from fp8c.error_codes import EXPLANATIONS
from fp8c.models import load_model

ROOT = Path(__file__).parents[1]
SOURCES = [p for top in ("fp8c", "backends", "passes", "specs", "tools") for p in (ROOT / top).rglob("*.py")]
_CODE = re.compile(r"\b[EWR]\d{4}\b")

#: Codes that only ranks, GPUs or downloads can show: the test file that does, and words of the message it checks.
SHOWN_ELSEWHERE = {
    "R1143": ("tests/tools/test_export_hf.py", "def test_partial_blocks_stay_bf16_unless_asked_for"),
}


def codes_in(paths: list[Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        for code in set(_CODE.findall(path.read_text(encoding="utf-8"))):
            found.setdefault(code, []).append(path.name)
    return found


def test_every_code_is_explained_and_raised() -> None:
    raised = codes_in([p for p in SOURCES if p.name != "error_codes.py"])
    warnings_of = {
        f"W{code[1:]}" for code in raised if code.startswith("E030")
    }  # specs/resolve.py makes them of errors
    assert set(raised) - set(EXPLANATIONS) == set(), "raised, but not explained"
    assert set(EXPLANATIONS) - set(raised) - warnings_of == set(), "explained, but nothing raises it"
    for code, text in EXPLANATIONS.items():
        assert len(text) > 30 and text.endswith("."), code


def test_no_code_is_explained_twice() -> None:
    keys = re.findall(r'^    "([EWR]\d{4})":', (ROOT / "fp8c/error_codes.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(EXPLANATIONS)


def test_every_code_has_a_failing_example() -> None:
    """Shown is what a `# E:` line expects, a test compares or matches, or a rendered message has; no comment counts."""
    shown = set(SHOWN_ELSEWHERE)
    for path in (ROOT / "tests").rglob("*"):
        if path.suffix == ".fp8":
            shown |= {c for line in re.findall(r"# E.*", path.read_text("utf-8")) for c in _CODE.findall(line)}
        elif path.suffix == ".py":
            for line in path.read_text(encoding="utf-8").splitlines():
                quoted = re.findall(r"""["'][^"']*["']""", line.partition("  # ")[0])
                rendered = re.findall(r"(?:error|warning|remark)\[(\w+)\]", line)
                shown |= {code for text in (*quoted, *rendered) for code in _CODE.findall(text)}
    assert set(EXPLANATIONS) - shown == set(), "codes without a failing example"
    for code, (file, words) in SHOWN_ELSEWHERE.items():
        assert words in (ROOT / file).read_text(encoding="utf-8"), code


@pytest.mark.parametrize("code", ["E0203", "W0410", "R0820"])
def test_explain_prints_the_explanation(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", code]) == 0
    shown = capsys.readouterr().out
    assert code in shown and " ".join(EXPLANATIONS[code].split())[:40] in " ".join(shown.split())


# --- examples ---------------------------------------------------------------------------------------------------------


def raised_by(call: Any) -> Diagnostic:
    with pytest.raises(DiagnosticError) as caught:
        call()
    return caught.value.diagnostics[0]


def test_cuda_compiler_rejects_a_kernel() -> None:
    from fp8c.backends.cuda import build

    (found,) = build._rejected("gemm.cu", "gemm.cu(3): error: expected a ;\n").diagnostics  # type: ignore[attr-defined]
    assert found.code == "E0431" and found.message.endswith("rejected gemm.cu: gemm.cu(3): error: expected a ;")


def test_cuda_driver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8c.backends.cuda import launch

    def name(status: int, text: Any) -> None:
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"an illegal memory access"

    monkeypatch.setattr(launch, "_driver", lambda: SimpleNamespace(cuGetErrorString=name))
    found = raised_by(lambda: launch._check(700, "cuLaunchKernel"))
    assert found.code == "E0432"
    assert found.message == "the CUDA driver failed in cuLaunchKernel: an illegal memory access (700)"
    launch._check(0, "cuLaunchKernel")


def test_a_gemm_in_its_portable_form_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from fp8c.backends.cuda import gemm

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            gemm._remark("scaled_mm [3, 5]", "K is no multiple of 16")
    assert [r.getMessage() for r in caplog.records] == ["remark[R0430]: scaled_mm [3, 5]: K is no multiple of 16"]


def test_a_schedule_holds_more_than_its_budget() -> None:
    from fp8c.schedule import COMPUTE, Schedule, Slot, Task, check_schedule, make_problem

    problem = make_problem([Task("a", COMPUTE, 1, (), 100), Task("b", COMPUTE, 1, ("a",), 100)], memory_budget_bytes=50)
    slots = tuple(Slot(task, float(i)) for i, task in enumerate(problem.tasks))
    found = check_schedule(problem, Schedule(slots, 2.0, "program", 100))
    assert [d.code for d in found] == ["E0753"] and found[0].message.endswith("the budget is 50")


def test_accumulators_of_sharded_parameters() -> None:
    module = nn.Linear(2, 2)
    setattr(module.weight, "device_mesh", object())
    found = raised_by(lambda: main_grad.add_main_grads(module))
    assert found.code == "E0843" and "'weight' is sharded" in found.message


def test_meshes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8c.distributed import init_mesh
    from fp8c.prepare import expert_parallel
    from fp8c.tools import compile_command

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = raised_by(lambda: init_mesh("cpu", ep=3))
    assert found.code == "E0862" and found.message == "the mesh ep=3 has 3 ranks, but 1 is running"
    mesh: Any = SimpleNamespace(mesh_dim_names=("dp",), ndim=1)
    found = raised_by(lambda: expert_parallel.expert_mesh(mesh))
    assert found.code == "E0860" and found.message == "the mesh has no dimension 'ep', found 'dp'"
    found = raised_by(lambda: compile_command.parse_mesh("ep=64,pp"))
    assert found.code == "E0866" and "pp" in found.message
    monkeypatch.setattr(expert_parallel, "rewritten_loops", lambda part: [SimpleNamespace(span=None)])
    found = expert_parallel._unknown("layers.0.moe", nn.Linear(1, 1))
    assert found.code == "E0861" and "'layers.0.moe' can't be sharded" in found.message


def test_sharded_experts_are_said() -> None:
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh

    from fp8c.prepare import prepare

    loaded = load_model(
        str(ROOT / "examples/moe_transformer.py"),
        overrides={"n_layers": 1, "n_dense_layers": 0, "n_experts": 2},
        weights="random",
    )
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        remarks = prepare(loaded.module, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("ep",)))
    finally:
        dist.destroy_process_group()
    (found,) = (r for r in remarks if r.code == "R0860")
    assert "are sharded over 1 ranks" in found.message


def test_weights_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    monkeypatch.setattr("fp8c.session.reason_not_to_keep", lambda module: "its parameters are sharded")
    session = driver.new_session("deepseek_v3", "cpu", keep_weights=True, model=weakref.ref(model))
    assert not session._keeps_weights() and not session._keeps_weights()
    (remark,) = session.remarks
    assert remark.code == "R0842" and remark.message.endswith("in every step: its parameters are sharded")


def test_adamw_tensors_that_do_not_belong_together() -> None:
    pytest.importorskip("triton")
    from fp8c.backends.triton import adamw

    param = torch.zeros(2, 3)
    bucket: Any = SimpleNamespace(params=[param], rows=lambda: [[torch.zeros(3, 2)]])
    found = raised_by(lambda: adamw.tables_of(bucket))
    assert found.code == "E1110" and "got a tensor [3, 2]" in found.message


# --- steps that can't be compiled -------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, is_frozen: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(128, 128, bias=False, dtype=dtype)
        self.requires_grad_(not is_frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).float().square().mean()


def compile_and_run(model: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    driver.compile(model, "deepseek_v3", "cpu")(x).backward()


def test_a_gemm_of_fp64_is_not_quantized() -> None:
    found = raised_by(lambda: compile_and_run(Model(torch.float64), torch.randn(4, 128, dtype=torch.float64)))
    assert found.code == "E0831" and found.message == "a float64 GEMM cannot be quantized"


def test_a_step_without_a_gradient_has_nothing_to_plan() -> None:
    from fp8c.tools import opt

    found = raised_by(lambda: opt.capture_joint(Model(is_frozen=True), torch.randn(4, 128, dtype=torch.bfloat16)))
    assert found.code == "E0832" and "without a backward" in found.message


def test_a_backward_with_a_gemm_too_many() -> None:
    from fp8c.tools import opt

    step = opt.capture_joint(Model(), torch.randn(4, 128, dtype=torch.bfloat16))
    wgrad = next(node for node in g.calls(step.joint.graph, g.GEMMS) if g.is_backward(node))
    with step.joint.graph.inserting_after(wgrad):
        step.joint.graph.node_copy(wgrad)
    found = raised_by(lambda: opt.run_passes(step, "deepseek_v3", ["assign-roles"]))
    assert found.code == "E0830" and "has 2 wgrad GEMMs where 1 is expected" in found.message


def test_a_stage_that_writes_to_its_input() -> None:
    from fp8c.stage import _outputs_of

    graph = fx.Graph()
    output = graph.output((graph.placeholder("x"),))
    output.meta["desc"] = [type("InputMutationAOTOutput", (), {})()]
    found = raised_by(lambda: _outputs_of(graph, 1))
    assert found.code == "E0870" and found.message.startswith("the module writes to an input or a buffer")
