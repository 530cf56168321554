"""A GEMM that is called again with the same operands is started again, not made ready again. The driver is a fake."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8c.backends.cuda import gemm, launch
from fp8c.diagnostics import DiagnosticError

ACT, WEIGHT = "e4m3[1x128] fp32", "e4m3[128x128] fp32"
M, N, K = 256, 128, 512


class FakeDriver:
    """Counts; `refusals` are the statuses of the next launches."""

    def __init__(self) -> None:
        self.maps = 0
        self.contexts = 0
        self.streams: list[int] = []
        self.refusals: list[int] = []
        self.cuLaunchKernelEx = self.Function(self)

    class Function:
        def __init__(self, driver: FakeDriver) -> None:
            self.driver = driver
            self.argtypes: list[Any] = []

        def __call__(self, config: int, function: Any, parameters: int, extra: None) -> int:
            if self.driver.refusals:
                return self.driver.refusals.pop(0)
            self.driver.streams.append(launch._LaunchConfig.from_address(config).stream)
            return 0

    def cuTensorMapEncodeTiled(self, *_: Any) -> int:
        self.maps += 1
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.contexts += 1
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    fake = FakeDriver()
    launch._launcher.cache_clear()
    launch._tensor_map.cache_clear()
    gemm._READY.clear()
    monkeypatch.setattr(launch, "_driver", lambda: fake)
    monkeypatch.setattr(launch, "_function", lambda config, index: ctypes.c_void_p(1))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as the index of a CPU tensor's device
    for module in (launch, gemm):
        monkeypatch.setattr(module, "multiprocessors", lambda index: 132)
        monkeypatch.setattr(module, "current_stream", lambda index: 7)
    monkeypatch.setattr(gemm, "_capability", lambda index: (9, 0))
    yield fake
    launch._launcher.cache_clear()
    launch._tensor_map.cache_clear()
    gemm._READY.clear()


def operands(k_stored: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = torch.zeros(M, k_stored).to(torch.float8_e4m3fn)[:, :K]
    return a, torch.ones(K // 128, M).t(), torch.zeros(N, K).to(torch.float8_e4m3fn), torch.ones(N // 128, K // 128)


def add(acc: Tensor, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """The product is added, so that the address of the result is the caller's."""
    gemm.scaled_mm_add_(acc, *given, ACT, WEIGHT, 128)


def test_the_second_call_prepares_nothing(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    acc, given = torch.zeros(M, N), operands()
    add(acc, given)
    made = driver.maps
    assert made > 0

    def prepare(*_: Any) -> launch.Launch:
        raise AssertionError("prepared again")

    monkeypatch.setattr(gemm, "prepare", prepare)
    add(acc, given)
    assert driver.streams == [7, 7] and driver.maps == made


@pytest.mark.parametrize("change", ["address", "strides", "stream", "reserved"])
def test_a_launch_belongs_to_what_it_was_prepared_for(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    stored = torch.zeros(M * (K + 16)).to(torch.float8_e4m3fn)
    acc, given = torch.zeros(M, N), (stored.as_strided((M, K), (K, 1)), *operands()[1:])
    add(acc, given)
    prepared = len(gemm._READY)
    match change:
        case "address":
            add(torch.zeros(M, N), given)
        case "strides":
            add(acc, (stored.as_strided((M, K), (K + 16, 1)), *given[1:]))
        case "stream":
            for module in (launch, gemm):
                monkeypatch.setattr(module, "current_stream", lambda index: 8)
            add(acc, given)
            assert driver.streams == [7, 8]
        case "reserved":
            monkeypatch.setattr(launch, "_reserved", 4)
            add(acc, given)
    assert len(gemm._READY) == prepared + 1


def test_copied_operands_are_copied_in_every_call(driver: FakeDriver) -> None:
    acc, given = torch.zeros(M, N), operands(k_stored=K + 8)  # rows that the copy engine can't address
    add(acc, given)
    add(acc, given)
    assert len(driver.streams) == 2 and not gemm._READY


def test_a_thread_without_a_context_gets_one(driver: FakeDriver) -> None:
    driver.refusals = [launch._INVALID_CONTEXT]
    add(torch.zeros(M, N), operands())
    assert driver.contexts == 1 and driver.streams == [7]


def test_other_refusals_are_reported(driver: FakeDriver) -> None:
    driver.refusals = [700]
    with pytest.raises(DiagnosticError, match="cuLaunchKernelEx"):
        add(torch.zeros(M, N), operands())
    assert not gemm._READY
