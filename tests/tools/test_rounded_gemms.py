"""GEMMs with rounded operands: what a block does to gradients that differ between tokens, and what is left alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8c.tools.rounded_gemms import GradientGroups, RoundedOperands, rounded, text_of


def gradients_of(sizes: Tensor, *, head: bool = False) -> GradientGroups:
    """A Linear whose output's gradient has rows of these sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator).bfloat16().requires_grad_()
    x = torch.randn(len(sizes), 128, generator=generator).bfloat16()
    dy = (torch.randn(len(sizes), 128, generator=generator) * sizes[:, None]).bfloat16()
    with GradientGroups([weight] if head else []) as groups:
        torch.nn.functional.linear(x, weight).backward(dy)
    assert weight.grad is not None and torch.equal(weight.grad, dy.t() @ x), "looking changes nothing"
    return groups


def test_a_token_with_small_gradients_is_lost_beside_a_large_one_in_a_block_only() -> None:
    sizes = torch.full((128,), 2.0**-20)
    sizes[5] = 1.0
    found = gradients_of(sizes).errors()["linears"]
    # E4M3 reaches from 448 down to 2^-9, half of which is 0: a factor of 2^-20 to the block's largest value is too much.
    assert found["128x128"].lost > 0.99 and found["128x128"].token > 0.99
    assert found["1x128"].lost < 0.01 and found["1x128"].token < 2.0**-4
    assert found["128x128"].dx_token is not None and found["128x128"].dx_token > 0.99
    assert abs(found["128x128"].dy - found["1x128"].dy) < 2.0**-6, "norms of the whole tensor hide it"
    assert "linears 128x128" in text_of({"linears": found})


def test_tokens_alike_lose_nothing_in_a_block_and_rows_of_zeros_do_not_count() -> None:
    sizes = torch.ones(130)
    sizes[7] = 0.0
    for errors in gradients_of(sizes).errors()["linears"].values():
        assert max(errors.dy, errors.token) < 2.0**-4 and errors.lost < 1e-3


def test_the_head_stays_out_of_it() -> None:
    assert gradients_of(torch.ones(128), head=True).errors() == {}


def test_rounded_operands_are_what_a_quantize_gives_back() -> None:
    """The yardstick is plain PyTorch; it must round as the compiler's own operator does."""
    import fp8c.ops  # noqa: F401

    x = torch.randn(130, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    for group, text in (((1, 128), "1x128"), ((128, 128), "128x128")):
        data, scale = torch.ops.fp8c.quantize(x, f"e4m3[{text}] fp32")
        back = torch.ops.fp8c.dequantize(data, scale, f"e4m3[{text}] fp32", torch.bfloat16, None, 200)
        # x / (amax / 448) against x * (448 / amax): now and then a tie falls to the neighbouring code.
        found = rounded(x, group)
        assert (found != back).float().mean() < 1e-3
        assert float((found - back).abs().max()) <= 2.0**-3 * float(x.abs().max())


def test_rounded_operands_leave_the_head_and_what_is_not_bf16() -> None:
    head, other = torch.randn(128, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    x = torch.randn(4, 128).bfloat16()
    plain = torch.nn.functional.linear
    with RoundedOperands([head]):
        assert torch.equal(plain(x, head), x @ head.t())
        assert torch.equal(plain(x.float(), other.float()), x.float() @ other.float().t())
        changed = plain(x, other)
    expected = rounded(x, (1, 128)) @ rounded(other, (128, 128)).t()
    assert torch.equal(changed, expected) and not torch.equal(changed, x @ other.t())
