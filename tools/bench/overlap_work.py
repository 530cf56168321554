"""What the overlap benchmark runs: DeepSeek-V3 MoE layers, their micro-batches in either order, and what they send."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8c.graph_costs import is_collective, is_control
from fp8c.ops.exchange import all_to_all
from fp8c.stage import Stage


class Layers(nn.Module):
    """Decoder layers of transformers' DeepseekV3, all with experts: [1, T, H] -> [1, T, H]."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
            DeepseekV3DecoderLayer,
            DeepseekV3RotaryEmbedding,
        )

        widths: dict[str, Any] = {"n_routed_experts": args.experts, "first_k_dense_replace": 0}
        widths["num_experts_per_tok"] = args.top_k
        if args.hidden < 7168:  # a rehearsal
            widths |= {"hidden_size": args.hidden, "moe_intermediate_size": 128, "num_attention_heads": 2}
            widths |= {"q_lora_rank": 128, "kv_lora_rank": 128, "num_key_value_heads": 2}
            widths |= {"n_group": 2, "topk_group": 1}
        config = DeepseekV3Config(**widths)
        config._attn_implementation = "sdpa"
        config._experts_implementation = "grouped_mm"
        self.rotary = DeepseekV3RotaryEmbedding(config)
        self.layers = nn.ModuleList([DeepseekV3DecoderLayer(config, i).bfloat16() for i in range(args.layers)])
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)[None]
        embedded = self.rotary(x, places)
        for layer in self.layers:
            y = layer(x, position_embeddings=embedded)
            x = y[0] if isinstance(y, tuple) else y
        return x


def skew(module: nn.Module, strength: float) -> None:
    """Bias the router's choice towards the first ranks' experts: `strength` from the first expert to the last."""
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(strength, 0.0, buffer.numel(), device=buffer.device))


class Work:
    """Micro-batches of one stage, one after another or in pairs; results in `seen` where asked for."""

    def __init__(self, stage: Stage, inputs: list[Tensor], gradients: list[Tensor]) -> None:
        self.stage, self.inputs, self.gradients = stage, inputs, gradients

    def unscheduled(self, seen: list[Any] | None = None) -> None:
        for x, dy in zip(self.inputs, self.gradients):
            outputs, kept = self.stage.forward(x)
            found = self.stage.backward(kept, dy)
            if seen is not None:
                seen += [*outputs, *found]

    def scheduled(self, seen: list[Any] | None = None) -> None:
        outputs, kept = self.stage.forward(self.inputs[0])
        last = outputs
        for at in range(1, len(self.inputs)):
            outputs, kept, found = self.stage.pair((self.inputs[at],), kept, (self.gradients[at - 1],))
            if seen is not None:
                seen += [*last, *found]
            last = outputs
        found = self.stage.backward(kept, self.gradients[-1])
        if seen is not None:
            seen += [*last, *found]

    def first(self, count: int) -> Work:
        """Fewer of the same micro-batches."""
        return Work(self.stage, self.inputs[:count], self.gradients[:count])

    def pairs(self, count: int, kept: list[Any]) -> list[Any]:
        for at in range(count):
            i = at % len(self.inputs)
            _, kept, _ = self.stage.pair((self.inputs[i],), kept, (self.gradients[i],))
        return kept


# What travels -------------------------------------------------------------------------------------------------------


def wire_is_exact(device: str, group: str, hidden: int) -> dict[str, bool]:
    """FP8 rows sent as bytes with their scales against rows rounded to FP8 and sent in BF16; and float8 sent as such."""
    fmt = "e4m3[1x128] pow2"
    x = torch.randn(512, hidden, device=device).bfloat16()
    data, scale = torch.ops.fp8c.quantize(x, fmt)
    even = [x.shape[0] // dist.get_world_size()] * dist.get_world_size()

    def moved(t: Tensor) -> Tensor:
        return all_to_all(t, even, even, group)

    as_bytes = moved(data.view(torch.uint8)).view(data.dtype)
    here = torch.ops.fp8c.dequantize(as_bytes, moved(scale), fmt, torch.bfloat16)
    there = moved(torch.ops.fp8c.dequantize(data, scale, fmt, torch.bfloat16))
    found = {"bytes and scales": torch.equal(here, there)}
    if device == "cuda":  # gloo refuses float8
        found["float8"] = torch.equal(moved(data).view(torch.uint8), as_bytes.view(torch.uint8))
    return found


def wire_bytes(graphs: Sequence[fx.GraphModule], rows: int) -> dict[str, int]:
    """Bytes that each kind of payload transfer takes in, by dtype, with `rows` rows each; counts are left out."""
    found: dict[str, int] = {}
    for module in graphs:
        for node in module.graph.nodes:
            if is_collective(node) and not is_control(node):
                val = node.meta["val"]
                size = rows * val.dtype.itemsize * int(torch.Size(val.shape[1:]).numel())
                name = f"{val.dtype} x {list(val.shape[1:])}".replace("torch.", "")
                found[name] = found.get(name, 0) + size
    return found


_COUNTS = (torch.int32, torch.int64)


def sent_bytes(run: Callable[[], object]) -> dict[str, int]:
    """Bytes that `run` hands to all_to_all_single on this rank, by dtype and row width; counts of rows are left out."""
    found: dict[str, int] = {}

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops._c10d_functional.all_to_all_single.default and args[0].dtype not in _COUNTS:
                name = f"{args[0].dtype} x {list(args[0].shape[1:])}".replace("torch.", "")
                found[name] = found.get(name, 0) + args[0].nbytes
            return func(*args, **(kwargs or {}))

    with Count():  # type: ignore[no-untyped-call]
        run()
    return found


def payload_groups(blocks: Iterable[int]) -> dict[int, str]:
    """Process groups with so many thread blocks each, by that number."""
    found: dict[int, str] = {}
    for count in sorted(blocks):
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.min_ctas = options.config.max_ctas = count
        group = dist.new_group(list(range(dist.get_world_size())), backend="nccl", pg_options=options)
        _KEEP.append(group)
        found[count] = group.group_name
    return found


_KEEP: list[Any] = []


def send_through(graphs: Sequence[fx.GraphModule], name: str) -> None:
    """Let payloads of these graphs travel in another group."""
    for module in graphs:
        for node in module.graph.nodes:
            if is_collective(node) and not is_control(node):
                node.args = (*node.args[:-1], name)
        module.recompile()


# Bits ---------------------------------------------------------------------------------------------------------------


def bits_of(work: Work, module: nn.Module, run: Callable[[list[Any]], None]) -> tuple[list[Tensor], list[Tensor]]:
    module.zero_grad()
    seen: list[Any] = []
    run(seen)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in gradients]
    return [t.clone() for t in seen if t is not None], [t.clone() for t in local]


def equal(a: tuple[list[Tensor], list[Tensor]], b: tuple[list[Tensor], list[Tensor]]) -> list[int]:
    """How many results and gradients differ."""
    return [sum(not torch.equal(x, y) for x, y in zip(one, two, strict=True)) for one, two in zip(a, b)]
