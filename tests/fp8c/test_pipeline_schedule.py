"""Pipeline orders against torch.distributed.pipelining, and that every order can run."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from fp8c.diagnostics import DiagnosticError
from fp8c.pipeline_schedule import (
    Action,
    Pair,
    Pipeline,
    actions_of,
    dualpipe,
    dualpipe_v,
    inputs_of,
    interleaved,
    make_pipeline,
    one_f_one_b,
    zero_bubble,
    zero_bubble_v,
)


def bare(cls: type, **attributes: Any) -> Any:
    """A torch schedule without stages or process group: only the fields its order is computed from."""
    schedule: Any = object.__new__(cls)
    for name, value in attributes.items():
        setattr(schedule, name, value)
    return schedule


def torch_orders(cls: type, ranks: int, micro_batches: int, local: int, split: bool = False) -> list[list[str]]:
    """Action strings per rank, without torch's idle slots."""
    rounds = max(1, micro_batches // ranks)
    schedule = bare(
        cls,
        pp_group_size=ranks,
        _n_microbatches=micro_batches,
        n_local_stages=local,
        num_stages=ranks * local,
        _num_stages=ranks * local,
        microbatches_per_round=micro_batches // rounds,
        number_of_rounds=rounds,
    )
    return [
        [text(a) for a in schedule._calculate_single_rank_operations(rank) if a is not None] for rank in range(ranks)
    ]


def text(action: Any) -> str:
    if action.sub_actions:
        return "(" + ";".join(text(a) for a in action.sub_actions) + ")"
    return f"{action.stage_index}{action.computation_type.value}{action.microbatch_index}"


def ours(pipeline: Pipeline) -> list[list[str]]:
    return [[str(step) for step in steps] for steps in pipeline.ranks]


@pytest.mark.parametrize("ranks,micro_batches", [(2, 2), (4, 4), (4, 8), (8, 24), (4, 3)])
def test_1f1b_is_torchs(ranks: int, micro_batches: int) -> None:
    schedule = bare(torch_schedules.Schedule1F1B, _num_stages=ranks, _n_microbatches=micro_batches)
    if micro_batches < ranks:  # torch's own order is wrong there (it counts forwards that do not exist)
        assert can_run(one_f_one_b(ranks, micro_batches))
        return
    orders = schedule._get_pipeline_order()
    compute = {"F", "B"}
    theirs = [[text(a) for a in orders[r] if a is not None and a.computation_type.value in compute] for r in orders]
    mine = ours(one_f_one_b(ranks, micro_batches))
    assert mine[:-1] == theirs[:-1]
    # Torch 2.13 numbers the last rank's forwards from 1 in this table (its execution counts from 0): compare kinds.
    assert [a.split("F")[0].split("B")[0] + a.lstrip("0123456789")[0] for a in mine[-1]] == [
        a.split("F")[0].split("B")[0] + a.lstrip("0123456789")[0] for a in theirs[-1]
    ]


@pytest.mark.parametrize("ranks,micro_batches,local", [(2, 4, 2), (4, 8, 2), (4, 8, 3), (4, 12, 2), (4, 4, 2)])
def test_interleaved_is_torchs(ranks: int, micro_batches: int, local: int) -> None:
    theirs = torch_orders(torch_schedules.ScheduleInterleaved1F1B, ranks, micro_batches, local)
    assert ours(interleaved(ranks, micro_batches, local)) == theirs


@pytest.mark.parametrize("ranks,micro_batches,local", [(4, 8, 1), (4, 8, 2), (8, 16, 1), (2, 6, 3)])
def test_zero_bubble_is_torchs(ranks: int, micro_batches: int, local: int) -> None:
    theirs = torch_orders(torch_schedules.ScheduleInterleavedZeroBubble, ranks, micro_batches, local)
    assert ours(zero_bubble(ranks, micro_batches, local)) == theirs


@pytest.mark.parametrize("ranks,micro_batches", [(4, 8), (4, 4), (2, 3), (8, 20)])
def test_zbv_is_torchs(ranks: int, micro_batches: int) -> None:
    theirs = torch_orders(torch_schedules.ScheduleZBVZeroBubble, ranks, micro_batches, 2)
    assert ours(zero_bubble_v(ranks, micro_batches)) == theirs


@pytest.mark.parametrize("ranks,micro_batches", [(4, 8), (4, 10), (2, 4), (8, 16), (8, 60)])
def test_dualpipev_is_torchs(ranks: int, micro_batches: int) -> None:
    theirs = torch_orders(torch_schedules.ScheduleDualPipeV, ranks, micro_batches, 2)
    assert ours(dualpipe_v(ranks, micro_batches)) == theirs


@pytest.mark.parametrize("ranks,micro_batches", [(4, 8), (8, 20), (16, 120)])
def test_dualpipe_takes_deepseeks_step_counts(ranks: int, micro_batches: int) -> None:
    """Step counts of `dualpipe.py`, recomputed here per rank: overlapped pairs, and delayed weight parts."""
    pipeline = dualpipe(ranks, micro_batches)
    for rank, steps in enumerate(pipeline.ranks):
        position = min(rank, ranks - 1 - rank)
        left = ranks // 2 - position - 1
        main = micro_batches // 2 - ranks + position + 1
        pairs = 2 * main - (1 if left == 0 else 0) + left
        assert sum(isinstance(s, Pair) for s in steps) == pairs
        inputs = [s for s in steps if isinstance(s, Action) and s.kind == "I"]
        weights = [s for s in steps if isinstance(s, Action) and s.kind == "W"]
        assert len(inputs) == len(weights)
        whole = [a for s in steps for a in actions_of(s) if a.kind in "BI"]
        assert len(whole) == micro_batches
        assert sum(a.kind == "F" for s in steps for a in actions_of(s)) == micro_batches


def can_run(pipeline: Pipeline) -> bool:
    """Whether every action's inputs come to exist when each rank runs its list in order."""
    done: set[Action] = set()
    at = [0] * len(pipeline.ranks)
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(pipeline.ranks):
            while at[rank] < len(steps):
                parts = actions_of(steps[at[rank]])
                if any(i not in done for a in parts for i in inputs_of(a, pipeline.stage_count)):
                    break
                for a in parts:
                    done.add(a)
                    if a.kind == "B":
                        done.add(Action("I", a.stage, a.micro_batch, a.way))
                at[rank] += 1
                moved = True
    return all(i == len(steps) for i, steps in zip(at, pipeline.ranks))


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb", "zbv", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("ranks,micro_batches", [(2, 4), (4, 16), (8, 32)])
def test_every_schedule_can_run_and_does_all_work_once(name: str, ranks: int, micro_batches: int) -> None:
    pipeline = make_pipeline(name, ranks, micro_batches)
    assert can_run(pipeline)
    actions = [a for steps in pipeline.ranks for s in steps for a in actions_of(s)]
    assert len(actions) == len(set(actions))
    per_way = micro_batches // pipeline.ways
    for kinds in ("F", "BI", "BW"):
        done = [a for a in actions if a.kind in kinds]
        assert len(done) == pipeline.stage_count * pipeline.ways * per_way


def test_a_swapped_list_is_found_out() -> None:
    good = one_f_one_b(2, 4)
    first, *rest = good.ranks[1]
    swapped = Pipeline(good.name, 2, 4, (good.ranks[0], (rest[0], first, *rest[1:])))
    assert not can_run(swapped)


def test_sizes_a_schedule_cannot_take_are_named() -> None:
    for name, ranks, micro_batches, code in [
        ("dualpipe", 3, 12, "E0942"),
        ("dualpipev", 4, 7, "E0942"),
        ("interleaved", 4, 9, "E0941"),
        ("gpipe2", 4, 8, "E0940"),
    ]:
        with pytest.raises(DiagnosticError) as caught:
            make_pipeline(name, ranks, micro_batches)
        assert caught.value.diagnostics[0].code == code
