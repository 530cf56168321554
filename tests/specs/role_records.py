"""Role records of models, written by hand: what `fp8c.graph` derives from a real graph. No torch here."""

from __future__ import annotations

from dataclasses import replace

from fp8c.roles import Op, OpUse


def _layer(index: int, count: int, is_moe: bool, hidden: int) -> list[OpUse]:
    base = f"model.layers.{index}"

    def gemm(name: str, role: str, n: int, k: int, kind: str, op: Op = Op.LINEAR, experts: int = 1) -> OpUse:
        path = f"{base}.{name}"
        return OpUse(
            f"{path}:{op.value}#{role}" if experts > 1 else f"{path}:{op.value}",
            op,
            path,
            frozenset({kind}),
            frozenset({role}) if role else frozenset(),
            index,
            count,
            f"{path}.weight",
            None,
            n,
            k,
            experts,
        )

    def other(name: str, op: Op, kinds: frozenset[str], role: str = "") -> OpUse:
        path = f"{base}.{name}"
        return OpUse(f"{path}:{op.value}", op, path, kinds, frozenset({role} if role else set()), index, count)

    norm = frozenset({"norm"})
    attention = [
        other("input_layernorm", Op.NORM, norm),
        gemm("self_attn.q_a_proj", "mla_down_proj", 1536, hidden, "attention"),
        other("self_attn.q_a_layernorm", Op.NORM, norm, "latent_norm"),
        gemm("self_attn.q_b_proj", "mla_up_proj", 24576, 1536, "attention"),
        gemm("self_attn.kv_a_proj_with_mqa", "mla_down_proj", 576, hidden, "attention"),
        other("self_attn.kv_a_layernorm", Op.NORM, norm, "latent_norm"),
        gemm("self_attn.kv_b_proj", "mla_up_proj", 32768, 512, "attention"),
        other("self_attn", Op.ATTENTION, frozenset({"attention"})),
        gemm("self_attn.o_proj", "attn_out_proj", hidden, 16384, "attention"),
        other("post_attention_layernorm", Op.NORM, norm),
    ]
    if not is_moe:
        return attention + [
            gemm("mlp.gate_proj", "mlp_up", 18432, hidden, "mlp"),
            gemm("mlp.up_proj", "mlp_up", 18432, hidden, "mlp"),
            other("mlp.act_fn", Op.SWIGLU, frozenset({"mlp"}), "mlp_swiglu"),
            gemm("mlp.down_proj", "mlp_down", hidden, 18432, "mlp"),
        ]
    return attention + [
        gemm("mlp.gate", "", 256, hidden, "router"),
        other("mlp.dispatch", Op.DISPATCH, frozenset({"moe"})),
        gemm("mlp.experts", "moe_up", 4096, hidden, "moe", Op.GROUPED_MM, 256),
        other("mlp.experts", Op.SWIGLU, frozenset({"moe"}), "moe_swiglu"),
        gemm("mlp.experts", "moe_down", hidden, 2048, "moe", Op.GROUPED_MM, 256),
        other("mlp.combine", Op.COMBINE, frozenset({"moe"})),
        gemm("mlp.shared_experts.up_proj", "mlp_up", 4096, hidden, "shared_expert"),
        other("mlp.shared_experts.act_fn", Op.SWIGLU, frozenset({"shared_expert"}), "mlp_swiglu"),
        gemm("mlp.shared_experts.down_proj", "mlp_down", hidden, 2048, "shared_expert"),
    ]


def deepseek(layers: int = 61, dense: int = 3, hidden: int = 7168) -> list[OpUse]:
    """DeepSeek-V3 with the names of its Hugging Face port: 61 layers, the first 3 dense."""
    uses = [OpUse("model.embed_tokens:embedding", Op.EMBEDDING, "model.embed_tokens", frozenset({"embedding"}))]
    for index in range(layers):
        uses += _layer(index, layers, index >= dense, hidden)
    uses.append(OpUse("model.norm:norm", Op.NORM, "model.norm", frozenset({"norm"})))
    uses.append(
        OpUse(
            "lm_head:linear",
            Op.LINEAR,
            "lm_head",
            frozenset({"lm_head"}),
            param="lm_head.weight",
            n=129280,
            k=hidden,
        )
    )
    return [replace(use, layer_count=layers) for use in uses]


def llama(layers: int = 4, hidden: int = 512) -> list[OpUse]:
    """A dense model: no router, no experts, no MLA; the rotary tables are a product of two activations."""
    uses = [OpUse("model.embed_tokens:embedding", Op.EMBEDDING, "model.embed_tokens", frozenset({"embedding"}))]
    uses.append(
        OpUse("model.rotary_emb:bmm", Op.BMM, "model.rotary_emb", k=1, no_dgrad="no gradient", no_wgrad="no gradient")
    )
    for i in range(layers):
        base = f"model.layers.{i}"
        for name, roles, n, k in (
            ("self_attn.q_proj", "attn_in_proj", hidden, hidden),
            ("self_attn.k_proj", "attn_in_proj", hidden // 4, hidden),
            ("self_attn.v_proj", "attn_in_proj", hidden // 4, hidden),
            ("self_attn.o_proj", "attn_out_proj", hidden, hidden),
            ("mlp.gate_proj", "mlp_up", 4 * hidden, hidden),
            ("mlp.up_proj", "mlp_up", 4 * hidden, hidden),
            ("mlp.down_proj", "mlp_down", hidden, 4 * hidden),
        ):
            path = f"{base}.{name}"
            kind = "attention" if "attn" in name else "mlp"
            uses.append(
                OpUse(
                    f"{path}:linear",
                    Op.LINEAR,
                    path,
                    frozenset({kind}),
                    frozenset({roles}),
                    i,
                    param=f"{path}.weight",
                    m=256,
                    n=n,
                    k=k,
                )
            )
        uses.append(
            OpUse(f"{base}.self_attn:attention", Op.ATTENTION, f"{base}.self_attn", frozenset({"attention"}), layer=i)
        )
        uses.append(
            OpUse(f"{base}.input_layernorm:norm", Op.NORM, f"{base}.input_layernorm", frozenset({"norm"}), layer=i)
        )
    uses.append(
        OpUse(
            "lm_head:linear",
            Op.LINEAR,
            "lm_head",
            frozenset({"lm_head"}),
            param="lm_head.weight",
            m=256,
            n=32000,
            k=hidden,
        )
    )
    return [replace(use, layer_count=layers) for use in uses]
