"""AdamW: against torch's, against FP64, its rounding, its states both ways, what it skips and what it says."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8c
from fp8c.diagnostics import DiagnosticError
from fp8c.optim import AdamW, StateTypes, state_types

ROOT = Path(__file__).parents[2]


def model(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).to(dtype)


def backward(net: nn.Module, seed: int) -> None:
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()).dtype)
    net(x).float().square().mean().backward()


def set_gradients(net: nn.Module, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(p.shape, generator=generator) * scale for p in net.parameters()]
    for p, g in zip(net.parameters(), grads):
        p.main_grad = g.clone()  # type: ignore[attr-defined]
    return grads


def fp64_adamw(
    start: list[Tensor], steps: list[list[Tensor]], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> list[Tensor]:
    """The formula of the paper, in FP64, on FP64 copies."""
    weights = [w.double() for w in start]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for t, grads in enumerate(steps, 1):
        for w, m, v, g in zip(weights, first, second, (g.double() for g in grads)):
            m.mul_(betas[0]).add_((1 - betas[0]) * g)
            v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
            w.mul_(1 - lr * decay)
            w.sub_(lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps))
    return weights


def test_types_come_from_the_spec() -> None:
    assert state_types("deepseek_v3") == StateTypes(torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    assert state_types("deepseek_v3").bytes_per_parameter == 12
    assert StateTypes().bytes_per_parameter == 16


def test_fp32_states_equal_torchs_adamw_bit_for_bit() -> None:
    mine, theirs = model(torch.float32), model(torch.float32)
    ours = AdamW(mine, lr=1e-2, spec="bf16", weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(10):
        for net, optimizer in ((mine, ours), (theirs, reference)):
            backward(net, i)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters()))


def test_masters_follow_fp64_as_closely_as_the_moments_round() -> None:
    """A stored moment is off by at most 2^-9 of itself, whatever was added; over the average that each moment is, errors
    of past steps fade as the gradients do. So m is off by at most 2^-9 / (1 - beta1) of its largest recent value."""
    net = model()
    start = [p.detach().float() for p in net.parameters()]
    optimizer = AdamW(net, lr=1e-2)
    steps = []
    for i in range(8):
        steps.append(set_gradients(net, i))
        optimizer.step()
    exact = fp64_adamw(start, steps, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    for p, w in zip(net.parameters(), exact):
        master = optimizer.state[p]["master"]
        # Eight steps of at most lr * |m_hat| / sqrt(v_hat) <= lr * sqrt((1-b1)^2/(1-b2)/(1-b1^2/b2)) ~ 1.6 lr each, with a
        # relative error of 8 roundings of m and 8/2 of v.
        assert (master.double() - w).abs().max() < 8 * 1.6 * 1e-2 * 12 * 2.0**-9
        assert torch.equal(p, master.to(torch.bfloat16)), "the parameter is its master, rounded"
        assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


def test_small_updates_are_not_lost_as_they_are_in_bf16() -> None:
    net: Any = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    optimizer = AdamW(net, lr=1e-4, weight_decay=0.0)
    for _ in range(60):
        net.weight.main_grad = torch.ones(8, 8)
        optimizer.step()
    # Each step moves by lr; half a BF16 unit below 1 is 2^-9 = 0.00195, twenty steps.
    assert torch.allclose(optimizer.state[net.weight]["master"], torch.full((8, 8), 1 - 60e-4), atol=1e-5)
    assert net.weight.max() < 1.0


def test_main_grad_is_accumulated_in_fp32() -> None:
    net = model()
    optimizer = AdamW(net, main_grad=True)
    single = copy.deepcopy(net)
    expected = [torch.zeros(p.shape) for p in net.parameters()]
    for i in range(4):
        backward(net, i)
        backward(single, i)
        for total, p in zip(expected, single.parameters()):
            assert p.grad is not None
            total += p.grad.float()
            p.grad = None
    for p, total in zip(net.parameters(), expected):
        assert p.grad is None and torch.equal(p.main_grad, total)  # type: ignore[attr-defined]
    optimizer.step()
    addresses = [p.main_grad.data_ptr() for p in net.parameters()]  # type: ignore[attr-defined]
    optimizer.zero_grad()
    for p, address in zip(net.parameters(), addresses):
        assert not p.main_grad.any() and p.main_grad.data_ptr() == address  # type: ignore[attr-defined]
    assert "W1102" not in [r.code for r in optimizer.remarks]


def test_bf16_gradients_are_remarked() -> None:
    net = model()
    optimizer = AdamW(net, spec="deepseek_v3")
    backward(net, 0)
    optimizer.step()
    assert [r.code for r in optimizer.remarks] == ["W1102"]


def test_clipping_equals_torchs() -> None:
    mine, theirs = model(torch.float32), model(torch.float32)
    ours = AdamW(mine, lr=1e-2, spec="bf16", max_norm=0.01)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(5):
        backward(mine, i)
        ours.step()
        ours.zero_grad()
        backward(theirs, i)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        reference.step()
        reference.zero_grad()
        assert torch.allclose(ours.norm, norm, rtol=1e-6)
    for p, q in zip(mine.parameters(), theirs.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=1e-2 * 2.0**-18)  # a step of lr, FP32 norms summed in another order


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out_and_counted(bad: float) -> None:
    net = model()
    optimizer = AdamW(net, max_norm=1.0)
    set_gradients(net, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in net.parameters()]
    set_gradients(net, 1)
    net[0].weight.main_grad[3, 3] = bad  # type: ignore[union-attr, index]
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], before["state"][number][key]) for key in state)
    set_gradients(net, 2)
    optimizer.step()
    assert optimizer.skipped == 1 and int(optimizer.state[net[0].weight]["step"]) == 2


def test_clears_sets_gradients_to_zero_and_changes_nothing_else() -> None:
    one, two = model(), model()
    a, b = AdamW(one, clears=True), AdamW(two)
    for i in range(3):
        set_gradients(one, i)
        set_gradients(two, i)
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert all(not p.main_grad.any() for p in one.parameters())  # type: ignore[attr-defined]


def test_groups_and_schedulers() -> None:
    net = model(torch.float32)
    other = model(torch.float32)

    def groups(m: Any) -> list[dict[str, Any]]:
        return [
            {"params": [m[0].weight, m[2].weight]},
            {"params": [m[0].bias, m[2].bias], "weight_decay": 0.0, "lr": 3e-2},
        ]

    ours = AdamW(groups(net), lr=1e-2, spec="bf16")
    reference = torch.optim.AdamW(groups(other), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 6) for o in (ours, reference)]
    for i in range(6):
        for m, o, schedule in zip((net, other), (ours, reference), schedules):
            backward(m, i)
            o.step()
            o.zero_grad()
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))


def test_state_dicts_go_both_ways() -> None:
    ours_net, torch_net = model(torch.float32), model(torch.float32)
    ours = AdamW(ours_net, lr=1e-2, spec="bf16", weight_decay=0.1)
    reference = torch.optim.AdamW(torch_net.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(3):
        for net, optimizer in ((ours_net, ours), (torch_net, reference)):
            backward(net, i)
            optimizer.step()
            optimizer.zero_grad()
    swapped_ours = AdamW(torch_net, lr=1.0, spec="bf16")
    swapped_torch = torch.optim.AdamW(ours_net.parameters(), lr=1.0)
    swapped_ours.load_state_dict(copy.deepcopy(reference.state_dict()))
    swapped_torch.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert swapped_ours.param_groups[0]["lr"] == 1e-2
    for net, optimizer in ((ours_net, swapped_torch), (torch_net, swapped_ours)):
        backward(net, 9)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours_net.parameters(), torch_net.parameters()))


def test_own_state_dict_resumes_bit_for_bit() -> None:
    net = model()
    optimizer = AdamW(net, max_norm=1.0)
    for i in range(3):
        set_gradients(net, i)
        optimizer.step()
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = model()
    resumed = AdamW(again, max_norm=1.0)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for i in range(3, 6):
        for m, o in ((net, optimizer), (again, resumed)):
            set_gradients(m, i)
            o.step()
    for p, q in zip(net.parameters(), again.parameters()):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["master"], resumed.state[q]["master"])


def test_a_parameter_written_by_someone_else_gets_a_new_master_only_where_it_changed() -> None:
    net: Any = nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = AdamW(net, lr=1e-3)
    net.weight.main_grad = torch.randn(4, 4)
    optimizer.step()
    master = optimizer.state[net.weight]["master"].clone()
    with torch.no_grad():
        net.weight[0, 0] = 5.0
        net.weight[1, 1] = net.weight[1, 1].clone()
    net.weight.main_grad.zero_()
    net.weight.requires_grad_(True)
    optimizer.refresh(net.weight)
    changed = optimizer.state[net.weight]["master"]
    assert changed[0, 0] == 5.0
    changed[0, 0] = master[0, 0]
    assert torch.equal(changed, master), "the bits below BF16 of every other weight stay"


def test_a_parameter_written_while_it_has_no_gradient_keeps_what_was_written() -> None:
    net = model()
    optimizer = AdamW(net, lr=1e-3)
    backward(net, 0)
    optimizer.step()
    weight = net[0].weight
    with torch.no_grad():
        weight.fill_(5.0)
    weight.grad = None
    optimizer.step()  # the others'
    backward(net, 1)
    optimizer.step()
    # at most lr * (1 + decay * 5) away, a tenth of BF16's unit there (2^-5)
    assert torch.equal(weight, torch.full_like(weight, 5.0))


@pytest.mark.parametrize("clears", [False, True])
def test_gradients_that_lie_otherwise_than_their_parameters_are_read_anew_in_every_step(clears: bool) -> None:
    """Accumulators of a transposed parameter and of one with gaps, which keep their address from step to step."""
    torch.manual_seed(0)
    values = [torch.randn(16, 8).t(), torch.randn(8, 32)[:, :16]]
    mine, theirs = [nn.Parameter(v) for v in values], [nn.Parameter(v.clone()) for v in values]
    for p in mine:
        p.main_grad = torch.zeros(8, 16)  # type: ignore[attr-defined]
    ours = AdamW(mine, lr=1e-2, spec="bf16", clears=clears)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(mine, theirs):
            q.grad = torch.randn(8, 16)
            p.main_grad.copy_(q.grad)  # type: ignore[attr-defined]
        ours.step()
        reference.step()
        assert all(bool(p.main_grad.any()) != clears for p in mine)  # type: ignore[attr-defined]
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs))


def test_gradients_set_to_none_are_freed() -> None:
    net = model()
    optimizer = AdamW(net)
    backward(net, 0)
    optimizer.step()
    gradient = weakref.ref(net[0].weight.grad)
    net.zero_grad()
    gc.collect()
    assert gradient() is None


def test_copies_and_pickles_go_on_as_the_original_does() -> None:
    net = model()
    optimizer = AdamW(net, lr=1e-2, max_norm=1.0)
    backward(net, 0)
    optimizer.step()
    others = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    for one, its in [(net, optimizer), *others]:
        one.zero_grad()
        backward(one, 1)
        its.step()
    for other, _ in others:
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))


def test_frozen_parameters_stay_and_may_be_frozen_later() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = AdamW(net)
    set_gradients(net, 0)
    frozen, later = net[0].weight.clone(), net[2].weight.clone()
    net[2].weight.requires_grad_(False)
    optimizer.step()
    assert torch.equal(net[0].weight, frozen) and torch.equal(net[2].weight, later)
    assert len(optimizer.param_groups[0]["params"]) == 3
    net[2].weight.requires_grad_(True)
    optimizer.step()
    assert not torch.equal(net[2].weight, later)


def test_versions_are_raised_so_that_kept_fp8_weights_are_refreshed() -> None:
    net = model()
    optimizer = AdamW(net)
    set_gradients(net, 0)
    before = [p._version for p in net.parameters()]
    optimizer.step()
    assert all(p._version > v for p, v in zip(net.parameters(), before))


def test_bare_parameters_work_and_say_what_is_lost() -> None:
    net = model()
    optimizer = AdamW(net.parameters())
    assert [r.code for r in optimizer.remarks] == ["W1101"] and "by number" in optimizer.remarks[0].message
    set_gradients(net, 0)
    optimizer.step()
    compiled = fp8c.compile(nn.Linear(128, 128).bfloat16(), target="cpu")
    assert fp8c.optim.AdamW(compiled).remarks == []


def test_bad_input_is_named() -> None:
    net = model()
    wrong = ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"eps": float("nan")}, {"max_norm": -1.0})
    for bad in wrong:
        with pytest.raises(DiagnosticError, match="E1101"):
            AdamW(net, **bad)  # type: ignore[arg-type]
    with pytest.raises(DiagnosticError, match="E1102"):
        AdamW(net.requires_grad_(False))
    net.requires_grad_(True)
    assert [r.code for r in AdamW(net, betas=(0.9, 0.999), spec="deepseek_v3").remarks] == ["W1103"]
    with pytest.raises(DiagnosticError, match="E1103"):
        AdamW([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    optimizer = AdamW(net)
    with pytest.raises(DiagnosticError, match="E1104"):
        optimizer.load_state_dict(AdamW(nn.Linear(2, 2)).state_dict())
    other = nn.Sequential(nn.Linear(24, 41), nn.Tanh(), nn.Linear(41, 8)).bfloat16()
    different = AdamW(other)
    set_gradients(other, 0)
    different.step()
    with pytest.raises(DiagnosticError, match="E1104"):
        optimizer.load_state_dict(different.state_dict())
    with pytest.raises(DiagnosticError, match="E1101"):
        optimizer.load_state_dict(torch.optim.AdamW(net.parameters(), amsgrad=True).state_dict())


def test_why_w1103_warns_a_bf16_moment_does_not_decay_near_beta_one() -> None:
    net: Any = nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = AdamW(net, betas=(0.9, 0.999))
    net.weight.main_grad = torch.ones(4, 4)
    optimizer.step()
    second = optimizer.state[net.weight]["exp_avg_sq"].clone()
    for _ in range(200):
        net.weight.main_grad.zero_()
        optimizer.step()
    assert torch.equal(optimizer.state[net.weight]["exp_avg_sq"], second)


def kernel_errors(device: str, **variables: str) -> dict[str, dict[str, float]]:
    script = Path(__file__).with_name("adamw_kernel_check.py")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(script), device],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_fused_kernel_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, errors in kernel_errors("cpu", TRITON_INTERPRET="1").items():
        assert max(errors.values()) <= 1.0, (case, errors)


@pytest.mark.gpu
def test_the_fused_kernel_on_the_gpu() -> None:
    for case, errors in kernel_errors("cuda").items():
        assert max(errors.values()) <= 1.0, (case, errors)
