"""Spread the experts of a prepared model over the ranks of a mesh.

Every routed-expert parameter becomes a DTensor `Shard(0)` over the mesh's dimension `ep`: fused 3-D parameters as they
are, lists of experts as one expert whose parameters are stacks ([E, ...]). The code that computes them stays; the module
learns who owns which experts (`fp8c_ranks`), and `fp8c.grouped` then sends rows there and back.

    experts.0.gate.weight [I, H] ... experts.7.gate.weight      ->  experts.gate.weight  DTensor [8, I, H], Shard(0)
    experts.gate_up_proj [8, 2I, H]                             ->  experts.gate_up_proj DTensor [8, 2I, H], Shard(0)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, fail
from fp8c.ops.exchange import Ranks, chunks
from fp8c.prepare.hf import is_hf_experts
from fp8c.prepare.loops import rewritten_loops

DIMENSION = "ep"


def shard_experts(module: nn.Module, mesh: DeviceMesh) -> list[Diagnostic]:
    """Shard the routed experts of a prepared model over `mesh["ep"]`, in place; say what was done.

    The parameters of every rank must be alike before; where there is a real process group, the first rank's are taken.
    A module whose experts are sharded already is left as it is, and so is a model that communicates by itself.

    Raises: DiagnosticError E0860 for a mesh without the dimension or with more ranks than experts, E0861 for experts
            that can't be sharded, with exit code MODEL.
    """
    group = expert_mesh(mesh)
    ranks = group.size()
    names: tuple[str, str] | None = None
    sharded: dict[str, int] = {}
    problems: list[Diagnostic] = []
    for name, part in list(module.named_modules()):
        if hasattr(part, "fp8c_ranks"):
            continue
        if is_hf_experts(part):
            experts: int = part.num_experts
            tables = [n for n, p in part.named_parameters(recurse=False) if p.shape[:1] == (experts,)]
        elif loops := rewritten_loops(part):
            experts = loops[0].experts
            tables = [path for loop in loops for path in loop.tables]
            if len({loop.experts for loop in loops}) > 1 or not tables:
                problems.append(_unknown(name or type(part).__name__, part))
                continue
        else:
            continue
        if chunks(experts, ranks)[-1] == 0:
            raise fail(
                "E0860",
                f"the {experts} experts of '{name}' leave some of the {ranks} ranks of mesh dimension '{DIMENSION}' "
                f"without any: {-(-experts // ranks)} on each before",
                help=f"make '{DIMENSION}' a divisor of {experts}",
                exit_code=ExitCode.MODEL,
            )
        for table in dict.fromkeys(tables):
            _shard(part, table, experts, group)
        names = names or (group.get_group().group_name, control_group(group).group_name)
        part.fp8c_ranks = Ranks(*names, group.get_local_rank(), chunks(experts, ranks), dist.get_backend() == "fake")
        sharded[name] = experts
    if problems:
        raise DiagnosticError(problems, ExitCode.MODEL)
    if not sharded:
        return []
    _replicate(module, group)
    most = max(sharded.values())
    return [
        Diagnostic(
            "R0860",
            f"the experts of {len(sharded)} modules (up to {most} each) are sharded over {ranks} ranks; "
            "every routing decision reads its counts on the host once, for all_to_all_single",
            severity=Severity.REMARK,
        )
    ]


def expert_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh's dimension `ep`. Raises: E0860."""
    names = mesh.mesh_dim_names or ()
    if DIMENSION not in names:
        raise fail(
            "E0860",
            f"the mesh has no dimension '{DIMENSION}', found {', '.join(map(repr, names)) or 'no names'}",
            help=f'init_device_mesh("cuda", (8,), mesh_dim_names=("{DIMENSION}",))',
            exit_code=ExitCode.USAGE,
        )
    return mesh[DIMENSION] if mesh.ndim > 1 else mesh


def control_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """A second group of the mesh's ranks where transfers of one group queue behind each other (NCCL), else the same."""
    group = mesh.get_group()
    if dist.get_backend(group) != "nccl":
        return group
    if group not in _CONTROL_GROUPS:
        ranks = dist.get_process_group_ranks(group)
        _CONTROL_GROUPS[group] = dist.new_group(ranks, use_local_synchronization=True)
    return _CONTROL_GROUPS[group]


_CONTROL_GROUPS: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _unknown(name: str, part: nn.Module) -> Diagnostic:
    return Diagnostic(
        "E0861",
        f"the experts of '{name}' can't be sharded: no list of modules or parameters, and no tensor, holds them",
        rewritten_loops(part)[0].span,
        help="keep them in an nn.ModuleList, or in parameters whose first axis counts experts",
    )


# Parameters ---------------------------------------------------------------------------------------------------------


