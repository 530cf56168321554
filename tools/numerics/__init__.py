"""`fp8c numerics`: what quantization does to a step, operand by operand."""
