"""Expert parallelism on gloo ranks against one device: the same bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8c.tools.compile_command import Request, compile_model

Run = Callable[..., list[Any]]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"distributed_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def jobs() -> ModuleType:
    return load("jobs")


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return load("jobs_training")


@pytest.fixture(scope="module")
def two() -> Iterator[Run]:
    with load("ranks").pool(2) as run:
        yield run


@pytest.fixture(scope="module")
def four() -> Iterator[Run]:
    with load("ranks").pool(4) as run:
        yield run


def check_step(run: Run, jobs: ModuleType, world: int, *args: Any) -> None:
    """Forward and expert gradients against one device with all ranks' sequences in one batch; replicated parameters
    against one device per rank, summed in rank order."""
    got = run("expert_parallel_step", *args)
    assert len({g["plan"] for g in got}) == 1
    together = jobs.one_device_step(*args[:2], list(range(world)), *args[2:])
    for rank, found in enumerate(got):
        assert torch.equal(found["logits"], together["logits"][rank : rank + 1])
    for name, gradient in got[0]["experts"].items():
        assert torch.equal(gradient, jobs.stacked(together["gradients"], name)), name
        assert torch.equal(got[0]["experts reduced"][name], gradient / world), name
    assert len(got[0]["experts"]) == (2 if args[0] == "hf" else 3)
    alone = [jobs.one_device_step(*args[:2], [rank], *args[2:])["gradients"] for rank in range(world)]
    for name in got[0]["own"]:
        total = torch.zeros_like(alone[0][name], dtype=torch.float32)
        for rank in range(world):
            assert torch.equal(got[rank]["own"][name], alone[rank][name]), name
            total += alone[rank][name].float()
        mean = (total / world).to(alone[0][name].dtype)
        assert all(torch.equal(found["reduced"][name], mean) for found in got), name


# deepseek_v3 sends FP8: rows are quantized before they travel instead of after, which is the same to the bit.
@pytest.mark.parametrize("kind", ["hf", "loop"])
@pytest.mark.parametrize("spec", ["bf16", "deepseek_v3"])
@pytest.mark.slow
def test_two_ranks_compute_what_one_device_does(two: Run, jobs: ModuleType, kind: str, spec: str) -> None:
    check_step(two, jobs, 2, kind, spec)


@pytest.mark.slow
def test_a_step_of_a_mesh_goes_through_inductor(two: Run) -> None:
    """Numbers of rows that are known at run time only: Inductor compiles them, and computes what the graph as it is does.

    It fuses roundings to BF16 away, after which an E4M3 operand may round to its other neighbour: 2**-4 of the value.
    """
    plain, compiled = two("expert_parallel_step", "loop", "deepseek_v3"), two("inductor_step", "loop", "deepseek_v3")
    for one, other in zip(plain, compiled):
        for a, b in zip((one["logits"], *one["experts"].values()), (other["logits"], *other["experts"].values())):
            assert (a.float() - b.float()).norm() <= 2**-4 * a.float().norm()


@pytest.mark.slow
def test_a_rank_whose_experts_get_no_row(two: Run, jobs: ModuleType) -> None:
    """Every token goes to experts 1 and 2: the second rank receives nothing."""
    check_step(two, jobs, 2, "loop", "deepseek_v3", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spec", "expert", "experts"), [("hf", "bf16", None, 8), ("loop", "deepseek_v3", 5, 7)]
)
def test_four_ranks_compute_what_one_device_does(
    four: Run, jobs: ModuleType, kind: str, spec: str, expert: int | None, experts: int
) -> None:
    """The second with seven experts (2, 2, 2, 1 of them on the ranks) and every token at experts 5 and 6."""
    check_step(four, jobs, 4, kind, spec, expert, experts)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "spec"), [("hf", "bf16"), ("loop", "deepseek_v3")])
def test_pairs_of_micro_batches_give_the_same_bits(two: Run, kind: str, spec: str) -> None:
    """Scheduled pairs of a forward and a backward against autograd, one micro-batch after another."""
    for found in two("paired_steps", kind, spec):
        plain, paired = found["plain"], found["paired"]
        assert found["moved"] > 0
        for name in ("outputs", "dx"):
            assert len(plain[name]) == len(paired[name]) == 3
            assert all(torch.equal(a, b) for a, b in zip(plain[name], paired[name])), name
        assert plain["gradients"].keys() == paired["gradients"].keys()
        assert all(torch.equal(a, paired["gradients"][n]) for n, a in plain["gradients"].items())


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_loads_on_four(two: Run, four: Run, tmp_path: Path) -> None:
    saved = two("save_step", str(tmp_path / "checkpoint"))[0]
    for loaded in four("load_step", str(tmp_path / "checkpoint")):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(value, loaded[name]) for name, value in saved.items())


@pytest.mark.slow
def test_a_one_device_checkpoint_loads(two: Run) -> None:
    assert two("load_one_device_state") == [True, True]


@pytest.mark.slow
def test_fsdp2_around_the_dense_parameters(two: Run, jobs: ModuleType) -> None:
    got = two("fsdp_step", "bf16")
    for rank, found in enumerate(got):
        alone = jobs.one_device_step("loop", "bf16", [rank])
        assert torch.equal(found["logits"], alone["logits"])


@pytest.mark.slow
def test_ranks_that_differ_are_told_before_they_exchange_anything(two: Run) -> None:
    for text in two("different_specs"):
        assert "E0863" in text and "ranks 0 and 1 differ in spec" in text
    for text in two("different_graphs"):
        assert "E0863" in text and "ranks 0 and 1 differ in graph" in text and "dynamic=True" in text


@pytest.mark.slow
def test_an_optimizer_refuses_gradients_that_differ_between_ranks(two: Run) -> None:
    for text in two("unreduced_gradients"):
        assert "E0864" in text and "reduce_gradients" in text


@pytest.mark.slow
def test_fp32_accumulators_of_a_mesh(two: Run, jobs: ModuleType, training: ModuleType) -> None:
    """Experts' accumulators against one device with both ranks' sequences in a batch, the others' against one device
    per rank, all over two micro-batches; reduced ones are means in rank order; the optimizer refuses others."""
    got = two("main_grad_steps", "deepseek_v3")
    together = training.one_device_main_grads("deepseek_v3", [[0, 1], [10, 11]])
    alone = [training.one_device_main_grads("deepseek_v3", [[rank], [rank + 10]]) for rank in range(2)]
    assert len(got[0]["summed"]) == 3
    for rank, found in enumerate(got):
        assert "E0864" in found["refused"]
        assert found["grads"] == [] and found["zeroed"]
        assert set(found["moved"]) == found["reduced"].keys()
        for name, total in found["summed"].items():
            assert total.dtype is torch.float32
            assert torch.equal(total, jobs.stacked(together, name)), name
            assert torch.equal(found["reduced"][name], total / 2), name
        for name, mine in found["own"].items():
            assert torch.equal(mine, alone[rank][name]), name
            assert torch.equal(found["reduced"][name], (alone[0][name] + alone[1][name]) / 2), name


@pytest.mark.slow
@pytest.mark.parametrize("main_grad", [False, True])
def test_gradients_are_divided_once(two: Run, main_grad: bool) -> None:
    for found in two("reduced_again", main_grad):
        for other in ("twice", "zeroed", "stepped"):
            assert all(torch.equal(g, found[other][n]) for n, g in found["once"].items()), other
        assert "E0868" in found["told"] and "zero_grad()" in found["told"]


@pytest.mark.slow
def test_ranks_with_batches_of_different_sizes(two: Run, jobs: ModuleType, training: ModuleType) -> None:
    """Losses have the bits of one process; gradients add rows up in another order, and wgrad's groups of 128 tokens hold
    other tokens: an E4M3 value is off by 2**-4 of itself at most."""
    want = training.uneven_alone(2)
    for rank, found in enumerate(two("uneven_batches")):
        assert all(torch.equal(a, b) for a, b in zip(found["losses"], want["losses"][rank]))
        for name, gradient in found["gradients"].items():
            expected = jobs.stacked(want["gradients"], name)
            assert (gradient - expected).norm() <= 2**-4 * expected.norm(), name


@pytest.mark.slow
def test_a_build_of_a_mesh_loads_on_its_ranks(two: Run, jobs: ModuleType, training: ModuleType, tmp_path: Path) -> None:
    """The plan of rank 0 with even rows and no other process, run by two."""
    example = str(jobs.ROOT / "examples" / "moe_transformer.py")
    request = Request(
        example, "deepseek_v3", "cpu", out=tmp_path / "build", mesh=(("ep", 2),), overrides=training.SMALL,
        batch=1, seq=jobs.LENGTH, baseline=False,
    )  # fmt: skip
    try:
        compile_model(request)
    finally:
        dist.destroy_process_group()
    for found in two("loaded_build", str(tmp_path / "build")):
        assert "E0866" in found["told"] and "mesh ep=2, found no mesh" in found["told"]
        assert torch.equal(found["loss"], found["alone"])
        assert len(found["sharded"]) == 6


@pytest.mark.slow
def test_routing_limited_to_nodes_stays_limited(two: Run) -> None:
    """DeepSeek-V3's group-limited routing with a group on each rank: all rows of a token go to one rank."""
    for found in two("limited_routing", "deepseek_v3"):
        ranks = found["chosen"] // 4
        assert ranks.shape[-1] == 3 and bool((ranks == ranks[:, :1]).all())
        assert found["sent"] == torch.bincount(ranks.flatten(), minlength=2).tolist()
        assert min(found["sent"]) > 0
        assert torch.equal(found["y"], found["alone"])


