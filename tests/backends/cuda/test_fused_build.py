"""Hopper's fused kernels without a GPU: every instance compiles, none spills, and what they don't take is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="its cuobjdump reads the machine code")

from fp8c.backends.cuda import ahead, build, operators
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
    for w, cache in itertools.product(weights, (ROWS, ROWS_2)):
        found.append(config("swiglu_quantize_cached", empty(300, 512), w, ROWS, cache))
    found += [config("quantize", empty(300, 512), f"e5m6[1x128] {kind}") for kind in ("pow2", "e8m0")]
    return found + [config("rms_norm_quantize", empty(9, c), empty(c), 1e-6, ROWS) for c in (128, 2048, 7168, 16384)]


@pytest.mark.slow
@pytest.mark.skipif(not build.has_compiler(), reason="neither NVRTC nor nvcc is installed")
def test_no_instance_spills() -> None:
    for made in instances():
        registers, spilled_bytes = resources(build.compile_cubin(made))
        assert spilled_bytes == 0, made
        assert registers * made.threads * made.blocks <= 65_536, made


def test_what_adds_up_the_weights_gradient_comes_along() -> None:
    weight = empty(300, dtype=torch.float32)
    assert backward(None, None).then is None
    added = backward(weight, None).then
    assert added is not None and added.source == "add_parts.cu"
    if build.has_compiler():
        compiled = {made.config for made in ahead.compile_instances([backward(weight, None)])}
        assert compiled == {backward(weight, None), added}


def test_keys_name_what_is_compiled() -> None:
    made = instances()
    assert len({build.source_key(m) for m in made}) == len(set(made)) == len(made)


@pytest.mark.parametrize(
    "op, arguments",
    [
        ("rms_norm_quantize", (empty(8, 32768), empty(32768), 1e-6, ROWS)),
        ("rms_norm_quantize", (empty(8, 256), empty(256), 1e-6, "e4m3[1x32] e8m0")),
        ("rms_norm_quantize", (empty(0, 256), empty(256), 1e-6, ROWS)),
        ("swiglu_quantize_cached", (empty(8, 400), None, ROWS, ROWS)),
        ("swiglu_quantize_cached", (empty(8, 512, dtype=torch.float16), None, ROWS, ROWS)),
        ("swiglu_quantize_cached", (empty(8, 512), None, ROWS_2, ROWS_2)),
        ("swiglu_quantize_cached", (empty(8, 512), None, ROWS, "e5m6[1x128] pow2")),
        ("swiglu_quantize_cached", (empty(0, 512), None, ROWS, ROWS)),
        ("quantize", (empty(8, 256), "e5m6[1x128] fp32")),
        ("quantize", (empty(8, 200), "e5m6[1x128] pow2")),
        ("quantize", (empty(2, 8, 256), "e5m6[1x128] pow2")),
        ("quantize", (empty(8, 256, dtype=torch.float32), "e5m6[1x128] pow2")),
    ],
)
def test_the_rest_is_refused(op: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Unsupported):
        config(op, *arguments)


def test_what_backward_refuses() -> None:
    codes, scale = empty(8, 512, dtype=torch.float8_e4m3fn), empty(8, 4, dtype=torch.float32)
    refused = [
        (empty(8, 200), codes, (ROWS, COLUMNS, ROWS, COLUMNS)),  # no whole groups
        (empty(8, 256, dtype=torch.float16), codes, (ROWS, COLUMNS, ROWS, COLUMNS)),
        (empty(8, 257)[:, 1:], codes, (ROWS, COLUMNS, ROWS, COLUMNS)),  # rows that 16 bytes don't divide
        (empty(8, 256), codes.t().contiguous().t(), (ROWS, COLUMNS, ROWS, COLUMNS)),
        (empty(8, 256), empty(8, 520, dtype=codes.dtype)[:, :512], (ROWS, COLUMNS, ROWS, COLUMNS)),
        (empty(8, 256), codes, ("e5m6[1x128] pow2", COLUMNS, ROWS, COLUMNS)),
        (empty(8, 256), codes, (ROWS, "e4m3[64x1] fp32", ROWS, COLUMNS)),
    ]
    for dh, q, formats in refused:
        with pytest.raises(Unsupported):
            config("swiglu_backward_quantize", dh, q, scale, None, None, *formats)


def test_another_implementation_serves_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_capability", lambda index: (9, 0))
    serve = operators.first_on_hopper("rms_norm_quantize", lambda *arguments: "triton")
    assert serve(empty(8, 100), empty(100), 1e-6, ROWS) == "triton"
    assert operators.first_on_hopper("gather_sum", serve) is serve
