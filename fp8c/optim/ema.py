"""Moving average of the parameters, kept in CPU memory and updated beside the training step.

    ema = fp8c.optim.EMA(step, decay=0.999)
    loss.backward(); optimizer.step(); ema.update()          # returns at once
    with ema.swapped():                                      # the average in the model, for evaluation
        evaluate(step)

After a step a stream of its own copies the parameters to pinned memory, and a thread folds them into the average when
the copy has arrived: average = lerp(average, parameter, 1 - decay) in FP32, the very operation of the synchronous
formula. The next update of the parameters waits (on the GPU) for the copy out of them; the host waits only when
`buffers` copies are still being folded in, which `waits` counts.

Source: DeepSeek-V3 (arXiv:2412.19437), section 3.2.3.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fp8c.diagnostics import ExitCode, fail
from fp8c.optim.adamw import local

#: Parameters below this go to the host together: one copy for many small tensors.
SMALL_BYTES = 1 << 20
ALIGNMENT_BYTES = 64
#: Elements that a fold takes at a time. Every piece is two calls into PyTorch, and before each the thread may have to
#: wait for the interpreter while the training loop launches kernels: few large pieces.
PIECE = 1 << 24


class EMA:
    """Exponential moving average of a module's parameters (those that are trained), in FP32 on the CPU.

    decay:     weight of the old average at each update
    every:     fold in every so many calls of `update`
    optimizer: whose step has to wait until the parameters have been copied; without it `update` makes the stream that
               calls it wait for the copy, which is as safe and a little slower
    buffers:   copies that may be under way at a time (each of the parameters' size, in pinned memory)
    Raises:    DiagnosticError E1120 for settings out of range or nothing to average
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float = 0.999,
        *,
        every: int = 1,
        optimizer: Optimizer | None = None,
        buffers: int = 2,
    ) -> None:
        if not 0.0 <= decay < 1.0 or every < 1 or buffers < 1:
            raise fail(
                "E1120", f"EMA got decay = {decay}, every = {every}, buffers = {buffers}", exit_code=ExitCode.USAGE
            )
        self.decay, self.every = decay, every
        self.params: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.params:
            raise fail("E1120", "EMA got a module without trained parameters", exit_code=ExitCode.USAGE)
        self.calls = 0
        self.updates = 0
        self.waits = 0
        self.average = {name: local(p).detach().to("cpu", torch.float32, copy=True) for name, p in self.params.items()}
        largest = max(average.numel() for average in self.average.values())
        self._scratch = torch.empty(min(PIECE, largest), dtype=torch.float32)
        self._snapshots = [Snapshot(list(self.params.values())) for _ in range(buffers)]
        self._free: queue.Queue[Snapshot] = queue.Queue()
        for snapshot in self._snapshots:
            self._free.put(snapshot)
        self._filled: queue.Queue[Snapshot | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fold, name="fp8c-ema", daemon=True)
        self._thread.start()
        self._copied: torch.cuda.Event | None = None
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._protect()) if optimizer is not None else None

    @torch.no_grad()
    def update(self) -> None:
        """Fold the parameters as they are now into the average. Returns before that has happened."""
        self.calls += 1
        if self.calls % self.every:
            return
        self._raise()
        try:
            snapshot = self._free.get_nowait()
        except queue.Empty:
            self.waits += 1
            snapshot = self._free.get()
            self._raise()
        self._copied = snapshot.take()
        if self._hook is None:
            self._protect()
        self.updates += 1
        self._filled.put(snapshot)

    def _protect(self) -> None:
        """Whatever the calling stream does next comes after the copy out of the parameters."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def _fold(self) -> None:
        averages = list(self.average.values())
        while (snapshot := self._filled.get()) is not None:
            try:
                with torch.no_grad():
                    for average, parameter in zip(averages, snapshot.arrived()):
                        fold(average, parameter, self.decay, self._scratch)
            except BaseException as error:  # noqa: BLE001 (raised in the training loop, by _raise)
                self._error = error
            self._free.put(snapshot)

    def _raise(self) -> None:
        if self._error is not None:
            raise RuntimeError("the moving average could not be updated") from self._error

    def flush(self) -> None:
        """Wait until every update has been folded in."""
        held = [self._free.get() for _ in self._snapshots]
        for snapshot in held:
            self._free.put(snapshot)
        self._raise()

    def close(self) -> None:
        """End the thread; the average stays readable."""
        self.flush()
        self._filled.put(None)
        self._thread.join()
        if self._hook is not None:
            self._hook.remove()

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The average in the model's parameters, rounded to their types; afterwards the parameters, bit for bit."""
        self.flush()
        params = [local(p) for p in self.params.values()]
        with torch.no_grad():
            kept = [p.clone() for p in params]
            for p, average in zip(params, self.average.values()):
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(params, kept):
                    p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from: the averages (DTensors where the parameters are), decay and counts."""
        self.flush()
        average = {name: placed_like(value, self.params[name]) for name, value in self.average.items()}
        return {
            "average": average,
            "decay": self.decay,
            "every": self.every,
            "calls": self.calls,
            "updates": self.updates,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises: DiagnosticError E1121 when names or shapes are not this module's."""
        self.flush()
        saved: Mapping[str, Tensor] = state["average"]
        missing, unknown = sorted(self.average.keys() - saved.keys()), sorted(saved.keys() - self.average.keys())
        if missing or unknown:
            raise fail("E1121", f"the saved average lacks {missing[:4]} and has {unknown[:4]} too many")
        for name, average in self.average.items():
            value = local(saved[name])
            if value.shape != average.shape:
                raise fail(
                    "E1121", f"the saved average of {name} is {list(value.shape)}, expected {list(average.shape)}"
                )
            average.copy_(value)
        self.decay, self.every = float(state["decay"]), int(state["every"])
        self.calls, self.updates = int(state["calls"]), int(state["updates"])


