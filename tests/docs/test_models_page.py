"""docs/models.md: its model file loads, its loop is rewritten, its error texts are what fp8c prints."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fp8c.diagnostics import DiagnosticError, render
from fp8c.models import check_step, load_model
from fp8c.prepare import prepare

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
TEXTS = [text for kind, text in BLOCKS if not kind]

MOE = """
import torch
from torch import nn

class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
    def forward(self, x):
        weights, indices = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
LOOP
        return y

def model():
    return MoE()

def example_inputs():
    return torch.randn(32, 16)

def loss(outputs, batch):
    return outputs.sum()
"""


def load_moe(folder: Path, loop: str) -> tuple[nn.Module, Tensor]:
    (folder / "model.py").write_text(MOE.strip("\n").replace("LOOP", textwrap.indent(loop.rstrip(), " " * 8)))
    loaded = load_model("model.py")
    return loaded.module, loaded.example_inputs


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_minimal_file_loads(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(PYTHON[0])
    loss = check_step(load_model("model.py"))
    assert loss is not None and loss > 0


def test_the_loop_becomes_what_the_page_shows(tmp_path: Path) -> None:
    module, x = load_moe(tmp_path, PYTHON[1])
    want = module(x)
    (remark,) = prepare(module, x)
    assert remark.code == "R0820"
    torch.testing.assert_close(module(x), want)
    names = set(type(module).forward.__code__.co_names)
    shown = set(re.findall(r"\b(route|positions|total)\(", PYTHON[2]))
    assert shown == {"route", "positions", "total"} <= names


def test_the_raised_error_is_printed_as_shown(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        'import torch\ndef model():\n    sizes = {"hidden": 8}\n    return torch.nn.Linear(8, sizes["hiden"])\n'
    )
    with pytest.raises(DiagnosticError) as caught:
        load_model("model.py")
    assert render(caught.value.diagnostics[0]) == TEXTS[0].rstrip()


def test_the_refusal_is_printed_as_shown(tmp_path: Path) -> None:
    loop = """
for i, expert in enumerate(self.experts):
    token, _ = torch.where(indices == i)
    token = token[:4]  # capacity
    y[token] += expert(x[token])
"""
    module, x = load_moe(tmp_path, loop.strip("\n"))
    with pytest.raises(DiagnosticError) as caught:
        prepare(module, x)
    assert render(caught.value.diagnostics[0]) == TEXTS[1].rstrip()
