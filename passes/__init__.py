"""The rewrites, in the order they run. This tuple is the only place that says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import fp8c.ops  # noqa: F401  (defines the operators)
from fp8c.diagnostics import ExitCode, fail
from fp8c.passes.assign_roles import AssignRoles
from fp8c.passes.causal_attention import CausalAttention
from fp8c.passes.choose_saved import ChooseSaved
from fp8c.passes.compress_saved import CompressSaved
from fp8c.passes.fp8_dispatch import Fp8Dispatch
from fp8c.passes.fuse_casts import FuseCasts
from fp8c.passes.fuse_combine import FuseCombine
from fp8c.passes.fuse_head_loss import FuseHeadLoss
from fp8c.passes.gather_gradients import GatherGradients
from fp8c.passes.insert_quantize import InsertQuantize
from fp8c.passes.requantize_for_wgrad import RequantizeForWgrad
from fp8c.passes.schedule_overlap import ScheduleOverlap

#: On the joint graph. Roles come first: the plan is resolved on what assign-roles finds.
ROLES = AssignRoles()
JOINT_PASSES = (
    CausalAttention(),
    GatherGradients(),
    FuseHeadLoss(),
    InsertQuantize(),
    RequantizeForWgrad(),
    Fp8Dispatch(),
    ChooseSaved(),
)

#: On the two halves, after partition.
HALF_PASSES = (CompressSaved(), FuseCasts(), FuseCombine(), ScheduleOverlap())

ALL_PASSES = (ROLES, *JOINT_PASSES, *HALF_PASSES)

#: Exact rewrites that no spec asks for: on unless a step is compiled without them.
OPTIONAL = frozenset({CausalAttention.name, GatherGradients.name, FuseHeadLoss.name, FuseCasts.name, FuseCombine.name})


def check_optional(names: Iterable[str]) -> frozenset[str]:
    """The passes a step is compiled without. Raises: DiagnosticError E0701 (usage) for one that is not optional."""
    names = frozenset(names)
    for name in sorted(names - OPTIONAL):
        near = difflib.get_close_matches(name, OPTIONAL, 1, 0.5)
        every = {p.name for p in ALL_PASSES}
        raise fail(
            "E0701",
            f"pass '{name}' can't be left out" if name in every else f"there is no pass '{name}'",
            help=f"did you mean '{near[0]}'?" if near else f"optional passes are {', '.join(sorted(OPTIONAL))}",
            exit_code=ExitCode.USAGE,
        )
    return names
