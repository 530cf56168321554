"""Target records: what the compiler knows of a machine. No torch here.

A target is a machine (`h200`); its `architecture` (`sm90`) is what specs name. Rates are dense peaks of one GPU; what
the numbers rest on is written in each file's `sources` (`backends/targets/*.toml`, read by `backends/target.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetRecord:
    """One machine.

    accumulator:    "fp32", or "truncating": the tensor core aligns products to the largest exponent and cuts them off
                    after `accumulator_fraction_bits` bits, so partial sums need promotion to FP32 registers
    promotion_step: `promote_every` must be a multiple of this many elements of K (one MMA instruction); 0: no promotion
    elements, groups, scales: what an FP8 GEMM operand may have, spelt as in the spec language
    native_scaling: formats whose scales the tensor core applies itself (no software promotion at group borders)
    hbm_tb_per_s:   peak; nvlink_gb_per_s and nic_gb_per_s: per GPU and direction; 0 where there is none
    """

    name: str
    architecture: str
    description: str
    sms: int
    fp8_tflops: float
    bf16_tflops: float
    hbm_gb: float
    hbm_tb_per_s: float
    nvlink_gb_per_s: float
    nic_gb_per_s: float
    accumulator: str
    accumulator_fraction_bits: int
    promotion_step: int
    elements: frozenset[str]
    groups: frozenset[str]
    scales: frozenset[str]
    native_scaling: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def is_truncating(self) -> bool:
        return self.accumulator == "truncating"
