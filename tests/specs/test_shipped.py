"""The specs that come with fp8c: the seven that are promised, each with its source, each compiles and trains."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
import torch

from fp8c import driver
from fp8c.models import load_model, load_namespace
from fp8c.specs.load import load, shipped, shipped_text
from fp8c.tools.verify import planned_gemms

TINY = str(Path(__file__).parents[1] / "tools" / "models" / "tiny.py")
SPECS = ("bf16", "deepseek_v3", "deepseek_v3_ue8m0", "hybrid_delayed", "hybrid_tensorwise", "mxfp8", "rowwise")


def test_these_are_shipped() -> None:
    assert tuple(sorted(shipped())) == SPECS


@pytest.mark.parametrize("name", SPECS)
def test_each_names_its_source(name: str) -> None:
    sources = r"arXiv:|Transformer Engine|torchao|DeepSeek-V3\.1|Megatron|OCP"
    assert re.search(sources, shipped_text(name)), name
    assert load(name).layers[-1].doc


@pytest.mark.parametrize("name", SPECS)
def test_each_compiles_and_trains(name: str) -> None:
    torch._dynamo.reset()
    loaded = load_model(TINY, weights="random", overrides={"layers": 1})
    step = driver.compile(loaded.step(), name, "cpu")
    losses = []
    for batch in islice(load_namespace(TINY).batches(0), 6):
        loss = step(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in loaded.module.parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all()
                parameter.sub_(parameter.grad)
                parameter.grad = None
    assert losses[-1] < losses[0] - 0.1
    (rewritten,) = driver.session_of(step).steps
    assert len(planned_gemms(rewritten.plan)) == (0 if name == "bf16" else 9)