def fold(average: Tensor, parameter: Tensor, decay: float, scratch: Tensor) -> None:
    """average = lerp(average, parameter, 1 - decay): average FP32, parameter of any type, both on the CPU, equal
    strides.

    scratch: FP32 [PIECE] to convert into; memory that is new each time would cost more than the arithmetic
    """
    if not is_dense(average) or average.stride() != parameter.stride():
        average.lerp_(parameter.float(), 1.0 - decay)
        return
    pieces = zip(torch.split(in_memory_order(average), PIECE), torch.split(in_memory_order(parameter), PIECE))
    for old, new in pieces:
        old.lerp_(scratch[: len(new)].copy_(new), 1.0 - decay)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as the one-dimensional view of its storage."""
    return tensor.as_strided((tensor.numel(),), (1,))


class Snapshot:
    """One copy of the parameters on the host: a pinned buffer, and on the device one for what is small."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = [local(p) for p in params]
        self.device = self.params[0].device
        size = 0
        order = sorted(range(len(self.params)), key=lambda i: self._is_large(self.params[i]))  # the small ones first
        offsets = [0] * len(self.params)
        small_end = 0
        for i in order:
            p = self.params[i]
            offsets[i] = size
            size += -(-p.numel() * p.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if not self._is_large(p):
                small_end = size
        on_gpu = self.device.type == "cuda"
        self.host = torch.empty(max(1, size), dtype=torch.uint8, pin_memory=on_gpu)
        self.values = [view(self.host, offset, p) for offset, p in zip(offsets, self.params)]
        self.small = [i for i, p in enumerate(self.params) if not self._is_large(p)]
        self.large = [i for i, p in enumerate(self.params) if self._is_large(p)]
        self.packed = torch.empty(small_end, dtype=torch.uint8, device=self.device) if on_gpu else None
        packed = self.packed if self.packed is not None else self.host
        self.packed_views = [view(packed, offsets[i], self.params[i]) for i in self.small]
        self.small_end = small_end
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    @staticmethod
    def _is_large(p: Tensor) -> bool:
        return p.numel() * p.element_size() >= SMALL_BYTES

    def take(self) -> torch.cuda.Event | None:
        """Start the copy. Returns what to wait for before the parameters may change; None when it is done."""
        if self.stream is None or self.event is None or self.packed is None:
            for value, p in zip(self.values, self.params):
                value.copy_(p)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            if self.small:
                torch._foreach_copy_(self.packed_views, [self.params[i] for i in self.small])
                self.host[: self.small_end].copy_(self.packed, non_blocking=True)
            for i in self.large:
                self.values[i].copy_(self.params[i], non_blocking=True)
            self.event.record(self.stream)
        return self.event

    def arrived(self) -> list[Tensor]:
        """The parameters on the host, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


def view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of the type, shape and (dense) strides of `like` in a flat byte buffer."""
    size = like.numel() * like.element_size()
    typed = flat[offset : offset + size].view(like.dtype)
    return typed.as_strided(like.shape, like.stride()) if is_dense(like) else typed.view(like.shape)


def is_dense(tensor: Tensor) -> bool:
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def placed_like(value: Tensor, param: Tensor) -> Tensor:
    """A DTensor of the parameter's placement around a local value that stays on the CPU; the value for other
    parameters.
    """
    if not isinstance(param, DTensor):
        return value
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = param._spec
    meta = TensorMeta(param.shape, param.stride(), value.dtype)
    placed = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
    return DTensor(value, placed, requires_grad=False)  # type: ignore[no-untyped-call]
