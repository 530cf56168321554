"""What is kept between steps, and in which precision: optimizer states, master weights, moving averages."""

from fp8c.optim import checkpoint
from fp8c.optim.adamw import AdamW
from fp8c.optim.ema import EMA
from fp8c.optim.state_types import StateTypes, state_types

__all__ = ["EMA", "AdamW", "StateTypes", "checkpoint", "state_types"]
