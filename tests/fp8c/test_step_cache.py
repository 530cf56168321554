"""Compiled steps that PyTorch's AOTAutograd cache keeps for other processes (fp8c/step_cache.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor.codecache import FxGraphCache

import fp8c
from fp8c import driver, step_cache
from fp8c.backends.target import load_target
from fp8c.optim.precision import SwitchedSession

BF16 = torch.bfloat16


class Block(nn.Module):
    """Two Linears with an activation between them; what the second is called can be chosen."""

    def __init__(self, second: str = "down") -> None:
        super().__init__()
        self.up = nn.Linear(128, 256, bias=False, dtype=BF16)
        self.add_module(second, nn.Linear(256, 128, bias=False, dtype=BF16))
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self, self.second)(torch.relu(self.up(x)))
        return out


@pytest.fixture(scope="module")
def inductors_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Inductor compiled for one test serves the next."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def cache(inductors_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """PyTorch's cache of whole steps, empty and in use."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inductors_folder))
    folder = inductors_folder / "aotautograd"
    shutil.rmtree(folder, ignore_errors=True)
    counters.clear()
    with functorch_config.patch(enable_autograd_cache=True):
        yield folder
    counters.clear()


def found() -> tuple[int, int]:
    """Steps that the cache had and had not, since the last call."""
    seen = counters.pop("aot_autograd", {})
    return seen.get("autograd_cache_hit", 0), seen.get("autograd_cache_miss", 0)


def compiled(second: str = "down", spec: str = "deepseek_v3", **options: Any) -> nn.Module:
    """A block of the same weights as any other, as another process would compile it."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    return fp8c.compile(Block(second), spec, lowering="inductor", dynamic=False, **options)


def run(step: nn.Module) -> list[Tensor]:
    """Output and gradients of one call."""
    torch.manual_seed(5)
    x = torch.randn(256, 128, dtype=BF16, requires_grad=True)
    out = step(x)
    out.float().square().mean().backward()
    assert x.grad is not None
    gradients = [p.grad if p.grad is not None else p.main_grad.clone() for p in step.parameters()]
    return [out.detach(), x.grad, *gradients]


def test_the_second_process_compiles_nothing_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled()
    results = run(first)
    assert found() == (0, 1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the step was lowered again")

    with monkeypatch.context() as patched:
        patched.setattr("fp8c.session.lowering.lower", refuse)
        patched.setattr("fp8c.session.pipeline.rewrite_and_partition", refuse)
        again = compiled()
        assert all(map(torch.equal, results, run(again)))
    assert found() == (1, 0)
    before, after = driver.session_of(first), driver.session_of(again)
    assert [str(r) for r in before.remarks] == [str(r) for r in after.remarks]
    assert len(after.steps) == 1, "what was done can still be asked for"
    assert after.steps[-1].plan.to_json() == before.steps[-1].plan.to_json()
    assert [r.changed for r in after.steps[-1].records] == [r.changed for r in before.steps[-1].records]


def test_what_is_known_of_a_step_that_was_kept_stays_known() -> None:
    """AOTAutograd strips the graph that it pickles."""
    step = compiled()
    run(step)
    assert counters["aot_autograd"]["autograd_cache_saved"] == 1
    halves = driver.session_of(step).steps[-1].halves
    for half in (halves.forward, halves.backward):
        assert all("val" in node.meta for node in half.graph.nodes if node.op == "call_function")


def test_a_step_from_the_cache_follows_its_weights_and_adds_to_its_own_accumulators() -> None:
    run(compiled(main_grad=True))
    again = compiled(main_grad=True)
    results = run(again)
    assert found() == (1, 1)
    assert all(p.grad is None for p in again.parameters())
    twice = run(again)
    assert torch.equal(twice[-1], 2 * results[-1])
    session = driver.session_of(again)
    assert session.weights.refreshed == 2, "each weight was quantized once, for both calls"
    with torch.no_grad():
        for p in again.parameters():
            p.mul_(2)
    assert torch.equal(run(again)[0], 4 * results[0])
    assert session.weights.refreshed == 4


def test_inference_is_kept_too() -> None:
    x = torch.randn(256, 128, dtype=BF16)
    with torch.no_grad():
        first = compiled()(x)
        again = compiled()
        assert torch.equal(first, again(x))
    assert found() == (1, 1)
    assert driver.session_of(again).steps == []


@pytest.mark.parametrize(
    "other",
    [
        lambda: compiled(second="gate"),  # rules name modules
        lambda: compiled(spec="bf16"),
        lambda: compiled(target=replace(load_target("cpu"), fp8_tflops=1.0)),  # a file of one's own may have any name
        lambda: compiled(main_grad=True),
        lambda: compiled(keep_weights=False),
        lambda: compiled(without=("causal-attention",)),
    ],
    ids=["module", "spec", "target", "main_grad", "keep_weights", "without"],
)
def test_another_step_of_the_same_graph_is_not_taken_for_it(other: Callable[[], nn.Module]) -> None:
    run(compiled())
    run(other())
    assert found() == (0, 2)


def test_modules_switched_to_bf16_are_another_step() -> None:
    results = run(compiled())
    step = compiled()
    session = driver.session_of(step)
    switched = SwitchedSession(session.spec, session.target, lowering="inductor", switched=("up",))
    driver.attach(step, switched, dynamic=False)
    assert not torch.equal(results[0], run(step)[0])
    assert found() == (0, 2)


@dataclass
class Doubled(driver.Session):
    """A session of somebody's own, which does something else and doesn't say so: the first result of a half is doubled."""

    def _lower(self, *args: Any, **options: Any) -> Any:
        run_half = super()._lower(*args, **options)

        def doubled(*given: Any) -> Any:
            first, *others = run_half(list(given))
            return [2 * first, *others]

        return make_boxed_func(doubled)


def test_sessions_that_do_something_else_are_not_kept() -> None:
    results = run(compiled())
    step = compiled()
    session = driver.session_of(step)
    driver.attach(step, Doubled(session.spec, session.target, lowering="inductor"), dynamic=False)
    assert torch.equal(2 * results[0], run(step)[0])
    assert found() == (0, 1)


def test_a_change_of_fp8c_itself_is_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run(compiled())
    monkeypatch.setattr(step_cache, "source_digest", lambda: "edited")
    run(compiled())
    assert found() == (0, 2)


class Loaded:
    """A kernel of Triton's that was loaded, as Inductor leaves it in code that it found."""

    launchers = ("launch",)

    def __getstate__(self) -> None:
        raise AssertionError("pickled after it was loaded")


