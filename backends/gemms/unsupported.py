"""How an implementation of a GEMM says that it can't serve a call."""

from __future__ import annotations


class Unsupported(Exception):
    """This implementation has nothing for this call, and has not touched its output; the message completes a remark."""
