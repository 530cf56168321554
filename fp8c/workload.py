"""What one layer of a MoE transformer with latent attention does under the FP8 recipe, as operators of the cost model.

The list follows DeepSeek-V3 (arXiv 2412.19437): every Linear and expert GEMM in FP8 with 1x128 operands, weight gradients
from retiled 128x1 inputs, attention and the output head in BF16, RMSNorm, MLA up-projections and SwiGLU recomputed in
backward. It answers two things: durations where nothing was measured, and what a change of hardware would save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fp8c.cost_model import Attention, Elementwise, Gemm, Machine, Operator, Quantize, Retile, estimate_us
from fp8c.durations import PREVIOUS, Deployment, DurationTable, Measured, ModelShape, OpDuration
from fp8c.network import simulate_combine, simulate_dispatch
from fp8c.routing import RoutingSpec, balanced_traffic
from fp8c.schedule import COMM, COMPUTE

FP8_TOKEN_SCALES = 4.0 / 128.0  # an FP32 scale per 128 values, bytes per value


@dataclass(frozen=True)
class Linear:
    """One projection: [tokens, k] x [k, n]; `groups` experts share the rows evenly. `is_recomputed` in backward."""

    rows: int
    n: int
    k: int
    groups: int = 1
    is_recomputed: bool = False

    def fprop(self) -> Gemm:
        return Gemm(self.rows // self.groups, self.n, self.k, self.groups)

    def dgrad(self) -> Gemm:
        return Gemm(self.rows // self.groups, self.k, self.n, self.groups, "dgrad")

    def wgrad(self) -> Gemm:
        return Gemm(self.n, self.k, self.rows // self.groups, self.groups, "wgrad")


Work = Mapping[str, tuple[Operator, ...]]


def layer_work(shape: ModelShape, kind: str, tokens: int, expert_parallel: int) -> Work:
    """Operators of one layer by table row: keys `F.attention`, `F.mlp`, `B.mlp`, `B.attention`, `W.mlp`, `W.attention`.

    tokens: per GPU; experts compute as many rows as an even routing gives them. The shared expert counts as `mlp`.
    """
    attention = _attention_linears(shape, tokens)
    rows = tokens * shape.top_k
    local = max(1, shape.experts // expert_parallel)
    if kind == "dense":
        mlp = [Linear(tokens, 2 * shape.dense_ffn, shape.hidden), Linear(tokens, shape.hidden, shape.dense_ffn)]
        swiglu, moved = tokens * shape.dense_ffn, 0.0
    else:
        inner = shape.expert_ffn * shape.shared_experts
        mlp = [
            Linear(rows, 2 * shape.expert_ffn, shape.hidden, local),
            Linear(rows, shape.hidden, shape.expert_ffn, local),
        ]
        if inner:
            mlp += [Linear(tokens, 2 * inner, shape.hidden), Linear(tokens, shape.hidden, inner)]
        swiglu, moved = rows * shape.expert_ffn + tokens * inner, float(rows * shape.hidden)
    core = Attention(
        max(1, tokens // shape.sequence),
        min(tokens, shape.sequence),
        shape.heads,
        shape.head_dim + shape.rope_dim,
        shape.head_dim,
    )
    core_backward = Attention(core.sequences, core.sequence, core.heads, core.qk_dim, core.v_dim, True)
    norm = Elementwise(tokens * shape.hidden * 6.0)  # residual read and written, normed value written, BF16
    gate_up = Elementwise(swiglu * 6.0)  # two values read, one written, BF16
    # Rows enter the experts as FP8 and leave as BF16, read and written once each.
    permute_in, permute_out = Elementwise(moved * 2.0), Elementwise(moved * 4.0)
    router = () if kind == "dense" else (Gemm(tokens, shape.experts, shape.hidden, is_bf16=True),)
    router_back = tuple(Gemm(g.m, g.k, g.n, is_bf16=True) for g in router)
    router_grad = tuple(Gemm(g.n, g.k, g.m, is_bf16=True) for g in router)
    rebuilt = [linear for linear in attention if linear.is_recomputed]
    return {
        "F.attention": (norm, *_forward(attention), core, *router),
        "F.mlp": (permute_in, *_forward(mlp), gate_up, norm, permute_out),
        "B.mlp": (permute_in, *_input_gradient(mlp), gate_up, Elementwise(swiglu * 10.0), permute_out),
        "B.attention": (norm, norm, *_forward(rebuilt), *_input_gradient(attention), core_backward, *router_back),
        "W.mlp": _weight_gradient(mlp),
        "W.attention": (*_weight_gradient(attention), *router_grad),
    }


def head_work(shape: ModelShape, tokens: int) -> Work:
    """The output head and loss, in BF16: logits are computed, and their gradient taken, once."""
    logits = Elementwise(tokens * shape.vocabulary * 8.0)
    return {
        "F.head": (Gemm(tokens, shape.vocabulary, shape.hidden, is_bf16=True), logits),
        "B.head": (Gemm(tokens, shape.hidden, shape.vocabulary, is_bf16=True),),
        "W.head": (Gemm(shape.vocabulary, shape.hidden, tokens, is_bf16=True),),
    }


def _attention_linears(shape: ModelShape, tokens: int) -> list[Linear]:
    """Latent attention: one fused down-projection, two up-projections, the output projection."""
    qk = shape.head_dim + shape.rope_dim
    return [
        Linear(tokens, shape.q_lora + shape.kv_lora + shape.rope_dim, shape.hidden),
        Linear(tokens, shape.heads * qk, shape.q_lora, is_recomputed=True),
        Linear(tokens, shape.heads * 2 * shape.head_dim, shape.kv_lora, is_recomputed=True),
        Linear(tokens, shape.hidden, shape.heads * shape.head_dim),
    ]


def _forward(linears: list[Linear]) -> tuple[Operator, ...]:
    return tuple(op for linear in linears for op in (Quantize(linear.rows * linear.k), linear.fprop()))


def _input_gradient(linears: list[Linear]) -> tuple[Operator, ...]:
    return tuple(op for linear in linears for op in (Quantize(linear.rows * linear.n), linear.dgrad()))


def _weight_gradient(linears: list[Linear]) -> tuple[Operator, ...]:
    """Retile the cached input, quantize the output gradient along tokens, multiply."""
    return tuple(
        op
        for linear in linears
        for op in (Retile(linear.rows * linear.k), Quantize(linear.rows * linear.n), linear.wgrad())
    )


def saved_bytes(shape: ModelShape, kind: str, tokens: int) -> int:
    """What one layer's forward leaves for its backward under the recipe, even routing (DeepSeek-V3, 3.2.3 and 3.3.3).

    Kept: the residual in front of each norm (BF16), the normed input of the down-projection and the latents, the
    output of attention (E5M6), inputs and SwiGLU inputs of experts (FP8 with FP32 scales). Experts' inputs are the rows
    they received, one per token and GPU that holds one of its experts.
    """
    fp8 = 1.0 + FP8_TOKEN_SCALES
    heads = shape.heads * shape.head_dim
    per_token = 2 * 2.0 * shape.hidden + shape.hidden * fp8 + 2.0 * (shape.q_lora + shape.kv_lora + shape.rope_dim)
    per_token += heads * (1.5 + FP8_TOKEN_SCALES) + 4.0 * shape.heads
    if kind == "dense":
        per_token += shape.hidden * fp8 + 2 * shape.dense_ffn * fp8
    else:
        copies = shape.top_k + shape.shared_experts
        per_token += copies * (shape.hidden + 2 * shape.expert_ffn) * fp8
    return int(per_token * tokens)


def activation_bytes(table: DurationTable, kind: str) -> int:
    """What one layer's forward leaves: the table's own figure, else the recipe's for the model's sizes."""
    if kind == "head":
        return 0
    return dict(table.saved_bytes).get(kind) or saved_bytes(table.model, kind, table.measured.tokens)


def with_transfers(table: DurationTable, machine: Machine) -> DurationTable:
    """The table with dispatch and combine around the experts, for a deployment that spreads them over GPUs; unchanged
    where it has them or needs none. Times are the hop simulator's, slowed as beside GEMMs."""
    has_them = any(op.on == COMM for op in table.ops)
    if has_them or table.deployment.expert_parallel <= 1 or not table.layer("moe", "F"):
        return table
    traffic = balanced_traffic(routing_of(table.model, table.deployment, machine.gpus_per_node))
    net = machine.network(table.measured.comm_sms)
    dispatch = simulate_dispatch(net, traffic, dispatch_bytes(table.model)).duration_us * machine.comm_slowdown_dispatch
    combine = simulate_combine(net, traffic, combine_bytes(table.model)).duration_us * machine.comm_slowdown_combine
    ms = {op.key: op.ms for op in table.ops if op.layer == "moe"}
    others = tuple(op for op in table.ops if op.layer != "moe")
    return replace(table, ops=(*others, *_moe_rows(ms, dispatch / 1000.0, combine / 1000.0)))


