"""The BF16 baseline: what torch.compile would save of the same step, to compare saved bytes with.

It needs a second joint graph, decomposed as Inductor decomposes it, and PyTorch's default min-cut. Neither depends on
what fp8c does, so on a system that can fork it runs in a process of its own beside the compiler.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from fp8c import capture
from fp8c.partition import Halves, default_min_cut
from fp8c.saved import SavedTensor, saved_tensors


class Split(Exception):
    """Stops AOTAutograd once the joint graph is cut; nothing is compiled."""


class Baseline:
    """The baseline of one captured forward graph, begun at once and waited for in `result`."""

    def __init__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> None:
        self._step = (copy.deepcopy(gm), example_inputs)
        self._pipe: int | None = None
        self._child = 0
        if hasattr(os, "fork") and (os.cpu_count() or 1) > 1 and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._fork()

    def _fork(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        receive, send = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(receive)
            _answer(send, self._step)
        os.close(send)
        self._pipe = receive

    def result(self) -> tuple[SavedTensor, ...]:
        """The storages that cross to backward. Computed here when there is no other process, or when that one failed."""
        if self._pipe is not None:
            with os.fdopen(self._pipe, "rb") as pipe:
                answer = pipe.read()
            self._pipe = None
            _, status = os.waitpid(self._child, 0)
            if status == 0 and answer:
                return tuple(SavedTensor(**fields) for fields in json.loads(answer))
        return saved_tensors(split_by_default(*self._step))


def _answer(send: int, step: tuple[fx.GraphModule, list[Any]]) -> NoReturn:
    """In the child: compute, write, and leave without running anything of the parent's."""
    status = 1
    with contextlib.suppress(BaseException):
        with os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") as silent, contextlib.redirect_stderr(silent):
            answer = json.dumps([asdict(t) for t in saved_tensors(split_by_default(*step))]).encode()
        with os.fdopen(send, "wb") as pipe:
            pipe.write(answer)
        status = 0
    os._exit(status)


def split_by_default(gm: fx.GraphModule, example_inputs: list[Any]) -> Halves:
    """The step in BF16 as torch.compile would split it: Inductor's decompositions, PyTorch's default min-cut.

    Attention stays one operator here too; nothing else of fp8c is applied.
    """
    from torch._inductor.decomposition import select_decomp_table

    capture.keep_attention(gm)
    gm.recompile()
    found: list[Halves] = []

    def split(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        found.append(default_min_cut(joint, inputs, num_fwd_outputs))
        raise Split

    backend = aot_autograd(fw_compiler=lambda g, _: g, partition_fn=split, decompositions=select_decomp_table())
    with contextlib.suppress(Split):
        backend(gm, example_inputs)
    return found[0]
