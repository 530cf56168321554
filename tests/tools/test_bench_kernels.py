"""`fp8c bench kernels` without a GPU: every row calls its launcher with arguments that it takes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="the launchers are Triton's")

from fp8c.backends.triton import ahead
from fp8c.tools.bench import kernels


class OnMeta(TorchFunctionMode):
    """What asks for a GPU gets tensors without data; seeded shares of experts are drawn on the CPU first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def test_every_row_launches_its_kernels() -> None:
    launches: dict[str, ahead.Launch] = {}
    names = []
    with OnMeta(), ahead.recording(launches):
        for row in itertools.chain(kernels.kernels(), kernels.activations()):
            row.call()
            names.append(row.name)
            assert row.moved_bytes > 0, row.name
    assert len(set(names)) == len(names) > 20
    started = {launch.kernel.fn.__name__ for launch in launches.values()}
    assert {"row_kernel", "norm_kernel", "gather_kernel", "forward_kernel", "gather_sum_kernel"} <= started, started
