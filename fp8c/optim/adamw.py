"""AdamW as a spec's `optimizer` section asks for it: for the recipe BF16 moments, FP32 master weights and gradients.

    step = fp8c.compile(model, spec="deepseek_v3")
    optimizer = fp8c.optim.AdamW(step, lr=3e-4, max_norm=1.0)

What is rounded: the moments enter the update in FP32 and are rounded once, to nearest even, when they are stored; the
parameter is its master weight rounded to nearest even. A BF16 value has 8 significant bits, so a moment that is stored
is off by at most 2^-9 of its value, and a moment moves at all only when a step changes it by more than half a unit:
with beta2 = 0.95 (the recipe) exp_avg_sq stops within 2^-8 / (1 - beta2) = 8 % of its fixed point, an update within
4 %. With 1 - beta2 < 2^-8 it would stop decaying (W1103).

Source: DeepSeek-V3 (arXiv:2412.19437), sections 3.3.3 and 4.2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fp8c import driver
from fp8c.backends.reference import adamw as portable
from fp8c.backends.reference.adamw import Bucket
from fp8c.diagnostics import Diagnostic, ExitCode, Severity, fail
from fp8c.main_grad import zero_main_grads
from fp8c.optim.state_types import StateTypes, state_types
from fp8c.optim.zero1 import Part, Zero1
from fp8c.specs.load import Spec

log = logging.getLogger("fp8c")

DEFAULT_SPEC = "deepseek_v3"
STATES = ("exp_avg", "exp_avg_sq", "master")
Params = nn.Module | Iterable[Tensor] | Iterable[Mapping[str, Any]]


@dataclass
class Work:
    """What one step updates together, with the settings of its parameter group, and what travels afterwards
    (ZeRO-1).
    """

    group: dict[str, Any]
    bucket: Bucket
    key: tuple[Any, ...]


@dataclass
class Plan:
    """The buckets of a step, for as long as every parameter and `main_grad` stays where it is: a step of many tensors
    costs the host one look at each. Of others (`grad`, and copies of gradients) none is made: it would keep them in memory.

    has_run: the kernels' tables have been made for it
    """

    works: list[Work]
    seen: list[tuple[Tensor, int, int]]  # parameter, its address, its gradient's
    has_run: bool = False

    @classmethod
    def of(cls, optimizer: AdamW, works: list[Work]) -> Plan:
        return cls(works, cls.look(optimizer))

    @staticmethod
    def look(optimizer: AdamW) -> list[tuple[Tensor, int, int]]:
        grads = [(p, optimizer.gradient(p)) for group in optimizer.param_groups for p in group["params"]]
        return [(p, local(p).data_ptr(), 0 if g is None else local(g).data_ptr()) for p, g in grads]

    def holds(self, optimizer: AdamW) -> bool:
        versions = optimizer._versions
        for (param, address, gradient), (now, at, grad_at) in zip(self.seen, self.look(optimizer), strict=False):
            if param is not now or address != at or gradient != grad_at:
                return False
            if grad_at and versions.get(param) != local(param)._version:
                return False
        return len(self.seen) == sum(len(group["params"]) for group in optimizer.param_groups)


class AdamW(Optimizer):
    """AdamW with states in the precision of a spec.

    params:       what `fp8c.compile` returned; or a module, tensors or parameter groups of one's own
    max_norm:     clip the gradients' global norm to this; None does not clip
    skip_nonfinite: leave a step out when a gradient is Inf or NaN, and count it in `skipped`; the host waits for
                    nothing
    spec:         whose `optimizer` section holds; the compiled module's own unless given
    main_grad:    give every parameter without one an FP32 accumulator `main_grad`: each micro-batch's gradient is added
                  to it and `grad` set to None. A module compiled with main_grad=True brings its own.
    zero1:        a one-dimensional mesh over which the states are divided; gradients are then averaged over it, unless
                  reduce_gradients is False because something else (DDP) has done so
    clears:       set the gradients to 0 inside the step, which saves the pass over them that `zero_grad` makes
    fused:        the fused kernel (default on a GPU) or PyTorch's foreach operators

    A gradient is `p.main_grad` where a parameter has one, otherwise `p.grad`. A parameter that someone else wrote since
    the last step (a loaded checkpoint) gets a new master weight wherever it is no longer its master's rounding.
    Errors: DiagnosticError E1101 for settings out of range, E1102 for nothing to train, E1103 for a sparse or complex
            one.
    """

    reads_main_grad = True

    def __init__(
        self,
        params: Params,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
        spec: str | Path | Spec | None = None,
        main_grad: bool = False,
        zero1: DeviceMesh | None = None,
        reduce_gradients: bool = True,
        clears: bool = False,
        fused: bool | None = None,
    ) -> None:
        self.remarks: list[Diagnostic] = []
        self.types = self._types(params, spec)
        self.max_norm, self.skip_nonfinite, self.clears, self.fused = max_norm, skip_nonfinite, clears, fused
        self.zero1 = None if zero1 is None else Zero1(zero1, reduce_gradients)
        self._control: Tensor | None = None
        self._plan: Plan | None = None
        self._stepped: list[Tensor] = []  # parameters of this step
        self._copied = False  # whether it reads copies of gradients that lie in memory otherwise than their parameters
        self._tables: dict[Any, Any] = {}
        self._versions: dict[Tensor, int] = {}
        self._hooks: list[Any] = []
        if max_norm is not None and not max_norm >= 0.0:
            raise fail("E1101", f"AdamW got max_norm = {max_norm}", exit_code=ExitCode.USAGE)
        named = dict(params.named_parameters()) if isinstance(params, nn.Module) else {}
        self.names: dict[Tensor, str] = {p: name for name, p in named.items()}
        given: Any = [p for p in named.values() if p.requires_grad] if isinstance(params, nn.Module) else list(params)
        if not given:
            raise fail(
                "E1102",
                "AdamW got no parameter that requires a gradient",
                help="unfreeze at least one, or leave the optimizer out",
                exit_code=ExitCode.USAGE,
            )
        super().__init__(given, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        if main_grad:
            self.accumulate()

    def _types(self, params: Params, spec: str | Path | Spec | None) -> StateTypes:
        if spec is not None:
            return state_types(spec)
        if isinstance(params, nn.Module) and "fp8c_session" in params.__dict__:
            return state_types(driver.session_of(params).spec)
        what = "a module that fp8c did not compile" if isinstance(params, nn.Module) else "bare parameters"
        lost = "" if isinstance(params, nn.Module) else ", and checkpoints name its states by number instead of by name"
        self.remark(
            "W1101",
            f"AdamW was built on {what}: no spec says what to keep, so it keeps what '{DEFAULT_SPEC}' does{lost}",
            "pass what fp8c.compile returned, or spec=...",
        )
        return state_types(DEFAULT_SPEC)

    def remark(self, code: str, message: str, help: str) -> None:
        """Say something once: kept in `remarks`, logged as a warning."""
        if all(known.code != code for known in self.remarks):
            self.remarks.append(Diagnostic(code, message, severity=Severity.WARNING, help=help))
            log.warning("%s: %s (%s)", code, message, help)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_settings(group)
        self.judge_betas(group)
        for param in group["params"]:
            if (
                param.is_complex()
                or param.is_sparse
                or param.dtype not in (torch.bfloat16, torch.float16, torch.float32)
            ):
                raise fail("E1103", f"AdamW cannot train a parameter of type {param.dtype} ({param.layout})")

    def judge_betas(self, group: Mapping[str, Any]) -> None:
        """W1103: rounded to nearest, beta * v is v again when the change is below half a unit in the last place,
        which is 2^-9 to 2^-8 of v."""
        kept = (self.types.exp_avg, self.types.exp_avg_sq)
        for name, beta, dtype in zip(("exp_avg", "exp_avg_sq"), group["betas"], kept):
            if dtype == torch.bfloat16 and 1.0 - beta < 2.0**-8:
                self.remark(
                    "W1103",
                    f"{name} in BF16 with a beta of {beta} does not decay: what a step takes off is rounded away",
                    "choose a beta of at most 0.99 (the recipe has 0.9 and 0.95), or a spec that keeps it in fp32",
                )

    # --- gradients ----------------------------------------------------------------------------------------------------

    def accumulate(self) -> None:
        """FP32 accumulators for the parameters that have none, filled by autograd as each gradient is ready."""
        for param in self.trained():
            if getattr(param, "main_grad", None) is None:
                zeros = torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
                param.main_grad = zeros  # type: ignore[attr-defined]
                hook = param.register_post_accumulate_grad_hook(_add_to_main_grad)  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def gradient(self, param: Tensor) -> Tensor | None:
        """What a step reads: `main_grad`, else `grad`; None for a parameter without either, which a step leaves
        alone.
        """
        if not param.requires_grad:
            return None
        main: Tensor | None = getattr(param, "main_grad", None)
        grad = param.grad if main is None else main
        if grad is None:
            return None
        if grad.is_sparse:
            raise fail("E1103", f"AdamW cannot use a sparse gradient (parameter {list(param.shape)})")
        if main is None and grad.dtype != self.types.grad and self.types.grad == torch.float32:
            self.remark(
                "W1102",
                f"gradients are {str(grad.dtype).removeprefix('torch.')}: their sums lose what FP32 would keep",
                "compile with main_grad=True, or build the optimizer with main_grad=True",
            )
        return grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """`grad` to None (or 0), `main_grad` to 0: an accumulator keeps its address, which the compiled step knows."""
        super().zero_grad(set_to_none)
        zero_main_grads(p for group in self.param_groups for p in group["params"])

    # --- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, check, update. Everything runs on the parameters' device, and the host waits for none of it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is None or not self._plan.holds(self):
            self._plan = None
            works, arrivals = self.gather()
            if not arrivals and not self._copied and all(is_kept(p) for p in self._stepped):
                self._plan = Plan.of(self, works)
        else:
            works, arrivals = self._plan.works, []
        if not works:
            return loss
        total = self.square_sum(works)
        if total is None:  # no clipping, no check: the factor is known
            total = torch.zeros((), device=works[0].bucket.params[0].device)
        scale = 1.0 if self.zero1 is None or not self.zero1.reduces else 1.0 / self.zero1.world
        limit = math.inf if self.max_norm is None else self.max_norm
        steps = [step for work in works for step in work.bucket.steps]
        control = self.control(total.device)
        corrections: list[Tensor] = []
        if self.is_fused(total.device):
            from fp8c.backends.triton import adamw as fused

            betas = [work.group["betas"] for work in works for _ in work.bucket.steps]
            table = fused.step_table(steps, betas, self._tables.get("steps"))
            self._tables["steps"] = table
            fused.decide(table, total, control, scale, limit, self.skip_nonfinite)
            corrections = list(torch.split(table.corrections, [len(work.bucket.steps) for work in works]))
        else:
            portable.decide(steps, total, control, scale, limit, self.skip_nonfinite)
        for number, work in enumerate(works):
            self.update(work, control, corrections[number] if corrections else None)
        if self._plan is not None:
            self._plan.has_run = True
        for parts, flat in arrivals:
            assert self.zero1 is not None
            self.zero1.publish(parts, flat)
        if self.clears and (self.zero1 is not None or self._copied):
            torch._foreach_zero_([local(g) for p in self.trained() if (g := self.gradient(p)) is not None])
        # Only of what was stepped: a parameter without a gradient may have been written by someone else meanwhile.
        torch.autograd.graph.increment_version([local(param) for param in self._stepped])
        for param in self._stepped:
            self._versions[param] = local(param)._version
        return loss

    def gather(self) -> tuple[list[Work], list[tuple[list[Part], Tensor]]]:
        """The tensors of this step, sorted into buckets; with ZeRO-1 also what is to be sent round afterwards."""
        rows: dict[tuple[Any, ...], tuple[dict[str, Any], list[list[Tensor]]]] = {}
        self._stepped, self._copied = [], False
        arrivals: list[tuple[list[Part], Tensor]] = []
        for number, group in enumerate(self.param_groups):
            pairs = [(p, g) for p in group["params"] if (g := self.gradient(p)) is not None]
            for param, _ in pairs:
                self.refresh(param)
                self._stepped.append(param)
            if self.zero1 is None:
                triples = [(p, local(p), matching(local(g), local(p))) for p, g in pairs]
                self._copied |= any(grad is not local(g) for (_, g), (_, _, grad) in zip(pairs, triples))
            else:
                triples = []
                grads = dict(pairs)
                for parts in self.zero1.buckets(list(grads)):
                    slices = self.zero1.gradients(parts, [grads[part.param] for part in parts])
                    flat, views = self.zero1.outbox(parts)
                    arrivals.append((parts, flat))
                    triples += [(part.param, view, grad) for part, view, grad in zip(parts, views, slices)]
            for param, part, grad in triples:
                state = self.state[param]
                master = local(state["master"]) if "master" in state else part
                row = (part, grad, master, local(state["exp_avg"]), local(state["exp_avg_sq"]), state["step"])
                # One tensor at an odd address (a slice of a flat buffer) would make every load of its launch narrow.
                is_aligned = all(tensor.data_ptr() % 16 == 0 for tensor in row[:5])
                key = (number, part.device, part.dtype, grad.dtype, is_aligned, *self.reduced_over(param))
                _, columns = rows.setdefault(key, (group, [[] for _ in range(6)]))
                for column, tensor in zip(columns, row):
                    column.append(tensor)
        works = []
        for key, (group, (params, grads_, masters, first, second, steps)) in rows.items():
            own = params[0] is masters[0]
            works.append(Work(group, Bucket(params, grads_, None if own else masters, first, second, steps), key))
        return works, arrivals

    def square_sum(self, works: Sequence[Work]) -> Tensor | None:
        """Sum of squares of all gradients on all ranks, FP32 []; None when nobody asks for it."""
        if self.max_norm is None and not self.skip_nonfinite:
            return None
        sums: dict[tuple[Any, ...], Tensor] = {}
        for work in works:
            groups = work.key[5:]
            part = self._square_sum(work)
            sums[groups] = sums[groups] + part if groups in sums else part
        total: Tensor | None = None
        for groups, part in sums.items():
            for group in groups:
                dist.all_reduce(part, group=group)
            total = part if total is None else total + part
        return total

    def _square_sum(self, work: Work) -> Tensor:
        if not self.is_fused(work.bucket.params[0].device):
            return portable.square_sum(work.bucket)
        from fp8c.backends.triton import adamw as fused

        self._tables[work.key] = self.tables(work)
        return fused.square_sum(work.bucket, self._tables[work.key])

    def tables(self, work: Work) -> Any:
        """The kernel's tables of a bucket: the last step's where the plan is the last step's."""
        from fp8c.backends.triton import adamw as fused

        old = self._tables.get(work.key)
        if old is not None and self._plan is not None and self._plan.has_run:
            return old
        return fused.tables_of(work.bucket, old)

    def update(self, work: Work, control: Tensor, corrections: Tensor | None) -> None:
        group = work.group
        settings: dict[str, Any] = {name: group[name] for name in ("betas", "eps", "weight_decay")}
        settings |= {"lr": float(group["lr"]), "clears": self.clears and self.zero1 is None}
        if not self.is_fused(control.device):
            portable.update(work.bucket, control, **settings)
            return
        from fp8c.backends.triton import adamw as fused

        if self.max_norm is None and not self.skip_nonfinite:  # otherwise the norm's pass has made it
            self._tables[work.key] = self.tables(work)
        assert corrections is not None
        fused.update(work.bucket, self._tables[work.key], control, corrections, **settings)

    def is_fused(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.fused is None else self.fused

    def reduced_over(self, param: Tensor) -> tuple[Any, ...]:
        """Process groups over which a parameter's parts lie: the norm is summed over them."""
        if self.zero1 is not None:
            return (self.zero1.mesh.get_group(),)
        if not isinstance(param, DTensor):
            return ()
        mesh = param.device_mesh
        return tuple(mesh.get_group(i) for i, place in enumerate(param.placements) if place.is_shard())

    def control(self, device: torch.device) -> Tensor:
        """Factor of the gradients, whether to step, norm, steps left out: FP32 [4]."""
        if self._control is None or self._control.device != device:
            old = self._control
            self._control = torch.zeros(4, device=device) if old is None else old.to(device)
        return self._control

    @property
    def skipped(self) -> int:
        """Steps left out because a gradient was not finite. Reading it waits for the device."""
        return 0 if self._control is None else int(self._control[3])

    @property
    def norm(self) -> Tensor:
        """Global norm of the last step's gradients before clipping, FP32 [] on the device."""
        return torch.zeros(()) if self._control is None else self._control[2]

    # --- state --------------------------------------------------------------------------------------------------------

    def init_state(self) -> None:
        """Make the states that a first step would make: zero moments, masters from the parameters."""
        for param in self.trained():
            self.refresh(param)

    @torch.no_grad()
    def refresh(self, param: Tensor) -> None:
        """States of a parameter that has none; a new master where someone else has written the parameter."""
        own = self.zero1.slice(param, param.detach()) if self.zero1 is not None else local(param)
        version = local(param)._version
        state = self.state[param]
        if "step" not in state:
            self._plan = None
            state["step"] = torch.zeros((), dtype=torch.float32, device=own.device)
            state["exp_avg"] = self.like(param, own, self.types.exp_avg)
            state["exp_avg_sq"] = self.like(param, own, self.types.exp_avg_sq)
            if param.dtype != self.types.master:
                state["master"] = self.like(param, own, self.types.master)
                local(state["master"]).copy_(own)
        elif "master" in state and self._versions.get(param) != version:
            master = local(state["master"])
            master.copy_(torch.where(master.to(own.dtype) == own, master, own.to(master.dtype)))
        self._versions[param] = version

    def like(self, param: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros of a parameter's (or, with ZeRO-1, its slice's) shape: a DTensor where the parameter is one."""
        if self.zero1 is None:
            return torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return self.zero1.state(param, torch.zeros(own.shape, dtype=dtype, device=own.device))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all settings and states, without what belongs to addresses and to hooks."""
        own = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return {**own, **super().__getstate__(), "_control": self._control}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._stepped, self._copied, self._tables, self._versions, self._hooks = None, [], False, {}, {}, []

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, which loads it; `master` and the count of skipped steps come on top."""
        state = super().state_dict()
        state["param_groups"][0]["skipped"] = self.skipped
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """States of this optimizer or of torch.optim.AdamW, brought to this optimizer's precision.

        Masters that the other did not keep are made from the parameters: load the model first.
        Raises: DiagnosticError E1104 when the numbers or shapes of the parameters differ; E1101 for amsgrad or
                maximize.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        saved = [len(group["params"]) for group in groups]
        own = [len(group["params"]) for group in self.param_groups]
        if saved != own:
            raise fail(
                "E1104",
                f"the saved optimizer has {saved} parameters in its groups, this one {own}",
                help="build the optimizer on the same parameters, frozen ones included or left out alike",
            )
        for group, mine in zip(groups, self.param_groups):
            if group.get("amsgrad") or group.get("maximize"):
                raise fail("E1101", "the saved optimizer used amsgrad or maximize, which AdamW of fp8c does not have")
            skipped = group.pop("skipped", None)
            if skipped is not None:
                self.control(local(mine["params"][0]).device)[3] = float(skipped)
            mine.update({key: value for key, value in group.items() if key in mine and key != "params"})
            mine["betas"] = tuple(mine["betas"])
            check_settings(mine)
            self.judge_betas(mine)
        self._plan = None
        numbers = [number for group in groups for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params):
            if number not in state_dict["state"]:
                self.state.pop(param, None)
                continue
            self.state.pop(param, None)
            self.refresh(param)
            self.load_param(param, state_dict["state"][number])

    def load_param(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        state = self.state[param]
        state["step"].fill_(float(saved["step"]))
        for name in STATES:
            if name not in state or name not in saved:
                continue
            value, mine = saved[name], state[name]
            if value.shape != mine.shape:
                raise fail(
                    "E1104",
                    f"saved {name} of parameter {self.names.get(param, '?')} is {list(value.shape)}, here it is "
                    f"{list(mine.shape)}",
                )
            if isinstance(mine, DTensor) and not isinstance(value, DTensor):
                own = self.zero1.slice(param, value) if self.zero1 is not None else None
                value = own if own is not None else _placed_like(value, mine)
            local(mine).copy_(local(value))


def check_settings(group: Mapping[str, Any]) -> None:
    """E1101 for a learning rate, beta, eps or decay out of range."""
    if len(group["betas"]) != 2:
        raise fail("E1101", f"AdamW got betas = {group['betas']}, expected two", exit_code=ExitCode.USAGE)
    beta1, beta2 = group["betas"]
    for name, value, allowed in (
        ("lr", float(group["lr"]), float(group["lr"]) >= 0.0),
        ("eps", group["eps"], group["eps"] >= 0.0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0.0),
        ("beta1", beta1, 0.0 <= beta1 < 1.0),
        ("beta2", beta2, 0.0 <= beta2 < 1.0),
    ):
        if not allowed or not math.isfinite(value):
            raise fail("E1101", f"AdamW got {name} = {value}", exit_code=ExitCode.USAGE)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_kept(param: Tensor) -> bool:
    """Whether a parameter's gradient stays where it is from step to step."""
    return getattr(param, "main_grad", None) is not None


def matching(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient that lies in memory as its parameter does."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _placed_like(whole: Tensor, mine: DTensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(mine.device), mine.device_mesh, mine.placements)


def _add_to_main_grad(param: Tensor) -> None:
    if param.grad is not None:
        local(param.main_grad).add_(local(param.grad))  # type: ignore[attr-defined]
        param.grad = None
