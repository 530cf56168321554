"""Saved bytes: what counts as the output head's own, in fp8c's halves and in the BF16 baseline's."""

from __future__ import annotations

from fp8c.tools.compile_command import CompileResult, Request, compile_model
from tests.models import hf


def compiled(vocabulary: int) -> CompileResult:
    overrides = hf.CONFIGS["llama"] | {"vocab_size": vocabulary}
    return compile_model(Request("hf:llama", target="cpu", out=None, overrides=overrides, batch=2, seq=32))


def test_hidden_states_as_wide_as_the_vocabulary_are_no_logits() -> None:
    hidden = hf.CONFIGS["llama"]["hidden_size"]
    same, other = compiled(hidden), compiled(2 * hidden)
    assert same.baseline is not None and other.baseline is not None
    assert same.saved.layer_bytes() == other.saved.layer_bytes()
    assert same.saved.total_bytes == other.saved.total_bytes
    assert same.baseline.total_bytes == other.baseline.total_bytes
    # BF16 keeps logits; fp8c gradients in their place, tokens x hidden and vocabulary x hidden
    assert same.baseline.logits_bytes == 64 * hidden * 2
    assert same.saved.logits_bytes == (64 + hidden) * hidden * 2
