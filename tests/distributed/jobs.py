"""What ranks of a test do: models, batches and training steps. Loaded by file in every process (see ranks.py)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

VOCABULARY = 128
LENGTH = 48
ROOT = Path(__file__).parents[2]


def load_example() -> ModuleType:
    name = "moe_transformer"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "moe_transformer.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def build(kind: str, experts: int = 8) -> Any:
    """`hf`: Qwen3-MoE, fused experts and softmax routing. `loop`: the example's MoE layer, a loop over modules."""
    torch.manual_seed(0)
    if kind == "loop":
        example = load_example()
        return Loop(example.MoE(example.Config(dim=128, expert_hidden_dim=128, n_experts=experts)))
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=experts,
        num_experts_per_tok=2,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


class Loop(nn.Module):
    """Embedding, one MoE layer, head: `forward(input_ids)` gives an object with `.logits`, as transformers' models do."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128, dtype=torch.bfloat16)
        self.norm = nn.RMSNorm(128, dtype=torch.bfloat16)
        self.moe = moe
        self.head = nn.Linear(128, VOCABULARY, bias=False, dtype=torch.bfloat16)
        for parameter in self.moe.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        y, _ = self.moe(self.norm(x))
        return (self.head(x + y),)


def skew(model: nn.Module, expert: int | None) -> None:
    """Make the router send every token to one expert first (and to its neighbour second)."""
    if expert is None:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mlp.gate.weight", "router.weight")):
                parameter.zero_()
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias"):
                buffer[expert] += 2.0
                buffer[(expert + 1) % len(buffer)] += 1.0


def batch(rank: int) -> Tensor:
    """One sequence [1, LENGTH]; every rank has its own."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator)


def logits_of(outputs: Any) -> Tensor:
    found: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return found


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def mesh_of() -> DeviceMesh:
    mesh: DeviceMesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    return mesh


def is_expert(name: str) -> bool:
    return ".experts." in name


def expert_parallel_step(kind: str, spec: str, expert: int | None = None, experts: int = 8) -> dict[str, Any]:
    """One step on this rank's sequence. Gradients: experts' whole, the others' before and after their reduction."""
    import fp8c
    from fp8c import distributed, driver

    model = build(kind, experts)
    skew(model, expert)
    step = fp8c.compile(model, spec=spec, target="cpu", mesh=mesh_of())
    rank = dist.get_rank()
    tokens = batch(rank)
    logits = logits_of(step(input_ids=tokens))
    loss_of(logits, tokens).backward()
    whole = {n: p.grad.full_tensor() for n, p in step.named_parameters() if isinstance(p.grad, DTensor)}
    mine = {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None and n not in whole}
    distributed.reduce_gradients(step)
    reduced = {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None and n not in whole}
    halved = {n: p.grad.full_tensor() for n, p in step.named_parameters() if isinstance(p.grad, DTensor)}
    return {
        "logits": logits.detach(),
        "experts": whole,
        "experts reduced": halved,
        "own": mine,
        "reduced": reduced,
        "remarks": [r.code for r in driver.session_of(step).remarks],
        "plan": driver.step_facts(driver.session_of(step).steps[-1], owns_evenly=experts % dist.get_world_size() == 0)[
            "plan"
        ],
    }


def inductor_step(kind: str, spec: str) -> dict[str, Any]:
    """`expert_parallel_step` as a GPU runs it: each half through Inductor instead of operator by operator."""
    from fp8c.backends import lowering

    chosen = lowering.choose_lowering
    lowering.choose_lowering = lambda device: "inductor"
    try:
        return expert_parallel_step(kind, spec)
    finally:
        lowering.choose_lowering = chosen


def one_device_step(
    kind: str, spec: str, sequences: list[int], expert: int | None = None, experts: int = 8
) -> dict[str, Any]:
    """The same on one device, for the sequences of several ranks: the sum of their mean losses."""
    import fp8c

    torch._dynamo.reset()
    model = build(kind, experts)
    skew(model, expert)
    step = fp8c.compile(model, spec=spec, target="cpu")
    tokens = torch.cat([batch(rank) for rank in sequences])
    logits = logits_of(step(input_ids=tokens))
    torch.stack([loss_of(logits[i : i + 1], tokens[i : i + 1]) for i in range(len(sequences))]).sum().backward()
    gradients = {n: p.grad for n, p in step.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "gradients": gradients}


def stacked(gradients: Mapping[str, Tensor], name: str) -> Tensor:
    """The gradient of an expert-parallel parameter among a one-device model's, whose experts may be a list."""
    if name in gradients:
        return gradients[name]
    before, _, after = name.partition(".experts.")
    found = [
        gradients[f"{before}.experts.{e}.{after}"]
        for e in range(len(gradients))
        if f"{before}.experts.{e}.{after}" in gradients
    ]
    return torch.stack(found)


