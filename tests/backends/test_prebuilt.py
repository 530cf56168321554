"""A build's kernels: compiled without a GPU for every GEMM of the step, and enough for a machine to compile nothing again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

pytest.importorskip("triton", reason="triton compiles the kernels")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fp8c import driver
from fp8c.backends import prebuilt
from fp8c.backends.cuda import build
from fp8c.backends.target import load_target
from fp8c.backends.triton import KERNELS, ahead
from fp8c.diagnostics import DiagnosticError
from fp8c.tools import opt
from tests.passes.steps import STEPS

needs_compiler = pytest.mark.skipif(not build.has_compiler(), reason="neither NVRTC nor nvcc is installed")

H200 = load_target("h200")
Halves = tuple[fx.GraphModule, fx.GraphModule]


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(256, 256, bias=False, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x))).float().square().mean()


def linear_halves(spec: str, target: str) -> Halves:
    """Through the driver, which notes whose gradient each result of backward is."""
    session = driver.new_session(spec, target)
    halves = driver.capture_step(Linears(), torch.randn(128, 256, dtype=torch.bfloat16), session).halves
    return halves.forward, halves.backward


def expert_halves() -> Halves:
    halves = opt.run_passes(STEPS["experts"](), "deepseek_v3", target="h200").halves
    assert halves is not None
    return halves.forward, halves.backward


@pytest.fixture(scope="module")
def experts() -> tuple[Halves, dict[str, bytes]]:
    halves = expert_halves()
    return halves, prebuilt.kernel_files(halves, H200)


class Driver:
    """As much of a GPU driver as Triton's launcher asks for before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[bool]]:
    """Triton's own launcher up to the launch; counts what it found in its cache and what it compiled."""
    found: Counter[bool] = Counter()

    def listen(*, cache_hit: bool, **_: Any) -> None:
        found[cache_hit] += 1

    original = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel.device_caches.clear()  # what this process has loaded: only what is on disk counts
        original(kernel, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        yield found


@needs_compiler
def test_every_gemm_of_the_step_has_its_instance(experts: tuple[Halves, dict[str, bytes]]) -> None:
    _, files = experts
    index = json.loads(files[prebuilt.INDEX])
    served = {(entry["op"], entry["implementation"]) for entry in index["gemms"]}
    assert served == {(op, "cuda") for op in ("scaled_grouped_mm", "scaled_grouped_wgrad")}
    by_source = {name: name.rpartition("-")[0] for name in (entry["name"] for entry in index["cuda"])}
    assert {entry["kernel"] for entry in index["gemms"]} == {
        name for name, source in by_source.items() if source == "gemm"
    }
    # The fused operators that Hopper has kernels for are compiled once, not for Triton too.
    assert "swiglu_backward" in by_source.values()
    assert "backward_rows_kernel" not in {entry["name"].rpartition("-")[0] for entry in index["kernels"]}
    for entry in (*index["cuda"], *index["kernels"]):
        assert entry["spilled_bytes"] == 0 and entry["registers"] <= 255
        assert files[f"kernels/{entry['name']}.cubin"][:4] == b"\x7fELF"


@needs_compiler
def test_accumulators_in_fp32_have_instances_of_their_own() -> None:
    """`main_grad=True` lets wgrad add to FP32, which is decided after the build."""
    index = json.loads(prebuilt.kernel_files(linear_halves("deepseek_v3", "h200"), H200)[prebuilt.INDEX])
    by_op = {(entry["op"], entry["kernel"]) for entry in index["gemms"]}
    kernels = {op: {name for o, name in by_op if o == op} for op in ("scaled_mm", "scaled_mm_add_")}
    assert kernels["scaled_mm_add_"] and not kernels["scaled_mm"] & kernels["scaled_mm_add_"]


def test_numbers_are_specialised_as_triton_does(tmp_path: Path, launcher: Counter[bool]) -> None:
    """RMSNorm's epsilon is a float, and no integer."""
    x = torch.empty(64, 256, dtype=torch.bfloat16, device="meta")
    arguments = (x, x.new_empty(256), 1e-6, "e4m3[1x128] fp32")
    launches: dict[str, ahead.Launch] = {}
    with ahead.recording(launches):
        KERNELS["rms_norm_quantize"](*arguments)
    (launch,) = launches.values()
    assert dict(launch.signature)["eps"] == "fp32"
    compiled = ahead.compile_launch(launch, 90)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        assert ahead.install(launch.to_json(), compiled.cubin, compiled.metadata, 90)
        launcher.clear()
        KERNELS["rms_norm_quantize"](*arguments)
    assert launcher == {True: 1}


@needs_compiler
def test_a_machine_with_the_build_compiles_nothing_again(
    experts: tuple[Halves, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: Counter[bool],
) -> None:
    halves, files = experts
    monkeypatch.setenv("FP8C_CACHE_DIR", str(tmp_path / "fp8c"))
    monkeypatch.setattr(build, "compile_cubin", lambda config: pytest.fail(f"compiled again: {config}"))
    graphs = list(prebuilt.graphs_that_run(halves))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        assert prebuilt.install(files.__getitem__, "sm90") == []
        for who in prebuilt.serve_gemms(graphs, H200).values():
            assert not isinstance(who, str) and build.cubin(who)[:4] == b"\x7fELF"
        fused = prebuilt.serve_fused(graphs, H200)
        launched_together = [c for config in fused.values() for c in (config, config.then) if c]
        assert launched_together and all(build.cubin(c)[:4] == b"\x7fELF" for c in launched_together)
        launched = 0
        for node in (node for graph in graphs for node in graph.nodes if node not in fused):
            if kernel := KERNELS.get(ahead.operator_name(node)):
                kernel(*fx.map_arg(node.args, ahead.as_meta), **fx.map_arg(node.kwargs, ahead.as_meta))
                launched += 1
    assert launched and launcher[True] >= 5, launcher
    assert launcher[False] == 0, launcher


@needs_compiler
def test_without_the_build_they_are_compiled(
    experts: tuple[Halves, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: Counter[bool]
) -> None:
    """What the count of the test above would be, if the build's kernels did not fit."""
    (forward, _), _ = experts
    node = next(n for n in forward.graph.nodes if ahead.operator_name(n) in KERNELS)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        KERNELS[ahead.operator_name(node)](*fx.map_arg(node.args, ahead.as_meta))
    assert launcher == {False: 1}


@needs_compiler
def test_kernels_that_changed_since_are_said_and_not_installed(
    experts: tuple[Halves, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, files = experts
    monkeypatch.setenv("FP8C_CACHE_DIR", str(tmp_path / "fp8c"))
    index = json.loads(files[prebuilt.INDEX])
    index["kernels"][0]["launch"]["source"] = "another"
    changed = files | {prebuilt.INDEX: json.dumps(index).encode()}
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        (remark,) = prebuilt.install(changed.__getitem__, "sm90")
        assert remark.code == "R0438" and remark.message.startswith("1 of ")
        (remark,) = prebuilt.install(files.__getitem__, "sm100")
    assert remark.message == "the build's kernels are for sm90, this GPU is sm100"


def test_microscaling_on_blackwell_is_native() -> None:
    """Every GEMM of an MXFP8 step becomes one instruction that scales inside the tensor core."""
    files = prebuilt.kernel_files(linear_halves("mxfp8", "b200"), load_target("b200"))
    index = json.loads(files[prebuilt.INDEX])
    assert {entry["implementation"] for entry in index["gemms"]} == {"triton"} and not index["cuda"]
    assert {entry["op"] for entry in index["gemms"]} == {"scaled_mm", "scaled_mm_add_"}
    gemms = [entry["name"] for entry in index["kernels"] if entry["name"].startswith("gemm_kernel")]
    assert len(gemms) >= 2  # a product, and one that is added
    for name in gemms:
        ptx = files[f"kernels/{name}.ptx"].decode()
        assert "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale" in ptx and ".target sm_100a" in ptx


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "find_spec", lambda name: None)
    with pytest.raises(DiagnosticError, match="E0433.*for h200 here: triton is not installed"):
        prebuilt.kernel_files(expert_halves(), H200)
    index = {"kernels": [{}, {}], "triton": "3"}
    assert prebuilt.stale_triton(index, lambda name: b"", "sm90") == 2


def test_targets_without_kernels_are_refused() -> None:
    with pytest.raises(DiagnosticError, match="E0433"):
        prebuilt.kernel_files(expert_halves(), load_target("cpu"))
