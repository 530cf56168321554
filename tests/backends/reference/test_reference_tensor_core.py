"""The model of Hopper's accumulator against recordings of an H200, and the compiled code against its PyTorch twin."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8c.backends.reference import tensor_core
from fp8c.diagnostics import DiagnosticError
from fp8c.formats import Format

RECORDINGS = np.load(Path(__file__).parents[2] / "data" / "h200_accumulator_vectors.npz")
NAMES = sorted({name[:-2] for name in RECORDINGS.files})
PER_TENSOR = Format.parse("e4m3[tensor] fp32")
ROW, BLOCK = Format.parse("e4m3[1x128] fp32"), Format.parse("e4m3[128x128] fp32")


def recorded(name: str) -> tuple[Tensor, Tensor, np.ndarray]:
    a, b = (torch.from_numpy(RECORDINGS[f"{name}_{operand}"]).view(torch.float8_e4m3fn) for operand in "ab")
    return a, b, RECORDINGS[f"{name}_o"]


def test_recordings_cover_all_kinds_of_operands() -> None:
    kinds = {name.rsplit("_", 1)[0] for name in NAMES}
    assert kinds == {"codes", "max", "mix", "negpos", "pos", "randn", "randn100", "sparse", "sub"}
    assert sum(RECORDINGS[f"{name}_o"].size for name in NAMES) > 60_000


@pytest.mark.parametrize("name", NAMES)
def test_model_agrees_with_the_chip_in_every_bit(name: str) -> None:
    a, b, out = recorded(name)
    one = torch.ones(1, 1)
    computed = tensor_core.gemm(a, one, b, one, PER_TENSOR, PER_TENSOR, promote_every=0).numpy()
    assert np.array_equal(computed.view(np.uint32), out.view(np.uint32))


@pytest.mark.parametrize("name", ["codes_128", "sub_64", "sparse_32", "mix_128", "randn_4096"])
def test_pytorch_twin_agrees_with_the_chip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_core, "compiled_library", lambda: None)
    a, b, out = recorded(name)
    one = torch.ones(1, 1)
    computed = tensor_core.gemm(a[:8], one, b[:8], one, PER_TENSOR, PER_TENSOR, promote_every=0).numpy()
    assert np.array_equal(computed.view(np.uint32), out[:8, :8].view(np.uint32))


@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (5, 33, 31), (33, 7, 129), (40, 64, 300), (3, 31, 1000)])
@pytest.mark.parametrize("b_fmt", [BLOCK, ROW, Format.parse("e5m2[128x128] pow2")], ids=lambda f: f.text)
def test_compiled_code_and_pytorch_twin_agree(
    m: int, n: int, k: int, b_fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(k)
    spread = torch.exp2(torch.randint(-8, 8, (k,), generator=generator))
    aq, a_scale = torch.ops.fp8c.quantize(torch.randn(m, k, generator=generator) * spread, ROW.text)
    bq, b_scale = torch.ops.fp8c.quantize(torch.randn(n, k, generator=generator) * spread, b_fmt.text)

    def run() -> list[Tensor]:
        return [tensor_core.gemm(aq, a_scale, bq, b_scale, ROW, b_fmt, every) for every in (0, 32, 128)]

    compiled = run()
    monkeypatch.setattr(tensor_core, "compiled_library", lambda: None)
    assert all(torch.equal(x, y) for x, y in zip(compiled, run()))


def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.randn(37, 160).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones(1, 1)
    alone = tensor_core.gemm(a, one, b, one, PER_TENSOR, PER_TENSOR, 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert torch.equal(tensor_core.gemm(a, one, b, one, PER_TENSOR, PER_TENSOR, 0), alone)


def test_a_single_product_is_exact() -> None:
    """32 elements of which one is not zero: nothing is cut, whatever the codes."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    a = torch.zeros(256, 32, dtype=torch.uint8)
    a[:, 5] = codes
    a, one = a.view(torch.float8_e4m3fn), torch.ones(1, 1)
    out = tensor_core.gemm(a, one, a, one, PER_TENSOR, PER_TENSOR, 0)
    expected = values[:, None] * values
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_unpromoted_sums_of_positive_data_lose_more_the_longer_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(16, 4096, generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones(1, 1)
    exact = a.double() @ b.double().T

    def bias(promote_every: int, k: int) -> float:
        computed = tensor_core.gemm(a[:, :k], one, b[:, :k], one, PER_TENSOR, PER_TENSOR, promote_every).double()
        reference = exact if k == 4096 else a[:, :k].double() @ b[:, :k].double().T
        return float(((computed - reference) / reference).mean())

    unpromoted = [bias(0, k) for k in (128, 1024, 4096)]
    assert 0 > unpromoted[0] > unpromoted[1] > unpromoted[2]  # truncation is always toward zero
    assert abs(bias(128, 4096)) < 2 * abs(unpromoted[0])  # promotion keeps the loss of one interval


@pytest.mark.parametrize(
    "promote_every,a,b,expected",
    [(0, PER_TENSOR, PER_TENSOR, 700), (128, PER_TENSOR, PER_TENSOR, 128), (0, ROW, BLOCK, 128), (64, ROW, BLOCK, 64),
     (256, ROW, PER_TENSOR, 128), (128, Format.parse("e4m3[1x32] e8m0"), ROW, 32)],
)  # fmt: skip
def test_promotion_interval(promote_every: int, a: Format, b: Format, expected: int) -> None:
    assert tensor_core.promotion_interval(promote_every, a, b, 700) == expected


def test_promotion_inside_an_instruction_is_refused() -> None:
    with pytest.raises(DiagnosticError, match="E0423"):
        tensor_core.promotion_interval(48, ROW, BLOCK, 256)


def test_infinities_and_nan_come_out() -> None:
    a = torch.ones(3, 64)
    a[1, 3], a[2, 5] = torch.inf, torch.nan
    a, b, one = a.to(torch.float8_e5m2), torch.ones(2, 64).to(torch.float8_e4m3fn), torch.ones(1, 1)
    out = tensor_core.gemm(a, one, b, one, Format.parse("e5m2[tensor] fp32"), PER_TENSOR, 0)
    assert out[0].tolist() == [64.0, 64.0] and out[1].tolist() == [torch.inf] * 2 and out[2].isnan().all()


def test_missing_compiler_warns_once_and_still_computes(tmp_path: Path) -> None:
    script = """if True:
        import torch, warnings
        from fp8c.backends.reference import tensor_core
        from fp8c.formats import Format
        fmt, one = Format.parse("e4m3[tensor] fp32"), torch.ones(1, 1)
        a = torch.ones(2, 32).to(torch.float8_e4m3fn)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                assert (tensor_core.gemm(a, one, a, one, fmt, fmt, 0) == 32).all()
        assert [str(w.message).startswith("warning[W0422]") for w in caught] == [True], caught
    """
    env = {"CC": str(tmp_path / "no-such-compiler"), "XDG_CACHE_HOME": str(tmp_path), "PATH": "/nowhere"}
    subprocess.run([sys.executable, "-c", script], check=True, env=env, cwd=Path(__file__).parents[3], timeout=120)


def test_library_is_built_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8C_CACHE_DIR", str(tmp_path))
    try:
        built = tensor_core._build()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler works here")
    stamp = built.stat().st_mtime_ns
    assert tensor_core._build() == built and built.stat().st_mtime_ns == stamp
    assert [p.suffix for p in built.parent.iterdir() if p.suffix != ".lock"] == [".so"]  # nothing half-built stays
