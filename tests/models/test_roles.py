"""Kinds and roles of Hugging Face models, found from data flow: exact tables, and the same after renaming everything."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from torch import nn

from fp8c.prepare import prepare
from fp8c.roles import OpUse
from fp8c.tools import opt
from tests.models import hf

#: Uses of one layer by the end of their path: (operator, kinds, roles).
Table = dict[str, tuple[str, str, str]]
PLAIN_ATTENTION: Table = {
    "input_layernorm": ("norm", "norm", ""),
    "self_attn.q_proj": ("linear", "attention", "attn_in_proj"),
    "self_attn.k_proj": ("linear", "attention", "attn_in_proj"),
    "self_attn.v_proj": ("linear", "attention", "attn_in_proj"),
    "self_attn": ("attention", "attention", ""),
    "self_attn.o_proj": ("linear", "attention", "attn_out_proj"),
    "post_attention_layernorm": ("norm", "norm", ""),
}
HEAD_NORMS: Table = {"self_attn.q_norm": ("norm", "norm", ""), "self_attn.k_norm": ("norm", "norm", "")}
MLA: Table = {
    "input_layernorm": ("norm", "norm", ""),
    "self_attn.q_a_proj": ("linear", "attention", "mla_down_proj"),
    "self_attn.q_a_layernorm": ("norm", "norm", "latent_norm"),
    "self_attn.q_b_proj": ("linear", "attention", "attn_in_proj mla_up_proj"),
    "self_attn.kv_a_proj_with_mqa": ("linear", "attention", "attn_in_proj mla_down_proj"),
    "self_attn.kv_a_layernorm": ("norm", "norm", "latent_norm"),
    "self_attn.kv_b_proj": ("linear", "attention", "attn_in_proj mla_up_proj"),
    "self_attn": ("attention", "attention", ""),
    "self_attn.o_proj": ("linear", "attention", "attn_out_proj"),
    "post_attention_layernorm": ("norm", "norm", ""),
}


def dense(path: str = "mlp", kinds: str = "mlp") -> Table:
    return {
        f"{path}.gate_proj": ("linear", kinds, "mlp_up"),
        f"{path}.up_proj": ("linear", kinds, "mlp_up"),
        path: ("swiglu", kinds, "mlp_swiglu"),
        f"{path}.down_proj": ("linear", kinds, "mlp_down"),
    }


def routed(router: str = "gate") -> Table:
    return {
        f"mlp.{router}": ("linear", "router", ""),
        "mlp.experts.gate_up_proj": ("grouped_mm", "moe", "moe_up"),
        "mlp.experts": ("swiglu", "moe", "moe_swiglu"),
        "mlp.experts.down_proj": ("grouped_mm", "moe", "moe_down"),
    }


SHARED_GATE: Table = {"mlp.shared_expert_gate": ("linear", "router", "")}
#: Attention with sinks is written in products of its own.
BY_HAND: Table = {path: entry for path, entry in PLAIN_ATTENTION.items() if path != "self_attn"}
LAYERS: dict[str, tuple[Table, Table]] = {
    "llama": (PLAIN_ATTENTION | dense(), PLAIN_ATTENTION | dense()),
    "mixtral": (PLAIN_ATTENTION | routed(), PLAIN_ATTENTION | routed()),
    "olmoe": (PLAIN_ATTENTION | HEAD_NORMS | routed(), PLAIN_ATTENTION | HEAD_NORMS | routed()),
    "qwen3_moe": (PLAIN_ATTENTION | HEAD_NORMS | routed(), PLAIN_ATTENTION | HEAD_NORMS | routed()),
    "qwen2_moe": (
        PLAIN_ATTENTION | routed() | dense("mlp.shared_expert", "mlp shared_expert") | SHARED_GATE,
        PLAIN_ATTENTION | routed() | dense("mlp.shared_expert", "mlp shared_expert") | SHARED_GATE,
    ),
    "glm4_moe": (
        PLAIN_ATTENTION | dense(),
        PLAIN_ATTENTION | routed() | dense("mlp.shared_experts", "mlp shared_expert"),
    ),
    "deepseek_v3": (MLA | dense(), MLA | routed() | dense("mlp.shared_experts", "mlp shared_expert")),
    "gpt_oss": (BY_HAND | routed("router"), BY_HAND | routed("router")),
}
ENDS: Table = {
    "model.embed_tokens": ("embedding", "embedding", ""),
    "model.norm": ("norm", "norm", ""),
    "lm_head": ("linear", "lm_head", ""),
}


class Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any) -> Any:
        return hf.loss(self.model, ids)


def uses_of(model: nn.Module) -> list[OpUse]:
    prepare(model)
    step = opt.capture_joint(Step(model), hf.tokens())
    return list(opt.run_passes(step, passes=["assign-roles"]).ctx.uses.values())


def row(use: OpUse) -> tuple[str, str, str]:
    return use.op.value, " ".join(sorted(use.kinds)), " ".join(sorted(use.roles))


def some_slow(names: Iterable[str], *quick: str) -> list[Any]:
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some_slow(LAYERS, "deepseek_v3", "qwen2_moe", "gpt_oss"))
def test_roles_of(name: str) -> None:
    uses = uses_of(hf.build(name))
    expected = dict(ENDS)
    for index, table in enumerate(LAYERS[name]):
        expected |= {f"model.layers.{index}.{path}": entry for path, entry in table.items()}
    found = {use.path.removeprefix("model."): row(use) for use in uses if use.op.value != "bmm"}
    assert found == expected
    products = [use for use in uses if use.op.value == "bmm" and "self_attn" in use.path]
    assert len(products) == (4 if name == "gpt_oss" else 0)
    assert all(use.kinds == {"attention"} for use in products)
    assert all(use.layer == int(use.path.split("layers.")[1][0]) for use in uses if "layers." in use.path)
    assert {use.layer_count for use in uses if use.layer is not None} == {2}


def rename(module: nn.Module) -> None:
    """Give every submodule and parameter inside a name that says nothing; attributes the code reads stay as aliases."""
    for parent in list(module.modules()):
        names: dict[str, str] = {}
        for kind, store in (("m", parent._modules), ("p", parent._parameters)):
            for number, (name, value) in enumerate(list(store.items())):
                if name.isdigit() or value is None:
                    continue
                del store[name]
                store[f"{kind}{number}"] = value  # type: ignore[assignment]
                names[name] = f"{kind}{number}"
        if names:
            parent.__class__ = aliased(type(parent), names)


def alias_of(name: str) -> property:
    def read(self: nn.Module) -> Any:  # Dynamo follows a function, not operator.attrgetter
        return getattr(self, name)

    return property(read)


def aliased(cls: type, names: dict[str, str]) -> type:
    """A subclass under another name, whose properties lead from the old names to the new ones."""
    properties = {old: alias_of(new) for old, new in names.items()}
    return type(f"Renamed{abs(hash((cls.__name__, *names.items()))) % 1000}", (cls,), properties)


@pytest.mark.parametrize("name", some_slow(["llama", "qwen2_moe", "deepseek_v3", "gpt_oss"], "deepseek_v3"))
def test_names_decide_nothing(name: str) -> None:
    """Module and parameter names and class names changed: kinds, roles, sizes and order stay."""
    plain, renamed = hf.build(name), hf.build(name)
    prepare(renamed)
    rename(renamed)
    before, after = uses_of(plain), uses_of(renamed)
    assert [(row(u), u.m, u.n, u.k, u.experts, u.no_dgrad, u.no_wgrad) for u in before] == [
        (row(u), u.m, u.n, u.k, u.experts, u.no_dgrad, u.no_wgrad) for u in after
    ]
    words = re.compile(r"proj|gate|expert|norm|attn|mlp|router|lm_head|embed")
    assert not any(words.search(u.path) for u in after), [u.path for u in after]
