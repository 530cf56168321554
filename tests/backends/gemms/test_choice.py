"""The choice among implementations of a GEMM: order, policies, what is measured, and what is remembered on disk."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8c.backends.gemms import candidates, choice, cublaslt, deepgemm, dispatch, measured
from fp8c.backends.gemms.table import Choice, Table
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.diagnostics import DiagnosticError

ROW, BLOCK = "e4m3[1x128] fp32", "e4m3[128x128] fp32"
MACHINE = {"device": "NVIDIA H200", "driver": "580", "torch": "2.11"}


def operands(m: int = 100, n: int = 256, k: int = 512) -> tuple[Any, ...]:
    """Arguments of `fp8c::scaled_mm` without data, laid out as fp8c stores them."""
    a = torch.empty(m, k, dtype=torch.float8_e4m3fn, device="meta")
    b = torch.empty(n, k, dtype=torch.float8_e4m3fn, device="meta")
    a_scale = torch.empty(-(-k // 128), -(-m // 4) * 4, device="meta").t()[:m]
    return a, a_scale, b, torch.empty(-(-n // 128), -(-k // 128), device="meta"), ROW, BLOCK, 128, torch.bfloat16


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor | Exception]:
    """Implementations that return what a test says; those it doesn't name have nothing for the call."""
    results: dict[str, Tensor | Exception] = {}

    def call(name: str, op: str, arguments: tuple[Any, ...]) -> Tensor:
        result = results.get(name, Unsupported("it is not here"))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(candidates, "call", call)
    return results


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Table:
    made = Table.open(tmp_path, MACHINE)
    monkeypatch.setattr(measured, "table_of", lambda index: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: SimpleContext())
    return made


class SimpleContext:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def times(monkeypatch: pytest.MonkeyPatch, **us: float) -> list[tuple[str, ...]]:
    """Say how long each implementation takes; returns what was timed, for each class of shapes."""
    timed: list[tuple[str, ...]] = []

    def time_in_turn(runs: dict[str, Any]) -> dict[str, float]:
        timed.append(tuple(runs))
        return {name: us[name] for name in runs}

    monkeypatch.setattr(measured, "time_in_turn", time_in_turn)
    return timed


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_next_implementation_serves_what_one_has_nothing_for(
    stand_ins: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    dispatch.remark.cache_clear()
    stand_ins["cuda"] = Unsupported("the kernels are for compute capability 9.0")
    stand_ins["triton"] = torch.ones(2)
    with caplog.at_level(logging.WARNING):
        assert dispatch.serve("scaled_mm", *operands()) is stand_ins["triton"]
        dispatch.serve("scaled_mm", *operands())
    (record,) = caplog.records
    text = "fp8c::scaled_mm: served by triton, not cuda: the kernels are for compute capability 9.0"
    assert record.getMessage() == f"remark[R0430]: {text}"


def test_the_portable_form_is_the_last(stand_ins: dict[str, Any]) -> None:
    stand_ins["portable"] = torch.ones(3)
    assert dispatch.serve("scaled_mm", *operands()) is stand_ins["portable"]


def test_a_wrong_operand_is_no_reason_to_ask_another(stand_ins: dict[str, Any]) -> None:
    from fp8c.diagnostics import fail

    stand_ins["cuda"], stand_ins["triton"] = fail("E0520", "shapes differ"), torch.ones(2)
    with pytest.raises(DiagnosticError, match="shapes differ"):
        dispatch.serve("scaled_mm", *operands())


def test_the_environment_pins_an_implementation(stand_ins: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins |= {"cuda": torch.zeros(1), "triton": torch.ones(1), "cublaslt": torch.ones(2)}
    with choice.using(choice.read_policy("cublaslt")):
        assert dispatch.serve("scaled_mm", *operands()) is stand_ins["cublaslt"]
        monkeypatch.setenv(choice.ENVIRONMENT, "triton")
        assert dispatch.serve("scaled_mm", *operands()) is stand_ins["triton"]
        monkeypatch.setenv(choice.ENVIRONMENT, "default")
        assert dispatch.serve("scaled_mm", *operands()) is stand_ins["cuda"]
    monkeypatch.setenv(choice.ENVIRONMENT, "cutlass")
    with pytest.raises(DiagnosticError, match=r"E0434.*\n.*default, measure, or one of cuda, triton"):
        dispatch.serve("scaled_mm", *operands())


def test_a_policy_holds_in_whichever_thread_calls(stand_ins: dict[str, Any]) -> None:
    stand_ins |= {"cuda": torch.zeros(1), "triton": torch.ones(1)}
    run = choice.under(choice.read_policy("triton"), lambda: dispatch.serve("scaled_mm", *operands()))
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    assert found == [stand_ins["triton"]]
    assert dispatch.serve("scaled_mm", *operands()) is stand_ins["cuda"]


def test_gpus_without_fp8_tensor_cores_run_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "capability", lambda index: (8, 0))
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0))
    for name in ("cuda", "triton", "cublaslt"):
        with pytest.raises(Unsupported, match="begin with compute capability 8.9"):
            candidates.call(name, "scaled_mm", (on_gpu,))