def dispatch_bytes(shape: ModelShape) -> float:
    """One token on its way to an expert: FP8 with an FP32 scale per 128 channels."""
    return shape.hidden * (1.0 + FP8_TOKEN_SCALES)


def combine_bytes(shape: ModelShape) -> float:
    return shape.hidden * 2.0


def parameter_counts(shape: ModelShape) -> tuple[float, float]:
    """Parameters of (all experts, everything else) of one MoE layer."""
    attention = sum(linear.n * linear.k for linear in _attention_linears(shape, 1))
    expert = 3.0 * shape.hidden * shape.expert_ffn
    return expert * shape.experts, attention + expert * shape.shared_experts + shape.hidden * shape.experts


def routing_of(shape: ModelShape, deployment: Deployment, gpus_per_node: int, zipf: float = 0.0) -> RoutingSpec:
    width = min(gpus_per_node, deployment.expert_parallel)
    return RoutingSpec(
        experts=shape.experts,
        top_k=shape.top_k,
        nodes=max(1, deployment.expert_parallel // width),
        gpus_per_node=width,
        tokens=deployment.sequences_per_micro_batch * shape.sequence,
        nodes_per_token=deployment.nodes_per_token,
        zipf=zipf,
    )


def predicted_table(shape: ModelShape, deployment: Deployment, machine: Machine, comm_sms: int) -> DurationTable:
    """A table of durations from the cost model alone, for models nobody has measured: compute on the SMs that
    communication leaves, transfers from the hop simulator, slowed as they are beside GEMMs."""
    tokens = deployment.sequences_per_micro_batch * shape.sequence
    sms = machine.sms if machine.has_comm_engine else machine.sms - comm_sms
    ops: list[OpDuration] = []

    def ms(work: tuple[Operator, ...]) -> float:
        return sum(estimate_us(op, machine, sms) for op in work) / 1000.0

    has_peers = deployment.expert_parallel > 1
    if has_peers:
        traffic = balanced_traffic(routing_of(shape, deployment, machine.gpus_per_node))
        net = machine.network(comm_sms)
        dispatch = simulate_dispatch(net, traffic, dispatch_bytes(shape)).duration_us * machine.comm_slowdown_dispatch
        combine = simulate_combine(net, traffic, combine_bytes(shape)).duration_us * machine.comm_slowdown_combine
    for kind in ["dense", "moe"] if shape.dense_layers else ["moe"]:
        work = layer_work(shape, kind, tokens, deployment.expert_parallel)
        times = {key: ms(ops_of) for key, ops_of in work.items()}
        if has_peers and kind == "moe":
            ops += _moe_rows(times, dispatch / 1000.0, combine / 1000.0)
        else:
            ops += _local_rows(kind, times)
    measured = Measured(machine.name, comm_sms, tokens, deployment.expert_parallel)
    return DurationTable(f"{shape.name} on {machine.name}, predicted", measured, tuple(ops), shape, deployment)


def _moe_rows(ms: Mapping[str, float], dispatch_ms: float, combine_ms: float) -> list[OpDuration]:
    """Attention, dispatch, experts, combine, and back. A combine's backward runs a dispatch, a dispatch's a combine."""

    def op(phase: str, name: str, *after: str, output: bool = False, can_split: bool = False) -> OpDuration:
        return OpDuration("moe", phase, name, COMPUTE, ms[f"{phase}.{name}"], after, output, can_split)

    def send(phase: str, name: str, after: str, kind: str, output: bool = False) -> OpDuration:
        time_ms = dispatch_ms if kind == "dispatch" else combine_ms
        return OpDuration("moe", phase, name, COMM, time_ms, (after,), output, True, 0.0, kind)

    return [
        op("F", "attention", PREVIOUS),
        send("F", "dispatch", "attention", "dispatch"),
        op("F", "mlp", "dispatch", can_split=True),
        send("F", "combine", "mlp", "combine", output=True),
        send("B", "combine", PREVIOUS, "dispatch"),
        op("B", "mlp", "combine", can_split=True),
        send("B", "dispatch", "mlp", "combine"),
        op("B", "attention", "dispatch", output=True),
        op("W", "mlp", "B.mlp"),
        op("W", "attention", "B.attention"),
    ]


def _local_rows(kind: str, ms: Mapping[str, float]) -> list[OpDuration]:
    """A layer without transfers."""
    rows = [
        ("F", "attention", PREVIOUS, False),
        ("F", "mlp", "attention", True),
        ("B", "mlp", PREVIOUS, False),
        ("B", "attention", "mlp", True),
        ("W", "mlp", "B.mlp", False),
        ("W", "attention", "B.attention", False),
    ]
    return [
        OpDuration(kind, phase, name, COMPUTE, ms[f"{phase}.{name}"], (after,), output)
        for phase, name, after, output in rows
    ]
