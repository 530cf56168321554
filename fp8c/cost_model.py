"""Per-operator times from a machine's numbers: GEMM, grouped GEMM, quantize, attention, all-to-all, elementwise.

A machine is a target record (rates, bandwidths, SM counts) and a cost sheet (`backends/costs/*.toml`, read by
`backends/costs.py`: what share of the peaks kernels reach, launch costs, how communication and GEMMs slow each other).
Every number of a sheet names its source there. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from fp8c.contention import Interference
from fp8c.network import Network

#: Output tiles a GEMM library chooses from; wave quantisation comes from these. Source: the tiles DeepGEMM's sm90
#: heuristics try (`csrc/jit_kernels/heuristics/`).
TILES = ((128, 128), (128, 112), (128, 160), (128, 192), (128, 256), (256, 128))


@dataclass(frozen=True)
class Machine:
    """One GPU and its place in a cluster. Rates are dense peaks; `*_usable` and `*_efficiency` are shares of them.

    gemm_*_efficiency: share of the peak a full wave of tiles reaches; tile_overhead_us: prologue and epilogue of a
        128x128 tile, beyond its multiplications
    is_promoting: FP8 partial sums go to FP32 registers every 128 of K, because the accumulator truncates
        (`is_truncating`) or because scales are multiplied in software (`has_group_scaling` False)
    gemm_native_efficiency: of FP8 GEMMs when neither reason holds
    can_cast_in_tma, can_cast_near_memory, can_read_transposed, has_comm_engine: the wishes of DeepSeek-V3, section 3.5
    comm_slowdown_*: time of a transfer beside GEMMs over its time alone
    pair_comm_slowdown, pair_compute_slowdown: the same beside all operators of a step, those that only move memory among
        them; and of these operators while transfers run
    blocked_share: share of its own time a GEMM without a carve-out loses when it starts beside a communication kernel
        that lasts as long as it does
    """

    name: str
    sms: int
    fp8_tflops: float
    bf16_tflops: float
    hbm_gb: float
    hbm_tb_per_s: float
    nvlink_gb_per_s: float
    nic_gb_per_s: float
    gpus_per_node: int = 8
    hbm_usable: float = 0.89
    nvlink_usable: float = 1.0
    nic_usable: float = 0.9
    launch_us: float = 3.0
    gemm_fp8_efficiency: float = 0.67
    gemm_wgrad_efficiency: float = 0.49
    gemm_bf16_efficiency: float = 0.725
    gemm_native_efficiency: float = 0.67
    tile_overhead_us: float = 0.5
    wgrad_tile_overhead_us: float = 2.0
    attention_forward_efficiency: float = 0.66
    attention_backward_efficiency: float = 0.56
    is_truncating: bool = True
    has_group_scaling: bool = False
    can_cast_in_tma: bool = False
    can_cast_near_memory: bool = False
    can_read_transposed: bool = False
    has_comm_engine: bool = False
    sm_read_gb_per_s: float = 200.0
    sm_write_gb_per_s: float = 50.0
    hop_us: float = 5.0
    comm_slowdown_dispatch: float = 1.0
    comm_slowdown_combine: float = 1.0
    pair_comm_slowdown: float = 1.0
    pair_compute_slowdown: float = 1.0
    blocked_share: float = 0.5
    optimizer_ms: float = 0.0

    @property
    def is_promoting(self) -> bool:
        return self.is_truncating or not self.has_group_scaling

    @property
    def interference(self) -> Interference:
        """What compute and transfers of a step's graph cost each other."""
        if self.has_comm_engine:
            return Interference()
        return Interference(self.pair_compute_slowdown, self.pair_comm_slowdown)

    def network(self, comm_sms: int) -> Network:
        """The two-level network as the hop simulator takes it."""
        return Network(
            nic_gb_s=self.nic_gb_per_s * self.nic_usable,
            nvlink_gb_s=self.nvlink_gb_per_s * self.nvlink_usable,
            gpus_per_node=self.gpus_per_node,
            comm_sms=comm_sms,
            sm_read_gb_s=self.sm_read_gb_per_s,
            sm_write_gb_s=self.sm_write_gb_per_s,
            hop_us=self.hop_us,
        )


