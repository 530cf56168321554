"""What is kept between steps, and in which precision: optimizer states, master weights, moving averages."""

from fp8c.optim import checkpoint
from fp8c.optim.adamw import AdamW
from fp8c.optim.ema import EMA
from fp8c.optim.precision import Precision, deterministic
from fp8c.optim.state_types import StateTypes, state_types
from fp8c.optim.telemetry import Telemetry

__all__ = [
    "EMA",
    "AdamW",
    "Precision",
    "StateTypes",
    "Telemetry",
    "checkpoint",
    "deterministic",
    "state_types",
]
