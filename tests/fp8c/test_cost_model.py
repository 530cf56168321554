"""The cost model against measured tables: GEMMs and contention on H200, DeepSeek's published transfer rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8c.backends.costs import load_machine, load_whatif, machine_names, whatif_names
from fp8c.cost_model import (
    AllToAll,
    Attention,
    Elementwise,
    Gemm,
    Operator,
    Quantize,
    Retile,
    beside_us,
    estimate_us,
    hbm_bytes,
)
from fp8c.diagnostics import DiagnosticError

H200 = load_machine("h200")

#: m, n, k, microseconds of DeepGEMM's FP8 and of cuBLAS' BF16 on one H200 (do_bench medians, torch 2.11, CUDA 13.0).
DENSE = [
    (4096, 2112, 7168, 102.3, 178.1),
    (4096, 24576, 1536, 261.6, 462.1),
    (4096, 32768, 512, 136.5, 237.6),
    (4096, 7168, 16384, 759.0, 1368.2),
    (4096, 4096, 7168, 183.7, 351.9),
    (4096, 7168, 2048, 97.7, 175.4),
    (8192, 8192, 8192, 857.4, 1619.8),
    (16384, 4096, 7168, 770.0, 1424.5),
]
#: n, k, tokens, TFLOP/s of DeepGEMM's FP8 weight gradient into FP32.
WGRAD = [
    (2112, 7168, 4096, 811),
    (24576, 1536, 4096, 849),
    (32768, 512, 4096, 756),
    (7168, 16384, 4096, 895),
    (4096, 7168, 4096, 857),
    (7168, 2048, 4096, 856),
    (8192, 8192, 8192, 910),
    (4096, 7168, 16384, 928),
]
#: groups, rows per group, n, k, TFLOP/s of DeepGEMM's contiguous grouped FP8 GEMM.
GROUPED = [(4, 8192, 4096, 7168, 1245), (4, 8192, 7168, 2048, 1165), (8, 4096, 4096, 7168, 1247)]

#: (MiB sent, SMs) -> ms of two FP8 GEMMs beside an all-to-all on two H200, without and with a carve-out, and of the
#: GEMMs and the transfer alone (the latter from the serial time less the GEMMs).
GEMM_MS = 0.879
CONTENTION = [
    (224, 8, 2.219, 1.840, 2.945 - 2 * GEMM_MS),
    (448, 8, 3.253, 2.629, 2.190),
    (224, 16, 2.012, 2.070, 2.755 - 2 * GEMM_MS),
    (224, 32, 1.890, 2.129, 2.45 - 2 * GEMM_MS),
    (448, 32, 2.140, 2.199, 2.805 - 2 * GEMM_MS),
]


@pytest.mark.parametrize("m,n,k,fp8_us,bf16_us", DENSE)
def test_dense_gemms_are_within_10_percent_of_measured(m: int, n: int, k: int, fp8_us: float, bf16_us: float) -> None:
    assert estimate_us(Gemm(m, n, k), H200) == pytest.approx(fp8_us, rel=0.10)
    assert estimate_us(Gemm(m, n, k, is_bf16=True), H200) == pytest.approx(bf16_us, rel=0.10)


@pytest.mark.parametrize("n,k,tokens,tflops", WGRAD)
def test_weight_gradients_are_within_10_percent_of_measured(n: int, k: int, tokens: int, tflops: float) -> None:
    gemm = Gemm(n, k, tokens, use="wgrad")
    assert estimate_us(gemm, H200) == pytest.approx(gemm.tflop / tflops * 1e6, rel=0.10)


@pytest.mark.parametrize("groups,m,n,k,tflops", GROUPED)
def test_grouped_gemms_are_within_10_percent_of_measured(groups: int, m: int, n: int, k: int, tflops: float) -> None:
    gemm = Gemm(m, n, k, groups)
    assert estimate_us(gemm, H200) == pytest.approx(gemm.tflop / tflops * 1e6, rel=0.10)


@pytest.mark.parametrize("mib,sms,plain_ms,carved_ms,comm_ms", CONTENTION)
def test_contention_follows_the_measured_table(
    mib: int, sms: int, plain_ms: float, carved_ms: float, comm_ms: float
) -> None:
    """Single runs, clocks not locked: 20 % without a carve-out (a hardware scheduler decides), 10 % with one."""
    gemms = [GEMM_MS * 1000.0] * 2
    assert beside_us(gemms, comm_ms * 1000.0, sms, H200, is_carved=False) == pytest.approx(plain_ms * 1000.0, rel=0.20)
    assert beside_us(gemms, comm_ms * 1000.0, sms, H200, is_carved=True) == pytest.approx(carved_ms * 1000.0, rel=0.10)


def test_partitioning_pays_at_8_blocks_and_not_at_32() -> None:
    """What the measured table shows and a model must reproduce, whatever its errors."""
    gemms = [GEMM_MS * 1000.0] * 2
    few = [beside_us(gemms, 1190.0, 8, H200, is_carved=carved) for carved in (False, True)]
    many = [beside_us(gemms, 690.0, 32, H200, is_carved=carved) for carved in (False, True)]
    assert few[1] < few[0]
    assert many[1] > many[0]


def test_a_quantizer_runs_at_the_measured_share_of_copy_bandwidth() -> None:
    """32768 x 7168 BF16 in 188 us (torchao's Triton quantizer, 89 % of copy): ours assumes copy bandwidth."""
    assert estimate_us(Quantize(32768 * 7168), H200) == pytest.approx(188.2, rel=0.15)


def test_fewer_sms_never_make_an_operator_faster() -> None:
    for op in (Gemm(4096, 7168, 2048), Attention(1, 4096, 128, 192, 128), Elementwise(1e8), Retile(10**7)):
        times = [estimate_us(op, H200, sms) for sms in (132, 112, 96, 64, 32)]
        assert times == sorted(times)


def test_attention_backward_costs_more_and_causal_half() -> None:
    forward, backward = Attention(1, 4096, 128, 192, 128), Attention(1, 4096, 128, 192, 128, True)
    assert 2.0 < backward.tflop / forward.tflop < 3.0
    assert forward.tflop == pytest.approx(128 * 4096**2 * (192 + 128) / 1e12)


def test_an_all_to_all_takes_its_slower_link() -> None:
    h800 = load_machine("h800")
    nvlink_us = estimate_us(AllToAll(0.0, 160e6), h800)
    nic_us = estimate_us(AllToAll(50e6, 0.0), h800)
    assert nvlink_us == pytest.approx(1000.0 + h800.launch_us)
    assert nic_us == pytest.approx(1000.0 / 0.9 + h800.launch_us)
    assert estimate_us(AllToAll(50e6, 160e6), h800) == pytest.approx(max(nvlink_us, nic_us))


def test_casts_and_retiles_vanish_where_the_machine_does_them() -> None:
    h800 = load_machine("h800")
    ops: list[Operator] = [Quantize(10**6), Retile(10**6)]
    base = hbm_bytes(ops, h800)
    assert base == 10**6 * (3 + 4 / 128 + 2 * (1 + 4 / 128))
    assert hbm_bytes(ops, load_machine("whatif/cast-in-tma")) == 10**6 * (1 + 2 * (1 + 4 / 128))
    assert hbm_bytes(ops, load_machine("whatif/cast-near-memory")) == 10**6 * 2 * (1 + 4 / 128)
    assert hbm_bytes(ops, load_machine("whatif/transposed-operands")) == 10**6 * (3 + 4 / 128)


def test_every_sheet_loads_and_every_wish_says_what_it_is() -> None:
    assert {"h800", "h100", "h200", "b200"} <= set(machine_names())
    for name in machine_names():
        assert load_machine(name).sms > 0
    assert len(whatif_names()) >= 6
    for name in whatif_names():
        whatif = load_whatif(name)
        assert whatif.wish
        assert whatif.machine != whatif.base


@pytest.mark.parametrize(
    "text,code",
    [
        ("not toml [", "E0931"),
        ('schema = "other/1"', "E0931"),
        ('schema = "fp8c.costs/1"\nbase = "h800"\nsmss = 3', "E0932"),
        ('schema = "fp8c.costs/1"\nbase = "h800"\nsms = -3', "E0932"),
        ('schema = "fp8c.costs/1"\nbase = "h800"\nsms = true', "E0932"),
        ('schema = "fp8c.costs/1"\nbase = "h800"\nis_truncating = 1', "E0932"),
        ('schema = "fp8c.costs/1"\nbase = "h900"', "E0930"),
    ],
)
def test_wrong_sheets_are_named(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(DiagnosticError) as caught:
        load_machine(path)
    assert caught.value.diagnostics[0].code == code
    assert caught.value.exit_code == 5


def test_a_wish_has_to_say_what_it_is() -> None:
    with pytest.raises(DiagnosticError) as caught:
        load_whatif("h800")
    assert caught.value.diagnostics[0].code == "E0931"


def test_a_sheet_based_on_itself_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'schema = "fp8c.costs/1"\nbase = "{path}"')
    with pytest.raises(DiagnosticError) as caught:
        load_machine(path)
    assert caught.value.diagnostics[0].code == "E0931"


def test_a_users_sheet_changes_what_it_says_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('schema = "fp8c.costs/1"\nbase = "h800"\nnic_gb_per_s = 100')
    mine, base = load_machine(path), load_machine("h800")
    assert mine.nic_gb_per_s == 100
    assert (mine.sms, mine.hbm_tb_per_s, mine.name) == (base.sms, base.hbm_tb_per_s, "mine")
