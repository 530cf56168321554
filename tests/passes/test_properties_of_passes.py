"""For every pass: a second run changes nothing, and what the plan does not mark stays as it is."""

from __future__ import annotations

import pytest
import torch

from fp8c import graph as g
from fp8c import verifier
from fp8c.pass_manager import PassManager
from fp8c.passes import HALF_PASSES, JOINT_PASSES, ROLES
from fp8c.tools import opt
from tests.passes.steps import STEPS, experts, linear, two_layers

ops = torch.ops.fp8c
ORDER = [ROLES.name, *(p.name for p in JOINT_PASSES)]


@pytest.mark.parametrize("step", STEPS)
def test_a_second_run_changes_nothing(step: str) -> None:
    captured = STEPS[step]()
    names = [name for name in ORDER for _ in range(2)]
    result = opt.run_passes(captured, passes=names)
    assert [changed for _, changed in result.changed[1::2]] == [0] * len(ORDER)


@pytest.mark.parametrize("step", STEPS)
def test_the_whole_pipeline_twice_changes_nothing(step: str) -> None:
    captured = STEPS[step]()
    result = opt.run_passes(captured, passes=ORDER)
    manager = PassManager(verifier.INVARIANTS)
    again = manager.run(result.graph, [opt.find_pass(name) for name in ORDER[1:]], result.ctx, {"roles"})
    assert [r.changed for r in manager.records] == [0] * len(ORDER[1:])
    assert g.structural_hash(again) == g.structural_hash(result.graph)


@pytest.mark.parametrize("step", STEPS)
def test_passes_on_halves_change_nothing_the_second_time(step: str) -> None:
    names = [*ORDER, opt.PARTITION, *(p.name for p in HALF_PASSES for _ in range(2))]
    result = opt.run_passes(STEPS[step](), passes=names)
    assert dict(result.changed[-2 * len(HALF_PASSES) + 1 :: 2]) == {p.name: 0 for p in HALF_PASSES}


@pytest.mark.parametrize("step", STEPS)
def test_roles_are_the_same_when_assigned_again(step: str) -> None:
    captured = STEPS[step]()
    first = opt.run_passes(captured, passes=["assign-roles"])
    again = opt.run_passes(captured, passes=["assign-roles"])
    assert first.ctx.uses == again.ctx.uses


@pytest.mark.parametrize("step", STEPS)
def test_a_plan_without_fp8_leaves_the_graph_as_it_is(step: str) -> None:
    captured = STEPS[step]()
    result = opt.run_passes(captured, "bf16", ORDER)
    assert [changed for _, changed in result.changed] == [0] * len(ORDER)
    assert g.structural_hash(result.graph) == g.structural_hash(captured.joint.graph)


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_compressed_without_a_format(step: str) -> None:
    result = opt.run_passes(STEPS[step](), "bf16", [*ORDER, opt.PARTITION, "compress-saved"])
    assert result.changed[-1] == ("compress-saved", 0)
    assert result.halves is not None
    assert all(saved.format is None for saved in result.ctx.saved.values())


def test_a_value_is_quantized_once_per_format_and_direction() -> None:
    result = opt.run_passes(experts(), passes=ORDER)
    seen = set()
    for node in g.calls(result.graph, {ops.quantize.default}):
        key = (g.strip(node.args[0], g.ROW_VIEWS), node.args[1])  # type: ignore[arg-type]
        assert key not in seen, g.node_text(node)
        seen.add(key)


def test_partition_decides_nothing() -> None:
    """What crosses is what choose-saved listed, inputs, and nothing else; all of the joint graph's results come out."""
    result = opt.run_passes(two_layers(), passes=[*ORDER, opt.PARTITION])
    assert result.halves is not None
    crossing = {n.name for n in result.halves.saved() if n.op != "placeholder"}
    assert crossing == set(result.ctx.saved)
    joint_outputs = g.output_node(result.graph).args[0]
    backward_outputs = g.output_node(result.halves.backward.graph).args[0]
    assert len(joint_outputs) == 1 + len(backward_outputs)  # type: ignore[arg-type]


def test_partition_recomputes_what_is_not_saved() -> None:
    """Without a saved value everything backward needs is computed again from inputs."""
    result = opt.run_passes(two_layers(), passes=[*ORDER[:-1]])
    result.ctx.saved.clear()
    from torch import fx

    from fp8c.partition import partition

    step = two_layers()
    halves = partition(fx.GraphModule(step.joint, g.copy_graph(result.graph)), result.ctx)
    assert [n for n in halves.saved() if n.op != "placeholder"] == []
    forward_gemms = sum(1 for _ in g.calls(halves.forward.graph, {ops.scaled_mm.default}))
    backward_gemms = sum(1 for _ in g.calls(halves.backward.graph, {ops.scaled_mm.default}))
    assert (forward_gemms, backward_gemms) == (2, 4 + 1)  # the first layer again: silu and the second wgrad read it


def test_inputs_stay_in_front() -> None:
    for make in (linear, experts):
        result = opt.run_passes(make(), passes=[*ORDER, opt.PARTITION, "compress-saved"])
        assert result.halves is not None
        for graph in (result.graph, result.halves.forward.graph, result.halves.backward.graph):
            kinds = [n.op == "placeholder" for n in graph.nodes]
            assert kinds == sorted(kinds, reverse=True)
