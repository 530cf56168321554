"""Small models for tests: Hugging Face architectures nobody here wrote, at widths that are multiples of 128.

Tests use them through the fixture `zoo` (tests/conftest.py), because test modules don't import each other here:

    def test_something(zoo):
        loaded = zoo.load("qwen3_moe")             # a fp8c.models.LoadedModel: module, example_inputs, step()

`zoo.MOE` names the models with experts, `zoo.DENSE` the others, `zoo.ALL` both; "example" is examples/moe_transformer.py.
`zoo.TITAN` names torchtitan's MoE blocks; `zoo.why_no_titan()` says why they can't be loaded, "" when they can.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fp8c.models import LoadedModel, Weights, load_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "moe_transformer.py"

_SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}

#: Overrides of each model type's default configuration. One layer with experts; the dense first layer where there is one.
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _SMALL
    | _EXPERTS
    | {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    },
    "qwen3_moe": _SMALL | _EXPERTS | {"num_experts": 8, "head_dim": 32},
    "mixtral": _SMALL | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": _SMALL | {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": _SMALL | _EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 128},
    "glm4_moe": _SMALL
    | _EXPERTS
    | {"n_routed_experts": 8, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "head_dim": 32},
    "gpt_oss": _SMALL | {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32},
    "llama": _SMALL,
}
DENSE = ("llama",)
MOE = (*(name for name in CONFIGS if name not in DENSE), "example")
ALL = (*MOE, *DENSE)
TITAN = ("titan_deepseek_v3", "titan_qwen3")

#: Keyword arguments of the example's `Config`, for a model that compiles in seconds.
SMALL_EXAMPLE = {"n_layers": 2, "dim": 128, "n_heads": 2, "dense_hidden_dim": 256, "expert_hidden_dim": 128}


def load(name: str, *, batch: int = 2, seq: int = 64, weights: Weights = "random", **overrides: Any) -> LoadedModel:
    """A small model by name, in BF16, with a batch of 2 x 64 tokens unless said otherwise."""
    if name in TITAN:
        return load_model(f"{Path(__file__).with_name('titan_moe.py')}:{name.removeprefix('titan_')}", weights=weights)
    if name == "example":
        return load_model(str(EXAMPLE), weights=weights, overrides=SMALL_EXAMPLE | overrides, batch=batch, seq=seq)
    return load_model(f"hf:{name}", weights=weights, overrides=CONFIGS[name] | overrides, batch=batch, seq=seq)


def why_no_titan() -> str:
    """Why torchtitan's models can't be imported here; "" when they can. It needs triton, and so mostly a GPU machine."""
    try:
        importlib.import_module("torchtitan.models.common.moe")
    except Exception as error:  # noqa: BLE001 - whatever its imports raise
        return f"torchtitan is not usable here: {type(error).__name__}: {error}"
    return ""