def test_a_package_that_is_missing_is_no_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "find_spec", lambda name: None)
    candidates.operators.cache_clear()
    try:
        with pytest.raises(Unsupported, match="triton is not installed"):
            candidates.call("triton", "scaled_mm", operands())
    finally:
        candidates.operators.cache_clear()


def test_a_tuned_step_measures_in_both_halves_and_no_other_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' CPU kernels stand in for a GPU's; what counts is the policy in force where they run."""
    import fp8c.backends.reference
    from fp8c import driver

    seen: list[choice.Policy] = []
    kernel = fp8c.backends.reference.gemm.scaled_mm

    def watch(session: driver.Session, gm: torch.fx.GraphModule, *args: Any, **options: Any) -> Any:
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.fp8c.scaled_mm.default):
            node.target = watched
        gm.recompile()
        return lower(session, gm, *args, **options)

    def watched(*args: Any) -> Tensor:
        seen.append(choice.policy())
        return kernel(*args)

    lower = driver.Session._lower
    monkeypatch.setattr(driver.Session, "_lower", watch)
    for tune in (True, False):
        torch._dynamo.reset()
        model = torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
        x = torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
        driver.compile(model, target="cpu", tune=tune)(x).float().square().mean().backward()
        assert seen == [choice.MEASURE if tune else choice.DEFAULT] * 3  # fprop, dgrad, wgrad
        seen.clear()


# --- classes of shapes ------------------------------------------------------------------------------------------------


def test_tokens_are_bucketed_and_weights_exact() -> None:
    op = "scaled_mm"
    assert choice.shape_class(op, operands(m=65)) == choice.shape_class(op, operands(m=128))
    assert choice.shape_class(op, operands(m=64)) != choice.shape_class(op, operands(m=65))
    assert choice.shape_class(op, operands(n=256)) != choice.shape_class(op, operands(n=272))
    a, a_scale, b, b_scale, *_ = operands(k=896)
    acc = torch.empty(100, 256, device="meta")
    gradient = choice.shape_class("scaled_mm_add_", (acc, a, a_scale, b, b_scale, ROW, ROW, 128))
    assert (gradient.m, gradient.n, gradient.k, gradient.out) == (100, 256, 1024, "f32, added")
    offs = torch.empty(8, dtype=torch.int32, device="meta")
    experts = choice.shape_class("scaled_grouped_wgrad", (a, a_scale, b, b_scale, offs, ROW, ROW, 128, torch.float32))
    assert (experts.m, experts.k, experts.experts) == (100, 1024, 8)
    rows = choice.shape_class(
        "scaled_grouped_mm", (a, a_scale, b[None], b_scale, offs, ROW, BLOCK, 128, torch.bfloat16)
    )
    assert (rows.m, rows.n, rows.k) == (128, 256, 896)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_each_class_is_measured_once_and_the_fastest_kept(
    stand_ins: dict[str, Any], table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = torch.randn(8, 8)
    stand_ins |= {"cuda": product, "triton": product, "cublaslt": product.clone()}
    timed = times(monkeypatch, cuda=10.0, triton=20.0, cublaslt=8.0)
    with choice.using(choice.MEASURE):
        for m in (65, 100, 128):
            assert dispatch.order("scaled_mm", operands(m)) == ("cublaslt", "cuda", "triton", "portable")
        dispatch.order("scaled_mm", operands(300))
    assert timed == [("cuda", "triton", "cublaslt")] * 2
    assert len(Table.open(table.path.parent, MACHINE).choices) == 2  # type: ignore[union-attr]


def test_the_default_stays_unless_another_is_clearly_faster(
    stand_ins: dict[str, Any], table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins |= {"cuda": torch.ones(4), "cublaslt": torch.ones(4)}
    times(monkeypatch, cuda=10.0, cublaslt=9.8)
    assert measured.fastest("scaled_mm", operands()) == "cuda"


def test_an_implementation_that_disagrees_is_not_taken(
    stand_ins: dict[str, Any], table: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    product = torch.randn(64, 64)
    with_nan = product.clone()
    with_nan[3, 3] = torch.nan
    stand_ins |= {
        "cuda": product,
        "triton": product * (1 + 2.0**-5),
        "cublaslt": product.bfloat16(),
        "deepgemm": with_nan,
    }
    timed = times(monkeypatch, cuda=10.0, triton=1.0, cublaslt=11.0, deepgemm=1.0)
    with caplog.at_level(logging.WARNING):
        assert measured.fastest("scaled_mm", operands()) == "cuda"
    assert timed == [("cuda", "cublaslt")]
    said = [r.getMessage() for r in caplog.records]
    assert (
        said[0] == "remark[R0437]: triton disagrees with cuda on fp8c::scaled_mm, and is not taken" and len(said) == 2
    )


def test_nan_in_the_operands_does_not_disturb_the_comparison() -> None:
    expected = torch.randn(8, 8)
    expected[2], expected[3, 3] = torch.nan, torch.inf
    assert measured.agree(expected.clone(), expected)
    assert not measured.agree(expected.nan_to_num(), expected)


def test_measuring_adds_nothing_to_the_callers_accumulator(monkeypatch: pytest.MonkeyPatch, table: Table) -> None:
    def call(name: str, op: str, arguments: tuple[Any, ...]) -> None:
        if name in ("deepgemm", "cublaslt"):
            raise Unsupported("not here")
        arguments[0].add_(2.0)

    monkeypatch.setattr(candidates, "call", call)
    timed = []

    def time_in_turn(runs: dict[str, Any]) -> dict[str, float]:
        for run in runs.values():
            run()
        timed.append(tuple(runs))
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(measured, "time_in_turn", time_in_turn)
    acc = torch.zeros(100, 256)
    a, a_scale, b, b_scale, *_ = operands()
    assert measured.fastest("scaled_mm_add_", (acc, a, a_scale, b, b_scale, ROW, ROW, 128)) == "cuda"
    assert timed == [("cuda", "triton")] and not acc.any()


def test_without_memory_the_default_serves_and_nothing_is_written(
    stand_ins: dict[str, Any], table: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_ins |= {
        "cuda": torch.ones(4),
        "triton": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    }
    timed = times(monkeypatch)
    with caplog.at_level(logging.WARNING), choice.using(choice.MEASURE):
        for _ in range(2):
            assert dispatch.order("scaled_mm", operands()) == ("cuda", "triton", "portable")
    assert len(caplog.records) == 1 and "no memory to measure scaled_mm" in caplog.records[0].getMessage()
    assert not timed and table.path is not None and not table.path.exists()


def test_nothing_is_measured_while_a_graph_is_captured(
    stand_ins: dict[str, Any], table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins |= {"cuda": torch.ones(4), "cublaslt": torch.ones(4)}
    timed = times(monkeypatch, cuda=10.0, cublaslt=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert measured.fastest("scaled_mm", operands()) == "" and not timed
    table.remember(choice.shape_class("scaled_mm", operands()).key, Choice("cublaslt", {"cublaslt": 1.0}))
    assert measured.fastest("scaled_mm", operands()) == "cublaslt"  # what is known already counts


def test_deterministic_algorithms_are_the_default_ones(
    stand_ins: dict[str, Any], table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins |= {"cuda": torch.ones(4), "cublaslt": torch.ones(4)}
    times(monkeypatch, cuda=10.0, cublaslt=1.0)
    assert measured.fastest("scaled_mm", operands()) == "cublaslt"
    torch.use_deterministic_algorithms(True)
    try:
        assert measured.fastest("scaled_mm", operands()) == ""
    finally:
        torch.use_deterministic_algorithms(False)


# --- on disk ----------------------------------------------------------------------------------------------------------

DAMAGES = {
    "cut": '{"schema": "fp8c.gemms/1", "mach',
    "no table": "[1, 2]",
    "another schema": json.dumps({"schema": "fp8c.gemms/9", "machine": MACHINE, "fastest": {}}),
    "another machine": json.dumps({"schema": "fp8c.gemms/1", "machine": {"device": "A100"}, "fastest": {}}),
    "unknown implementation": json.dumps(
        {"schema": "fp8c.gemms/1", "machine": MACHINE, "fastest": {"x": {"implementation": "rm", "us": {"rm": 1}}}}
    ),
    "not a time": json.dumps(
        {
            "schema": "fp8c.gemms/1",
            "machine": MACHINE,
            "fastest": {"x": {"implementation": "cuda", "us": {"cuda": "y"}}},
        }
    ),
    "no text": "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_damaged_or_foreign_is_rebuilt(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Table.open(tmp_path, MACHINE).path
    assert path is not None
    path.write_bytes(DAMAGES[damage].encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        table = Table.open(tmp_path, MACHINE)
    assert table.choices == {} and "R0436" in caplog.records[0].getMessage()
    table.remember("one", Choice("triton", {"triton": 2.0, "cuda": 3.0}))
    assert Table.open(tmp_path, MACHINE).choices == {"one": Choice("triton", {"triton": 2.0, "cuda": 3.0})}


def test_other_versions_have_another_file(tmp_path: Path) -> None:
    Table.open(tmp_path, MACHINE).remember("one", Choice("cuda", {"cuda": 1.0}))
    assert Table.open(tmp_path, MACHINE | {"driver": "590"}).choices == {}


def test_of_two_processes_the_first_decides(tmp_path: Path) -> None:
    first, second = Table.open(tmp_path, MACHINE), Table.open(tmp_path, MACHINE)
    assert first.remember("one", Choice("cuda", {"cuda": 1.0})).implementation == "cuda"
    assert second.remember("two", Choice("triton", {"triton": 1.0})).implementation == "triton"
    assert second.remember("one", Choice("cublaslt", {"cublaslt": 0.5})).implementation == "cuda"
    assert set(Table.open(tmp_path, MACHINE).choices) == {"one", "two"}


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    table = Table.open(tmp_path / "file" / "cache", MACHINE)
    with caplog.at_level(logging.WARNING):
        assert table.remember("one", Choice("cuda", {"cuda": 1.0})).implementation == "cuda"
        table.remember("two", Choice("cuda", {"cuda": 1.0}))
    assert set(table.choices) == {"one", "two"}
    assert any("kept for this process alone" in r.getMessage() for r in caplog.records)


WRITER = """
import sys
from pathlib import Path
from fp8c.backends.gemms.table import Choice, Table
table = Table.open(Path(sys.argv[1]), {"device": "x"})
for i in range(20):
    table.remember(f"{sys.argv[2]} {i}", Choice("cuda", {"cuda": 1.0 + i}))
    table.remember(f"shared {i}", Choice("cuda", {"cuda": 1.0 + int(sys.argv[2])}))
