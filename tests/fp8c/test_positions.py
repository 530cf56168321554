"""Which masks are the causal triangle, proven from operators: every way to write one, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fp8c.positions import Affine, Positions, Where, is_causal_triangle

N = 24  # sequence length of the static cases
Mask = Callable[[Tensor], Tensor]


def proven(mask: Mask, symbolic: bool, size: int = N) -> tuple[bool, Tensor]:
    """Whether the analysis proves the mask of a sequence [size] causal, and the mask."""
    x = torch.arange(100, 100 + size)
    graph = make_fx(mask, tracing_mode="symbolic" if symbolic else "fake")(x).graph
    (result,) = graph.output_node().all_input_nodes
    return is_causal_triangle(Positions().value(result), result.meta["val"].dim()), mask(x)


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0])


CAUSAL: dict[str, Mask] = {
    "tril of ones": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(),
    "not triu": lambda x: ~torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1),
    "keys <= queries": lambda x: positions(x)[None, :] <= positions(x)[:, None],
    "queries >= keys, rank 4": lambda x: (positions(x)[:, None] >= positions(x)[None, :])[None, None].expand(
        2, 1, -1, -1
    ),
    "keys < queries + 1": lambda x: positions(x) < (positions(x) + 1).view(-1, 1),
    "not keys > queries": lambda x: torch.logical_not(positions(x) > positions(x).unsqueeze(1)),
    "minus infinity above": lambda x: torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1),
    "filled": lambda x: torch.zeros(x.shape[0], x.shape[0]).masked_fill(
        torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1), float("-inf")
    ),
    "where, the least BF16": lambda x: torch.where(
        positions(x)[None, :] <= positions(x)[:, None],
        torch.zeros((), dtype=torch.bfloat16),
        torch.full((), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16),
    ),
    "one minus, times the least": lambda x: (
        (1.0 - (positions(x)[None, :] <= positions(x)[:, None]).to(torch.float32)) * torch.finfo(torch.float32).min
    ),
    "positions counted by cumsum": lambda x: (
        torch.ones_like(x).cumsum(0)[None, :] <= torch.ones_like(x).cumsum(0)[:, None]
    ),
    "and with all true": lambda x: (positions(x)[None, :] <= positions(x)[:, None]) & torch.ones((), dtype=torch.bool),
    "twice the same": lambda x: (
        (positions(x)[None, :] <= positions(x)[:, None]) & torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril()
    ),
    "looked up": lambda x: (positions(x)[None, :] <= positions(x)[:, None])[positions(x)[:, None], positions(x)],
}

OTHERS: dict[str, Mask] = {
    "transposed": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril().t(),
    "strictly below": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(-1),
    "one more": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(1),
    "window": lambda x: (
        (positions(x)[None, :] <= positions(x)[:, None]) & (positions(x)[None, :] > positions(x)[:, None] - 8)
    ),
    "padding": lambda x: (positions(x)[None, :] <= positions(x)[:, None]) & (x > 110)[None, :],
    "positions given": lambda x: x[None, :] <= x[:, None],
    "inverted": lambda x: positions(x)[None, :] > positions(x)[:, None],
    "minus infinity below": lambda x: torch.full((x.shape[0], x.shape[0]), float("-inf")).tril(),
    "a penalty, not a mask": lambda x: torch.full((x.shape[0], x.shape[0]), -1e4).triu(1),
    "a bonus for what is seen": lambda x: torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1) + 1.0,
    "blocks": lambda x: positions(x)[None, :] // 4 <= positions(x)[:, None] // 4,
    "negative indices": lambda x: (positions(x)[None, :] <= positions(x)[:, None])[
        (positions(x) - 1)[:, None], positions(x) - 1
    ],
    "small numbers wrap around": lambda x: (
        (positions(x) * 32).to(torch.int8)[None, :] <= (positions(x) * 32).to(torch.int8)[:, None]
    ),
    "either": lambda x: (positions(x)[None, :] <= positions(x)[:, None]) | (positions(x)[None, :] < 4),
    "steps of two": lambda x: positions(x)[None, :] * 2 <= positions(x)[:, None],
    "depends on the batch": lambda x: (
        (positions(x)[None, :] <= positions(x)[:, None])
        & (torch.arange(2)[:, None, None] <= positions(x)[None, :, None])
    ),
    "all": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool),
}


def is_triangle(mask: Tensor) -> bool:
    visible = mask if mask.dtype is torch.bool else mask == 0
    hidden = ~mask if mask.dtype is torch.bool else mask <= torch.finfo(torch.bfloat16).min
    want = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    return bool((visible == want).all() and (hidden == ~want).all())


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_is_proven(name: str, symbolic: bool) -> None:
    found, mask = proven(CAUSAL[name], symbolic)
    assert is_triangle(mask) and found


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_mask_is_not(name: str, symbolic: bool) -> None:
    found, mask = proven(OTHERS[name], symbolic)
    assert not found
    assert not is_triangle(mask) or name in ("positions given", "negative indices")  # these are causal for some data


def test_a_window_that_never_binds_is_causal_for_that_length_only() -> None:
    window = OTHERS["window"]
    assert proven(window, symbolic=False, size=8)[0]
    assert not proven(window, symbolic=True, size=8)[0]
    assert not proven(window, symbolic=False, size=9)[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_proven_values_are_the_values(data: st.DataObject) -> None:
    """Random programs over positions: what is derived agrees with what is computed."""
    steps = data.draw(st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=5))
    numbers = data.draw(st.lists(st.integers(-3, 5), min_size=len(steps), max_size=len(steps)))

    def program(x: Tensor) -> Tensor:
        y = torch.arange(6)[None, :].expand(5, -1)
        for step, number in zip(steps, numbers):
            y = _STEPS[step](y, number)
        return y

    graph = make_fx(program, tracing_mode="fake")(torch.zeros(1)).graph
    (result,) = graph.output_node().all_input_nodes
    value, want = Positions().value(result), program(torch.zeros(1))
    if value is not None:
        assert torch.equal(evaluated(value, want.shape), want.to(torch.float64))


_STEPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "add": lambda y, n: y + n,
    "minus rows": lambda y, n: y.long() - torch.arange(y.shape[0])[:, None],
    "times": lambda y, n: y * n,
    "from": lambda y, n: n - y.long(),
    "below": lambda y, n: y.long() < n,
    "at least": lambda y, n: y.long() >= n,
    "same": lambda y, n: y.long() == n,
    "transposed": lambda y, n: y.t(),
    "behind the first": lambda y, n: y[:, 1:] if y.shape[1] > 1 else y,
    "every other": lambda y, n: y[::2],
    "again": lambda y, n: torch.cat([y[:, :1], y], 1),
    "continued": lambda y, n: torch.cat([y[:, :1].long() - 1, y.long()], 1),
    "summed": lambda y, n: y.cumsum(1),
    "not": lambda y, n: ~(y.bool()),
    "and below": lambda y, n: y.bool() & (torch.arange(y.shape[1]) < n),
    "lower": lambda y, n: y.tril(n),
    "upper": lambda y, n: y.triu(n),
    "unit axis": lambda y, n: y[None].permute(1, 0, 2).reshape(y.shape),
    "picked": lambda y, n: y.bool().where(torch.tensor(True), torch.tensor(False)),
}


def evaluated(value: Affine | Where, shape: torch.Size) -> Tensor:
    grid = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")

    def affine(v: Affine) -> Tensor:
        total = torch.full(shape, float(v.const), dtype=torch.float64)
        for c, axis in zip(v.coefs, grid, strict=True):
            total += c * axis
        return total

    if isinstance(value, Affine):
        return affine(value)
    holds = torch.ones(shape, dtype=torch.bool)
    for condition in value.conditions:
        holds &= affine(condition) >= 0
    return torch.where(holds, float(value.yes), float(value.no)).double()
