"""The rewrites, in the order they run. This tuple is the only place that says so."""

from __future__ import annotations

import fp8c.ops  # noqa: F401  (defines the operators)
from fp8c.passes.assign_roles import AssignRoles
from fp8c.passes.choose_saved import ChooseSaved
from fp8c.passes.compress_saved import CompressSaved
from fp8c.passes.fp8_dispatch import Fp8Dispatch
from fp8c.passes.insert_quantize import InsertQuantize
from fp8c.passes.requantize_for_wgrad import RequantizeForWgrad
from fp8c.passes.schedule_overlap import ScheduleOverlap

#: On the joint graph. Roles come first: the plan is resolved on what assign-roles finds.
ROLES = AssignRoles()
JOINT_PASSES = (
    InsertQuantize(),
    RequantizeForWgrad(),
    Fp8Dispatch(),
    ChooseSaved(),
)

#: On the two halves, after partition.
HALF_PASSES = (CompressSaved(), ScheduleOverlap())

ALL_PASSES = (ROLES, *JOINT_PASSES, *HALF_PASSES)
