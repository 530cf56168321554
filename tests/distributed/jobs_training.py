"""What surrounds a step of several ranks: checkpoints, accumulators, FSDP2, builds, torchtitan's dispatcher, pipelines.

Loaded by file in every process, beside jobs.py (see ranks.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def load_jobs() -> ModuleType:
    name = "distributed_jobs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("jobs.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


jobs = load_jobs()


def save_step(folder: str) -> dict[str, Tensor]:
    """Train one step with AdamW and save model and optimizer with DCP; all parameters and moments, whole."""
    step, optimizer = trained(2.0)
    write_state(step, optimizer, folder)
    return whole_state(step, optimizer)


def load_step(folder: str) -> dict[str, Tensor]:
    """Load what another number of ranks saved into a model and optimizer that were trained differently."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    step, optimizer = trained(0.5)
    model_state, optimizer_state = get_state_dict(step, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    load(state, checkpoint_id=folder)
    set_state_dict(step, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return whole_state(step, optimizer)


def trained(factor: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A step of AdamW on gradients that need no backward: a multiple of the parameters."""
    import fp8c
    from fp8c import distributed

    step = fp8c.compile(jobs.build("loop"), spec="bf16", target="cpu", mesh=jobs.mesh_of())
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2, foreach=False)
    for parameter in step.parameters():
        parameter.grad = parameter.detach() * factor
    distributed.reduce_gradients(step)
    optimizer.step()
    return step, optimizer


def write_state(step: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model_state, optimizer_state = get_state_dict(step, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def whole_state(step: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in step.named_parameters():
        found[name] = jobs.whole(parameter.detach())
        for key, value in optimizer.state[parameter].items():
            if value.ndim:
                found[f"{name} {key}"] = jobs.whole(value)
    return found


def load_one_device_state() -> bool:
    """A one-device model's state dict, experts in a list, loads into a sharded one and gives the same numbers back."""
    import fp8c

    plain = jobs.build("loop")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(3.0)
    step = fp8c.compile(jobs.build("loop"), spec="bf16", target="cpu", mesh=jobs.mesh_of())
    step.load_state_dict(plain.state_dict())
    theirs = dict(plain.named_parameters())
    return all(torch.equal(jobs.whole(p.detach()), jobs.stacked(theirs, n)) for n, p in step.named_parameters())


def fsdp_step(spec: str) -> dict[str, Any]:
    """Dense parameters sharded by FSDP2 over the same ranks, experts over `ep`; gradients whole."""
    from torch.distributed.fsdp import fully_shard

    import fp8c

    mesh = jobs.mesh_of()
    step = fp8c.compile(jobs.build("loop"), spec=spec, target="cpu", mesh=mesh, fullgraph=False)
    experts: set[Any] = {p for p in step.parameters() if isinstance(p, DTensor)}
    fully_shard(step, mesh=mesh, ignored_params=experts)
    tokens = jobs.batch(dist.get_rank())
    logits = jobs.logits_of(step(input_ids=tokens))
    jobs.loss_of(logits, tokens).backward()
    gradients = {n: jobs.whole(p.grad) for n, p in step.named_parameters()}
    return {"logits": logits.detach(), "gradients": gradients}


def main_grad_steps(spec: str, rounds: int = 2) -> dict[str, Any]:
    """FP32 accumulators over some micro-batches, reduced, then a step of the optimizer; experts' are given whole."""
    import fp8c
    from fp8c import distributed
    from fp8c.optim import AdamW

    step = fp8c.compile(jobs.build("loop"), spec=spec, target="cpu", mesh=jobs.mesh_of(), main_grad=True)
    optimizer = AdamW(step, lr=0.1)
    for at in range(rounds):
        tokens = jobs.batch(dist.get_rank() + 10 * at)
        jobs.loss_of(jobs.logits_of(step(input_ids=tokens)), tokens).backward()
    found: dict[str, Any] = {n: p.main_grad for n, p in step.named_parameters()}  # type: ignore[attr-defined]
    summed = {n: jobs.whole(t) for n, t in found.items() if isinstance(t, DTensor)}
    own = {n: t.clone() for n, t in found.items() if n not in summed}
    refused = ""
    try:
        optimizer.step()
    except fp8c.DiagnosticError as error:
        refused = str(error)
    distributed.reduce_gradients(step)
    before = {n: jobs.whole(p.detach()) for n, p in step.named_parameters()}
    reduced = {n: jobs.whole(t) for n, t in found.items()}
    optimizer.step()
    return {
        "summed": summed,
        "own": own,
        "reduced": reduced,
        "refused": refused,
        "grads": [n for n, p in step.named_parameters() if p.grad is not None],
        "moved": [n for n, p in step.named_parameters() if not torch.equal(jobs.whole(p.detach()), before[n])],
        "zeroed": zeroed(step),
    }


def reduced_again(main_grad: bool) -> dict[str, Any]:
    """Gradients reduced twice, those of a backward behind that, and of a step after zeroing and after an optimizer."""
    import fp8c
    from fp8c import distributed

    step = fp8c.compile(jobs.build("loop"), spec="bf16", target="cpu", mesh=jobs.mesh_of(), main_grad=main_grad)
    tokens = jobs.batch(dist.get_rank())

    def gradients() -> dict[str, Tensor]:
        found = {n: distributed.gradient_of(p) for n, p in step.named_parameters()}
        return {n: jobs.whole(g).clone() for n, g in found.items()}

    def reduce_step() -> dict[str, Tensor]:
        jobs.loss_of(jobs.logits_of(step(input_ids=tokens)), tokens).backward()
        distributed.reduce_gradients(step)
        return gradients()

    once = reduce_step()
    distributed.reduce_gradients(step)
    twice, told = gradients(), ""
    try:
        reduce_step()
    except fp8c.DiagnosticError as error:
        told = str(error)
    step.zero_grad()
    zeroed = reduce_step()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.0)
    optimizer.step()  # its own zero_grad keeps accumulators, and here gradients in place
    for gradient in (distributed.gradient_of(p) for p in step.parameters()):
        gradient.zero_()
    return {"once": once, "twice": twice, "told": told, "zeroed": zeroed, "stepped": reduce_step()}


def uneven_batches() -> dict[str, Any]:
    """Sequences of another length on each rank, which change on one rank alone: two steps on the same gradients."""
    import fp8c
    from fp8c import distributed

    torch._dynamo.reset()
    step = fp8c.compile(
        jobs.build("loop"), spec="deepseek_v3", target="cpu", mesh=jobs.mesh_of(), main_grad=True, dynamic=True
    )
    losses = []
    for tokens in (uneven(dist.get_rank(), 0), uneven(dist.get_rank(), 1)):
        loss = jobs.loss_of(jobs.logits_of(step(input_ids=tokens)), tokens)
        loss.backward()
        losses.append(loss.detach())
    distributed.reduce_gradients(step)
    return {"losses": losses, "gradients": {n: jobs.whole(p.main_grad) for n, p in step.named_parameters()}}  # type: ignore[attr-defined]


def uneven(rank: int, number: int) -> Tensor:
    """Two sequences; only the first rank's are longer in the second step."""
    length = 20 + 8 * rank + 12 * number * (rank == 0)
    return torch.cat([jobs.batch(10 * rank + number + i)[:, :length] for i in range(2)])


def uneven_alone(world: int) -> dict[str, Any]:
    """The same batches in one process, each on its own: losses by rank, gradients of their mean over the ranks."""
    import fp8c

    torch._dynamo.reset()
    step = fp8c.compile(jobs.build("loop"), spec="deepseek_v3", target="cpu", main_grad=True)
    losses: list[list[Tensor]] = []
    for rank in range(world):
        losses.append([])
        for number in range(2):
            tokens = uneven(rank, number)
            loss = jobs.loss_of(jobs.logits_of(step(input_ids=tokens)), tokens)
            (loss / world).backward()
            losses[-1].append(loss.detach())
    return {"losses": losses, "gradients": {n: p.main_grad for n, p in step.named_parameters()}}  # type: ignore[attr-defined]


def zeroed(step: nn.Module) -> bool:
    step.zero_grad()
    return all(not jobs.whole(p.main_grad).any() for p in step.parameters())  # type: ignore[attr-defined]


def one_device_main_grads(spec: str, sequences: list[list[int]]) -> dict[str, Tensor]:
    """The accumulators of one device after micro-batches of these ranks' sequences."""
    import fp8c

    torch._dynamo.reset()
    step = fp8c.compile(jobs.build("loop"), spec=spec, target="cpu", main_grad=True)
    for ranks in sequences:
        tokens = torch.cat([jobs.batch(rank) for rank in ranks])
        logits = jobs.logits_of(step(input_ids=tokens))
        torch.stack([jobs.loss_of(logits[i : i + 1], tokens[i : i + 1]) for i in range(len(ranks))]).sum().backward()
    return {n: p.main_grad for n, p in step.named_parameters()}  # type: ignore[attr-defined, misc]


#: A decoder layer with experts and a prediction module with more of them.
SMALL = {
    "n_layers": 1,
    "n_dense_layers": 0,
    "dim": 128,
    "n_heads": 2,
    "expert_hidden_dim": 128,
    "dense_hidden_dim": 128,
}


def loaded_build(folder: str) -> dict[str, Any]:
    """A build made with a mesh, on ranks of that mesh, against the model on one device; what is said without a mesh."""
    import fp8c
    from fp8c.models import load_model

    told = ""
    try:
        fp8c.load(folder)
    except fp8c.DiagnosticError as error:
        told = str(error)
    step = fp8c.load(folder, mesh=jobs.mesh_of())
    plain = load_model(str(jobs.ROOT / "examples" / "moe_transformer.py"), overrides=SMALL, batch=1, seq=jobs.LENGTH)
    step.module.load_state_dict(plain.module.state_dict())
    loss = step(step.example_inputs)
    loss.backward()
    alone = fp8c.compile(plain.step(), spec="deepseek_v3", target="cpu")(step.example_inputs)
    sharded = [n for n, p in step.named_parameters() if isinstance(p.grad, DTensor)]
    return {"told": told, "loss": loss.detach(), "alone": alone.detach(), "sharded": sharded}


def titan_moe(batch: int, seed: int) -> tuple[nn.Module, Tensor]:
    """torchtitan's MoE block of its DeepSeek-V3 debug model, alike everywhere, and a batch."""
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")
    spec = importlib.util.spec_from_file_location("titan_moe", jobs.ROOT / "tests" / "titan_moe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    moe, (x,) = module.build("deepseek_v3", "debugmodel", batch=batch, seq=32)
    return moe, torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def titan_result(moe: nn.Module, x: Tensor, spec: str) -> tuple[nn.Module, Tensor]:
    import fp8c

    step = fp8c.compile(moe, spec=spec, target="cpu")
    y = step(x)
    y = y[0] if isinstance(y, tuple) else y
    y.float().square().sum().backward()
    return step, y.detach()


def titan_expert_parallel(spec: str) -> dict[str, Any]:
    """The block with torchtitan's own all-to-all dispatcher over the ranks, given to fp8c.compile without a mesh."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from fp8c import driver

    moe, x = titan_moe(1, 50 + dist.get_rank())
    routed: Any = moe.routed_experts
    routed.token_dispatcher.wire_meshes(ep_mesh=jobs.mesh_of())
    for name, p in list(routed.inner_experts.named_parameters()):
        shards = distribute_tensor(p.detach(), jobs.mesh_of(), [Shard(0)])
        setattr(routed.inner_experts, name, nn.Parameter(shards))
    step, y = titan_result(moe, x, spec)
    halves = driver.session_of(step).steps[-1].halves
    sent = [
        [str(n.meta["val"].dtype).removeprefix("torch.") for n in half.graph.nodes if "all_to_all" in str(n.target)]
        for half in (halves.forward, halves.backward)
    ]
    experts = {n: jobs.whole(p.grad) for n, p in step.named_parameters() if isinstance(p, DTensor)}
    return {"y": y, "sent": sent, "experts": experts}


def titan_one_device(spec: str, ranks: int) -> dict[str, Any]:
    """The block on one device with the ranks' batches one after another."""
    torch._dynamo.reset()
    moe, _ = titan_moe(1, 0)
    x = torch.cat([titan_moe(1, 50 + rank)[1] for rank in range(ranks)])
    step, y = titan_result(moe, x, spec)
    return {"y": y, "gradients": {n: p.grad for n, p in step.named_parameters()}}


def dualpipe(spec: str, micro_batches: int = 8) -> dict[str, Any]:
    """Four stages on two ranks (a V), trained by DualPipeV with pairs as one graph; the same stages one after another."""
    from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

    import fp8c
    from fp8c import pipelining

    rank = dist.get_rank()

    def stage_step(index: int) -> nn.Module:
        torch.manual_seed(index)
        linear = nn.Sequential(
            nn.RMSNorm(128), nn.Linear(128, 256, bias=False), nn.SiLU(), nn.Linear(256, 128, bias=False)
        )
        return fp8c.compile(Wrapped(linear.bfloat16()), spec=spec, target="cpu")

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(micro_batches, 16, 128, generator=generator).bfloat16()
    target = torch.randn(micro_batches, 16, 128, generator=generator).bfloat16()

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        return (output.float() - wanted.float()).square().mean()

    mine = (rank, 3 - rank)
    modules = {i: pipelining.StageModule(stage_step(i), lambda node: 1.0) for i in mine}
    stages: list[Any] = []
    for i, module in modules.items():
        given, made = (x[:1].clone().requires_grad_(needs) for needs in (i > 0, True))  # who sends gradients
        none = pipelining.no_weight_work
        stages.append(PipelineStage(module, i, 4, torch.device("cpu"), given, made, dw_builder=none))
    schedule = ScheduleDualPipeV(stages, micro_batches, loss_fn=loss, scale_grads=False)
    pipelining.overlap_pairs(schedule)
    losses: list[Tensor] = []
    schedule.step(*((x,) if rank == 0 else ()), target=target if rank == 0 else None, losses=losses)
    found = {f"{i}.{n}": jobs.whole(p.grad) for i, m in modules.items() for n, p in m.step.named_parameters()}

    serial = [stage_step(i) for i in range(4)]
    for at in range(micro_batches):
        y = x[at : at + 1]
        for step in serial:
            y = step(y)
        loss(y, target[at : at + 1]).backward()
    want = {f"{i}.{n}": p.grad for i in mine for n, p in serial[i].named_parameters()}
    pairs = sum(len(m.pairs) for m in modules.values())
    return {"found": found, "want": want, "pairs": pairs}


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y