def test_a_new_step_whose_code_inductor_found_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update of fp8c, say. Inductor's code then has loaded kernels in it, which can't be pickled."""
    results = run(compiled())
    find = FxGraphCache.cache_hit_post_compile

    def find_loaded(graph: Any, *others: Any) -> Any:
        graph, info = find(graph, *others)
        graph._triton_bundle = SimpleNamespace(static_autotuners=[SimpleNamespace(kernel=Loaded())])
        return graph, info

    monkeypatch.setattr(step_cache, "source_digest", lambda: "edited")
    counters.clear()
    with monkeypatch.context() as patched:
        patched.setattr(FxGraphCache, "cache_hit_post_compile", find_loaded)
        run(compiled())
    assert counters["inductor"]["fxgraph_cache_hit"] == 2
    assert counters["aot_autograd"]["autograd_cache_saved"] == 1
    assert found() == (0, 1)
    assert all(map(torch.equal, results, run(compiled())))
    assert found() == (1, 0)


def test_a_new_step_whose_code_went_away_meanwhile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = SimpleNamespace(
        _triton_bundle=SimpleNamespace(static_autotuners=[SimpleNamespace(kernel=Loaded())]), _fx_graph_cache_key="gone"
    )
    with pytest.raises(step_cache.BypassAOTAutogradCache, match="no longer in its cache"):
        step_cache.as_stored(graph)  # type: ignore[arg-type]


def test_source_digest_sees_every_file_that_decides_what_a_graph_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "specs").mkdir()
    spec = tmp_path / "specs" / "a.fp8"
    spec.write_text("before")
    monkeypatch.setattr(step_cache.fp8c, "__file__", str(tmp_path / "__init__.py"))
    digests = []
    for text in ("before", "after"):
        spec.write_text(text)
        digests.append(step_cache.source_digest.__wrapped__())
    assert digests[0] != digests[1]


def test_a_damaged_entry_is_compiled_again(cache: Path) -> None:
    results = run(compiled())
    entries = [path for path in cache.rglob("*") if path.is_file()]
    assert len(entries) == 1
    entries[0].write_bytes(entries[0].read_bytes()[:1000])
    assert all(map(torch.equal, results, run(compiled())))
    assert found()[0] == 0


def test_a_step_whose_code_is_gone_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(compiled())
    with monkeypatch.context() as patched:
        patched.setattr(FxGraphCache, "cache_hit_post_compile", lambda *_: (None, {}))
        again = compiled()
        assert all(map(torch.equal, results, run(again)))
    assert found()[0] == 0
    assert len(driver.session_of(again).planned) == 1


def test_a_graph_is_the_same_to_inductor_wherever_it_stands() -> None:
    run(compiled())
    counters.pop("inductor", None)
    run(compiled(second="gate"))
    assert counters["inductor"]["fxgraph_cache_hit"] == 2


def test_what_runs_in_this_process_alone_is_not_kept() -> None:
    run(compiled(spec="hybrid_delayed"))
    results = run(compiled(spec="hybrid_delayed"))
    assert found() == (0, 2)
    assert all(t.isfinite().all() for t in results)
