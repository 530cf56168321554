"""The gradient of an embedding: PyTorch's operator, and what Inductor is given instead of its decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fp8c.ops import embedding

aten = torch.ops.aten


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 12, 8, generator=generator).to(dtype), torch.randint(5, (2, 12), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_gradient_of_an_embedding(dtype: torch.dtype) -> None:
    dy, indices = drawn(dtype)
    found = torch.ops.fp8c.embedding_gradient(dy, indices, 7, 3, False)
    table = torch.zeros(7, 8, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.embedding(indices, table, padding_idx=3).backward(dy.double())
    assert table.grad is not None and found.dtype is dtype
    # at most 24 terms for a word: as many roundings, of the type where the CPU adds in it
    terms = torch.zeros_like(table.grad).index_add_(0, indices.view(-1), dy.double().abs().view(-1, 8))
    assert ((found.double() - table.grad).abs() <= 24 * torch.finfo(dtype).eps * terms).all()
    with FakeTensorMode() as mode:
        fake = torch.ops.fp8c.embedding_gradient(mode.from_tensor(dy), mode.from_tensor(indices), 7, 3, False)
    assert fake.shape == found.shape and fake.dtype is dtype


@pytest.mark.parametrize("dtype,is_kept", [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_tables_in_16_bits_are_not_decomposed(dtype: torch.dtype, is_kept: bool) -> None:
    operator = aten.embedding_dense_backward.default
    table = dict(select_decomp_table())
    table[operator] = embedding.decomposition(table[operator])
    traced: fx.GraphModule = make_fx(
        lambda dy, indices: operator(dy, indices, 7, -1, False), decomposition_table=table
    )(*drawn(dtype))
    targets = {n.target for n in traced.graph.nodes}
    assert (torch.ops.fp8c.embedding_gradient.default in targets) == is_kept
    assert any("index_put" in str(t) for t in targets) != is_kept