# -------------------------------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class Gemm:
    """[m, k] x [k, n] per group, `groups` times. `use` is fprop, dgrad or wgrad; FP8 unless `is_bf16`."""

    m: int
    n: int
    k: int
    groups: int = 1
    use: str = "fprop"
    is_bf16: bool = False

    @property
    def tflop(self) -> float:
        return 2.0 * self.groups * self.m * self.n * self.k / 1e12

    @property
    def bytes_moved(self) -> float:
        """Operands read once, the result written; wgrad reads and writes an FP32 accumulator."""
        element = 2.0 if self.is_bf16 else 1.0
        result = 8.0 if self.use == "wgrad" else 2.0
        return self.groups * ((self.m * self.k + self.n * self.k) * element + self.m * self.n * result)


@dataclass(frozen=True)
class Attention:
    """Causal attention of `heads` heads; head sizes of queries and keys, and of values."""

    sequences: int
    sequence: int
    heads: int
    qk_dim: int
    v_dim: int
    is_backward: bool = False

    @property
    def tflop(self) -> float:
        """Half of the full product is masked away. Backward multiplies five times where forward does twice."""
        scores = self.sequences * self.heads * self.sequence**2 / 2.0
        per_score = 2.0 * (self.qk_dim + self.v_dim)
        if self.is_backward:
            per_score = 2.0 * (3.0 * self.qk_dim + 2.0 * self.v_dim)
        return scores * per_score / 1e12


@dataclass(frozen=True)
class Quantize:
    """BF16 to FP8 with a scale per 128 values, one orientation."""

    elements: int

    @property
    def bytes_moved(self) -> float:
        return self.elements * (2.0 + 1.0 + 4.0 / 128.0)


@dataclass(frozen=True)
class Retile:
    """FP8 1x128 read back, transposed and written as FP8 128x1, the operand of a weight gradient."""

    elements: int

    @property
    def bytes_moved(self) -> float:
        return self.elements * 2.0 * (1.0 + 4.0 / 128.0)


@dataclass(frozen=True)
class Elementwise:
    """Anything bound by memory: norms, SwiGLU, permutations, sums."""

    bytes_moved: float


@dataclass(frozen=True)
class AllToAll:
    """An all-to-all(v) in which the busiest rank sends `nic_bytes` over its NIC and `nvlink_bytes` over NVLink."""

    nic_bytes: float
    nvlink_bytes: float


Operator = Gemm | Attention | Quantize | Retile | Elementwise | AllToAll


def estimate_us(op: Operator, machine: Machine, sms: int | None = None) -> float:
    """Time of one operator alone on `sms` SMs (all of them by default), launch included."""
    share = min(1.0, (sms if sms is not None else machine.sms) / machine.sms)
    match op:
        case Gemm():
            return _gemm_us(op, machine, max(1, round(machine.sms * share)))
        case Attention():
            efficiency = (
                machine.attention_backward_efficiency if op.is_backward else machine.attention_forward_efficiency
            )
            return machine.launch_us + op.tflop / (machine.bf16_tflops * efficiency * share) * 1e6
        case Quantize() | Retile() | Elementwise():
            kept = _kept_bytes(op, machine)
            if kept == 0.0:
                return 0.0
            return machine.launch_us + kept / _hbm_bytes_per_us(machine, share)
        case AllToAll():
            nic = op.nic_bytes / (machine.nic_gb_per_s * machine.nic_usable * 1e3) if op.nic_bytes else 0.0
            nvlink = op.nvlink_bytes / (machine.nvlink_gb_per_s * machine.nvlink_usable * 1e3)
            return machine.launch_us + max(nic, nvlink)
        case _:
            assert_never(op)


def _hbm_bytes_per_us(machine: Machine, share: float) -> float:
    """About 70 % of the SMs are enough to fill memory, so a partition hardly slows a copy."""
    return machine.hbm_tb_per_s * 1e6 * machine.hbm_usable * min(1.0, share / 0.7)