def paired_steps(kind: str, spec: str, micro_batches: int = 3) -> dict[str, Any]:
    """Micro-batches through a stage: one after another by autograd, then by graphs in pairs. Both results."""
    import fp8c
    from fp8c import stage as stages
    from fp8c.backends.costs import load_machine

    model = Block(build("loop").moe) if kind == "loop" else Block(build("hf").model.layers[0].mlp)
    step = fp8c.compile(model, spec=spec, target="cpu", mesh=mesh_of())
    generator = torch.Generator().manual_seed(7 + dist.get_rank())

    def rows() -> Tensor:
        return torch.randn(1, LENGTH, 128, generator=generator).bfloat16()

    xs = [rows() for _ in range(micro_batches)]
    dys = [rows() for _ in range(micro_batches)]
    plain: dict[str, Any] = {"outputs": [], "dx": []}
    for x, dy in zip(xs, dys):
        x = x.clone().requires_grad_()
        y = step(x)
        y.backward(dy)
        plain["outputs"].append(y.detach())
        plain["dx"].append(x.grad)
    plain["gradients"] = {n: whole(p.grad) for n, p in step.named_parameters()}
    step.zero_grad()

    stage = stages.Stage.capture(step, (xs[0],))
    report = stage.schedule_pair_for(load_machine("h200"), 20)
    paired: dict[str, Any] = {"outputs": [], "dx": []}
    outputs, kept = stage.forward(xs[0])
    paired["outputs"] += outputs
    for at in range(1, micro_batches):
        outputs, kept, dx = stage.pair((xs[at],), kept, (dys[at - 1],))
        paired["outputs"] += outputs
        paired["dx"] += dx
    paired["dx"] += stage.backward(kept, dys[-1])
    paired["gradients"] = {n: whole(p.grad) for n, p in step.named_parameters()}
    return {"plain": plain, "paired": paired, "moved": report.moved}


def whole(gradient: Any) -> Tensor:
    found: Tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found.clone()


class Block(nn.Module):
    """A residual MoE layer: [1, T, 128] -> [1, T, 128]."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(128, dtype=torch.bfloat16)
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        y = self.moe(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


def different_specs() -> str:
    """Ranks that ask for different recipes: the error's text."""
    import fp8c

    try:
        fp8c.compile(build("loop"), spec=("bf16", "deepseek_v3")[dist.get_rank()], target="cpu", mesh=mesh_of())
    except fp8c.DiagnosticError as error:
        return str(error)
    return ""


def different_graphs() -> str:
    """Ranks whose batches give different graphs: the error's text."""
    import fp8c

    step = fp8c.compile(build("loop"), spec="bf16", target="cpu", mesh=mesh_of())
    tokens = batch(0)[:, : LENGTH - 8 * dist.get_rank()]
    try:
        step(input_ids=tokens)
    except fp8c.DiagnosticError as error:
        return str(error)
    return ""


def lose_a_rank() -> str:
    """Rank 1 dies after the first step; what rank 0 is told in the second."""
    import os

    import fp8c

    step = fp8c.compile(build("loop"), spec="bf16", target="cpu", mesh=mesh_of())
    tokens = batch(0)
    loss_of(logits_of(step(input_ids=tokens)), tokens).backward()
    if dist.get_rank() == 1:
        os._exit(7)
    try:
        loss_of(logits_of(step(input_ids=tokens)), tokens).backward()
    except fp8c.DiagnosticError as error:
        return str(error)
    return ""


def unreduced_gradients() -> str:
    """An optimizer that is given gradients of one rank's batch alone: the error's text, then none after reducing."""
    import fp8c
    from fp8c import distributed

    step = fp8c.compile(build("loop"), spec="bf16", target="cpu", mesh=mesh_of())
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    logits_of(step(input_ids=batch(dist.get_rank()))).float().square().mean().backward()
    text = ""
    try:
        optimizer.step()
    except fp8c.DiagnosticError as error:
        text = str(error)
    distributed.reduce_gradients(step)
    optimizer.step()
    return text


def limited_moe() -> nn.Module:
    """transformers' DeepseekV3MoE: 8 experts in 2 groups, of which a token may reach 1; top-3."""
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=128,
        moe_intermediate_size=128,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=3,
    )
    torch.manual_seed(0)
    moe: nn.Module = DeepseekV3MoE(config).bfloat16()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.1)
    return moe


def limited_routing(spec: str) -> dict[str, Any]:
    """Experts that eager routing chooses; rows that the compiled layer's first payload sends; outputs of both ways."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import fp8c
    from fp8c import stage as stages

    chosen: list[Tensor] = []
    splits: list[list[int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops._c10d_functional.all_to_all_single.default and args[0].ndim > 1:
                splits.append(list(args[2]))
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, LENGTH, 128, generator=torch.Generator().manual_seed(20 + dist.get_rank())).bfloat16()
    plain: Any = Block(limited_moe())
    plain.moe.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    plain(x)
    alone = fp8c.compile(Block(limited_moe()), spec=spec, target="cpu")(x)
    torch._dynamo.reset()
    step = fp8c.compile(Block(limited_moe()), spec=spec, target="cpu", mesh=mesh_of())
    stage = stages.Stage.capture(step, (x,))
    with Watch():
        (y, *_), _ = stage.forward(x)
    return {"chosen": chosen[0], "sent": splits[0], "y": y, "alone": alone.detach()}


def sent_bytes(spec: str) -> dict[str, int]:
    """Bytes that one forward and backward of an MoE layer hands to all_to_all_single, by dtype and row width."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import fp8c
    from fp8c import stage as stages

    found: dict[str, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops._c10d_functional.all_to_all_single.default:
                name = f"{args[0].dtype} {list(args[0].shape[1:])}"
                found[name] = found.get(name, 0) + args[0].nbytes
            return func(*args, **(kwargs or {}))

    step = fp8c.compile(Block(build("loop").moe), spec=spec, target="cpu", mesh=mesh_of())
    x = torch.randn(1, LENGTH, 128).bfloat16()
    stage = stages.Stage.capture(step, (x,))
    with Count():
        _, kept = stage.forward(x)
        stage.backward(kept, x)
    return found