@pytest.mark.slow
def test_torchtitans_dispatcher_is_used_as_it_is(two: Run, training: ModuleType, zoo: ModuleType) -> None:
    """torchtitan's own collectives stay, with FP8 payloads where the spec has them, and nothing is sharded again."""
    if zoo.why_no_titan():
        pytest.skip(zoo.why_no_titan())
    got = two("titan_expert_parallel", "deepseek_v3")
    together = training.titan_one_device("deepseek_v3", 2)
    for rank, found in enumerate(got):
        forward, backward = found["sent"]
        assert sorted(forward) == ["bfloat16", "float32", "int64", "uint8"]  # combine, scales, counts, payload
        assert sorted(backward) == ["float32", "uint8"]  # the input needs no gradient
        assert torch.equal(found["y"], together["y"][rank : rank + 1])
        assert len(found["experts"]) == 3
        for name, gradient in found["experts"].items():
            assert torch.equal(gradient, together["gradients"][name]), name


@pytest.mark.slow
def test_a_rank_that_dies_is_reported(jobs: ModuleType) -> None:
    with load("ranks").pool(2, 30.0) as run:
        told, died = run("lose_a_rank")
    assert died == (7,)
    assert "E0865" in told


@pytest.mark.slow
def test_dualpipe_runs_its_pairs_as_one_graph(two: Run) -> None:
    for found in two("dualpipe", "deepseek_v3"):
        assert found["pairs"] > 0
        assert found["found"].keys() == found["want"].keys()
        assert all(torch.equal(gradient, found["want"][name]) for name, gradient in found["found"].items())


@pytest.mark.slow
def test_dispatch_sends_half_the_bytes(two: Run) -> None:
    """Dispatch and the gradient's dispatch in FP8 with their scales, combine both ways in BF16."""
    in_bf16, in_fp8 = two("sent_bytes", "bf16"), two("sent_bytes", "deepseek_v3")
    for wide, narrow in zip(in_bf16, in_fp8):
        combined = narrow["torch.bfloat16 [128]"]
        dispatched = wide["torch.bfloat16 [128]"] - combined
        quantized = narrow["torch.uint8 [128]"] + narrow["torch.float32 [1]"]
        assert dispatched > 0
        assert quantized <= 0.52 * dispatched
        assert narrow["torch.uint8 [128]"] * 2 == dispatched