def _kept_bytes(op: Quantize | Retile | Elementwise, machine: Machine) -> float:
    """Bytes a memory-bound operator still moves on this machine: casts and transposes may happen on the way."""
    match op:
        case Quantize():
            if machine.can_cast_near_memory or machine.can_cast_in_tma:
                return 0.0  # the GEMM reads BF16 and casts on the way; what that read costs more is in `hbm_bytes`
            return op.bytes_moved
        case Retile():
            return 0.0 if machine.can_read_transposed else op.bytes_moved
        case Elementwise():
            return op.bytes_moved
        case _:
            assert_never(op)


def hbm_bytes(ops: Iterable[Operator], machine: Machine) -> float:
    """Bytes over the memory bus, the GEMM's own reads included.

    A cast in TMA leaves the GEMM's read at 2 bytes per element; a cast near memory sends 1 byte per element.
    """
    total = 0.0
    for op in ops:
        match op:
            case Quantize():
                total += _kept_bytes(op, machine)
                if machine.can_cast_in_tma and not machine.can_cast_near_memory:
                    total += op.elements  # read as BF16 where the GEMM would have read FP8
            case Retile() | Elementwise():
                total += _kept_bytes(op, machine)
            case Gemm():
                total += op.bytes_moved
            case Attention() | AllToAll():
                pass
            case _:
                assert_never(op)
    return total


def _gemm_us(op: Gemm, machine: Machine, sms: int) -> float:
    peak = machine.bf16_tflops if op.is_bf16 else machine.fp8_tflops
    overhead_us = machine.wgrad_tile_overhead_us if op.use == "wgrad" else machine.tile_overhead_us
    if op.is_bf16:
        efficiency = machine.gemm_bf16_efficiency
        overhead_us = machine.tile_overhead_us
    elif not machine.is_promoting:
        efficiency = machine.gemm_native_efficiency
    else:
        efficiency = machine.gemm_wgrad_efficiency if op.use == "wgrad" else machine.gemm_fp8_efficiency
    flop_per_us = peak * 1e6 / machine.sms * efficiency
    best = math.inf
    for rows, cols in TILES:
        tiles = op.groups * math.ceil(op.m / rows) * math.ceil(op.n / cols)
        wave_us = 2.0 * rows * cols * op.k / flop_per_us + overhead_us * rows * cols / (128 * 128)
        best = min(best, math.ceil(tiles / sms) * wave_us)
    return machine.launch_us + max(best, op.bytes_moved / _hbm_bytes_per_us(machine, sms / machine.sms))


# ------------------------------------------------------------------------------------------------------- contention


def compute_stretch(machine: Machine, comm_sms: int, base_comm_sms: int = 0) -> float:
    """How much longer compute takes when communication holds `comm_sms` SMs, over when it holds `base_comm_sms`."""
    if machine.has_comm_engine:
        return (machine.sms - base_comm_sms) / machine.sms
    return (machine.sms - base_comm_sms) / (machine.sms - comm_sms)


def beside_us(gemm_us: list[float], comm_us: float, comm_sms: int, machine: Machine, *, is_carved: bool) -> float:
    """Time of GEMMs one after another beside one communication kernel on `comm_sms` SMs.

    With a carve-out the GEMMs leave those SMs alone: they are slower by the SMs they miss, and the transfer by the
    memory and links they share. Without one, each GEMM that starts beside the transfer has thread blocks waiting for
    the occupied SMs and ends late by `blocked_share` of itself (in proportion, when the transfer ends first).
    Checked against two H200 in `tests/fp8c/test_cost_model.py`.
    """
    if is_carved:
        stretched = sum(gemm_us) * machine.sms / (machine.sms - comm_sms)
        return max(stretched, comm_us * machine.comm_slowdown_dispatch)
    time = 0.0
    for one in gemm_us:
        left = max(0.0, comm_us - time)
        time += one * (1.0 + machine.blocked_share * min(1.0, left / one))
    return max(time, comm_us)