def _shard(part: nn.Module, path: str, experts: int, mesh: DeviceMesh) -> None:
    """Replace a list of experts, or a tensor over experts, by its shards."""
    *parents, last = path.split(".")
    owner = part.get_submodule(".".join(parents))
    found = getattr(owner, last)
    holder = owner
    match found:
        case nn.Parameter():
            owner.register_parameter(last, _parameter(found, mesh))
        case nn.ParameterList():
            stack = nn.ParameterList([_parameter(_stack(list(found)), mesh, found[0].requires_grad)])
            owner.register_module(last, stack)
            holder = stack
        case nn.ModuleList() | nn.ModuleDict():
            members = list(found.values()) if isinstance(found, nn.ModuleDict) else list(found)
            holder = _stacked_expert(members, isinstance(found, nn.ModuleDict), mesh)
            owner.register_module(last, holder)
        case _:
            return  # a buffer over experts: every rank keeps all of it
    if not any(isinstance(hook, _ShardOnLoad) for hook in holder._load_state_dict_pre_hooks.values()):
        holder.register_load_state_dict_pre_hook(_ShardOnLoad(experts))  # type: ignore[no-untyped-call]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach() for t in tensors])


def _parameter(full: Tensor, mesh: DeviceMesh, requires_grad: bool | None = None) -> nn.Parameter:
    """A parameter [E, ...] sharded over the mesh; alike on all ranks afterwards, as the first rank has it."""
    if isinstance(full, DTensor):
        return full  # type: ignore[return-value]  # the user sharded it
    needs = full.requires_grad if requires_grad is None else requires_grad
    full = full.detach()
    sizes = chunks(full.shape[0], mesh.size())
    first = sum(sizes[: mesh.get_local_rank()])
    mine = full[first : first + sizes[mesh.get_local_rank()]]
    if _has_values(full):
        outgoing = None
        if mesh.get_local_rank() == 0:  # every rank gets as many rows as the first: scatter takes equal sizes
            missing = sizes[0] * len(sizes) - full.shape[0]
            padded = torch.cat([full, full.new_zeros(missing, *full.shape[1:])]) if missing else full
            outgoing = [t.contiguous() for t in torch.split(padded, sizes[0])]
        received = torch.empty((sizes[0], *full.shape[1:]), dtype=full.dtype, device=full.device)
        dist.scatter(received, outgoing, group_src=0, group=mesh.get_group())
        mine = received[: mine.shape[0]]
    shard = DTensor.from_local(mine.clone(), mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
    return nn.Parameter(shard, requires_grad=needs)


def _has_values(tensor: Tensor) -> bool:
    """Whether there are values, and other processes to agree with."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor)) and dist.get_backend() != "fake"


def _replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Every other parameter and buffer as the first rank has it, as DistributedDataParallel does."""
    group = mesh.get_group()
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor) and _has_values(tensor):
            dist.broadcast(tensor.detach(), group_src=0, group=group)


# Lists of experts ---------------------------------------------------------------------------------------------------


def _stacked_expert(experts: Sequence[nn.Module], is_dict: bool, mesh: DeviceMesh) -> nn.Module:
    """One module in the place of a list: an expert whose parameters are stacks over all of them.

    It is iterated and indexed like the list, and every entry is itself: code that collects one parameter per expert
    gets the stack.
    """
    stack = copy.deepcopy(experts[0])
    for path, part in stack.named_modules():
        peers = [expert.get_submodule(path) for expert in experts]
        for name, first in list(part._parameters.items()):
            if first is not None:
                values = _stack([peer._parameters[name] for peer in peers])  # type: ignore[misc]
                part._parameters[name] = _parameter(values, mesh, first.requires_grad)
    stack.__class__ = _stack_class(type(stack), len(experts), is_dict)
    return stack


def _stack_class(base: type[nn.Module], count: int, is_dict: bool) -> type[nn.Module]:
    def iterate(self: nn.Module) -> Iterator[nn.Module]:
        yield self

    methods: dict[str, Any] = {
        "__iter__": iterate,
        "__len__": lambda self: count,
        "__getitem__": lambda self, key: self,
        "values" if is_dict else "__doc__": iterate if is_dict else base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    key = (base, count, is_dict)
    if key not in _STACKS:
        _STACKS[key] = type(base.__name__, (base,), methods)
    return _STACKS[key]


#: Layers of a model share one class.
_STACKS: dict[tuple[type[nn.Module], int, bool], type[nn.Module]] = {}


class _ShardOnLoad:
    """Lets sharded experts load a one-device checkpoint: full tensors are cut, and a list's `0.gate.weight`,
    `1.gate.weight`, ... are stacked to `gate.weight` before."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters():
            if not isinstance(parameter, DTensor):
                continue
            keys = [f"{prefix}{e}.{name}" for e in range(self.experts)]
            if all(key in state for key in keys):
                state[prefix + name] = torch.stack([state.pop(key) for key in keys])
            full = state.get(prefix + name)
            if full is not None and not isinstance(full, DTensor) and full.shape == parameter.shape:
                mesh = parameter.device_mesh
                state[prefix + name] = distribute_tensor(full, mesh, parameter.placements, src_data_rank=None)
