"""Training on several ranks: the mesh, the gradients of replicated parameters, and whether ranks agree.

mesh = fp8c.distributed.init_mesh("cuda", ep=8)
step = fp8c.compile(model, spec="deepseek_v3", mesh=mesh)
step(**batch).loss.backward()
fp8c.distributed.reduce_gradients(step)
optimizer.step()
"""

from __future__ import annotations

import datetime
import json
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fp8c.diagnostics import DiagnosticError, ExitCode, fail
from fp8c.main_grad import IS_MEAN

# The mesh ------------------------------------------------------------------------------------------------------------


def init_mesh(device: str, *, comm_sms: int | None = None, **dimensions: int) -> DeviceMesh:
    """A mesh over all ranks that torchrun started, e.g. `init_mesh("cuda", ep=8)`; sets up the process group and the GPU.

    comm_sms: how many SMs NCCL's kernels may take in the group of dimension "ep" (one thread block each). The group gets
              a stream of high priority, and fp8c's GEMMs leave that many SMs to it.
    Raises: DiagnosticError E0862 for a mesh that is not as large as the number of ranks, or more ranks than GPUs.
    """
    wanted, there = math.prod(dimensions.values()), int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        there = dist.get_world_size()
    text = " x ".join(f"{name}={size}" for name, size in dimensions.items())
    if wanted != there:
        raise fail(
            "E0862",
            f"the mesh {text} has {wanted} ranks, but {there} {'is' if there == 1 else 'are'} running",
            help=f"start it with torchrun --nproc-per-node {wanted}, or choose a mesh of {there}",
            exit_code=ExitCode.USAGE,
        )
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise fail(
                "E0862",
                f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}",
                help="start at most one rank for each GPU (torchrun --nproc-per-node)",
                exit_code=ExitCode.USAGE,
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    override: dict[int | str, Any] = {}
    if device == "cuda" and comm_sms is not None:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.min_ctas = options.config.max_ctas = comm_sms
        override = {"ep": options}
        limit_gemm_sms(comm_sms)
    sizes, names = tuple(dimensions.values()), tuple(dimensions)
    mesh: DeviceMesh = init_device_mesh(device, sizes, mesh_dim_names=names, backend_override=override or None)
    return mesh


def limit_gemm_sms(reserved: int) -> None:
    """Leave `reserved` SMs of every GPU to communication: fp8c's GEMMs start that many thread blocks fewer, and cuBLAS
    is told to (an experimental switch of PyTorch, without which its kernels wait for SMs)."""
    from fp8c.backends.cuda import launch

    launch.reserve_multiprocessors(reserved)
    carve_out = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if carve_out is not None:
        carve_out(reserved or None)


# Gradients -----------------------------------------------------------------------------------------------------------


def replicated_parameters(step: nn.Module) -> list[nn.Parameter]:
    """Parameters that every rank of the experts' group holds whole: all but DTensors (experts, and what FSDP shards)."""
    return [p for p in step.parameters() if p.requires_grad and not isinstance(p, DTensor)]


def reduce_gradients(step: nn.Module) -> None:
    """Make every gradient that of the mean of all ranks' losses. Call it after the last backward of a step.

    Replicated parameters: summed over the experts' group in rank order, in FP32, rounded once, and divided by the number
    of ranks: the same bits on every rank, whatever the transport's own order of summation. Sharded experts hold the sum
    of all ranks' contributions already and are divided. Parameters that FSDP2 shards are left to it.

    Called again it changes nothing.

    Traffic: an all-to-all and an all-gather of the gradients' size, as a ring all-reduce moves.
    Raises: DiagnosticError E0868 when a backward has added to experts' gradients that were divided already.
    """
    mesh = _mesh_of(step)
    if mesh is None:
        return
    group = mesh.get_group()
    ranks = group.size()
    found = [gradient_of(p) for p in step.parameters()]
    experts = [g for g in found if isinstance(g, DTensor) and "ep" in (g.device_mesh.mesh_dim_names or ())]
    if any(getattr(gradient, IS_MEAN, True) is False for gradient in experts):
        raise fail(
            "E0868",
            "a backward has added to experts' gradients that reduce_gradients had divided already: the sum of both is "
            "neither a mean nor a sum of the ranks' losses",
            help="call reduce_gradients(step) once, after the last micro-batch, and zero_grad(), which sets gradients to None, before the next step",
        )
    for gradient in experts:
        if not hasattr(gradient, IS_MEAN):
            gradient._local_tensor.div_(ranks)
            setattr(gradient, IS_MEAN, True)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for own in (gradient_of(p) for p in replicated_parameters(step)):
        if own is not None:
            by_dtype.setdefault(own.dtype, []).append(own)
    for gradients in by_dtype.values():
        for bucket in _buckets(gradients):
            _mean_in_rank_order(bucket, group, ranks)
    _unreduced(step).clear()


