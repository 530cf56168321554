"""Stages of `torch.distributed.pipelining` whose forward and backward run as one scheduled graph where a schedule pairs them.

    stages = [PipelineStage(StageModule(step), index, count, device, input_args=x, output_args=y, dw_builder=no_weight_work)]
    schedule = ScheduleDualPipeV(stages, n_microbatches, loss_fn=loss)
    overlap_pairs(schedule)
    schedule.step(x, target=...)

A stage's module is captured at its first call, as graphs (`fp8c.stage`): autograd sees one function. For an action
OVERLAP_F_B the backward runs the forward of the other micro-batch with it, in the order found for the pair.
Source: torch.distributed.pipelining.schedules, `_PipelineScheduleRuntime._step_microbatches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules

from fp8c import driver
from fp8c.passes.schedule_overlap import NodeCost
from fp8c.stage import Pair, Stage


class StageModule(nn.Module):
    """A module as its stage's graphs; the same parameters, called with tensors and returning one tensor.

    step:    what `fp8c.compile` returned
    cost_us: durations of nodes that pairs are scheduled with; all ranks have to use the same
    """

    def __init__(self, step: nn.Module, cost_us: NodeCost) -> None:
        super().__init__()
        self.step = driver.uncompiled(step)
        self.cost_us = cost_us
        self.session = driver.session_of(step)
        self.stages: dict[tuple[Any, ...], Stage] = {}
        self.pairs: dict[tuple[int, int], Pair] = {}
        self.anchor = torch.zeros((), requires_grad=True)  # so that autograd calls back for inputs without gradients
        self.partner: tuple[StageModule, tuple[Tensor, ...]] | None = None
        self.ahead: tuple[Tensor, list[Any]] | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = _Run.apply(self, self.anchor, *inputs)  # type: ignore[no-untyped-call]
        return result

    def stage_for(self, inputs: Sequence[Tensor]) -> Stage:
        key = tuple((tuple(t.shape), t.dtype) for t in inputs)
        if key not in self.stages:
            with torch.enable_grad():  # also from inside an autograd function
                self.stages[key] = Stage.capture(self.step, inputs, self.session.fresh())
        return self.stages[key]

    def paired_with(self, behind: Stage, inputs: Sequence[Tensor]) -> Pair:
        """This module's forward beside `behind`'s backward."""
        ahead = self.stage_for(inputs)
        key = id(ahead), id(behind)
        if key not in self.pairs:
            self.pairs[key] = Pair(ahead, behind, self.cost_us)
        return self.pairs[key]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: StageModule, anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.module, ctx.stage = module, module.stage_for(inputs)
        if module.ahead is not None:  # a pair has computed it already
            (output, ctx.kept), module.ahead = module.ahead, None
            return output
        outputs, ctx.kept = module.stage_for(inputs).forward(*inputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        module: StageModule = ctx.module
        if module.partner is None:
            return None, None, *ctx.stage.backward(ctx.kept, dy)
        (partner, inputs), module.partner = module.partner, None
        pair = partner.paired_with(ctx.stage, inputs)
        (output,), kept, gradients = pair.run(inputs, ctx.kept, (dy,))
        partner.ahead = output, kept
        return None, None, *gradients


def no_weight_work() -> Callable[[], None]:
    """`dw_builder` of a stage: its backward graph has computed weight gradients with the inputs'."""
    return lambda: None


def overlap_pairs(schedule: Any) -> None:
    """Let a schedule with OVERLAP_F_B actions (ScheduleDualPipeV) run their two halves as one graph."""
    schedule.register_custom_function(schedules.OVERLAP_F_B, _run_pair)


def _run_pair(action: Any, context: Any) -> None:
    schedule = context.schedule_ref
    ahead, behind = action.sub_actions
    stages = {stage.stage_index: stage for stage in schedule._stages}
    front, back = stages[ahead.stage_index], stages[behind.stage_index]
    if not front.is_first and ahead.stage_index - 1 not in stages:
        schedules._wait_batch_p2p(schedule.fwd_recv_ops.pop((ahead.stage_index, ahead.microbatch_index)))
    if not back.is_last and behind.stage_index + 1 not in stages:
        schedules._wait_batch_p2p(schedule.bwd_recv_ops.pop((behind.stage_index, behind.microbatch_index)))
    given = context.arg_mbs[ahead.microbatch_index]
    inputs = given if front.is_first else front._retrieve_recv_activations(ahead.microbatch_index)

    back.submod.partner = front.submod, tuple(inputs)
    schedule.backward_counter[behind.stage_index] += 1
    back.backward_one_chunk(
        behind.microbatch_index,
        loss=schedule._maybe_get_loss(back, behind.microbatch_index),
        full_backward=True,
        last_backward=schedule.backward_counter[behind.stage_index] == schedule._n_microbatches,
    )
    if behind.stage_index - 1 in stages:
        gradient = back.get_local_bwd_output(behind.microbatch_index)
        stages[behind.stage_index - 1].set_local_bwd_input(gradient, behind.microbatch_index)

    output = front.forward_one_chunk(ahead.microbatch_index, given, context.kwarg_mbs[ahead.microbatch_index])
    schedule._maybe_compute_loss(front, output, context.target_mbs, ahead.microbatch_index)
    if ahead.stage_index + 1 in stages:
        stages[ahead.stage_index + 1].set_local_fwd_input(output, ahead.microbatch_index)
