"""EMA: equal to the synchronous formula bit for bit, never in the step's way, resumable, swapped in and out."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8c.diagnostics import DiagnosticError
from fp8c.optim import EMA, AdamW
from fp8c.optim import ema as ema_module


def model(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    # A large tensor (its own copy), small ones, and one that is stored transposed.
    net = nn.Sequential(nn.Linear(700, 800), nn.Linear(33, 7)).to(device, torch.bfloat16)
    last: Any = net[1]
    last.weight = nn.Parameter(last.weight.detach().t().contiguous().t())
    return net


def train_step(net: nn.Module, optimizer: AdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.main_grad = torch.randn(p.shape, generator=generator).to(p.device)  # type: ignore[attr-defined]
        p.main_grad = torch.empty_like(p, dtype=torch.float32).copy_(p.main_grad)  # type: ignore[attr-defined]
    optimizer.step()


def synchronous(history: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = {name: value.float() for name, value in history[0].items()}
    for now in history[1:]:
        for name in average:
            average[name].lerp_(now[name].float(), 1.0 - decay)
    return average


def check_exact(device: str) -> None:
    net = model(device)
    optimizer = AdamW(net, lr=1e-2)
    ema = EMA(net, 0.9, optimizer=optimizer)

    def now() -> dict[str, Tensor]:
        return {n: p.detach().cpu().clone() for n, p in net.named_parameters()}

    history = [now()]
    for i in range(7):
        train_step(net, optimizer, i)
        ema.update()
        history.append(now())
    ema.flush()
    expected = synchronous(history, 0.9)
    assert all(torch.equal(ema.average[name], expected[name]) for name in expected)
    assert ema.updates == 7
    ema.close()


def test_equals_the_synchronous_formula_bit_for_bit() -> None:
    check_exact("cpu")


@pytest.mark.gpu
def test_equals_the_synchronous_formula_on_the_gpu() -> None:
    check_exact("cuda")


def test_update_returns_before_the_average_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    optimizer = AdamW(net, lr=1e-2)
    ema = EMA(net, 0.5, buffers=2)
    go = threading.Event()
    fold = ema_module.fold

    def slow(*arguments: Any) -> None:
        go.wait(20)
        fold(*arguments)

    monkeypatch.setattr(ema_module, "fold", slow)
    before = {name: value.clone() for name, value in ema.average.items()}
    train_step(net, optimizer, 0)
    ema.update()
    first = {n: p.detach().clone() for n, p in net.named_parameters()}
    train_step(net, optimizer, 1)  # writes the parameters while their copy waits to be folded in
    assert all(torch.equal(ema.average[n], before[n]) for n in before) and ema.waits == 0
    go.set()
    ema.flush()
    for n in before:
        assert torch.equal(ema.average[n], before[n].lerp(first[n].float(), 0.5))


def test_a_fold_in_pieces_is_the_formula_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema_module, "PIECE", 1000)
    check_exact("cpu")


def test_waits_only_when_every_buffer_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    ema = EMA(net, 0.5, buffers=1)
    fold = ema_module.fold
    started = threading.Event()

    def slow(*arguments: Any) -> None:
        started.set()
        threading.Event().wait(0.02)
        fold(*arguments)

    monkeypatch.setattr(ema_module, "fold", slow)
    ema.update()
    started.wait(20)
    ema.update()
    assert ema.waits == 1
    ema.flush()


def test_swaps_in_rounded_and_out_bit_for_bit() -> None:
    net = model()
    optimizer = AdamW(net, lr=1e-2)
    ema = EMA(net, 0.9)
    train_step(net, optimizer, 0)
    ema.update()
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    masters = {n: optimizer.state[p]["master"].clone() for n, p in net.named_parameters()}
    watched: Any = net[0]
    version = watched.weight._version
    with ema.swapped():
        for n, p in net.named_parameters():
            assert torch.equal(p, ema.average[n].bfloat16())
        assert watched.weight._version > version
    assert all(torch.equal(p, weights[n]) for n, p in net.named_parameters())
    for n, p in net.named_parameters():
        optimizer.refresh(p)
        assert torch.equal(optimizer.state[p]["master"], masters[n]), "a swap costs the masters no bit"


def test_resumes() -> None:
    net, other = model(), model()
    a, b = AdamW(net, lr=1e-2), AdamW(other, lr=1e-2)
    ema = EMA(net, 0.9, every=2)
    for i in range(3):
        train_step(net, a, i)
        ema.update()
    again = EMA(other, 0.5)
    for i in range(3):
        train_step(other, b, i)
    again.load_state_dict(ema.state_dict())
    for i in range(3, 6):
        for n, o, e in ((net, a, ema), (other, b, again)):
            train_step(n, o, i)
            e.update()
    ema.flush()
    again.flush()
    assert again.updates == ema.updates == 3 and again.every == 2
    assert all(torch.equal(again.average[name], value) for name, value in ema.average.items())


def test_bad_input_is_named() -> None:
    net = model()
    with pytest.raises(DiagnosticError, match="E1120"):
        EMA(net, 1.0)
    with pytest.raises(DiagnosticError, match="E1120"):
        EMA(nn.ReLU())
    with pytest.raises(DiagnosticError, match="E1121"):
        EMA(net).load_state_dict(EMA(nn.Linear(2, 2)).state_dict())


def test_an_error_in_the_thread_reaches_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMA(model(), 0.9)

    def broken(*_: object) -> None:
        raise ValueError("no memory")

    monkeypatch.setattr(ema_module, "fold", broken)
    ema.update()
    with pytest.raises(RuntimeError, match="moving average"):
        ema.flush()