def _note_addition(parameter: Tensor) -> None:
    gradient = gradient_of(parameter)
    if hasattr(gradient, IS_MEAN):
        setattr(gradient, IS_MEAN, False)


def gradient_of(parameter: Tensor) -> Tensor | None:
    """What an optimizer step reads: the FP32 accumulator where there is one, else `.grad`."""
    found: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if found is None else found


BUCKET_BYTES = 64 << 20


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if found[-1] and size + tensor.nbytes > BUCKET_BYTES:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.nbytes
    return found


def _mean_in_rank_order(tensors: Sequence[Tensor], group: dist.ProcessGroup, ranks: int) -> None:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    count = flat.numel()
    each = -(-count // ranks)
    padded = torch.cat([flat, flat.new_zeros(each * ranks - count)])
    theirs = torch.empty_like(padded)
    dist.all_to_all_single(theirs, padded, group=group)  # my part of every rank's gradients, by rank
    total = theirs[:each].float()
    for rank in range(1, ranks):
        total += theirs[rank * each : (rank + 1) * each]
    mine = (total / ranks).to(flat.dtype)
    dist.all_gather(list(torch.split(padded, each)), mine, group=group)
    for tensor, part in zip(tensors, torch.split(padded[:count], [t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


#: What `watch_gradients` leaves in a module's dictionary.
EXPERT_PARALLEL_STATE = ("fp8c_expert_mesh", "fp8c_unreduced")


def _mesh_of(step: nn.Module) -> DeviceMesh | None:
    found = step.__dict__.get("fp8c_expert_mesh")
    return found if isinstance(found, DeviceMesh) else None


def _unreduced(step: nn.Module) -> set[int]:
    found: set[int] = step.__dict__.setdefault("fp8c_unreduced", set())
    return found


def watch_gradients(step: nn.Module, mesh: DeviceMesh) -> None:
    """Remember the mesh, and let every optimizer refuse gradients that differ between ranks (E0864)."""
    step.__dict__["fp8c_expert_mesh"] = mesh
    unreduced = _unreduced(step)
    for parameter in replicated_parameters(step):
        parameter.register_post_accumulate_grad_hook(lambda p: unreduced.add(id(p)))  # type: ignore[no-untyped-call]
    for parameter in step.parameters():
        if parameter.requires_grad and isinstance(parameter, DTensor):
            parameter.register_post_accumulate_grad_hook(_note_addition)  # type: ignore[no-untyped-call]

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if unreduced and any(id(p) in unreduced for g in optimizer.param_groups for p in g["params"]):
            raise fail(
                "E0864",
                f"{len(unreduced)} replicated parameters have gradients of this rank's batch alone: the optimizer would "
                "let the ranks drift apart",
                help="call fp8c.distributed.reduce_gradients(step) after the last backward, or shard them with FSDP2",
            )
        for parameter in (p for g in optimizer.param_groups for p in g["params"] if isinstance(p, DTensor)):
            gradient = gradient_of(parameter)
            if gradient is not None:
                vars(gradient).pop(IS_MEAN, None)

    handle = register_optimizer_step_pre_hook(check)
    weakref.finalize(step, handle.remove)


def gradients_noted(step: nn.Module) -> Callable[[Tensor], None] | None:
    """What to call with a parameter whose `main_grad` a compiled backward added to: no hook of autograd's sees that.
    None for a module without a mesh."""
    if _mesh_of(step) is None:
        return None
    unreduced = _unreduced(step)

    def note(parameter: Tensor) -> None:
        if isinstance(parameter, DTensor):
            _note_addition(parameter)
        else:
            unreduced.add(id(parameter))

    return note


# Agreement -----------------------------------------------------------------------------------------------------------

_questions: dict[tuple[int, ...], int] = {}  # how often this process has asked the same others


def agree_on(facts: Mapping[str, str], members: Sequence[int], patience_s: float | None = None) -> None:
    """Compare named facts (a spec's hash, a graph's) over these ranks, this one among them.

    Through the group's key-value store, not by a collective: a rank that never answers is named after `patience_s` (the
    group's timeout by default) instead of hanging the others.
    Raises: DiagnosticError E0863 with the first rank that differs, or is missing, and what differs.
    """
    members = tuple(members)
    if not is_distributed() or len(members) < 2:
        return
    number = _questions[members] = _questions.get(members, -1) + 1
    store = dist.distributed_c10d._get_default_store()
    compare_facts(
        store, facts, dist.get_rank(), members, group_timeout_s() if patience_s is None else patience_s, number
    )


#: What lets ranks run one graph on batches of different sizes.
DYNAMIC = "with fp8c.compile(..., dynamic=True) sizes may differ, each 2 or more"


def compare_facts(
    store: Any, facts: Mapping[str, str], rank: int, members: Sequence[int], patience_s: float, number: int
) -> None:
    """`agree_on` over a given store; `number` tells questions apart. Raises: E0863."""
    place = f"fp8c/facts/{','.join(map(str, members))}/{number}"
    store.set(f"{place}/{rank}", json.dumps(dict(facts)))
    for other in members:
        key = f"{place}/{other}"
        try:
            store.wait([key], datetime.timedelta(seconds=patience_s))
        except RuntimeError as error:  # DistStoreError when time is up
            raise fail(
                "E0863",
                f"rank {other} has not come to question {number} ({', '.join(facts)}) within {patience_s:g} s",
                help="look at that rank's output: it failed, or it runs another program"
                + (
                    ", or its batch kept the sizes it had where this rank's changed: " + DYNAMIC
                    if "graph" in facts
                    else ""
                ),
            ) from error
        theirs: dict[str, str] = json.loads(store.get(key))
        for name in sorted(facts.keys() | theirs.keys()):
            if facts.get(name) != theirs.get(name):
                raise fail(
                    "E0863",
                    f"ranks {min(rank, other)} and {max(rank, other)} differ in {name}: "
                    f"{_short(facts.get(name))} on rank {rank}, {_short(theirs.get(name))} on rank {other}",
                    help="all ranks have to compile the same model with the same spec, target and versions"
                    + (", on batches of the same sizes: " + DYNAMIC if name == "graph" else ""),
                )


def _short(text: str | None) -> str:
    return "nothing" if text is None else text[:16]


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    ready = dist.is_available() and dist.is_initialized()
    return ready and dist.get_world_size() > 1 and dist.get_backend() != "fake"


def group_timeout_s() -> float:
    """How long the default group waits for a rank."""
    try:
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        options = dist.group.WORLD._get_backend(device).options  # type: ignore[union-attr]
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):  # a backend without options
        return 600.0


def explaining_lost_ranks(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled half that communicates: a transport's error becomes E0865, which says what it means."""

    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except DiagnosticError:
            raise
        except RuntimeError as error:
            text = str(error)
            if not any(word in text for word in _LOST):
                raise
            raise fail(
                "E0865",
                "another rank stopped answering during this step: " + text.strip().splitlines()[0][:200],
                help="look for the first rank that failed: its output says why",
            ) from error

    if hasattr(run, "_boxed_call"):
        called._boxed_call = run._boxed_call  # type: ignore[attr-defined]
    return called


#: What gloo and NCCL say when a peer is gone or late.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timeout", "NCCL error", "Broken pipe")
