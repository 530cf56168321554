"""The AdamW kernels compile for a Hopper GPU on a machine without one, with loads of 16 bytes and nothing exchanged."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fp8c.backends.triton import adamw  # noqa: E402

SCALARS = {"n": "i32", "lr": "fp32", "gain1": "fp32", "kept2": "fp32", "gain2": "fp32", "eps": "fp32"}
TABLES = {"addresses": "*i64", "sizes": "*i64", "chunks": "*i32"}
UPDATE = TABLES | {"control": "*fp32", "corrections": "*fp32"} | SCALARS | {"weight_decay": "fp32"}
DECIDE = {
    "steps": "*i64", "betas": "*fp64", "corrections": "*fp32", "square_sum": "*fp32", "control": "*fp32", "n": "i32",
    "grad_scale": "fp32", "max_norm": "fp32",
}  # fmt: skip


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    if not isinstance(kernel, triton.runtime.jit.JITFunction):
        pytest.skip("Triton's interpreter was switched on before the kernels were imported")
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": adamw.WARPS})


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("recipe", [True, False], ids=["recipe", "fp32"])
def test_the_update(recipe: bool, is_aligned: bool) -> None:
    half = tl.bfloat16 if recipe else tl.float32
    types = {"PARAM": half, "GRAD": tl.float32, "MASTER_TYPE": tl.float32, "FIRST": half, "SECOND": half}
    flags = {"HAS_MASTER": recipe, "CLEARS": True, "ALIGNED": is_aligned, "CHUNK": adamw.CHUNK, "BLOCK": adamw.BLOCK}
    found = compiled(adamw.adamw_kernel, UPDATE, types | flags)
    wide = set(re.findall(r"ld\.global\.v4\.b32", found.asm["ptx"]))
    assert bool(wide) == is_aligned
    assert found.metadata.shared == 0, "threads exchange data: types have different layouts"


@pytest.mark.parametrize("grad", [tl.float32, tl.bfloat16], ids=["fp32", "bf16"])
def test_the_norm(grad: Any) -> None:
    constants = {"GRAD": grad, "ALIGNED": True, "CHUNK": adamw.CHUNK, "BLOCK": adamw.BLOCK}
    compiled(adamw.square_sum_kernel, TABLES | {"partials": "*fp32", "n": "i32"}, constants)


@pytest.mark.parametrize("checked", [True, False])
def test_the_decision(checked: bool) -> None:
    compiled(adamw.decide_kernel, DECIDE, {"COUNT": 128, "CHECKED": checked})
