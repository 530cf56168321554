"""What the scaled GEMMs multiply, as one record. Their schemas (`fp8c.ops`) list it argument by argument."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

_Result = TypeVar("_Result")


class Operands(NamedTuple):
    """Two FP8 operands, each with its scales and format, reduced along their last axis.

    promote_every: elements of K between promotions to FP32; 0: only where a scale changes along K
    offs: int32 [E], cumulative ends of the experts; None where nothing is grouped
    """

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor
    a_fmt: str
    b_fmt: str
    promote_every: int
    offs: Tensor | None = None

    @property
    def ends(self) -> Tensor:
        """`offs` of a grouped product."""
        assert self.offs is not None
        return self.offs


_EXPERTS = 4  # where `offs` stands among the operands' arguments
_COUNT = 7  # of the others


def takes_operands(implementation: Callable[..., _Result]) -> Callable[..., _Result]:
    """An operator's implementation on (accumulator,) `Operands` (, out_dtype), callable with the operator's own arguments.

    Its name says what these are: ..._add_ takes an accumulator first, scaled_grouped_... takes `offs` behind b's scales.
    """
    start = int(implementation.__name__.endswith("_add_"))
    if "grouped" in implementation.__name__:
        experts, end = start + _EXPERTS, start + _COUNT + 1

        @functools.wraps(implementation)
        def call(*args: Any) -> _Result:
            given = Operands._make((*args[start:experts], *args[experts + 1 : end], args[experts]))
            return implementation(*args[:start], given, *args[end:])
    else:
        end = start + _COUNT

        @functools.wraps(implementation)
        def call(*args: Any) -> _Result:
            return implementation(*args[:start], Operands(*args[start:end]), *args[end:])

    return call
