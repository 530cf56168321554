"""ZeRO-1: parameters and gradients are whole on every rank, the optimizer's states are divided among the ranks.

A parameter's states are DTensors with one axis sharded over the mesh, of the parameter's own global shape, so a
checkpoint made with one number of ranks, with FSDP2 or without sharding loads into any other. Gradients are
reduce-scattered in FP32 and new parameters all-gathered in their own type, some 64 MiB of gradients at a time.

Source: Rajbhandari et al., arXiv:1910.02054; DeepSeek-V3 (arXiv:2412.19437), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

BUCKET_BYTES = 64 << 20

# torch 2.13 renamed both and warns of the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass
class Part:
    """One parameter: the axis it is divided along, this rank's slice of it, and its place in the flat buffers."""

    param: Tensor
    axis: int
    shapes: tuple[tuple[int, ...], ...]  # of every rank's slice, as torch.chunk cuts them
    padded: int  # elements of the largest slice
    offset: int = 0


@dataclass
class Zero1:
    """mesh: one-dimensional; reduces: sum the gradients over the mesh and divide by its size (the data is divided)."""

    mesh: DeviceMesh
    reduces: bool = True
    parts: dict[Tensor, Part] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return int(self.mesh.size())

    @property
    def rank(self) -> int:
        return int(self.mesh.get_local_rank())

    def part(self, param: Tensor) -> Part:
        if param not in self.parts:
            axis = self.axis(param)
            pieces = param.detach().chunk(self.world, axis)
            shapes = [tuple(piece.shape) for piece in pieces]
            empty = (*param.shape[:axis], 0, *param.shape[axis + 1 :])
            shapes += [empty] * (self.world - len(shapes))
            self.parts[param] = Part(param, axis, tuple(shapes), max(piece.numel() for piece in pieces))
        return self.parts[param]

    def axis(self, param: Tensor) -> int:
        """The first axis that divides evenly, otherwise the longest."""
        even = [axis for axis, size in enumerate(param.shape) if size % self.world == 0 and size]
        return even[0] if even else max(range(param.dim()), key=lambda axis: param.shape[axis])

    def slice(self, param: Tensor, tensor: Tensor, rank: int | None = None) -> Tensor:
        """A rank's slice (by default this rank's) of a tensor of the parameter's shape, as a view."""
        part = self.part(param)
        pieces = tensor.chunk(self.world, part.axis)
        at = self.rank if rank is None else rank
        return pieces[at] if at < len(pieces) else tensor.narrow(part.axis, 0, 0)

    def state(self, param: Tensor, local: Tensor) -> DTensor:
        """This rank's slice of a state as a DTensor of the parameter's global shape."""
        whole = torch.empty(param.shape, device="meta")
        placed: DTensor = DTensor.from_local(
            local,
            self.mesh,
            [Shard(self.part(param).axis)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return placed

    def buckets(self, params: Sequence[Tensor]) -> list[list[Part]]:
        """Parameters in order, cut where the FP32 gradients of a bucket exceed BUCKET_BYTES or the type changes."""
        found: list[list[Part]] = []
        for param in params:
            part = self.part(param)
            last = found[-1] if found else None
            full = last is not None and (last[-1].offset + last[-1].padded) * self.world * 4 > BUCKET_BYTES
            if last is None or full or last[0].param.dtype != param.dtype:
                found.append([])
                part.offset = 0
            else:
                part.offset = last[-1].offset + last[-1].padded
            found[-1].append(part)
        return found

    def gradients(self, parts: Sequence[Part], grads: Sequence[Tensor]) -> list[Tensor]:
        """FP32 slices of the gradients, summed over the ranks when the optimizer reduces."""
        size = parts[-1].offset + parts[-1].padded
        device = grads[0].device
        mine = torch.empty(size, dtype=torch.float32, device=device)
        if not self.reduces:
            views = self.views(parts, mine, self.rank)
            torch._foreach_copy_(views, [self.slice(part.param, grad) for part, grad in zip(parts, grads)])
            return views
        sent = torch.zeros(self.world, size, dtype=torch.float32, device=device)
        for rank in range(self.world):
            pieces = [self.slice(part.param, grad, rank) for part, grad in zip(parts, grads)]
            torch._foreach_copy_(self.views(parts, sent[rank], rank), pieces)
        reduce_scatter(mine, sent.view(-1), group=self.mesh.get_group())
        return self.views(parts, mine, self.rank)

    def outbox(self, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        """A flat buffer with this rank's slices of the parameters, and the slices as views of it."""
        size = parts[-1].offset + parts[-1].padded
        flat = torch.zeros(size, dtype=parts[0].param.dtype, device=parts[0].param.device)
        views = self.views(parts, flat, self.rank)
        torch._foreach_copy_(views, [self.slice(part.param, part.param.detach()) for part in parts])
        return flat, views

    def publish(self, parts: Sequence[Part], flat: Tensor) -> None:
        """Every rank's slices into every rank's parameters."""
        received = torch.empty(self.world, flat.numel(), dtype=flat.dtype, device=flat.device)
        all_gather(received.view(-1), flat, group=self.mesh.get_group())
        for rank in range(self.world):
            into = [self.slice(part.param, part.param.detach(), rank) for part in parts]
            torch._foreach_copy_(into, self.views(parts, received[rank], rank))

    def views(self, parts: Sequence[Part], flat: Tensor, rank: int) -> list[Tensor]:
        found = []
        for part in parts:
            shape = part.shapes[rank]
            count = 1
            for length in shape:
                count *= length
            found.append(flat[part.offset : part.offset + count].view(shape))
        return found