"""


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), str(i)] for i in range(3)]
    runs = [subprocess.Popen(command, cwd=Path(__file__).parents[3]) for command in commands]
    assert [run.wait() for run in runs] == [0, 0, 0]
    kept = Table.open(tmp_path, {"device": "x"}).choices
    assert len(kept) == 3 * 20 + 20
    assert not list(tmp_path.glob("*.part"))


# --- libraries --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    for cached in (cublaslt._recipes, deepgemm._recipe):
        cached.cache_clear()


def test_cublaslt_gets_views_of_what_is_stored(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    kinds = torch.nn.functional.ScalingType  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda *a, **k: given.append((a, k)))
    args = operands(m=128)
    cublaslt.scaled_mm(*args)
    (a, b, left, left_kind, right, right_kind), options = given[0]
    assert b.shape == (512, 256) and b.stride() == (1, 512)
    assert left is args[1] and left.stride() == (1, 128) and left_kind == kinds.BlockWise1x128
    assert right.shape == (4, 2) and right.stride() == (1, 4) and right_kind == kinds.BlockWise128x128
    assert options == {"output_dtype": torch.bfloat16, "use_fast_accum": False}


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [((126, 256, 512), "multiple of 4"), ((128, 256, 640), "multiple of 512"), ((128, 250, 512), "multiples of 16")],
)
def test_cublaslt_is_no_candidate_where_scales_would_be_laid_out_anew(
    hopper: None, sizes: tuple[int, int, int], reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        cublaslt.scaled_mm(*operands(*sizes))


def test_what_cublaslt_refuses_is_no_error_of_the_step(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", refuse)
    with pytest.raises(Unsupported, match="it refuses: CUBLAS_STATUS_NOT_SUPPORTED$"):
        cublaslt.scaled_mm(*operands(m=128))


def test_deepgemm_gets_what_is_stored(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    stand_in = SimpleNamespace(fp8_gemm_nt=lambda *a, **k: given.append((a, k)))
    monkeypatch.setattr(deepgemm, "_package", lambda: stand_in)
    args = operands(m=102)
    out = deepgemm.scaled_mm(*args)
    assert given[-1] == (((args[0], args[1]), (args[2], args[3]), out), {"c": None, "recipe": (1, 128, 128)})
    acc, b_scale = torch.empty(102, 256, device="meta"), torch.empty(4, 256, device="meta").t()
    deepgemm.scaled_mm_add_(acc, args[0], args[1], args[2], b_scale, ROW, ROW, 128)
    assert given[-1][0][2] is acc and given[-1][1] == {"c": acc, "recipe": (1, 1, 128)}
    with pytest.raises(Unsupported, match="whole groups of 128"):
        deepgemm.scaled_mm(*operands(k=500))
    with pytest.raises(Unsupported, match="lie otherwise"):
        deepgemm.scaled_mm(args[0], args[1].contiguous(), *args[2:])
