"""Hopper's fused kernels without a GPU: every instance compiles, none spills, and what they don't take is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="its cuobjdump reads the machine code")

from fp8c.backends.cuda import build, operators
from fp8c.backends.cuda.fused import FusedConfig
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.backends.triton.ahead import resources

ROWS, ROWS_2, COLUMNS, COLUMNS_2 = "e4m3[1x128] fp32", "e4m3[1x128] pow2", "e4m3[128x1] fp32", "e4m3[128x1] pow2"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def config(op: str, *arguments: Any) -> FusedConfig:
    found: FusedConfig = operators.CONFIGS[op](*arguments)
    return found


def backward(weight: Tensor | None, ends: Tensor | None, cache: str = ROWS, columns: str = COLUMNS) -> FusedConfig:
    codes, scale = empty(300, 512, dtype=torch.float8_e4m3fn), empty(300, 4, dtype=torch.float32)
    return config(
        "swiglu_backward_quantize", empty(300, 256), codes, scale, weight, ends, cache, columns, ROWS, columns
    )


def instances() -> list[FusedConfig]:
    weights, ends = (None, empty(300, dtype=torch.float32)), (None, empty(8, dtype=torch.int32))
    found = [backward(w, e) for w, e in itertools.product(weights, ends)]
    found += [backward(weights[1], ends[1], ROWS_2, COLUMNS_2)]
    found += [config("swiglu_quantize_cached", empty(300, 512), w, ROWS, ROWS_2) for w in weights]
    found += [config("swiglu_quantize", *empty(300, 512).chunk(2, -1), weights[1], ROWS)]
    return found + [config("rms_norm_quantize", empty(9, c), empty(c), 1e-6, ROWS) for c in (128, 2048, 7168, 16384)]


@pytest.mark.slow
@pytest.mark.skipif(not build.has_compiler(), reason="neither NVRTC nor nvcc is installed")
def test_no_instance_spills() -> None:
    for made in instances():
        registers, spilled_bytes = resources(build.compile_cubin(made))
        assert spilled_bytes == 0, made
        assert registers * made.threads * made.blocks <= 65_536, made


def test_keys_name_what_is_compiled() -> None:
    made = instances()
    assert len({build.source_key(m) for m in made}) == len(set(made)) == len(made)


@pytest.mark.parametrize(
    "op, arguments",
    [
        ("swiglu_quantize_cached", (empty(8, 200), None, ROWS, ROWS)),  # 100 features are no whole groups
        ("swiglu_quantize_cached", (empty(8, 512, dtype=torch.float16), None, ROWS, ROWS)),
        ("swiglu_quantize_cached", (empty(8, 512), None, ROWS, "e5m6[1x128] pow2")),
        ("swiglu_quantize_cached", (empty(8, 512).t().contiguous().t(), None, ROWS, ROWS)),
        ("swiglu_quantize", (empty(8, 257)[:, 1:], empty(8, 256), None, ROWS)),  # rows that 16 bytes don't divide
        ("rms_norm_quantize", (empty(8, 32768), empty(32768), 1e-6, ROWS)),
        ("rms_norm_quantize", (empty(8, 256), empty(256), 1e-6, "e4m3[1x32] e8m0")),
        ("rms_norm_quantize", (empty(0, 256), empty(256), 1e-6, ROWS)),
    ],
)
def test_the_rest_is_refused(op: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Unsupported):
        config(op, *arguments)


def test_another_implementation_serves_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_capability", lambda index: (9, 0))
    serve = operators.first_on_hopper("rms_norm_quantize", lambda *arguments: "triton")
    assert serve(empty(8, 100), empty(100), 1e-6, ROWS) == "triton"
    assert operators.first_on_hopper("gather_sum", serve) is serve
